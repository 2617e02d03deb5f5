"""Options from the command line, the environment and a file: who wins, and how a bad value is named."""

from pathlib import Path

import msgspec
import pytest

from fusewire.kernels.modes import KernelMode
from fusewire.service.config import (
    ConfigError,
    EngineConfig,
    ServeConfig,
    is_loopback,
    load_config,
    serve_options,
)


def toml(folder: Path, content: str) -> Path:
    file = folder / "fusewire.toml"
    file.write_text(content)
    return file


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1\nadmin_port = 1\nmetrics_port = 1\n")
    environment = {"FUSEWIRE_PORT": "2", "FUSEWIRE_ADMIN_PORT": "2"}
    config = load_config({"port": "3"}, environment, file)
    assert (config.port, config.admin_port, config.metrics_port) == (3, 2, 1)
    assert config.block_size == ServeConfig().block_size


def test_nothing_given_is_the_default() -> None:
    assert load_config({}, {}) == ServeConfig()


def test_text_is_converted_to_the_type_of_the_field() -> None:
    config = load_config(
        {"kernel_modes": "fused, unfused", "kernel_mode": "unfused", "max_context": "128"},
        {"FUSEWIRE_INSECURE": "true", "FUSEWIRE_HOST": "0.0.0.0", "FUSEWIRE_DRAIN_SECONDS": "1.5"},
    )
    assert config.kernel_modes == (KernelMode.FUSED, KernelMode.UNFUSED)
    assert (config.kernel_mode, config.max_context) == (KernelMode.UNFUSED, 128)
    assert (config.insecure, config.drain_seconds) == (True, 1.5)


@pytest.mark.parametrize(
    ("word", "says"), [("yes", True), ("On", True), ("1", True), ("no", False), ("0", False)]
)
def test_a_switch_is_set_by_a_word_in_the_environment(word: str, says: bool) -> None:
    given = load_config({}, {"FUSEWIRE_PREFIX_CACHE": word, "FUSEWIRE_DASHBOARD": word})
    assert (given.prefix_cache, given.dashboard) == (says, says)


def test_an_empty_variable_counts_as_unset() -> None:
    assert load_config({}, {"FUSEWIRE_MAX_CONTEXT": "", "FUSEWIRE_PORT": ""}) == ServeConfig()


def test_a_list_in_a_file(tmp_path: Path) -> None:
    assert load_config({}, {}, toml(tmp_path, 'kernel_modes = ["fused"]')).kernel_modes == ("fused",)


BAD_VALUES = [
    ("port", "abc", "expected int, got 'abc'"),
    ("port", "65536", "expected int <= 65535, got '65536'"),
    ("max_running", "0", "expected int >= 1, got '0'"),
    ("max_request_bytes", "2147483648", "expected int <= 2147483647, got '2147483648'"),
    ("max_response_bytes", "1023", "expected int >= 1024, got '1023'"),
    ("max_context", "few", "expected int, got 'few'"),
    ("gpu_memory_utilization", "2", "expected float <= 1.0, got '2'"),
    ("kernel_mode", "zip", "expected one of unfused, fused_norm, fused, got 'zip'"),
    ("kernel_modes", "fused,zip", "expected some of unfused, fused_norm, fused, got 'fused,zip'"),
    ("device", "tpu", "expected one of auto, cuda, cpu, got 'tpu'"),
    ("insecure", "maybe", "expected yes or no, got 'maybe'"),
]


@pytest.mark.parametrize(("name", "value", "problem"), BAD_VALUES)
def test_a_bad_value_is_named_the_way_it_was_given(
    tmp_path: Path, name: str, value: str, problem: str
) -> None:
    file = toml(tmp_path, f'{name} = "{value}"')
    variable = f"FUSEWIRE_{name.upper()}"
    with pytest.raises(ConfigError) as by_option:
        load_config({name: value}, {variable: value}, file)
    with pytest.raises(ConfigError) as by_variable:
        load_config({}, {variable: value}, file)
    with pytest.raises(ConfigError) as by_file:
        load_config({}, {}, file)
    assert str(by_option.value) == f"--{name.replace('_', '-')}: {problem}"
    assert str(by_variable.value) == f"{variable}: {problem}"
    assert str(by_file.value) == f"{file}: {name}: {problem}"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel_modes": ""}, "kernel-modes"),
        ({"kernel_modes": []}, "kernel_modes"),
        ({"kernel_modes": "fused", "kernel_mode": "unfused"}, "kernel_mode"),
        ({"max_step_growth": "1"}, "max_step_growth"),
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_client_ca": "c"}, "tls_client_ca"),
        ({"max_running": "64", "max_step_tokens": "63"}, "max_step_tokens"),
        ({"host": "0.0.0.0"}, "host"),
        ({"admin_host": "::"}, "admin_host"),
        ({"host": "example.org"}, "host"),
        ({"host": "unix:/run/x"}, "host"),
        ({"metrics_host": "0.0.0.0"}, "metrics_host"),
        ({"metrics_host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, "metrics_host"),
        ({"admin_host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"}, "admin_token_file or tls_client_ca"),
    ],
)
def test_options_that_do_not_fit_together_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(options, {})


def test_another_address_needs_tls_or_a_word() -> None:
    load_config({"host": "0.0.0.0", "insecure": True}, {})
    load_config({"metrics_host": "0.0.0.0", "insecure": True}, {})
    tls = {"tls_cert": "c", "tls_key": "k"}
    load_config({"host": "0.0.0.0"} | tls, {})
    load_config({"admin_host": "0.0.0.0", "admin_token_file": "t"} | tls, {})
    load_config({"admin_host": "0.0.0.0", "tls_client_ca": "a"} | tls, {})


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_config({}, {}, tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="fusewire"):
        load_config({}, {}, toml(tmp_path, "port ="))
    with pytest.raises(ConfigError, match="unknown option prot"):
        load_config({}, {}, toml(tmp_path, "prot = 1"))
    (tmp_path / "latin").write_bytes(b'model = "\xe9"')
    with pytest.raises(ConfigError, match="latin"):
        load_config({}, {}, tmp_path / "latin")


def test_every_field_is_described() -> None:
    options = serve_options()
    assert [option.name for option in options] == list(ServeConfig.__struct_fields__)
    assert all(option.description for option in options)
    switches = {option.name for option in options if option.is_switch}
    assert switches == {"insecure", "deterministic", "prefix_cache", "dashboard"}
    assert {option.name for option in options if option.is_list} == {"kernel_modes"}


def test_every_default_can_be_given_as_it_is_shown() -> None:
    shown = {option.name: option.default for option in serve_options() if option.default != "unset"}
    shown |= {"insecure": "false", "deterministic": "false", "prefix_cache": "true", "dashboard": "false"}
    assert load_config(shown, {}) == ServeConfig()


def test_the_engine_is_told_its_share_and_can_read_it() -> None:
    engine = load_config({"max_context": "256"}, {}).engine("/models/demo")
    assert (engine.model_path, engine.max_context) == ("/models/demo", 256)
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineConfig) == engine


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
