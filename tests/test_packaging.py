"""What is installed is what is in the repository, and starts from nothing but itself."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = (
    ".git",
    ".venv*",
    "gen",
    "build",
    "dist",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "results",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources alone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*GENERATED))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    (path,) = folder.glob("fusewire-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source_and_every_stub(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("kernels", "model", "service"):
        for path in (ROOT / package).rglob("*.py"):
            assert f"fusewire/{path.relative_to(ROOT)}" in names
    for name in ("page.html", "page.css", "page.js"):
        assert f"fusewire/service/dashboard/{name}" in names
    for proto in (ROOT / "proto" / "fusewire" / "v1").glob("*.proto"):
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert f"fusewire/v1/{proto.stem}{suffix}" in names


def test_the_wheel_holds_the_demo_model_and_nothing_outside_the_namespace(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for file in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert f"fusewire/model/demo/{file}" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fusewire"}
    assert "fusewire/__init__.py" not in names, (
        "fusewire is a namespace; its parts live in folders of their own"
    )


def test_the_front_end_starts_without_torch() -> None:
    """Nothing that the listening process imports may pull in torch or transformers."""
    heavy = "{'torch', 'triton', 'transformers'} & set(sys.modules)"
    code = f"import sys, fusewire.service.cli, fusewire.service.server; sys.exit(', '.join({heavy}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"
