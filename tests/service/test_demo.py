"""`fusewire demo` for real, and that nothing of it stays behind, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.service.client import Answer
from fusewire.service.demo import PathFigures, compare_texts
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1 import kernel_pb2

DEMO_SECONDS = 240
GONE_SECONDS = 30


@pytest.fixture
def demo() -> Iterator["subprocess.Popen[str]"]:
    options = ["--json", "--repetitions", "2", "--max-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fusewire.service.cli", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield process
    process.kill()
    process.communicate()


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + GONE_SECONDS
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"left behind: {alive}"
        time.sleep(0.05)


def wait_for_engine(process: "subprocess.Popen[str]") -> list[int]:
    """Wait until the demo has a server and that an engine; returns both process ids."""
    end = time.monotonic() + DEMO_SECONDS
    while len(pids := descendants(process.pid)) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return pids


def test_the_demo_shows_both_paths_and_stops_its_server(demo: "subprocess.Popen[str]") -> None:
    pids = wait_for_engine(demo)
    out, err = demo.communicate(timeout=DEMO_SECONDS)
    assert demo.returncode == 0, err
    report = json.loads(out)
    assert report["repetitions"] == 2
    assert report["texts_equal"] is True
    assert set(report["paths"]) == {"unfused", "fused"}
    for figures in report["paths"].values():
        assert figures["completion_tokens"] == 8
        assert figures["prompt_tokens"] > 0
        assert figures["backend"]
        assert figures["text"]
        assert 0 < figures["prefill_seconds"] <= figures["time_to_first_token_seconds"]
        assert figures["time_per_output_token_seconds"] > 0
    assert "starting a server" in err
    wait_until_gone(pids)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_or_killed_demo_leaves_no_server_behind(
    demo: "subprocess.Popen[str]", number: signal.Signals, status: int
) -> None:
    pids = wait_for_engine(demo)
    demo.send_signal(number)
    _, err = demo.communicate(timeout=DEMO_SECONDS)
    assert demo.returncode == status
    assert "Traceback" not in err
    wait_until_gone(pids)


def answer(prefill: float, decode: float, text: str = "x") -> Answer:
    timings = pb.PhaseTimings(
        prefill_seconds=prefill, decode_seconds=decode, time_to_first_token_seconds=prefill + 1
    )
    usage = pb.Usage(prompt_tokens=3, completion_tokens=5)
    kernel = kernel_pb2.KernelReport(backend="torch-cpu")
    return Answer(text=text, finished=pb.Finished(usage=usage, timings=timings, kernel=kernel))


def test_figures_are_medians_over_the_repetitions() -> None:
    figures = PathFigures.of([answer(1, 40), answer(9, 4), answer(2, 8)])
    assert (figures.prefill_seconds, figures.time_to_first_token_seconds) == (2, 3)
    assert figures.time_per_output_token_seconds == 2
    assert (figures.prompt_tokens, figures.completion_tokens, figures.backend) == (3, 5, "torch-cpu")


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [("abc", "abc", "equal"), ("abc", "abd", "character 3"), ("abc", "ab", "character 3")],
)
def test_texts_are_compared(left: str, right: str, said: str) -> None:
    assert said in compare_texts(left, right)
