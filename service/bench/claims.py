"""The claim of a twice as fast prefill forward, put to the test: whole models, random weights.

Each kernel path computes the same forward, eagerly and as a CUDA graph; the path alone on one layer's
shapes gives the share of the forward that it can save (Amdahl). Knows nothing of checkpoints.
"""

import math
import time
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import PATHS
from fusewire.kernels.shape import QKNormShape
from fusewire.model import demo
from fusewire.model.attention import select_backend
from fusewire.model.batch import Row, Seating
from fusewire.model.config import ModelConfig
from fusewire.model.families.qwen3 import Qwen3
from fusewire.model.forward_batch import ForwardBatch, StepInputs
from fusewire.model.kv_cache import KVCache
from fusewire.model.sampling_params import SamplingParams
from fusewire.model.seats import SeatTable
from fusewire.service.bench.inputs import BLOCK_SIZE, draw_buffers, draw_site, path_arguments
from fusewire.service.bench.measure import FAILURES, Bench, Progress, Save, describe_failure
from fusewire.service.bench.options import BenchOptions, OptionError
from fusewire.service.bench.results import Forward, Run, Spread
from fusewire.service.bench.timing import capture

GPU_MODELS = ("qwen3-0.6b", "qwen3-8b")
CPU_MODELS = ("demo",)
GPU_TOKENS = (16, 64, 256, 1024, 4096)
CPU_TOKENS = (16, 64)
STEP_SETS = 4


def model_config(name: str, layers: int | None) -> ModelConfig:
    """Spell a model's shape; the published ones are those of their config.json.

    Raises:
        OptionError: for more layers than the model has.
    """
    if name == "demo":
        config = ModelConfig.read(demo.path())
    else:
        hidden, intermediate, depth, heads = {
            "qwen3-0.6b": (1024, 3072, 28, 16),
            "qwen3-8b": (4096, 12288, 36, 32),
        }[name]
        config = ModelConfig(
            architecture="Qwen3ForCausalLM",
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=depth,
            num_heads=heads,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=40960,
            tie_word_embeddings=name == "qwen3-0.6b",
            attention_bias=False,
            dtype="bfloat16",
        )
    if layers is not None and layers > config.num_layers:
        raise OptionError(f"--layers: {name} has {config.num_layers}, got {layers}")
    return replace(config, num_layers=layers or config.num_layers)


def measure_prefill(options: BenchOptions, progress: Progress, save: Save) -> Run:
    """Time prefill forwards of the chosen models on every path.

    Raises:
        OptionError: if the device is not there, or a number does not fit a model.
    """
    bench = Bench.of(options, progress)
    models = options.models or (GPU_MODELS if bench.on_gpu else CPU_MODELS)
    sizes = options.tokens or (GPU_TOKENS if bench.on_gpu else CPU_TOKENS)
    configs = {name: model_config(name, options.layers) for name in models}
    for name, config in configs.items():
        if max(sizes) > config.max_position_embeddings:
            raise OptionError(f"--tokens: {name} takes {config.max_position_embeddings}, got {max(sizes)}")
    with torch.inference_mode():
        run = bench.start_run()
        for name, config in configs.items():
            progress(f"{name}: drawing the weights of {config.num_layers} layers")
            try:
                model = RandomModel(bench, name, config, max(sizes))
            except torch.OutOfMemoryError as problem:
                bench.absent[name] = describe_failure(problem)
                continue
            for tokens in sizes:
                run.forwards += model.measure(tokens)
                save(run)
            del model
    return run


class RandomModel:
    """A model with random weights and a cache for one sequence."""

    def __init__(self, bench: Bench, name: str, config: ModelConfig, most_tokens: int) -> None:
        self._bench = bench
        self._name = name
        self._config = config
        self._attention = attention = select_backend("auto", config, 1, bench.dtype, bench.device)
        self._model = Qwen3(config, attention, most_tokens, bench.dtype, bench.device)
        _draw_weights(self._model, bench.device)
        self._blocks = -(-most_tokens // BLOCK_SIZE)
        self._cache = KVCache(config, self._blocks, BLOCK_SIZE, bench.dtype, bench.device)
        self._seats = SeatTable(1, most_tokens, self._blocks, bench.device)
        self._inputs = StepInputs(self._seats, BLOCK_SIZE, most_tokens, 1)

    def measure(self, tokens: int) -> list[Forward]:
        """Time the forward of a prompt on every path."""
        start = time.perf_counter()
        reference = self._reference(tokens)
        found = [self._measure(tokens, mode, reference) for mode in KernelMode]
        self._bench.progress(f"{self._name}, {tokens} tokens: {time.perf_counter() - start:.1f} s")
        return found

    def _measure(self, tokens: int, mode: KernelMode, reference: Tensor | None) -> Forward:
        found = Forward(
            model=self._name,
            layers=self._config.num_layers,
            tokens=tokens,
            mode=mode,
            backend=self._model.site.backend(mode, tokens),
        )
        if reference is None:
            reason = "the unfused forward, which all are compared with, failed"
            return msgspec.structs.replace(found, failure=reason)
        try:
            eager, gpu, difference = self._time_forward(tokens, mode, reference)
            step_gpu, step_eager = self._time_step(tokens, mode)
        except FAILURES as problem:
            return msgspec.structs.replace(found, failure=describe_failure(problem))
        return msgspec.structs.replace(
            found,
            eager_us=eager,
            gpu_us=gpu,
            step_eager_us=step_eager,
            step_gpu_us=step_gpu,
            logit_difference=difference,
        )

    def _reference(self, tokens: int) -> Tensor | None:
        """Compute the last token's logits on the unfused path, in float64."""
        try:
            return self._logits(self._batch(tokens, KernelMode.UNFUSED)).double()
        except FAILURES as problem:
            self._bench.progress(describe_failure(problem))
            return None

    def _time_forward(
        self, tokens: int, mode: KernelMode, reference: Tensor
    ) -> tuple[Spread, Spread | None, float]:
        """Time eager calls and graph replays; the logits compared are the graph's where there is one."""
        batch, timer = self._batch(tokens, mode), self._bench.timer
        eager = timer.eagerly(lambda number: self._logits(batch), 1)
        if not self._bench.on_gpu:
            return eager, None, _difference(self._logits(batch), reference)
        timer.warm_up_aside(lambda number: self._logits(batch), 1)
        outputs: list[Tensor] = []
        graph = capture(lambda number: outputs.append(self._logits(batch)), 1, 1)
        graph.replay()
        gpu = Spread.of(timer.on_device(graph.replay), 1)
        return eager, gpu, _difference(outputs[0], reference)

    def _time_step(self, tokens: int, mode: KernelMode) -> tuple[Spread | None, Spread]:
        """Time the path alone on one layer's shapes: in a graph, and eagerly."""
        config, bench = self._config, self._bench
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        shape = QKNormShape(*heads, config.rms_norm_eps, rotary_dim=config.head_dim)
        site = draw_site(shape, tokens, bench.dtype, bench.device, "prefill")
        sets = draw_buffers(site, STEP_SETS)

        def call(number: int) -> Tensor:
            return PATHS[mode](*path_arguments(site, sets[number]))

        gpu = bench.timer.in_graph(call, STEP_SETS) if bench.on_gpu else None
        return gpu, bench.timer.eagerly(call, STEP_SETS)

    def _batch(self, tokens: int, mode: KernelMode) -> ForwardBatch:
        """One prompt from its start, of which the last token wants logits."""
        ids = torch.randint(self._config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
        table = range(self._blocks)
        self._seats.seat([Seating(0, ids.tolist(), tokens, table, SamplingParams())])
        shape = self._attention.chunk_shape(tokens, 1)
        return self._inputs.load([Row(0, 0, tokens, samples=True)], mode, shape)

    def _logits(self, batch: ForwardBatch) -> Tensor:
        self._inputs.expand(batch)
        return self._model.logits(self._model(batch, self._cache))


def _draw_weights(model: Qwen3, device: torch.device) -> None:
    """Draw weights that keep activations at their scale: variance 1/inputs, less on the residual stream."""
    generator = torch.Generator(device).manual_seed(0)
    residual = 1 / math.sqrt(2 * model.config.num_layers)
    for name, view in model.checkpoint_views().items():
        if view.dim() == 1:
            view.normal_(1.0, 0.1, generator=generator)
        else:
            scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            view.normal_(0.0, scale / math.sqrt(view.shape[1]), generator=generator)


def _difference(logits: Tensor, reference: Tensor) -> float:
    """RMS relative difference.

    Raises:
        ValueError: if the logits are not finite.
    """
    difference = float((logits.double() - reference).norm() / reference.norm())
    if not math.isfinite(difference):
        raise ValueError("the logits are not finite")
    return difference
