"""Runs steps of the model: rows in, chosen tokens out.

Owns weights, paged KV cache, the seats' tables and the device. A step is launched without waiting for
it and collected later, so the host can plan the next one meanwhile. Knows nothing of requests, queues
or which block belongs to whom; it computes the rows it is given.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fusewire.kernels.compiling import CompileThreads
from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import backend_name
from fusewire.model.attention import select_backend
from fusewire.model.batch import Row, Sampled, Seating, Step
from fusewire.model.block_check import BlockCheck
from fusewire.model.config import ModelConfig, ModelError
from fusewire.model.cuda_graphs import (
    PREFILL_TOKENS,
    GraphPool,
    StepGraphs,
    decode_buckets,
    prefill_buckets,
)
from fusewire.model.device import name_of_device, name_of_dtype, resolve_device, resolve_dtype
from fusewire.model.device_clock import DeviceClock, DeviceSpan
from fusewire.model.families.qwen3 import Qwen3
from fusewire.model.forward_batch import ForwardBatch, StepInputs, StepShape
from fusewire.model.kv_cache import (
    KVCache,
    blocks_for,
    blocks_in_cpu_memory,
    blocks_in_gpu_memory,
    bytes_per_block,
    cpu_memory_bytes,
)
from fusewire.model.logit_drift import POSITIONS, compare_streams, drifts_of
from fusewire.model.observations import LogitDrift, Observation, RowPhase
from fusewire.model.observer import Observer
from fusewire.model.sampler import Choice, Sampler
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable
from fusewire.model.shadow import FAULT
from fusewire.model.weights import Progress, load_weights

_GREEDY = SamplingParams()
_SHAPED = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=1)
_WIDEST = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=1)

_MOST = MappingProxyType({"cuda": (256, 16384), "cpu": (64, 2048)})
"""Rows and tokens of the largest step where options do not say."""
_GRAPH_BYTES = 3 << 29
"""GPU memory set aside for CUDA graphs; what they take is in the start report."""
_TOKEN_MULTIPLE = 64
"""Steps without a graph are padded to a multiple of so many tokens, which products run better with."""
_PROMPT_MULTIPLES = ((4096, 512), (8192, 1024), (sys.maxsize, 2048))
"""The same for one whole prompt, by its length: cuDNN builds a plan, 50 ms, for each length it meets."""
_COMPARED_POSITIONS = 512
"""Of a sequence at most; their streams are kept on the device."""
_PART_TOKENS = 512
"""Of a sequence that is compared, between which other steps run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """What a runner is told at its start."""

    path: str | Path
    """A Hugging Face folder."""
    device: str = "auto"
    """"auto", "cuda" or "cpu"."""
    dtype: str = "auto"
    """"auto" (float32 on CPU, the checkpoint's on CUDA), "float32", "float16" or "bfloat16"."""
    attention_backend: str = "auto"
    block_size: int = 16
    max_context: int | None = None
    """Tokens of the longest sequence; None takes the model's."""
    max_running: int | None = None
    """Rows of the largest step; None takes 256 on CUDA and 64 on a CPU."""
    max_step_tokens: int | None = None
    """Tokens of the largest step; None takes 16384 on CUDA and 2048 on a CPU, or `max_running` if more."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds; None sizes it by memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that may be filled."""
    deterministic: bool = False
    """One implementation of each path at every size, also where another one is faster."""
    shadow: bool = True
    """Let steps keep what `ModelRunner.check_shadow` looks at."""
    inject_fault: KernelMode | None = None
    """Scale the q norm's weight by 1.01 on this path, for drills."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("block_size", "max_running", "max_step_tokens", "max_context", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name}: must be at least 1, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ModelError(
                f"gpu_memory_utilization: must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )


@dataclass(slots=True)
class LaunchedStep:
    """A step that the device is at work on."""

    rows: Sequence[Row]
    choice: Choice | None
    """None if no row samples."""
    span: DeviceSpan
    """From when its inputs are there to when its tokens are chosen."""
    block_check: BlockCheck | None
    """None if it completes no block."""
    device_seconds: float | None = None
    """Length of the span, once the step is collected."""


class ModelRunner:
    """A loaded model with its KV cache, ready to run steps on one device."""

    def __init__(
        self,
        options: RunnerOptions,
        progress: Progress | None = None,
        on_stage: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the folder's model and allocate its KV cache.

        Args:
            options: what to load, and how.
            progress: told of the weights, after each tensor.
            on_stage: called after each other stage of loading and warming up: a step, a graph.

        Raises:
            ModelError: if the folder, an option or the memory does not allow it; it names the key,
                tensor or option.
        """
        folder = Path(options.path)
        started = time.monotonic()
        self._on_stage = on_stage
        self.config = ModelConfig.read(folder)
        self.context_length = _context_length(self.config, options.max_context)
        self.block_size = options.block_size
        self._device = resolve_device(options.device)
        most_running, most_tokens = _MOST[self._device.type]
        self.max_running = options.max_running or min(most_running, options.max_step_tokens or most_tokens)
        self.max_step_tokens = options.max_step_tokens or max(most_tokens, self.max_running)
        self._dtype = resolve_dtype(options.dtype, self.config.dtype, self._device)
        torch.set_float32_matmul_precision("highest")  # no TF32: float32 means float32
        attention = select_backend(
            options.attention_backend, self.config, self.max_running, self._dtype, self._device
        )
        self.attention_backend = attention.name
        self._attention = attention
        with _out_of_memory_names("dtype, gpu_memory_utilization", "the weights do not fit"):
            self._model = Qwen3(
                self.config,
                attention,
                self.context_length,
                self._dtype,
                self._device,
                deterministic=options.deterministic,
            )
        max_blocks = blocks_for(self.context_length, self.block_size)
        with _out_of_memory_names("max_running, max_context", "the tables of running sequences do not fit"):
            self._spare_seat = self.max_running  # of a sequence that is compared
            self._seats = SeatTable(self.max_running + 1, self.context_length, max_blocks, self._device)
            self._inputs = StepInputs(
                self._seats, self.block_size, self._most_padded_tokens(), self.max_running
            )
            self._sampler = Sampler(self._seats, self.config.vocab_size, self.max_running)
            self._observer = Observer(
                self._model, self.block_size, self._most_padded_tokens(), shadow=options.shadow
            )
        self._clock = DeviceClock(self._device)
        captures = self._device.type == "cuda" and attention.capturable
        self._graphs = StepGraphs(GraphPool()) if captures else None
        self._outputs = self._allocate_outputs()
        self._last: ForwardBatch
        """The step launched last."""
        self.start_report: dict[str, float] = {}
        """What the start took: seconds of loading, of that of rehearsing, of warming up and of capturing;
        bytes and number of graphs."""
        self._load(folder, progress)
        if options.inject_fault is not None:
            for site in self._model.sites:
                site.plant_fault(options.inject_fault, FAULT)
        self.start_report["load_seconds"] = time.monotonic() - started
        self.num_blocks = self._choose_num_blocks(options)
        with _out_of_memory_names("kv_tokens, gpu_memory_utilization", "the KV cache does not fit"):
            self._cache = self._allocate_cache(self.num_blocks)

    @property
    def device_name(self) -> str:
        """The device that computes: "cpu", or the product name of the GPU."""
        return name_of_device(self._device)

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and activations: "float32", "float16" or "bfloat16"."""
        return name_of_dtype(self._dtype)

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def kernel_backend(self, mode: KernelMode) -> str:
        """Name the implementation behind a kernel mode on this device, where size does not decide."""
        return backend_name(mode, self._device)

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        """Name the implementation that runs a step of so many tokens, which may be padded to run as more."""
        if self._graphs is not None:
            shape = self._graphs.smallest(num_tokens, 1, is_decode=False)
            num_tokens = _padded(num_tokens) if shape is None else shape.num_tokens
        return self._model.site.backend(mode, num_tokens)

    # ---- steps ----

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Start a step and return; the device takes steps in the order of their launches."""
        span = self._clock.start()
        logits, batch = self._compute(step, span)
        if logits is None:
            span.end()
            return LaunchedStep(step.rows, None, span, self._check_blocks(step))
        sampling = [row for row in step.rows if row.samples]
        choice = self._sampler.choose(
            logits, sampling, batch.sample_seats, batch.sample_lengths, chosen=span.end
        )
        return LaunchedStep(step.rows, choice, span, self._check_blocks(step))

    def _check_blocks(self, step: Step) -> BlockCheck | None:
        return BlockCheck.launch(step.rows, self._cache, self._seats.block_tables)

    def collect(self, launched: LaunchedStep) -> list[Sampled | None]:
        """Wait for a step: an entry a row, None for rows that sample nothing."""
        if launched.choice is None:
            launched.span.wait()
        tokens = iter(launched.choice.collect() if launched.choice is not None else ())
        if launched.device_seconds is None:
            launched.device_seconds = self._clock.read(launched.span)
        return [next(tokens) if row.samples else None for row in launched.rows]

    def nonfinite_rows(self, launched: LaunchedStep) -> frozenset[int]:
        """The rows of a step, by index, that completed a block whose k or v is not finite; waits for that."""
        return frozenset() if launched.block_check is None else launched.block_check.rows()

    def check_device(self) -> None:
        """Raise the error after which a GPU runs nothing more, if there was one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def device_seconds(self, launched: LaunchedStep) -> float:
        """Tell how long the device worked on a step that was collected; gaps between launches count."""
        assert launched.device_seconds is not None, "the step was not collected"
        return launched.device_seconds

    def run(self, step: Step) -> list[Sampled | None]:
        """Launch a step and wait for it."""
        return self.collect(self.launch(step))

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """Run one step and return the logits [S, vocabulary] of the rows that sample, in order.

        They are overwritten by the next step.
        """
        logits, batch = self._compute(step)
        return batch.input_ids.new_empty(0, self.config.vocab_size) if logits is None else logits

    def _compute(self, step: Step, span: DeviceSpan | None = None) -> tuple[Tensor | None, ForwardBatch]:
        """Launch the forward pass; its logits [S, vocabulary], or None if no row samples.

        A span begins once the inputs are sent.
        """
        if step.seatings:
            self._seats.seat(step.seatings)
        shape = self._shape_of(step)
        batch = self._inputs.load(step.rows, step.mode, shape)
        if span is not None:
            span.begin()
        self._last = batch
        if self._graphs is None or not self._graphs.replay(step.mode, shape):
            self._forward(batch)
        num_samples = len(batch.logit_rows)
        if shape.is_decode:
            return self._outputs.logits[:num_samples], batch
        if not num_samples:
            return None, batch
        return self._model.logits(self._outputs.stream[:num_samples]), batch

    def _forward(self, batch: ForwardBatch) -> None:
        """Run the model over a batch into the outputs: logits of a decode step, else the last stream."""
        self._inputs.expand(batch)
        stream = self._model(batch, self._cache, capture=self._observer.capture_of_steps)
        if batch.shape.is_decode:
            self._model.logits(stream, out=self._outputs.logits[: len(stream)])
        else:
            self._outputs.stream[: len(stream)] = stream

    def _shape_of(self, step: Step) -> StepShape:
        """Choose the shape to run a step in: a captured one, or its own."""
        num_rows, num_tokens = len(step.rows), step.num_tokens
        is_decode = num_tokens == num_rows and all(row.samples for row in step.rows)
        if self._graphs is not None:
            captured = self._graphs.smallest(num_tokens, num_rows, is_decode=is_decode)
            if captured is not None:
                return captured
        if is_decode:
            return self._decode_shape(num_rows)
        if self._device.type == "cuda":
            is_prompt = num_rows == 1 and step.rows[0].start == 0
            num_tokens = _padded(num_tokens, is_prompt=is_prompt)
        return self._attention.chunk_shape(num_tokens, num_rows)

    def _decode_shape(self, num_rows: int) -> StepShape:
        return StepShape(num_rows, num_rows)

    def _record(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    # ---- looking closer ----

    @torch.inference_mode()
    def check_shadow(self, step: Step, decode_tokens: int) -> None:
        """Check both paths against float32 on rows of the step launched last, behind it.

        It is the step's path that is checked, or `fused` if that is `unfused`, as the step's size has it;
        at one layer, not always the same. See `fusewire.model.shadow`.

        Args:
            step: that step.
            decode_tokens: how many of its tokens, the first ones, decode; the others are prefill.
        """
        self._observer.check(self._last, step.num_tokens, decode_tokens)

    @torch.inference_mode()
    def time_qk(self, step: Step, phase: RowPhase) -> None:
        """Time the QK step of one layer as the step launched last had it, behind it.

        Args:
            step: that step.
            phase: of all its rows.
        """
        self._observer.time(self._last, phase)

    def take_observations(self) -> list[Observation]:
        """Hand over what checks and timings have found; those that are under way are left for later."""
        return self._observer.take()

    @torch.inference_mode()
    def qk_seconds(self, mode: KernelMode, num_tokens: int) -> float:
        """Time the QK step of one layer in a step of so many tokens, and wait for it: seconds."""
        if self._device.type == "cuda" and num_tokens > PREFILL_TOKENS[-1]:
            num_tokens = _padded(num_tokens, is_prompt=True)
        return self._observer.seconds(mode, num_tokens)

    @torch.inference_mode()
    def compare_logits(
        self,
        token_ids: Sequence[int],
        first: int,
        left: KernelMode,
        right: KernelMode,
        blocks: Sequence[int],
    ) -> Generator[None, None, list[LogitDrift]]:
        """Run a sequence on both paths and compare the logits after its tokens from `first` on.

        It yields between parts, where other steps may run, and while the device is not done with a part.

        Args:
            token_ids: of the sequence, no longer than the context.
            first: the first position whose logits are compared; of more than 512 the others are not.
            left: the path that is the measure.
            right: the other one.
            blocks: of the KV cache, for every token; what they hold is overwritten.

        Returns:
            One entry a position.

        Raises:
            ValueError: if there is no such position, or the sequence is longer than the context or the
                blocks.
        """
        if not 0 <= first < len(token_ids):
            raise ValueError(f"first: must be from 0 to {len(token_ids) - 1}, got {first}")
        if len(blocks) < blocks_for(len(token_ids), self.block_size):
            raise ValueError(f"blocks: {len(blocks)} cannot hold {len(token_ids)} tokens")
        self._seats.seat([Seating(self._spare_seat, token_ids, len(token_ids), blocks, _GREEDY)])
        end = min(len(token_ids), first + _COMPARED_POSITIONS)
        ours = yield from self._stream_of(left, first, end)
        theirs = yield from self._stream_of(right, first, end)
        figures = []
        for part in compare_streams(ours, theirs, self._model.logits):
            figures.append(part)
            yield from self._part_done()
        return drifts_of(torch.cat(figures)[: end - first])

    def _stream_of(self, mode: KernelMode, first: int, end: int) -> Generator[None, None, Tensor]:
        """Run the compared sequence: the last stream `[P, hidden]` of tokens `[first, end)`, then padding."""
        positions = -(-(end - first) // POSITIONS) * POSITIONS
        kept = self._outputs.stream.new_zeros(positions, self.config.hidden_size)
        most = min(_PART_TOKENS, self.max_step_tokens)
        for start in range(0, first, most):
            count = min(most, first - start)
            self._compute(Step(mode, [Row(self._spare_seat, start, count, samples=False)]))
            yield from self._part_done()
        for start in range(first, end, most):
            count = min(most, end - start)
            stream = self._stream_of_every_token(mode, Row(self._spare_seat, start, count, samples=False))
            kept[start - first : start - first + count] = stream
            yield from self._part_done()
        return kept

    def _stream_of_every_token(self, mode: KernelMode, row: Row) -> Tensor:
        """Run one row: its last stream `[count, hidden]`."""
        batch = self._inputs.load([row], mode, self._shape_of(Step(mode, [row])))
        if self._graphs is not None:  # as in a graph, so that no kernel is needed that none has
            batch = replace(batch, query_lens=(), context_lens=())
        self._inputs.expand(batch)
        capture = self._observer.capture_of_steps  # so that its kernels are those of every step
        return self._model(batch, self._cache, every_token=True, capture=capture)[: row.count]

    def _part_done(self) -> Generator[None]:
        """Let others have their turn, until the device has done what was launched so far."""
        done = self._record()
        yield
        while done is not None and not done.query():
            yield

    # ---- warming up ----

    def _load(self, folder: Path, progress: Progress | None) -> None:
        """Read the weights; meanwhile threads compile what a rehearsal without them has found."""
        with CompileThreads() as threads:
            if self._device.type == "cuda":
                started = time.monotonic()
                with threads.rehearsal():
                    self._rehearse()
                self.start_report["rehearsal_seconds"] = time.monotonic() - started
            with _out_of_memory_names("dtype, gpu_memory_utilization", "the weights do not fit"):
                load_weights(folder, self._model.checkpoint_views(), self._model.tied_tensors, progress)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Go through steps of every kind and shape, on weights and a cache of no content, for their kernels.

        What is drawn is not reported: log-probabilities are looked up by tokens that nobody has drawn.
        """
        with _out_of_memory_names("max_step_tokens, max_running", "a step does not fit beside the weights"):
            self._sampler.warm_up(self._dtype)
            self._cache = self._allocate_cache(1)
            for lengths in self._probes():
                self._run_probe(lengths, _GREEDY, KernelMode.FUSED)
            for shape in self._graph_shapes():
                self._forward(self._inputs.load_padding(KernelMode.FUSED, shape))
                self._on_stage()
            for mode in KernelMode:
                self._run_probe([1], _GREEDY, mode)
            self._compare_nothing()
        del self._cache

    def warm_up(self, modes: Sequence[KernelMode]) -> None:
        """Run steps of every kind on each mode and capture the graphs, so that nothing compiles later.

        Writes to the KV cache: call it before any sequence is alive.
        """
        started = time.monotonic()
        self._observer.limit_to(modes)
        for mode in modes:
            for lengths in self._probes():
                for params in (_GREEDY, _SHAPED):
                    self._run_probe(lengths, params, mode)
            self._observer.check(self._last, num_tokens=1, decode_tokens=0)
        self._compare_nothing()
        self._observer.take()
        self._attention.warm_up(self._long_prompts(), self._cache.layers[0])
        self._sampler.warm_up(self._dtype)
        warmed = time.monotonic()
        self.start_report["warm_up_seconds"] = warmed - started
        if self._graphs is not None:
            self._capture(self._graphs, modes)
            self.start_report["capture_seconds"] = time.monotonic() - warmed

    def _compare_nothing(self) -> None:
        """Compare the logits of one token of block 0."""
        for _ in self.compare_logits([0], 0, KernelMode.FUSED, KernelMode.UNFUSED, [0]):
            pass

    def _probes(self) -> list[list[int]]:
        """Token counts of the rows of steps that between them run every kernel of a step."""
        steps = [[1], [1] * self.max_running, [16], [33, 1, 7], [129], [self.block_size]]
        if self._device.type == "cuda":  # past the graphs: chunks of long and of short contexts
            steps += [[PREFILL_TOKENS[-1], 64], [66] * 32]
        return steps

    @property
    def warm_up_tokens(self) -> int:
        """Tokens of the largest step that `warm_up` runs."""
        return min(self.max_step_tokens, max(map(sum, self._probes())))

    def _long_prompts(self) -> list[int]:
        """Tokens that whole prompts without a graph are padded to."""
        longest = min(self.max_step_tokens, self.context_length)
        lengths = range(PREFILL_TOKENS[-1] + 1, longest + 1, _TOKEN_MULTIPLE)
        return sorted({_padded(length, is_prompt=True) for length in lengths})

    def _graph_shapes(self) -> list[StepShape]:
        """Shapes of the steps that are captured, the largest first."""
        chunks = [
            self._attention.chunk_shape(tokens, min(tokens, self.max_running))
            for tokens in prefill_buckets(self.max_step_tokens)
        ]
        decodes = [self._decode_shape(rows) for rows in decode_buckets(self.max_running)]
        return [*reversed(chunks), *reversed(decodes)]

    @torch.inference_mode()
    def _capture(self, graphs: StepGraphs, modes: Sequence[KernelMode]) -> None:
        """Capture every bucket, in an order in which the smaller ones fit the memory the first ones took."""
        free, _ = torch.cuda.mem_get_info(self._device)
        knobs = "gpu_memory_utilization, max_running"
        with _out_of_memory_names(knobs, "the CUDA graphs do not fit beside the KV cache"):
            shapes = self._graph_shapes()
            for shape in shapes:
                for mode in modes:
                    batch = self._inputs.load_padding(mode, shape)
                    graphs.capture(mode, shape, partial(self._forward, batch))
                    self._on_stage()
            self._observer.capture(graphs.pool, [shape.num_tokens for shape in shapes])
        self.start_report |= {
            "graphs": float(len(graphs)),
            "graph_bytes": float(free - torch.cuda.mem_get_info(self._device)[0]),
        }

    def _run_probe(
        self, lengths: Sequence[int], params: SamplingParams, mode: KernelMode, *, at_end: bool = False
    ) -> None:
        """Run one step of rows of token 0, at the start or the end of contexts that all lie in block 0."""
        rows, seatings, left = [], [], self.max_step_tokens
        for seat, length in enumerate(lengths[: self.max_running]):
            count = min(length, self.context_length, left)
            if count == 0:
                break
            left -= count
            start = self.context_length - count if at_end else 0
            table = [0] * blocks_for(start + count, self.block_size)
            seatings.append(Seating(seat, [0] * (start + count), start + count, table, params))
            rows.append(Row(seat, start, count, samples=True))
        self.run(Step(mode, rows, seatings))
        self._on_stage()

    # ---- memory ----

    def _most_padded_tokens(self) -> int:
        """Tokens of the largest step, padded."""
        return _padded(max(self.max_step_tokens, self.max_running), is_prompt=True)

    def _allocate_outputs(self) -> "_Outputs":
        widths = (self.config.vocab_size, self.config.hidden_size)
        with _out_of_memory_names("max_running", "a step's outputs do not fit"):
            return _Outputs(
                *(
                    torch.empty(self.max_running, width, dtype=self._dtype, device=self._device)
                    for width in widths
                )
            )

    def _allocate_cache(self, num_blocks: int) -> KVCache:
        return KVCache(self.config, num_blocks, self.block_size, self._dtype, self._device)

    def _choose_num_blocks(self, options: RunnerOptions) -> int:
        """Size the KV cache by the options or by memory; it must hold one sequence of full context."""
        size = bytes_per_block(self.config, self.block_size, self._dtype)
        needed = blocks_for(self.context_length, self.block_size)
        knobs = "max_context"
        if options.kv_tokens is not None:
            knobs = "kv_tokens, max_context"
            blocks = options.kv_tokens // self.block_size
        elif self._device.type == "cuda":
            knobs = "gpu_memory_utilization, max_context, max_step_tokens"
            working = self._measure_working_bytes() + _GRAPH_BYTES
            affordable = blocks_in_gpu_memory(self._device, options.gpu_memory_utilization, working, size)
            blocks = min(affordable, self.max_running * needed)  # more could never be in use
        else:
            blocks = blocks_in_cpu_memory(self.context_length, self.max_running, self.block_size, size)
        if blocks < needed:
            raise ModelError(
                f"{knobs}: a KV cache of {blocks * self.block_size} tokens cannot hold one sequence of "
                f"{self.context_length}"
            )
        if self._device.type == "cpu" and blocks * size > cpu_memory_bytes():
            raise ModelError(f"{knobs}: a KV cache of {blocks * size / 2**30:.1f} GiB exceeds the memory")
        return blocks

    def _measure_working_bytes(self) -> int:
        """Run the two heaviest steps on a cache of one block and take the peak of what they allocate."""
        knobs = "max_step_tokens, max_running"
        with _out_of_memory_names(knobs, "the largest step does not fit beside the weights"):
            self._cache = self._allocate_cache(1)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            for lengths in ([self.max_step_tokens], [1] * self.max_running):
                at_end = not self._attention.capturable  # such a backend's memory grows with the context
                self._run_probe(lengths, _WIDEST, KernelMode.UNFUSED, at_end=at_end)
            peak = torch.cuda.max_memory_allocated(self._device) - before
        del self._cache
        torch.cuda.empty_cache()
        return peak


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Where forward passes leave what comes of them, each over what the last one left."""

    logits: Tensor
    """[max_running, vocabulary], of decode steps."""
    stream: Tensor
    """[max_running, hidden], of other steps: of the tokens that yield logits."""


def _padded(tokens: int, *, is_prompt: bool = False) -> int:
    """Tokens of a step that has no graph, those that pad it included."""
    multiple = _TOKEN_MULTIPLE
    if is_prompt:
        multiple = next(each for most, each in _PROMPT_MULTIPLES if tokens <= most)
    return -(-tokens // multiple) * multiple


def _context_length(config: ModelConfig, max_context: int | None) -> int:
    if max_context is None:
        return config.max_position_embeddings
    if max_context > config.max_position_embeddings:
        raise ModelError(
            f"max_context: {max_context} exceeds the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    return max_context


@contextmanager
def _out_of_memory_names(knobs: str, problem: str) -> Iterator[None]:
    """Turn running out of device memory into an error that names the options to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{knobs}: {problem}: {error}") from error
