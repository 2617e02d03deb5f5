"""A run as text: what was measured where, tables of times, and the answers to the claims.

Imports no torch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fusewire.service.bench.results import Cell, Forward, Run, Spread, Timed

TWICE = 2.0
Value = Callable[[Timed], str | None]
"""What a table's field says of a contender at a size; None where there is nothing to say."""


def as_text(run: Run) -> str:
    """Lay a run out as text, its answers last."""
    parts = [header(run)]
    for cells in _by_heads(run.cells).values():
        parts += _tables(cells)
    if run.claim == "kernel":
        parts.append(kernel_verdict(run.cells))
    if run.forwards:
        parts += [_forward_table(run.forwards), _share_table(run.forwards), prefill_verdict(run.forwards)]
    parts += _remarks(run)
    return "\n\n".join(part for part in parts if part)


def header(run: Run) -> str:
    """Say where and with what the run was measured."""
    env = run.environment
    lines = [
        f"{env.command}",
        f"{env.device}, {env.dtype}; torch {env.torch}, triton {env.triton}, fusewire {env.fusewire}, "
        f"Python {env.python}; {env.started}",
        "backends: " + ", ".join(f"{mode} {backend}" for mode, backend in env.backends.items()),
    ]
    if run.copy_rate is not None:
        rate = run.copy_rate
        lines.append(
            f"copy of {rate.tensor_bytes >> 20} MiB: torch {rate.torch_copy / 1e12:.3f} TB/s, "
            f"Triton {rate.triton_copy / 1e12:.3f} TB/s; shares are of the faster"
        )
    if run.empty_kernel_us is not None:
        lines.append(f"empty kernel in a graph: {run.empty_kernel_us.median:.2f} us")
    if env.device_type == "cpu":
        lines.append(
            f"A CPU, {env.cpu_threads} threads: wall time only. These figures say nothing about a GPU."
        )
    return "\n".join(lines)


# ---- contenders ----


def _by_heads(cells: Iterable[Cell]) -> Mapping[tuple[int, int, int], list[Cell]]:
    groups: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.num_q_heads, cell.num_kv_heads, cell.head_dim), []).append(cell)
    return groups


def _tables(cells: Sequence[Cell]) -> list[str]:
    """The tables of one pair of heads: a contender a row, a number of tokens a column."""
    first = cells[0]
    heads = f"{first.num_q_heads}/{first.num_kv_heads} heads of {first.head_dim}"
    tables = [
        _table(f"{heads}: GPU us in a graph (share of copy)", cells, _gpu),
        _table(f"{heads}: eager wall us", cells, _eager),
        _table(f"{heads}: RMS relative error", cells, _error),
    ]
    for title, of in (("GPU time", gpu_us), ("eager wall time", eager_us)):
        value = _times_fused(cells, of)
        tables.append(_table(f"{heads}: {title} as a multiple of fused", cells, value))
    return tables


def gpu_us(timed: Timed) -> Spread | None:
    """The time in a graph."""
    return timed.gpu_us


def eager_us(timed: Timed) -> Spread | None:
    """The wall time of an eager call."""
    return timed.eager_us


def _gpu(timed: Timed) -> str | None:
    if timed.gpu_us is None:
        return None
    share = "" if timed.share_of_copy is None else f" ({timed.share_of_copy:.2f})"
    return f"{timed.gpu_us.median:.2f}{share}"


def _eager(timed: Timed) -> str | None:
    return None if timed.eager_us is None else f"{timed.eager_us.median:.1f}"


def _error(timed: Timed) -> str | None:
    return None if timed.error is None else f"{timed.error:.1e}"


def _times_fused(cells: Sequence[Cell], of: Callable[[Timed], Spread | None]) -> Value:
    fused: dict[int, float] = {}
    for cell in cells:
        timed = cell.find("fused")
        if timed is not None and (spread := of(timed)) is not None:
            fused |= {id(other): spread.median for other in cell.contenders}

    def value(timed: Timed) -> str | None:
        spread = of(timed)
        if spread is None or timed.work != "step" or id(timed) not in fused:
            return None
        return f"{spread.median / fused[id(timed)]:.2f}"

    return value


def _table(title: str, cells: Sequence[Cell], value: Value) -> str:
    """Draw a table, or nothing if it would be empty."""
    names = dict.fromkeys(timed.name for cell in cells for timed in cell.contenders)
    rows = []
    for name in names:
        found = [cell.find(name) for cell in cells]
        said = [None if timed is None else _say(timed, value) for timed in found]
        if any(said):
            rows.append([name, *(text or "-" for text in said)])
    columns = ["tokens", *(str(cell.tokens) for cell in cells)]
    return f"{title}\n{align([columns, *rows])}" if rows else ""


def _say(timed: Timed, value: Value) -> str | None:
    text = value(timed)
    return "failed" if text is None and timed.failure else text


def align(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _remarks(run: Run) -> list[str]:
    """Say who was absent and what failed."""
    lines = [f"absent: {name}: {reason}" for name, reason in run.absent.items()]
    for cell in run.cells:
        where = f"{cell.num_q_heads}/{cell.num_kv_heads} heads, {cell.tokens} tokens"
        lines += [f"failed: {t.name}, {where}: {t.failure}" for t in cell.contenders if t.failure]
    for forward in run.forwards:
        if forward.failure:
            lines.append(
                f"failed: {forward.model}, {forward.tokens} tokens, {forward.mode}: {forward.failure}"
            )
    return ["\n".join(lines)] if lines else []


# ---- the claims ----


def kernel_verdict(cells: Sequence[Cell]) -> str:
    """Answer "a single kernel is 2-7x faster": the norm kernel against the model file's two norms."""
    rows = [["heads", "tokens", "GPU", "eager", "GPU, F.rms_norm", "eager, F.rms_norm", "2x reached"]]
    for cell in cells:
        gpu, eager = (ratio(cell, "chain_norm", "qk_norm", of) for of in (gpu_us, eager_us))
        others = [_times(ratio(cell, "torch_norm", "qk_norm", of)) for of in (gpu_us, eager_us)]
        heads = f"{cell.num_q_heads}/{cell.num_kv_heads}"
        rows.append(
            [heads, str(cell.tokens), _times(gpu), _times(eager), *others, _reached(gpu=gpu, eager=eager)]
        )
    return "Claim: one norm kernel is 2-7x as fast as the unfused norms of q and k\n" + align(rows)


def ratio(cell: Cell, slow: str, fast: str, of: Callable[[Timed], Spread | None]) -> float | None:
    """How many times as long one contender takes as another."""
    slower, faster = (None if timed is None else of(timed) for timed in (cell.find(slow), cell.find(fast)))
    return None if slower is None or faster is None else slower.median / faster.median


def _forward_table(forwards: Sequence[Forward]) -> str:
    rows = [["model", "tokens", "path", "eager ms", "graph ms", "logit difference from unfused"]]
    for forward in forwards:
        difference = forward.logit_difference
        rows.append(
            [
                _model(forward),
                str(forward.tokens),
                forward.mode,
                _milliseconds(forward.eager_us),
                _milliseconds(forward.gpu_us),
                "-" if difference is None else f"{difference:.1e}",
            ]
        )
    return "Prefill forward\n" + align(rows)


def _share_table(forwards: Sequence[Forward]) -> str:
    """Draw up how much of each forward the QK-norm step is, all layers together."""
    rows = [["model", "tokens", "path", "eager share", "graph share", "step us eager", "step us GPU"]]
    for forward in forwards:
        rows.append(
            [
                _model(forward),
                str(forward.tokens),
                forward.mode,
                _percent(share(forward, eager=True)),
                _percent(share(forward, eager=False)),
                _microseconds(forward.step_eager_us),
                _microseconds(forward.step_gpu_us),
            ]
        )
    return "Share of the QK-norm step in the forward (the step alone, times the layers)\n" + align(rows)


def share(forward: Forward, *, eager: bool) -> float | None:
    """The path alone times the layers, over the forward's time."""
    step, whole = (
        (forward.step_eager_us, forward.eager_us) if eager else (forward.step_gpu_us, forward.gpu_us)
    )
    return None if step is None or whole is None else step.median * forward.layers / whole.median


def prefill_verdict(forwards: Sequence[Forward]) -> str:
    """Answer "2x for a launch-bound prefill forward", with what Amdahl allows at most."""
    by_size: dict[tuple[str, int], dict[str, Forward]] = {}
    for forward in forwards:
        by_size.setdefault((_model(forward), forward.tokens), {})[forward.mode] = forward
    columns = ["eager", "most", "graph", "most", "fused_norm eager", "fused graph / unfused eager"]
    rows = [["model", "tokens", *columns, "2x reached"]]
    for (model, tokens), modes in by_size.items():
        unfused, fused = modes.get("unfused"), modes.get("fused")
        if unfused is None or fused is None:
            continue
        eager = _over(unfused.eager_us, fused.eager_us)
        graph = _over(unfused.gpu_us, fused.gpu_us)
        norm = modes.get("fused_norm")
        rows.append(
            [
                model,
                str(tokens),
                _times(eager),
                _times(_most(share(unfused, eager=True))),
                _times(graph),
                _times(_most(share(unfused, eager=False))),
                _times(None if norm is None else _over(unfused.eager_us, norm.eager_us)),
                _times(_over(unfused.eager_us, fused.gpu_us)),
                _reached(eager=eager, graph=graph),
            ]
        )
    title = "Claim: fused makes a launch-bound prefill forward 2x as fast (most: if the step took no time)\n"
    return title + align(rows)


def _most(part: float | None) -> float | None:
    """The speed-up if this part of the time went to nothing (Amdahl 1967)."""
    return None if part is None or part >= 1 else 1 / (1 - part)


def _over(slow: Spread | None, fast: Spread | None) -> float | None:
    return None if slow is None or fast is None else slow.median / fast.median


def _reached(**ratios: float | None) -> str:
    """Say by which clock the ratio is at least two."""
    known = {name: value for name, value in ratios.items() if value is not None}
    if not known:
        return "not measured"
    return ", ".join(f"{name} {'yes' if value >= TWICE else 'no'}" for name, value in known.items())


def _model(forward: Forward) -> str:
    return f"{forward.model}, {forward.layers} layers"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _milliseconds(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median / 1e3:.2f}"


def _microseconds(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.1f}"
