"""Generates the `fusewire.v1` stubs from `proto/`, then hands over to setuptools.

A `build_py` hook would run after the package list has been read, so protoc runs here, at the top:
a bare `pip install -e .` or a wheel build needs nothing done by hand. The output folder `gen/` is
ignored by git. Everything declarative is in `pyproject.toml`.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc
from setuptools import setup

ROOT = Path(__file__).parent
PROTO = ROOT / "proto"
STUBS = ROOT / "gen"


def generate_stubs() -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` for every file of `proto/` into `gen/`."""
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    if not sources:
        sys.exit(f"no .proto file under {PROTO}")
    STUBS.mkdir(exist_ok=True)
    includes = [f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={STUBS}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
        sys.exit("protoc failed")
    package = STUBS / "fusewire" / "v1"
    (package / "__init__.py").write_text('"""The wire: generated from proto/fusewire/v1."""\n')
    (package / "py.typed").touch()


generate_stubs()
setup()
