"""Every option of `fusewire serve`, from one frozen declaration.

A field is an option of the command line (`--max-running`), of the environment
(`FUSEWIRE_MAX_RUNNING`) and of a TOML file (`max_running`), in that order of precedence. Invariants
are checked when a `ServeConfig` is made. Knows no argparse, no gRPC and no torch.
"""

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from fusewire.kernels.modes import KernelMode
from fusewire.service.logs import LogFormat, LogLevel
from fusewire.service.messages import Routing
from fusewire.service.text import NotUtf8, as_text

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
AboveZero = Annotated[float, Meta(gt=0)]


class ConfigError(ValueError):
    """An option has a value that cannot be used; the message names the option."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is told at its start."""

    model_path: str
    device: Literal["auto", "cuda", "cpu"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    kernel_mode: KernelMode
    kernel_modes: tuple[KernelMode, ...]
    attention_backend: str
    block_size: int
    max_context: int | None
    max_running: int | None
    max_step_tokens: int | None
    max_step_growth: float
    prefix_cache: bool
    kv_tokens: int | None
    gpu_memory_utilization: float
    deterministic: bool
    log_level: LogLevel
    log_format: LogFormat
    shadow_every: int
    shadow_threshold: float | None
    qk_timing_every: int
    inject_fault: KernelMode | None
    engine_timeout: float | None
    routing: Routing | None = None
    """Which paths to go on with after a restart; None starts with `kernel_mode`."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `fusewire serve`. The `description` of a field is its help text."""

    model: Annotated[
        str, Meta(description="Hugging Face folder or hub id; empty serves the embedded demo model")
    ] = ""
    served_model_name: Annotated[
        str, Meta(description="name that requests use; empty takes the folder's or the id's")
    ] = ""
    host: Annotated[str, Meta(description="address of the public gRPC port")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="public gRPC port; 0 picks a free one")] = 50051
    frontends: Annotated[
        Count,
        Meta(description="processes that share the public port; each takes its share of max-waiting"),
    ] = 1
    admin_host: Annotated[str, Meta(description="address of the admin gRPC port")] = "127.0.0.1"
    admin_port: Annotated[Port, Meta(description="admin gRPC port; 0 picks a free one")] = 50052
    metrics_host: Annotated[str, Meta(description="address of the metrics port")] = "127.0.0.1"
    metrics_port: Annotated[Port, Meta(description="port of /metrics; 0 picks a free one")] = 9464
    kernel_mode: Annotated[KernelMode, Meta(description="path of requests that pin none")] = KernelMode.FUSED
    kernel_modes: Annotated[
        tuple[KernelMode, ...],
        Meta(description="paths that are warmed up and can be switched to, comma-separated"),
    ] = tuple(KernelMode)
    device: Annotated[Literal["auto", "cuda", "cpu"], Meta(description="where to compute")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Meta(description="type of weights and activations; auto is float32 on cpu, the checkpoint's on cuda"),
    ] = "auto"
    attention_backend: Annotated[
        str, Meta(description="attention implementation; auto picks the best available")
    ] = "auto"
    max_context: Annotated[
        Count | None, Meta(description="context length in tokens; unset takes the model's")
    ] = None
    max_running: Annotated[
        Count | None, Meta(description="most requests that run at once; unset is 256 on cuda, 64 on cpu")
    ] = None
    max_waiting: Annotated[Count, Meta(description="most requests that may wait; more are refused")] = 1024
    max_step_tokens: Annotated[
        Count | None,
        Meta(
            description="most tokens of one step, longer prompts are prefilled in chunks; unset is 16384 on "
            "cuda, 2048 on cpu"
        ),
    ] = None
    max_step_growth: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="bound on a decode step that also prefills, in pure decode steps' time; 0 for none",
        ),
    ] = 1.6
    prefix_cache: Annotated[
        bool, Meta(description="let prompts start from the KV that earlier ones with the same beginning left")
    ] = True
    default_max_tokens: Annotated[
        Count,
        Meta(
            description="tokens to generate when a request does not say; fewer if the model's "
            "generation_config sets a smaller max_new_tokens"
        ),
    ] = 512
    block_size: Annotated[Count, Meta(description="tokens of one KV cache block")] = 16
    kv_tokens: Annotated[
        Count | None,
        Meta(
            description="tokens the KV cache holds; unset sizes it by memory on cuda, by max-running on cpu"
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="share of the GPU's memory to use")
    ] = 0.9
    deterministic: Annotated[
        bool,
        Meta(description="keep to one kernel of each path at every step size, also where another is faster"),
    ] = False
    shadow_every: Annotated[
        int,
        Meta(
            ge=0,
            description="steps from one check of both kernel paths against float32 to the next; 0 for none",
        ),
    ] = 999  # odd, for the two graphs of a size take turns, and keep the rows of different layers
    shadow_threshold: Annotated[
        AboveZero | None,
        Meta(
            description="relative error of q, k or v beyond which unfused becomes the default; unset goes "
            "by the dtype",
        ),
    ] = None
    qk_timing_every: Annotated[
        int,
        Meta(ge=0, description="steps from one timing of the QK-norm step to the next; 0 for none"),
    ] = 1000
    inject_fault: Annotated[
        KernelMode | None,
        Meta(description="scale the q norm's weight by 1.01 on this path: a drill for the shadow guard"),
    ] = None
    dashboard: Annotated[
        bool, Meta(description="serve a page to watch and switch the kernel paths, on loopback")
    ] = False
    dashboard_port: Annotated[Port, Meta(description="port of the page; 0 picks a free one")] = 9465
    engine_timeout: Annotated[
        Seconds | None,
        Meta(
            description="seconds that the engine's loop may stand still until the engine is restarted; unset "
            "goes by what its steps should take, 0 never"
        ),
    ] = None
    stream_stall_seconds: Annotated[
        Seconds,
        Meta(description="seconds that a client may leave its stream unread, until it is ended; 0 for any"),
    ] = 30.0
    drain_seconds: Annotated[Seconds, Meta(description="time that running requests get after SIGTERM")] = 30.0
    max_request_bytes: Annotated[int, Meta(ge=1, lt=2**31, description="largest request message")] = 4 << 20
    request_buffer_bytes: Annotated[
        Count,
        Meta(
            description="bytes of requests that one front end holds at once, half of them for messages that "
            "are still coming in; two of the largest are held in any case"
        ),
    ] = 128 << 20
    max_response_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            lt=2**31,
            description="largest response message; stock clients take 4194304 and must be told to take more",
        ),
    ] = 4 << 20
    tls_cert: Annotated[str, Meta(description="PEM certificate chain; with --tls-key it turns TLS on")] = ""
    tls_key: Annotated[str, Meta(description="PEM private key")] = ""
    tls_client_ca: Annotated[
        str, Meta(description="PEM bundle; clients must present a certificate it signed")
    ] = ""
    auth_token_file: Annotated[
        str, Meta(description="file of bearer tokens, one a line, each may use the public port")
    ] = ""
    admin_token_file: Annotated[
        str, Meta(description="file of bearer tokens, one a line, each may use the admin port")
    ] = ""
    insecure: Annotated[
        bool,
        Meta(
            description="allow plaintext, and an admin port without credentials, on an address that is not "
            "loopback"
        ),
    ] = False
    log_level: Annotated[LogLevel, Meta(description="least severe lines to log")] = "info"
    log_format: Annotated[LogFormat, Meta(description="how a line of the log looks")] = "text"
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="base URL of an OpenTelemetry collector (OTLP over HTTP) that gets traces, for "
            "instance http://127.0.0.1:4318; empty turns tracing off"
        ),
    ] = ""

    def __post_init__(self) -> None:
        """Check what one field alone cannot: pairs, paths and exposure."""
        if not self.kernel_modes:
            raise ConfigError("kernel_modes: at least one mode is needed")
        if self.kernel_mode not in self.kernel_modes:
            raise ConfigError(
                f"kernel_mode: {self.kernel_mode} is not among kernel_modes {', '.join(self.kernel_modes)}"
            )
        if self.inject_fault not in (None, *self.kernel_modes):
            raise ConfigError(f"inject_fault: {self.inject_fault} is not among kernel_modes")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert, tls_key: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca: needs tls_cert and tls_key")
        if self.max_step_tokens and self.max_running and self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"max_step_tokens: {self.max_step_tokens} is less than max_running {self.max_running}, "
                "so a full batch could not decode in one step"
            )
        if 0 < self.max_step_growth <= 1:
            raise ConfigError(
                f"max_step_growth: must be above 1, or 0 for no bound, got {self.max_step_growth:g}"
            )
        if self.otlp_endpoint and not _is_http_url(self.otlp_endpoint):
            raise ConfigError(f"otlp_endpoint: expected an http or https URL, got {self.otlp_endpoint!r}")
        if not self.insecure:
            self._check_exposure()

    def _check_exposure(self) -> None:
        """Refuse plaintext, and an admin port that is anybody's, where others than this machine reach it."""
        for name, host in (("host", self.host), ("admin_host", self.admin_host)):
            if not self.tls_cert and not is_loopback(host):
                raise ConfigError(
                    f"{name}: {host} is not loopback; turn TLS on, or say --insecure to serve plaintext"
                )
        if not (self.admin_token_file or self.tls_client_ca or is_loopback(self.admin_host)):
            raise ConfigError(
                f"admin_host: {self.admin_host} is not loopback; give admin_token_file or tls_client_ca, or "
                "say --insecure to let anybody in"
            )
        if not is_loopback(self.metrics_host):
            raise ConfigError(
                f"metrics_host: {self.metrics_host} is not loopback and /metrics is plaintext; "
                "say --insecure to serve it so"
            )

    def engine(self, model_path: str) -> EngineConfig:
        """Pick what the engine needs to know, for the model in the folder `model_path`."""
        own = ServeConfig.__struct_fields__
        shared = {name: getattr(self, name) for name in EngineConfig.__struct_fields__ if name in own}
        return EngineConfig(model_path=model_path, **shared)


_WORDS = MappingProxyType(
    dict.fromkeys(("yes", "on", "true", "1"), True) | dict.fromkeys(("no", "off", "false", "0"), False)
)
"""What a switch may be called in the environment."""


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


class Option(NamedTuple):
    """How one field of `ServeConfig` is spelled and explained to an operator."""

    name: str
    flag: str
    variable: str
    description: str
    default: str
    choices: tuple[str, ...]
    """The values that it, or an item of its list, can take; empty if they are not few."""
    is_switch: bool
    is_list: bool


def serve_options() -> list[Option]:
    """Describe every field of `ServeConfig`, in the order of its declaration."""
    hints = get_type_hints(ServeConfig, include_extras=True)
    return [_describe(field, hints[field.name]) for field in msgspec.structs.fields(ServeConfig)]


def load_config(
    options: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> ServeConfig:
    """Merge options, environment and file (in that order of precedence) into a `ServeConfig`.

    `options` holds only what the command line gave; strings are converted to the field's type. An
    empty variable of the environment counts as unset.

    Raises:
        ConfigError: for an unknown key of the file or a value that cannot be used; it names the
            option the way it was given: as a flag, a variable or a key of the file.
    """
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in _read(file).items() if file is not None else ():
        values[name], given_as[name] = value, f"{file}: {name}"
    described = {option.name: option for option in serve_options()}
    for option in described.values():
        if value := environment.get(option.variable):
            values[option.name], given_as[option.name] = value, option.variable
        if option.name in options:
            values[option.name], given_as[option.name] = options[option.name], option.flag
    converted = {name: _convert(described[name], value, given_as[name]) for name, value in values.items()}
    try:
        return msgspec.convert(converted, ServeConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), values, given_as)) from error


def _convert(option: Option, value: Any, given_as: str) -> Any:
    """Read a string where msgspec would not: a list by its commas, a switch by its word."""
    if not isinstance(value, str):
        return value
    try:
        value = as_text(value)
    except NotUtf8 as error:
        raise ConfigError(f"{given_as}: {error}") from error
    if option.is_list:
        return [item.strip() for item in value.split(",")]
    return _WORDS.get(value.lower(), value) if option.is_switch else value


def _read(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
    if unknown := sorted(set(content) - set(ServeConfig.__struct_fields__)):
        raise ConfigError(f"--config {file}: unknown option {', '.join(unknown)}")
    return content


def _explain(message: str, values: Mapping[str, Any], given_as: Mapping[str, str]) -> str:
    """Say a conversion error of msgspec, "Expected `int` - at `$.port`", in the operator's words."""
    located = re.fullmatch(r"(?P<what>.*) - at `\$\.(?P<name>\w+).*`", message)
    if located is None:  # raised by ServeConfig itself, and names its option
        return message
    name, what = located["name"], located["what"]
    option = next(option for option in serve_options() if option.name == name)
    if option.is_switch:
        expected = "expected yes or no"
    elif option.choices:
        expected = f"expected {'some' if option.is_list else 'one'} of {', '.join(option.choices)}"
    else:
        expected = what.split(", got ")[0].replace("`", "").replace(" | null", "").replace("Exp", "exp")
    return f"{given_as[name]}: {expected}, got {values[name]!r}"


def _describe(field: msgspec.structs.FieldInfo, hint: Any) -> Option:
    kind, *metas = get_args(hint)
    return Option(
        name=field.name,
        flag=f"--{field.name.replace('_', '-')}",
        variable=f"FUSEWIRE_{field.name.upper()}",
        description=next(meta.description for meta in metas if meta.description),
        default=_spell(field.default),
        choices=_choices(kind),
        is_switch=kind is bool,
        is_list=get_origin(kind) is tuple,
    )


def _choices(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is KernelMode or KernelMode in get_args(kind):
        return tuple(mode.value for mode in KernelMode)
    return ()


def _spell(default: Any) -> str:
    if default is None or default == "":
        return "unset"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(default) if isinstance(default, tuple) else str(default)
