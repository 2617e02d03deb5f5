"""What was measured of the engine as text: where, with what, and a row a figure.

Imports no torch.
"""

import statistics
from collections.abc import Mapping, Sequence

from fusewire.service.bench.engine_figures import YARDSTICK_SOURCE, columns, figures, others, row, spell
from fusewire.service.bench.engine_results import (
    Environment,
    ModelShape,
    Profile,
    Run,
    Saved,
    StepProfile,
    Yardstick,
)
from fusewire.service.bench.table import align


def as_text(saved: Saved, yardsticks: Sequence[Yardstick] = ()) -> str:
    """Lay a saved file of any kind out as text; the yardsticks stand beside a run's figures."""
    if isinstance(saved, Run):
        return run_text(saved, yardsticks)
    if isinstance(saved, Profile):
        return profile_text(saved)
    return yardstick_text(saved)


def run_text(run: Run, yardsticks: Sequence[Yardstick] = ()) -> str:
    """Lay out a run of `fusewire bench engine`."""
    shown = others(run, yardsticks)
    parts = [header(run), align([columns(shown), *(row(figure, shown) for figure in figures(run))])]
    if run.start.details:
        parts.append("of the start: " + ", ".join(start_details(run.start.details)))
    if shown.any:
        parts.append(f"beside: {YARDSTICK_SOURCE}")
    parts += run.remarks
    return "\n\n".join(parts)


def header(run: Run) -> str:
    """Say where, with what and on which model a run was measured."""
    setup = run.setup
    lines = [
        run.environment.command,
        where(run.environment),
        model(run.model),
        f"{setup.kernel_mode} on {setup.kernel_backend}, attention {setup.attention_backend}, "
        f"{setup.kv_tokens:,} KV cache tokens, context {setup.context_length:,}",
    ]
    if run.environment.device == "cpu":
        lines.append(f"A CPU, {run.environment.cpu_threads} threads. These figures say nothing about a GPU.")
    return "\n".join(lines)


def where(environment: Environment) -> str:
    """Name device, versions and time."""
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    commit = f" at {environment.commit}" if environment.commit else ""
    return f"{environment.device}; {versions}{commit}; {environment.started}"


def model(shape: ModelShape) -> str:
    """Name a model and its shape."""
    return (
        f"{shape.name}, {shape.dtype}: {shape.layers} layers of {shape.hidden}, "
        f"{shape.query_heads}/{shape.kv_heads} heads of {shape.head_dim}"
    )


def start_details(details: Mapping[str, float]) -> list[str]:
    """Spell what a runner tells of its start, each under a name that ends in its unit."""
    return [_spell_detail(name, value) for name, value in details.items()]


def _spell_detail(name: str, value: float) -> str:
    what = name.replace("_", " ")
    if what.endswith(" bytes"):
        return f"{what.removesuffix(' bytes')} {value / 2**20:,.0f} MiB"
    if what.endswith(" seconds"):
        return f"{what.removesuffix(' seconds')} {value:.2f} s"
    return f"{what} {value:g}"


def yardstick_text(yardstick: Yardstick) -> str:
    """Lay out transformers' figures."""
    title = f"transformers generate, attention {yardstick.attention}"
    lines = [yardstick.environment.command, where(yardstick.environment), model(yardstick.model), title]
    return "\n".join(lines) + "\n\n" + align(yardstick_rows(yardstick))


def yardstick_rows(yardstick: Yardstick) -> list[list[str]]:
    """transformers' figures, a row each, after a row of titles."""
    rows = [["what", "first token ms", "step ms", "tok/s"]]
    for item in yardstick.decode:
        what = f"batch {item.requests}, {item.prompt_tokens} in, {item.answer_tokens} out"
        samples = (_ms(item.first), _ms(item.step_seconds), item.rates)
        rows.append([what, *(spell(statistics.median(values)) for values in samples)])
    for prompt in yardstick.prefill:
        first = spell(statistics.median(_ms(prompt.first)))
        rows.append([f"prefill of {prompt.tokens} tokens", first, "", ""])
    return rows


def profile_text(profile: Profile) -> str:
    """Lay out a profile of decode steps."""
    lines = [profile.environment.command, where(profile.environment), model(profile.model)]
    return "\n\n".join(["\n".join(lines), *(step_text(steps) for steps in profile.steps)])


def step_text(steps: StepProfile) -> str:
    """Lay out what the device does in a step of one batch size."""
    parts = [
        step_summary(steps),
        align(kernel_rows(steps)),
        align(gap_rows(steps)),
        "\n".join(f"{gap.us:8.1f} us between {gap.after} and {gap.before}" for gap in steps.largest_gaps),
    ]
    return "\n\n".join(part for part in parts if part)


def step_summary(steps: StepProfile) -> str:
    """Say in a sentence how busy the device is."""
    return (
        f"decode at batch {steps.batch}, {steps.steps} steps: {steps.step_us:.1f} us a step under the "
        f"profiler, the GPU busy {100 * steps.busy:.1f} % of it; without it {steps.plain_step_us:.1f} us, "
        f"{100 * steps.fed:.1f} % of the steps launched before the one ahead had ended, "
        f"the GPU busy at least {100 * steps.plain_busy:.1f} %; "
        f"{steps.kernels_per_step:.1f} kernels a step, {steps.qk_kernels_per_layer:.2f} QK kernels a layer"
    )


def kernel_rows(steps: StepProfile) -> list[list[str]]:
    """The kernels that take the most time, a row each, after a row of titles."""
    rows = [["kernel", "a step", "mean us", "share"]]
    for kernel in steps.top:
        share = f"{100 * kernel.share:.1f} %"
        rows.append([kernel.name, f"{kernel.per_step:.1f}", f"{kernel.mean_us:.2f}", share])
    return rows


def gap_rows(steps: StepProfile) -> list[list[str]]:
    """How many gaps of which length there are, a row each, after a row of titles."""
    rows = [["gap us", "a step", "us a step"]]
    for bin_ in steps.gaps:
        length = (
            f"{bin_.least_us:g} and more"
            if bin_.most_us is None
            else f"{bin_.least_us:g} to {bin_.most_us:g}"
        )
        rows.append([length, f"{bin_.per_step:.2f}", f"{bin_.us_per_step:.2f}"])
    return rows


def _ms(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]
