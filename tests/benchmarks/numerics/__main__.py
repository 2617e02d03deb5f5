"""Measures what each kernel path costs in accuracy, and writes a report.

    python -m tests.benchmarks.numerics --out tests/benchmarks/results [--quick] [--checkpoint FOLDER]

Runs on CUDA where there is one, else on a CPU with small sizes (`--quick`), where all three paths are
torch. Writes numerics-DEVICE.md and, with every figure, numerics-DEVICE.json. Exits 1 if `fused` is
less exact than `unfused` anywhere it is judged, if its bits depend on the batch, or if a strange row
changes another one.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fusewire.kernels.modes import KernelMode
from fusewire.kernels.paths import backend_name
from fusewire.model.config import ModelConfig
from fusewire.model.demo import path as demo_path
from fusewire.model.device import name_of_device
from tests.benchmarks.numerics import kernel, model
from tests.benchmarks.numerics.report import as_markdown


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--checkpoint", type=Path, help="a Qwen3 folder whose drift is measured too")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_float32_matmul_precision("highest")
    found = measure(options, device)
    slug = found["device"].lower().replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"numerics-{slug}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = as_markdown(found)
    (options.out / f"numerics-{slug}.md").write_text(text)
    print(text)
    return 1 if found["violations"] else 0


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Run every section."""
    quick = options.quick
    found: dict = {
        "command": "python -m tests.benchmarks.numerics"
        + " --quick" * quick
        + " --checkpoint FOLDER" * (options.checkpoint is not None),
        "device": name_of_device(device),
        "backends": {mode.value: backend_name(mode, device) for mode in KernelMode},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    on_gpu = device.type == "cuda"
    drift_dtypes = ["bfloat16", "float16", "float32"] if on_gpu else ["bfloat16", "float32"]
    long = 512 if quick else 8192
    sections: dict[str, Callable[[], object]] = {
        "errors": lambda: kernel.errors(quick, device),
        "exact_angles": lambda: kernel.exact_angles(device, 64 if quick else 1024),
        "strange": lambda: kernel.strange(device),
        "invariance": lambda: kernel.invariance(quick, device),
        "drift_demo": lambda: [
            row
            for tokens in (long // 2, long)
            for row in model.drift(demo_path(), model.held_out_ids(tokens), drift_dtypes, device)
        ],
        "drift_checkpoint": lambda: drift_of(options.checkpoint, quick, device),
        "perplexity": lambda: model.perplexities(
            *((4, 32, long) if quick else (32, 256, long)), drift_dtypes, device
        ),
    }
    for name, section in sections.items():
        started = time.perf_counter()
        found[name] = section()
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    found["violations"] = violations(found)
    return found


def drift_of(folder: Path | None, quick: bool, device: torch.device) -> list[dict]:
    """Drift of a checkpoint on random tokens; nothing without one."""
    if folder is None:
        return []
    vocabulary = ModelConfig.read(folder).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (256 if quick else 4096,), generator=generator).tolist()
    return model.drift(folder, ids, ["bfloat16"], device)


def violations(found: dict) -> list[str]:
    """What must not be."""
    wrong = [f"error: {row}" for row in found["errors"] if not row.get("holds", True)]
    changing = (row for row in found["strange"] if not row["others_keep_their_bits"])
    wrong += [f"a strange row changed others: {row}" for row in changing]
    fused = (KernelMode.FUSED.value, KernelMode.FUSED_NORM.value)
    if not all(name.startswith("torch") for name in found["backends"].values()):
        wrong += [
            f"bits depend on the batch: {row}"
            for row in found["invariance"]
            if row["path"] in fused and row["differ"]
        ]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
