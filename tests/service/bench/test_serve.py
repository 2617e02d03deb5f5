"""`fusewire bench serve`: what it makes of what clients saw, and a run against a server of its own."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fusewire.service import cli
from fusewire.service.bench import serve_results
from fusewire.service.bench.serve_client import Job
from fusewire.service.bench.serve_results import LoadFigures, ServeRun, Spread, StreamRecord
from fusewire.service.client import Connection
from tests.tools.fake_server import FakeServer
from tests.tools.server_process import PacedServer, free_port

SMALL = (
    "--streams",
    "4",
    "--requests",
    "8",
    "--processes",
    "2",
    "--prompt-tokens",
    "3",
    "--output-tokens",
    "5",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PacedServer]:
    with PacedServer(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def bench(capsys: pytest.CaptureFixture[str], target: str, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", "serve", "--target", target, *arguments])
    return status, *capsys.readouterr()


def record(started: float, messages: list[float], tokens: int, **fields) -> StreamRecord:
    return StreamRecord(
        started=started, messages=messages, ended=messages[-1] + 0.5, completion_tokens=tokens, **fields
    )


# ---- the figures ----


def test_tokens_are_counted_from_usage_and_times_from_messages() -> None:
    figures = LoadFigures.of(
        [record(10, [11, 12, 14], 7, path="p"), record(11, [13], 1, path="p")], streams=2
    )
    assert figures.completion_tokens == 8
    assert figures.seconds == 4.5
    assert figures.tokens_per_second == 8 / 4.5
    assert (figures.messages, figures.tokens_per_message) == (4, 2)
    assert figures.ttft == Spread(mean=1.5, p50=1, p90=2, p99=2, most=2)
    assert figures.itl is not None
    assert (figures.itl.mean, figures.itl.p50, figures.itl.p99) == (1.5, 1, 2)
    assert figures.tpot is not None
    assert figures.tpot.p50 == 0.5
    assert figures.paths == {"p": 2}


def test_a_failed_stream_is_an_error_and_gives_no_figure() -> None:
    failed = StreamRecord(started=0.0, ended=9.0, error="UNAVAILABLE: gone")
    figures = LoadFigures.of([failed, record(1, [2, 3], 2)], streams=2)
    assert figures.errors == {"UNAVAILABLE: gone": 1}
    assert (figures.completion_tokens, figures.requests) == (2, 2)
    assert LoadFigures.of([failed], streams=1).ttft is None


def test_a_percentile_is_a_value_that_occurred() -> None:
    spread = Spread.of([float(value) for value in range(1, 101)])
    assert spread == Spread(mean=50.5, p50=50, p90=90, p99=99, most=100)
    assert Spread.of([]) is None


def test_prompts_are_drawn_by_seed_and_number_from_the_vocabulary() -> None:
    def job(seed: str, vocab_size: int = 500) -> Job:
        return Job(
            connection=Connection("127.0.0.1:1"),
            channels=1,
            streams=1,
            requests=range(2),
            warm_ups=range(2, 3),
            prompt_tokens=50,
            output_tokens=4,
            vocab_size=vocab_size,
            mode=None,
            seed=seed,
            salt="s",
        )

    def ids(job: Job, number: int) -> list[int]:
        return list(job.request(number).token_ids.ids)

    assert ids(job("0/burst"), 1) == ids(job("0/burst"), 1)
    assert ids(job("0/burst"), 1) != ids(job("0/single"), 1) != ids(job("0/single"), 2)
    assert {len(ids(job("0"), number)) for number in range(9)} == {50}
    assert all(100 <= token_id < 500 for token_id in ids(job("0"), 0))
    assert all(token_id < 50 for token_id in ids(job("0", vocab_size=50), 0))


# ---- the command ----


def test_every_load_is_sent_counted_and_saved(
    server: PacedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "run.json"
    target = f"127.0.0.1:{server.port}"
    loads = ("--loads", "kept-full,single,burst", "--mode", "fused")
    status, out, err = bench(capsys, target, *SMALL, *loads, "--json", "--out", str(saved))
    assert status == 0
    told = json.loads(out)
    assert told == json.loads(saved.read_text())
    assert told["format"] == serve_results.FORMAT
    assert told["options"]["streams"] == 4
    assert told["environment"]["server"]["device"] == "no device"
    assert {"fusewire", "grpcio", "python"} <= told["environment"]["versions"].keys()
    assert f"fusewire bench serve --target {target}" in told["environment"]["command"]
    assert {name: load["requests"] for name, load in told["loads"].items()} == {
        "kept-full": 8,
        "single": 8,
        "burst": 4,
    }
    for load in told["loads"].values():
        assert load["completion_tokens"] == 5 * load["requests"]
        assert load["prompt_tokens"] == 3 * load["requests"]
        assert load["errors"] == {}
        assert load["paths"] == {"fused on none": load["requests"]}
        assert 0 < load["ttft"]["p50"] <= load["ttft"]["p99"]
    assert "kept-full: 8 requests, 4 at a time, from 2 processes" in err
    assert msgspec.json.decode(saved.read_bytes(), type=ServeRun).failed is False


def test_a_run_is_shown_as_a_table(server: PacedServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = bench(capsys, f"127.0.0.1:{server.port}", *SMALL)
    assert status == 0
    assert "kept-full        4         8" in out
    assert "kept-full: 40 tokens in" in out
    assert "fused on none" in out


def test_streams_that_fail_are_told_and_the_exit_status_is_1(
    server: PacedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"127.0.0.1:{server.port}"
    status, out, _ = bench(capsys, target, *SMALL, "--prompt-tokens", "40000")
    assert status == 1
    assert "8 streams failed: INVALID_ARGUMENT: token_ids" in out


def test_answers_of_another_length_are_failures(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as fake:
        status, out, _ = bench(capsys, fake.target, *SMALL, "--output-tokens", "6", "--json")
    assert status == 1
    assert json.loads(out)["loads"]["kept-full"]["errors"] == {"5 tokens came instead of 6": 8}


def test_a_server_that_is_not_there_fails_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = bench(capsys, f"127.0.0.1:{free_port()}", *SMALL)
    assert status == 1
    assert "UNAVAILABLE" in err


def test_a_client_process_that_dies_fails_the_run(
    server: PacedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fusewire.service.bench.serve._ClientProcess.start",
        lambda client: os.kill(client._process.pid, signal.SIGKILL),
    )
    status, _, err = bench(capsys, f"127.0.0.1:{server.port}", *SMALL)
    assert status == 1
    assert "a client process died" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--streams", "8", "--requests", "7"), "--requests: 7 cannot keep 8 streams full"),
        (("--streams", "2", "--processes", "3"), "--processes: 3 share 2 streams"),
    ],
)
def test_options_that_do_not_fit_are_named(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = bench(capsys, "127.0.0.1:1", *arguments)
    assert status == 2
    assert named in err
