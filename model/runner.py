"""Runs steps of the model: rows of token ids in, chosen tokens out.

Owns weights, paged KV cache and device. Knows nothing of requests, queues or which block belongs to
whom; it computes the rows it is given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import backend_name
from fusewire.model.attention import select_backend
from fusewire.model.batch import Row, Sampled, SampleSpec
from fusewire.model.config import ModelConfig, ModelError
from fusewire.model.device import name_of_device, name_of_dtype, resolve_device, resolve_dtype
from fusewire.model.families.qwen3 import Qwen3
from fusewire.model.forward_batch import ForwardBatch
from fusewire.model.kv_cache import (
    KVCache,
    blocks_for,
    blocks_in_cpu_memory,
    blocks_in_gpu_memory,
    bytes_per_block,
    cpu_memory_bytes,
)
from fusewire.model.sampler import sample
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.weights import Progress, load_weights

_GREEDY = SamplingParams()
_SHAPED = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=1)
_WIDEST = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=1)


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
    max_running: int = 64
    """Rows of the largest step."""
    max_step_tokens: int = 2048
    """Tokens of the largest step."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds; None sizes it by memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that may be filled."""
    deterministic: bool = False
    """One implementation of each path at every size, also where another one is faster."""

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


class ModelRunner:
    """A loaded model with its KV cache, ready to run steps on one device."""

    def __init__(self, options: RunnerOptions, progress: Progress | None = None) -> None:
        """Load the folder's model and allocate its KV cache.

        Raises:
            ModelError: if the folder, an option or the memory does not allow it; it names the key,
                tensor or option.
        """
        folder = Path(options.path)
        self.config = ModelConfig.read(folder)
        self.context_length = _context_length(self.config, options.max_context)
        self.block_size = options.block_size
        self._max_step_tokens = options.max_step_tokens
        self._device = resolve_device(options.device)
        self._dtype = resolve_dtype(options.dtype, self.config.dtype, self._device)
        torch.set_float32_matmul_precision("highest")  # no TF32: float32 means float32
        attention = select_backend(options.attention_backend, self._device)
        self.attention_backend = attention.name
        with _out_of_memory_names("dtype, gpu_memory_utilization", "the weights do not fit"):
            self._model = Qwen3(
                self.config,
                attention,
                self.context_length,
                self._dtype,
                self._device,
                deterministic=options.deterministic,
            )
            load_weights(folder, self._model.checkpoint_views(), self._model.ignored_tensors, progress)
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
        """Name the implementation that runs a step of so many tokens."""
        return self._model.site.backend(mode, num_tokens)

    def run(self, rows: Sequence[Row], mode: KernelMode) -> list[Sampled | None]:
        """Run one step on one kernel path: an entry a row, None for rows that sample nothing.

        Waits for the device exactly once, at the end.
        """
        logits = self.logits(rows, mode)
        specs = [row.sample for row in rows if row.sample is not None]
        if not specs:
            self._synchronize()
            return [None] * len(rows)
        tokens = iter(sample(logits, specs))
        return [None if row.sample is None else next(tokens) for row in rows]

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row], mode: KernelMode) -> Tensor:
        """Run one step and return the logits [S, vocabulary] of the rows that sample, in order."""
        batch = ForwardBatch.build(rows, mode, self.block_size, self._device)
        hidden = self._model(batch, self._cache)
        return self._model.logits(hidden[batch.logit_rows])

    def warm_up(self, modes: Sequence[KernelMode]) -> None:
        """Run small prefills, decodes and mixtures on each mode, so that nothing compiles later.

        Writes to the KV cache: call it before any sequence is alive.
        """
        steps = (
            [1],
            [1, 1],
            [1] * 16,
            [16],
            [33],
            [33, 1, 7],
            [129],  # past the kernels' small launches
            *([sizes.min_tokens] for sizes in self._model.site.epilogue_ranges),
        )
        for mode in modes:
            for lengths in steps:
                tokens = [min(length, self.context_length, self._max_step_tokens) for length in lengths]
                for params in (_GREEDY, _SHAPED):
                    self.run([_probe(count, self.block_size, params=params) for count in tokens], mode)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

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
            working = self._measure_working_bytes(options)
            affordable = blocks_in_gpu_memory(self._device, options.gpu_memory_utilization, working, size)
            blocks = min(affordable, options.max_running * needed)  # more could never be in use
        else:
            blocks = blocks_in_cpu_memory(self.context_length, options.max_running, self.block_size, size)
        if blocks < needed:
            raise ModelError(
                f"{knobs}: a KV cache of {blocks * self.block_size} tokens cannot hold one sequence of "
                f"{self.context_length}"
            )
        if self._device.type == "cpu" and blocks * size > cpu_memory_bytes():
            raise ModelError(f"{knobs}: a KV cache of {blocks * size / 2**30:.1f} GiB exceeds the memory")
        return blocks

    def _measure_working_bytes(self, options: RunnerOptions) -> int:
        """Run the two heaviest steps on a cache of one block and take the peak of what they allocate."""
        chunk = min(options.max_step_tokens, self.context_length)
        longest_chunk = [_probe(chunk, self.block_size, start=self.context_length - chunk, params=_WIDEST)]
        decode = _probe(1, self.block_size, start=self.context_length - 1, params=_WIDEST)
        knobs = "max_step_tokens, max_running"
        with _out_of_memory_names(knobs, "the largest step does not fit beside the weights"):
            self._cache = self._allocate_cache(1)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            for rows in (longest_chunk, [decode] * options.max_running):
                self.run(rows, KernelMode.UNFUSED)
            peak = torch.cuda.max_memory_allocated(self._device) - before
        del self._cache
        torch.cuda.empty_cache()
        return peak


def _context_length(config: ModelConfig, max_context: int | None) -> int:
    if max_context is None:
        return config.max_position_embeddings
    if max_context > config.max_position_embeddings:
        raise ModelError(
            f"max_context: {max_context} exceeds the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    return max_context


def _probe(tokens: int, block_size: int, *, start: int = 0, params: SamplingParams) -> Row:
    """Make a row of token 0 whose whole context lies in block 0: any cache can hold it."""
    sample_spec = SampleSpec(params=params, prompt_ids=[0], output_ids=[0])
    return Row([0] * tokens, start, [0] * blocks_for(start + tokens, block_size), sample_spec)


@contextmanager
def _out_of_memory_names(knobs: str, problem: str) -> Iterator[None]:
    """Turn running out of device memory into an error that names the options to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{knobs}: {problem}: {error}") from error
