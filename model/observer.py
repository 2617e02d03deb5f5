"""Looks closer at steps of one model without holding them up: shadow checks and timings of the QK step.

Everything is launched behind the step that was launched last, and handed over when the device has done it.
Knows nothing of which steps are looked at, or what is thought of the result.
"""

from collections import deque
from collections.abc import Sequence

from fusewire.kernels.modes import KernelMode
from fusewire.model.cuda_graphs import GraphPool
from fusewire.model.families.qwen3 import Qwen3
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.hidden_state_capture import HiddenStateCapture
from fusewire.model.observations import Observation, RowPhase
from fusewire.model.qk_timing import QKTimer, QKTiming
from fusewire.model.shadow import ShadowCheck, ShadowGuard
from fusewire.model.site_scratch import SiteScratch

KEPT_TOKENS = 2048
"""Tokens of a step that are kept for a check; those of a larger one are not all seen."""
_BEST_FIRST = (KernelMode.FUSED, KernelMode.FUSED_NORM)


class Observer:
    """Owns what is needed to look at the steps of a model.

    Args:
        model: its weights need not be there yet.
        block_size: of the memory that stands for the KV cache.
        most_tokens: of a step; also of a captured one.
        shadow: whether steps keep a stream, without which they cannot be checked.
    """

    def __init__(self, model: Qwen3, block_size: int, most_tokens: int, *, shadow: bool) -> None:
        tokens, weight = min(KEPT_TOKENS, most_tokens), model.site.qkv.weight
        scratch = SiteScratch.allocate(model.site, tokens, block_size)
        sites = model.sites
        self.capture_of_steps = (
            HiddenStateCapture(len(sites), tokens, weight.shape[1], weight.dtype, weight.device)
            if shadow
            else None
        )
        """What forward passes are to keep."""
        self._guard = ShadowGuard(sites, scratch)
        self._timer = QKTimer(model.site, scratch, block_size)
        self._modes: Sequence[KernelMode] = tuple(KernelMode)
        self._under_way: deque[ShadowCheck | QKTiming] = deque()

    def limit_to(self, modes: Sequence[KernelMode]) -> None:
        """Look at no other paths than these, and the unfused one, from now on: they are warmed up."""
        self._modes = tuple(modes)

    def capture(self, pool: GraphPool, sizes: Sequence[int]) -> None:
        """Capture the timings of steps of so many tokens."""
        self._timer.capture(pool, self._modes, sizes)

    def check(self, batch: ForwardBatch, num_tokens: int, decode_tokens: int) -> None:
        """Check the path of the step launched last or, if that is the unfused one, the best of the others.

        At the layer whose turn it was; then it is the next one's. See
        `fusewire.model.shadow.ShadowGuard.check`. Does nothing where no stream is kept or the unfused path is
        the only one.
        """
        capture = self.capture_of_steps
        candidates = [mode for mode in (batch.kernel_mode, *_BEST_FIRST) if mode in self._modes]
        mode = next((mode for mode in candidates if mode is not KernelMode.UNFUSED), None)
        if capture is None or mode is None:
            return
        self._under_way.append(self._guard.check(batch, capture, mode, num_tokens, decode_tokens))
        capture.turn()

    def time(self, batch: ForwardBatch, phase: RowPhase) -> None:
        """Time the QK step at the size and on the path of the step launched last."""
        self._under_way.append(self._timer.begin(phase, batch.kernel_mode, batch.shape.num_tokens))

    def seconds(self, mode: KernelMode, num_tokens: int) -> float:
        """Time the QK step of one layer, and wait for it."""
        return self._timer.seconds(mode, num_tokens)

    def take(self) -> list[Observation]:
        """Hand over what is known by now."""
        known: list[Observation] = []
        while self._under_way and self._under_way[0].is_known():
            known += self._under_way.popleft().observations()
        return known
