"""Reads a Dockerfile and a .dockerignore, as far as this project's own ones go.

Knows parser directives, heredocs and negated folders of a .dockerignore no more than the files use them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """One instruction, its continued lines joined."""

    instruction: str
    argument: str


class Stage(NamedTuple):
    """One `FROM BASE AS NAME` and the steps under it; `base` is an image or another stage's name."""

    name: str
    base: str
    steps: tuple[Step, ...]

    def last(self, instruction: str) -> str | None:
        """The argument that is in force at the stage's end, or None."""
        return next((s.argument for s in reversed(self.steps) if s.instruction == instruction), None)


def read_stages(file: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile, by name, in its order."""
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    steps = [
        Step(*line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", "").splitlines() if line
    ]
    starts = [number for number, step in enumerate(steps) if step.instruction == "FROM"]
    stages = {}
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        base, name = steps[start].argument.split(" AS ")
        stages[name] = Stage(name, base, tuple(steps[start + 1 : end]))
    return stages


def with_bases(stages: dict[str, Stage], target: str) -> Stage:
    """A stage and all that it is built upon, as one."""
    stage = stages[target]
    if stage.base not in stages:
        return stage
    below = with_bases(stages, stage.base)
    return Stage(target, below.base, below.steps + stage.steps)


def environment(stage: Stage, base: dict[str, str]) -> dict[str, str]:
    """What the ENV steps of a stage make of a base image's environment."""
    variables = dict(base)
    for step in stage.steps:
        if step.instruction == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", step.argument):
                variables[name] = re.sub(r"\$(\w+)", lambda match: variables[match[1]], value)
    return variables


def exec_form(argument: str) -> list[str]:
    """The words of `["a", "b"]`; what stands before it (options, CMD) is left out."""
    return json.loads(argument[argument.index("[") :])


def allowed(ignore_file: Path) -> list[str]:
    """The top-level names that a .dockerignore of the form `*`, `!NAME`, … lets through."""
    lines = ignore_file.read_text("utf-8").splitlines()
    assert "*" in lines, f"{ignore_file} lets everything through"
    return [line[1:] for line in lines if line.startswith("!")]


def copy_context(root: Path, target: Path) -> None:
    """Copy what a build would get to see of the folder `root` into a new folder."""
    target.mkdir()
    for name in allowed(root / ".dockerignore"):
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target / name)
