"""What is saved is what is read back, and nothing else is taken for a run."""

import json

import pytest

from fusewire.service.bench.results import FORMAT, ResultsError, Run, Spread, load, save, to_json


def test_a_saved_run_is_read_back_unchanged(run: Run, tmp_path) -> None:
    path = tmp_path / "run.json"
    save(run, path)
    assert load(path) == run
    assert json.loads(path.read_text()) == json.loads(to_json(run))
    assert json.loads(path.read_text())["format"] == FORMAT


def test_a_spread_is_of_one_call_in_microseconds() -> None:
    spread = Spread.of([n * 1e-3 for n in range(11, 0, -1)], calls=10)
    assert (spread.samples, spread.calls) == (11, 10)
    assert [spread.low, spread.median, spread.high] == pytest.approx([200, 600, 1000])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "another"}', '{"cells": 3}'])
def test_another_file_is_no_run(text: str, tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"run\.json: is no saved run"):
        load(path)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ResultsError, match=r"nothing\.json"):
        load(tmp_path / "nothing.json")
