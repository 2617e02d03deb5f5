"""What the GPU does in a decode step of the engine: which kernels, how busy, and where it waits.

    python -m tests.benchmarks.decode_profile --model DIR --out decode-profile.json

Runs the engine as `fusewire bench engine` does and records some steps at each batch size with torch's
profiler, device activities only; kernels inside CUDA graphs are recorded one by one. A kernel that runs
once a step cuts the recording into steps. The share of busy time is that in which at least one kernel or
copy runs, so a kernel that was launched early and waits for the one before it counts as running.

The profiler costs the host more than some steps have, which then leaves the GPU waiting as it does not
otherwise. So unprofiled steps are watched too: whether each was launched before the one ahead had ended.
"""

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fusewire.kernels.modes import KernelMode
from fusewire.model.batch import Sampled, Step
from fusewire.service.bench.engine_options import EngineBenchOptions
from fusewire.service.bench.engine_results import Gap, GapBin, KernelShare, Profile, StepProfile
from fusewire.service.bench.engine_session import Session, environment, locate_model
from fusewire.service.bench.engine_table import profile_text
from fusewire.service.bench.results import save
from fusewire.service.engine.engine import Runner

COMMAND = "python -m tests.benchmarks.decode_profile --model FOLDER"
PROMPT_TOKENS = 128
ANSWER_TOKENS = 512
SETTLING_TOKENS = 32
PLAIN_STEPS = 100
STEPS = 24
UNSETTLED_STEPS = 4
"""Left out at the start: the profiler's own start lets the engine's queue of steps run empty."""
TOP = 15
LARGEST_GAPS = 8
HOST_GAP_US = 20.0
"""A gap at least so long between two kernels is the host's doing, and the profiler's; see `fed`."""
GAP_EDGES_US = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
NAME_LENGTH = 90
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
QK_KERNEL = re.compile(r"qk_norm|qkv_epilogue")


class Feed:
    """Watches a runner: of each step it launches, whether the one ahead still runs by then."""

    def __init__(self, runner: Runner) -> None:
        self.fed: list[bool] = []
        self._runner = runner
        self._ahead: torch.cuda.Event | None = None

    def launch(self, step: Step) -> Any:
        launched = self._runner.launch(step)
        if self._ahead is not None:
            self.fed.append(not self._ahead.query())
        self._ahead = torch.cuda.Event()
        self._ahead.record()
        return launched

    def collect(self, launched: Any) -> Sequence[Sampled | None]:
        return self._runner.collect(launched)

    def nonfinite_rows(self, launched: Any) -> Collection[int]:
        return self._runner.nonfinite_rows(launched)

    def backend(self, mode: KernelMode, num_tokens: int) -> str:
        return self._runner.backend(mode, num_tokens)

    def check_device(self) -> None:
        self._runner.check_device()


class Activity(NamedTuple):
    """One kernel or copy on the device, in microseconds."""

    start: float
    end: float
    name: str
    is_kernel: bool


def read_trace(path: Path) -> list[Activity]:
    """Read the device's activities from a chrome trace, in the order of their starts."""
    found = [
        Activity(event["ts"], event["ts"] + event["dur"], short_name(event["name"]), event["cat"] == "kernel")
        for event in json.loads(path.read_text("utf-8"))["traceEvents"]
        if event.get("cat") in DEVICE_CATEGORIES
    ]
    return sorted(found)


def short_name(name: str) -> str:
    """A kernel's name without its arguments' types, cut to a line."""
    return name.removeprefix("void ").partition("(")[0][:NAME_LENGTH] or name[:NAME_LENGTH]


def summarise(
    activities: Sequence[Activity],
    batch: int,
    steps: int,
    layers: int,
    plain_step_us: float,
    fed: float = 1.0,
) -> StepProfile:
    """Cut the activities into steps and sum up the whole ones.

    Args:
        activities: in the order of their starts.
        batch: rows of each step.
        steps: how many there are, give or take two.
        layers: of the model.
        plain_step_us: what a step takes unprofiled.
        fed: see `StepProfile`.

    Raises:
        ValueError: if no kernel runs once a step.
    """
    delimiter = once_a_step(activities, steps)
    starts = [each.start for each in activities if each.name == delimiter][UNSETTLED_STEPS:]
    whole = len(starts) - 1
    if whole < 1:
        raise ValueError(f"{steps} steps are too few: {UNSETTLED_STEPS} are left out")
    first, last = starts[0], starts[-1]
    inside = [each for each in activities if first <= each.start < last]
    gaps = find_gaps(inside, last)
    kernels = [each for each in inside if each.is_kernel]
    own_gaps_us = sum(gap.us for gap in gaps if gap.us < HOST_GAP_US) / whole
    return StepProfile(
        batch=batch,
        steps=whole,
        step_us=(last - first) / whole,
        plain_step_us=plain_step_us,
        busy=1 - sum(gap.us for gap in gaps) / (last - first),
        fed=fed,
        plain_busy=fed - own_gaps_us / plain_step_us,
        kernels_per_step=len(kernels) / whole,
        qk_kernels_per_layer=sum(bool(QK_KERNEL.search(each.name)) for each in kernels) / whole / layers,
        top=shares(inside, whole, last - first)[:TOP],
        gaps=bins(gaps, whole),
        largest_gaps=sorted(gaps, key=lambda gap: -gap.us)[:LARGEST_GAPS],
        delimiter=delimiter,
    )


def once_a_step(activities: Sequence[Activity], steps: int) -> str:
    """Find the kernel that runs once a step; of several, the one that takes longest."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for each in activities:
        if each.is_kernel:
            by_name[each.name].append(each.end - each.start)
    once = {name: sum(times) for name, times in by_name.items() if abs(len(times) - steps) <= 2}
    if not once:
        raise ValueError(f"no kernel ran about {steps} times, once a step")
    return max(once, key=lambda name: once[name])


def find_gaps(activities: Sequence[Activity], last: float) -> list[Gap]:
    """The times up to `last` in which nothing runs; the last activity is followed by the first."""
    found = []
    end, name = activities[0].start, ""
    following = Activity(last, last, activities[0].name, True)
    for each in [*activities, following]:
        if each.start > end:
            found.append(Gap(us=each.start - end, after=name, before=each.name))
        if each.end > end:
            end, name = each.end, each.name
    return found


def shares(activities: Sequence[Activity], steps: int, window_us: float) -> list[KernelShare]:
    """Each kernel's or copy's part in the window, the largest first."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for each in activities:
        by_name[each.name].append(each.end - each.start)
    found = [
        KernelShare(
            name=name,
            per_step=len(times) / steps,
            mean_us=sum(times) / len(times),
            share=sum(times) / window_us,
        )
        for name, times in by_name.items()
    ]
    return sorted(found, key=lambda kernel: -kernel.share)


def bins(gaps: Sequence[Gap], steps: int) -> list[GapBin]:
    """Count the gaps of like length."""
    found = []
    for least, most in itertools.pairwise([*GAP_EDGES_US, None]):
        inside = [gap.us for gap in gaps if least <= gap.us and (most is None or gap.us < most)]
        if inside:
            found.append(
                GapBin(
                    least_us=least,
                    most_us=most,
                    per_step=len(inside) / steps,
                    us_per_step=sum(inside) / steps,
                )
            )
    return found


def profile_batch(session: Session, feed: Feed, batch: int, source: random.Random) -> StepProfile:
    """Run a batch of streams and profile some of its decode steps."""
    ids = range(session.vocabulary)
    streams = [session.request(source.choices(ids, k=PROMPT_TOKENS), ANSWER_TOKENS) for _ in range(batch)]
    session.submit(streams)
    session.step_until(lambda: all(len(stream.times) > SETTLING_TOKENS for stream in streams))
    feed.fed.clear()
    plain_step_us = 1e6 * clock_steps(session, PLAIN_STEPS) / PLAIN_STEPS
    fed = sum(feed.fed) / len(feed.fed)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]):  # the first one sets the profiler up
            clock_steps(session, 2)
            torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            clock_steps(session, STEPS)
            torch.cuda.synchronize()
        recorded.export_chrome_trace(str(trace))
        activities = read_trace(trace)
    session.cancel()
    return summarise(activities, batch, STEPS, session.ready.model.layers, plain_step_us, fed)


def clock_steps(session: Session, steps: int) -> float:
    """Seconds that so many further steps take."""
    started, until = time.perf_counter(), session.steps + steps
    session.step_until(lambda: session.steps >= until)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder of the model; empty takes the embedded one")
    parser.add_argument("--batches", default="1,32", help="rows of the steps, comma-separated")
    parser.add_argument("--kernel-mode", default="fused")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_profile: needs a CUDA device", file=sys.stderr)
        return 1
    folder, name = locate_model(options.model)
    engine = {"kernel_mode": options.kernel_mode, "max_context": "4096", "device": "cuda"}
    session = Session(EngineBenchOptions(engine=engine).engine_config(folder), name)
    feed = session.watch(Feed)
    source = random.Random(0)
    found = Profile(
        environment=environment(f"{COMMAND} --batches {options.batches}", session.ready.device),
        model=session.shape(),
        setup=session.setup(),
        steps=[profile_batch(session, feed, int(batch), source) for batch in options.batches.split(",")],
    )
    save(found, options.out)
    print(profile_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
