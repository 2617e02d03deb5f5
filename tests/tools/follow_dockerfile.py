"""Follows deploy/Dockerfile's steps without a container engine, then runs what they make as one would.

    sudo .venv/bin/python -m tests.tools.follow_dockerfile [--target cpu] [-e NAME=VALUE …] [-- COMMAND …]

The image is an overlay over this machine's own root, so it leaves nothing behind. Steps are carried out as
written, except those that fetch: this environment's packages stand in for what `uv pip install` brings, uv
and `apt-get` are skipped, and this Python stands in for the base image's. The stages share one root, which
makes COPY --from a check that the files are there. The server is then PID 1 of its own process, network and
mount namespaces: uid 10001, no capability, root read-only, /tmp without exec.

Needs Linux, root, unshare, nsenter, setpriv and ip. Exits with 0 if all went as it should, else 1.
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tools.dockerfile import Stage, copy_context, environment, exec_form, read_stages, with_bases

REPOSITORY = Path(__file__).parents[2]
BASE_ENVIRONMENT = {"PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
FETCHES_REQUIREMENTS = "uv pip install"
FETCHES = (FETCHES_REQUIREMENTS, "pip install 'uv", "apt-get")
INSIDE = "FUSEWIRE_TEST_NAMESPACE"
START_SECONDS = 60
STOP_SECONDS = 60


class Failed(Exception):
    """A step or a check did not do what it should."""


class Image:
    """A root file system that is built step by step, under `folder`."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root = folder / "root"
        self._context = folder / "context"
        copy_context(repository, self._context)
        layer, work = folder / "layer", folder / "work"
        for path in (self.root, layer, work):
            path.mkdir()
        _run(
            "mount", "-t", "overlay", "-o", f"lowerdir=/,upperdir={layer},workdir={work}", "image", self.root
        )
        for name in ("dev", "proc", "sys"):
            _run("mount", "--rbind", f"/{name}", self.root / name)
        self._open_python()

    def _open_python(self) -> None:
        """Let every user reach this Python, which may lie in root's home."""
        for folder in Path(sys.base_prefix, "bin").parents:
            inside = self.inside(str(folder))
            inside.chmod(inside.stat().st_mode | 0o111)

    def build(self, stage: Stage, variables: dict[str, str]) -> None:
        """Carry out a stage's own steps; those of its bases have been, and left it these variables."""
        folder = "/"
        for step in stage.steps:
            if step.instruction == "WORKDIR":
                folder = step.argument
                self.inside(folder).mkdir(parents=True, exist_ok=True)
            elif step.instruction == "COPY":
                self._copy(step.argument, self.inside(folder))
            elif step.instruction == "RUN":
                self._run_step(step.argument, folder, variables)

    def _copy(self, argument: str, folder: Path) -> None:
        *options, source, target = argument.split()
        if options:  # --from another stage, whose root is the same one
            if source != target or not self.inside(source).exists():
                raise Failed(f"COPY {argument}: not made by an earlier stage")
        elif source == ".":
            shutil.copytree(self._context, folder / target, dirs_exist_ok=True)
        else:
            shutil.copy(self._context / source, folder / target)

    def _run_step(self, argument: str, folder: str, variables: dict[str, str]) -> None:
        command = re.sub(r"--mount=\S+\s+", "", argument)
        if any(text in command for text in FETCHES):
            report(f"skipped  {command[:90].rstrip()}")
            if FETCHES_REQUIREMENTS in command:
                self._lend_packages()
            return
        report(f"RUN      {command[:90].rstrip()}")
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        line = ["chroot", str(self.root), "/bin/sh", "-c", f"cd {folder} && {command}"]
        done = subprocess.run(line, env=pip | variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"RUN {command}\n{done.stdout}{done.stderr}")

    def _lend_packages(self) -> None:
        """Let the image's environment see this one's packages, all but Fusewire itself."""
        here, lent = self.inside("/opt/packages"), self.inside("/opt/lent")
        here.mkdir()
        lent.mkdir()
        _run("mount", "--bind", sysconfig.get_path("purelib"), here)  # may lie in /tmp, which gets covered
        for entry in here.iterdir():
            if "fusewire" not in entry.name:
                (lent / entry.name).symlink_to(f"/opt/packages/{entry.name}")
        (packages,) = self.inside("/opt/fusewire/lib").glob("python*/site-packages")
        (packages / "lent.pth").write_text("import sys; sys.path.insert(0, '/opt/lent')\n")

    def inside(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / path.lstrip("/")


class Container:
    """A stage's image with a command in it; a context manager that leaves no process behind."""

    def __init__(self, image: Image, stage: Stage, command: Sequence[str], variables: dict[str, str]) -> None:
        self._image = image
        self._user = stage.last("USER") or "0:0"
        self._variables = environment(stage, BASE_ENVIRONMENT) | variables
        self._command = [*exec_form(stage.last("ENTRYPOINT") or "[]"), *command]
        self.health_command = exec_form(stage.last("HEALTHCHECK") or "[]")

    def __enter__(self) -> "Container":
        prepare = f"ip link set lo up && mount -o remount,ro {self._image.root}"
        unshare = ["unshare", "--pid", "--fork", "--net", "--mount", "--kill-child"]
        self._image.inside("/proc").mkdir(exist_ok=True)
        proc = f"--mount-proc={self._image.inside('/proc')}"
        line = [
            *unshare,
            proc,
            "/bin/sh",
            "-c",
            f'{prepare} && exec "$@"',
            "sh",
            *self._confine(self._command),
        ]
        self._process = subprocess.Popen(line)
        return self

    def _confine(self, command: Sequence[str]) -> list[str]:
        uid, gid = self._user.split(":")
        privileges = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups"]
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        user = [f"--reuid={uid}", f"--regid={gid}"]
        root = str(self._image.root)
        return ["chroot", root, "setpriv", *user, *privileges, "env", "-i", *variables, *command]

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # and, by --kill-child, all that are inside
        self._process.wait()

    def call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        enter = ["nsenter", "--target", str(self.first_pid), "--mount", "--pid", "--net", "--"]
        return subprocess.run([*enter, *self._confine(command)], capture_output=True, text=True, check=False)

    @property
    def first_pid(self) -> int:
        """The process id, outside, of the one that is 1 inside."""
        return _children(self._process.pid)[0]

    def wait_until_healthy(self) -> None:
        """Wait for the health check to exit with 0."""
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise Failed(f"the server ended with {self._process.returncode}")
            if _children(self._process.pid) and self.call(self.health_command).returncode == 0:
                return
            if time.monotonic() > end:
                raise Failed(f"not healthy: {self.call(self.health_command).stderr}")
            time.sleep(0.5)

    def stop(self) -> int:
        """Send PID 1 a SIGTERM, and return what it ends with."""
        os.kill(self.first_pid, signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", default="cpu", help="stage to build (default %(default)s)")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="folder to build from")
    parser.add_argument("-e", dest="variables", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("command", nargs="*", help="instead of the image's CMD")
    args = parser.parse_args(argv)
    if INSIDE not in os.environ:  # the mounts below end with this process
        line = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", __spec__.name]
        given = sys.argv[1:] if argv is None else argv
        return subprocess.run([*line, *given], env={**os.environ, INSIDE: "1"}, check=False).returncode
    try:
        _follow(args.repository, args.target, args.command, dict(v.split("=", 1) for v in args.variables))
    except Failed as error:
        print(f"FAILED   {error}", file=sys.stderr)
        return 1
    return 0


def _follow(repository: Path, target: str, command: Sequence[str], variables: dict[str, str]) -> None:
    stages = read_stages(repository / "deploy" / "Dockerfile")
    with TemporaryDirectory(prefix="fusewire-image-") as name:
        _run("mount", "-t", "tmpfs", "tmpfs", name)
        try:
            image = Image(Path(name), repository)
            for stage in _needed(stages, target):
                report(f"FROM     {stage.base} AS {stage.name}")
                image.build(stage, environment(with_bases(stages, stage.name), BASE_ENVIRONMENT))
            whole = with_bases(stages, target)
            _mount_volumes(image, whole)
            _try(Container(image, whole, command or exec_form(whole.last("CMD") or "[]"), variables))
        finally:
            _run("umount", "--recursive", "--lazy", name)


def _needed(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The stages that a target is made of, in the file's order: its bases, and whence it copies."""
    names, open_names = set[str](), [target]
    while open_names:
        stage = stages[open_names.pop()]
        names.add(stage.name)
        sources = re.findall(r"from=([\w-]+)", " ".join(step.argument for step in stage.steps))
        open_names += [other for other in (stage.base, *sources) if other in stages]
    return [stage for stage in stages.values() if stage.name in names]


def _mount_volumes(image: Image, stage: Stage) -> None:
    """Mount what compose.yaml mounts: /tmp as Docker does it, and two volumes."""
    uid, gid = (stage.last("USER") or "0:0").split(":")
    _run("mount", "-t", "tmpfs", "-o", "noexec,nosuid,nodev,size=256m,mode=1777", "tmp", image.inside("/tmp"))
    _run("mount", "-t", "tmpfs", "-o", f"uid={uid},gid={gid},mode=755", "cache", image.inside("/cache"))
    run = image.inside("/run/secrets")
    run.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "secrets", run)
    token = run / "admin-token"
    token.write_text(secrets.token_urlsafe())
    token.chmod(0o444)


def _try(container: Container) -> None:
    with container:
        container.wait_until_healthy()
        report(f"ok       healthy by {container.health_command}")
        status = Path(f"/proc/{container.first_pid}/status").read_text()
        report("ok       PID 1 is " + _show(status, "Name", "Uid", "CapBnd", "NoNewPrivs"))
        if "Read-only" not in (answer := container.call(["touch", "/written"]).stderr):
            raise Failed(f"the root is not read-only: {answer}")
        report("ok       the root is read-only")
        os.kill(_children(container.first_pid)[0], signal.SIGKILL)
        time.sleep(1)
        container.wait_until_healthy()
        report("ok       healthy again after its engine was killed")
        if zombies := [pid for pid in _children(container.first_pid) if _is_zombie(pid)]:
            raise Failed(f"zombies: {zombies}")
        report("ok       no zombie")
        if code := container.stop():
            raise Failed(f"SIGTERM: ended with {code}")
        report("ok       SIGTERM to PID 1: ended with 0")


def report(line: str) -> None:
    """Say what was done."""
    print(line, flush=True)


def _show(status: str, *names: str) -> str:
    """Some lines of a /proc/PID/status, on one."""
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return ", ".join(f"{name} {lines[name].split()[0]}" for name in names)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in tasks for child in file.read_text().split()]


def _is_zombie(pid: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
