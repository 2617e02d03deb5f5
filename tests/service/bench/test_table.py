"""What a reader sees of a saved run: figures where they are, reasons where they are not."""

from fusewire.service.bench.results import Cell, Run, Timed
from fusewire.service.bench.table import as_text, kernel_verdict, prefill_verdict
from tests.service.bench.conftest import cell, forward, timed


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the table of this title, by their first word."""
    (part,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return {line.split()[0]: line.split()[1:] for line in part.splitlines()[1:]}


def test_a_row_a_contender_and_a_column_a_size(run: Run) -> None:
    gpu = rows(as_text(run), "32/8 heads of 128: GPU us")
    assert gpu == {
        "tokens": ["1", "4096"],
        "unfused": ["30.00", "failed"],
        "fused": ["2.00", "40.00", "(0.90)"],
        "copy": ["1.50", "-"],
    }


def test_multiples_are_of_fused_at_the_same_size_and_for_the_same_work(run: Run) -> None:
    assert rows(as_text(run), "32/8 heads of 128: GPU time as a multiple") == {
        "tokens": ["1", "4096"],
        "unfused": ["15.00", "failed"],
        "fused": ["1.00", "1.00"],
    }


def test_the_header_names_device_versions_and_command(run: Run) -> None:
    head = as_text(run).split("\n\n")[0]
    for word in (
        "fusewire bench kernels --heads 32/8",
        "A GPU",
        "bfloat16",
        "2.11.0",
        "3.6.0",
        "triton-cuda",
    ):
        assert word in head
    assert "CPU" not in head


def test_a_cpu_run_says_so(run: Run) -> None:
    run.environment = type(run.environment)(**_fields(run) | {"device_type": "cpu"})
    assert "say nothing about a GPU" in as_text(run).split("\n\n")[0]


def _fields(run: Run) -> dict[str, object]:
    return {name: getattr(run.environment, name) for name in run.environment.__struct_fields__}


def test_absence_and_failure_are_told_with_their_reasons(run: Run) -> None:
    text = as_text(run)
    assert "absent: vllm: cannot be imported" in text
    assert "failed: unfused, 32/8 heads, 4096 tokens: RuntimeError: no" in text


def norms(chain: float, one: float) -> Cell:
    contenders: list[Timed] = [
        timed("chain_norm", chain, 100.0, "norm"),
        timed("torch_norm", 6.0, 40.0, "norm"),
        timed("qk_norm", one, 80.0, "norm"),
    ]
    return cell(64, *contenders)


def test_the_kernel_claim_is_answered_by_each_clock() -> None:
    text = kernel_verdict([norms(20.0, 2.0)])
    assert "10.00x" in text
    assert "GPU".lower() in text.lower()
    assert text.endswith("gpu yes, eager no")
    assert kernel_verdict([norms(3.0, 2.0)]).endswith("gpu no, eager no")


def test_the_prefill_claim_tells_the_ratio_and_its_bound() -> None:
    forwards = [
        forward("unfused", 1000, 500, 25),
        forward("fused_norm", 800, 450, 9),
        forward("fused", 400, 300, 1),
    ]
    row = prefill_verdict(forwards).splitlines()[-1]
    # eager 2.5, at most 1 / (1 - 0.25); graph 1.67, at most 1 / (1 - 0.5); the diagonal 1000 / 300
    assert row.split()[-10:-4] == ["2.50x", "1.33x", "1.67x", "2.00x", "1.25x", "3.33x"]
    assert row.endswith("eager yes, graph no")
