"""The server's configuration: all settings, checked."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from bilm_api.constants import MAX_RESPONSE_BYTES, Priority
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bilm_server.addresses import socket_path, split_address
from bilm_server.limits import for_long_sentences
from bilm_server.log_levels import parse_levels

MODEL_NAME = "([A-Za-z0-9._-]{1,64})"
"""What a model can be called, as a regular expression: the name stands in metrics, health and the access log."""

_HOST = r"\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]"
"""A name, an IPv4 address, an IPv6 address in brackets as it stands in `Host`, or any host."""


class Right(StrEnum):
    """Rights, as they stand in the configuration. Never renamed."""

    NO_LOG = "no-log"
    """Keep calls out of the access log, by the metadata x-bilm-no-log."""
    RELOAD = "reload"
    """Have the server read its models and callers again."""


def _check_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError("expected a name as the token file or the certificate gives it")
    return name


class CallerSettings(BaseModel):
    """One of `[[callers]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_check_name)] = Field(description="as the token file or the certificate has it")
    rights: frozenset[Right] = Field(frozenset(), description="what it may do beside calling")
    max_priority: Priority = Field(
        Priority.INTERACTIVE, description="batch: all that it sends is batch, whatever it asks for"
    )


Precision = Literal["auto", "float32", "bfloat16"]
TokenizerKind = Literal["moses", "whitespace"]


class ModelSettings(BaseModel):
    """One of `[[models]]`: a model, or an ensemble of others of them. What isn't set is as for the whole server."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str = Field(pattern=f"^{MODEL_NAME}$", description="that requests give")
    path: str | None = Field(None, description="as model")
    options: Path | None = Field(None, description="as options")
    precision: Precision | None = Field(None, description="as precision")
    tokenizer: TokenizerKind | None = Field(None, description="as tokenizer")
    tokenizer_language: str | None = Field(None, min_length=2, description="as tokenizer_language")
    token_cache_mib: int | None = Field(None, ge=0, description="as token_cache_mib")
    input_cache_mib: int | None = Field(None, ge=0, description="as input_cache_mib")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of its share of the device's time while others want it, too"
    )
    members: tuple[str, ...] = Field((), description="models whose vectors are concatenated, in this order")
    layers: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = Field(
        (),
        description="for each member, its layers that are the ensemble's; by default as many of the last as all have",
    )

    @field_validator("members")
    @classmethod
    def _check_members(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(value) == 1 or len(set(value)) < len(value):
            raise ValueError("expected two names or more, each once")
        own = [name for name in _OF_ONE_MODEL if info.data.get(name) is not None]
        if value and info.data.get("weight", 1.0) != 1.0:
            own.append("weight")
        if value and own:
            raise ValueError(f"an ensemble has no {', '.join(own)} of its own")
        if not value and info.data.get("path") is None:
            raise ValueError("expected path, or members")
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: tuple[tuple[int, ...], ...], info: ValidationInfo) -> tuple[tuple[int, ...], ...]:
        if value and len(value) != len(info.data.get("members", value)):
            raise ValueError("expected a list of layers for each member")
        if len({len(layers) for layers in value}) > 1 or not all(value):
            raise ValueError("expected as many layers of each member, one at least")
        if any(list(layers) != sorted(set(layers)) for layers in value):
            raise ValueError("expected ascending layers")
        return value


_OF_ONE_MODEL = (
    "path", "options", "precision", "tokenizer", "tokenizer_language", "token_cache_mib", "input_cache_mib"
)  # fmt: skip
"""Settings that a model has and an ensemble hasn't."""


class ServerConfig(BaseSettings):
    """All settings. Frozen, parsed once, passed down."""

    model_config = SettingsConfigDict(
        env_prefix="BILM_",
        frozen=True,
        extra="forbid",
        validate_default=True,
        cli_prog_name="bilm-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    config: Path | None = Field(None, description="TOML file with any of these settings, named as the flags with _")
    check_config: bool = Field(
        False, description="check the configuration and all that it names, show what memory it takes, and end"
    )
    model: str = Field(
        "",
        description="a .safetensors file, a folder with options.json and weights.hdf5, a .hdf5 file with --options, or "
        "random:tiny|small|medium|original for tests; empty: the model that ships; NAME=MODEL for each of several",
    )
    options: Path | None = Field(None, description="the options.json that goes with a .hdf5 file")
    served_model_name: str = Field(
        "",
        pattern=f"^{MODEL_NAME}?$",
        description="name that requests may give: letters, digits, . _ -, at most 64; empty: of the file or folder",
    )
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT (port 0: any free one) or unix:PATH")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Precision = Field(
        "float32",
        description="of the products, float32, bfloat16, or auto: bfloat16 where the processor has such products; "
        "sums are in float32",
    )
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0: one a core that it may use, at most 16")
    tokenizer: TokenizerKind = Field("moses", description="for raw text")
    tokenizer_language: str = Field("en", min_length=2, description="whose rules Moses follows: en, de, ko, ja, …")
    models: tuple[ModelSettings, ...] = Field(
        (),
        description="several models, a [[models]] each in the TOML file with name and path, and what differs from the "
        "settings of the whole server; calls that name none get the first",
    )
    kernel_cache: Path | None = Field(
        None,
        description="folder that compiled kernels are kept in, closed to other users; by default bilm-serve in "
        "XDG_CACHE_HOME or ~/.cache",
    )
    require_kernels: bool = Field(
        False, description="refuse to serve where a kernel doesn't compile or work, instead of computing more slowly"
    )
    reflection: bool = Field(False, description="offer server reflection")
    kserve: bool = Field(True, description="offer the Open Inference Protocol of KServe and Triton on the same port")

    max_rows: int | None = Field(
        None, ge=1, description="sentences computed at a time; by default 128 on a CPU, 1024 on a GPU"
    )
    max_tokens_in_flight: int = Field(
        65536, ge=8, description="tokens and boundaries of the sentences computed at a time"
    )
    token_cache_mib: int = Field(
        64, ge=0, description="MiB for vectors and names of tokens seen before; 0: none are kept"
    )
    input_cache_mib: int | None = Field(
        None,
        ge=0,
        description="MiB for layer 1's input projections of tokens seen before; 0: none; by default 128, on a GPU 0; "
        "small cells in bfloat16 by AMX have none",
    )
    batch_share: float = Field(
        0.125, gt=0, le=0.5, description="share of the rounds that batch sentences get while a few interactive ones run"
    )
    max_sentences_per_request: int = Field(1024, ge=1, description="sentences in one Embed")
    max_tokens_per_request: int = Field(16384, ge=1, description="tokens in one Embed")
    max_tokens_per_sentence: int = Field(32768, ge=1, description="tokens in one sentence")
    max_text_kib: int = Field(256, ge=1, description="KiB of one raw text; tokenising takes its time")
    max_waiting_tokens: int = Field(65536, ge=1, description="tokens admitted and not computed, of Embed calls")
    max_waiting_mib: int = Field(512, ge=1, description="MiB of responses admitted and not sent, of Embed calls")
    max_stream_tokens: int = Field(65536, ge=1, description="tokens admitted and not sent, of all streams together")
    max_stream_mib: int = Field(1024, ge=1, description="MiB of responses admitted and not sent, of all streams")
    max_stream_items_in_flight: int = Field(64, ge=1, description="items that one stream reads ahead of its results")

    health_listen: str = Field(
        "", description="HOST:PORT or unix:PATH for health alone, with its own connections and no TLS; empty: none"
    )
    ready_listen: str = Field(
        "", description="HOST:PORT that is open while the server is SERVING, for checks that only connect; empty: none"
    )
    http_listen: str = Field("", description="HOST:PORT for calls over HTTP; needs the extra http; empty: none")
    http_host: tuple[str, ...] = Field(
        (),
        description="host that HTTP requests may name, without its port, several times for several, or * for any; by "
        "default names and addresses of the loopback",
    )
    max_connections: int = Field(
        0,
        ge=0,
        description="connections at a time, half of them HTTP's where that is on; 0: what the descriptors allow, at "
        "most 10,000",
    )
    max_connection_age_s: float = Field(
        300.0, gt=0, description="seconds after which a connection is asked to be opened anew, so that load spreads"
    )
    load_reports: bool = Field(
        False, description="report tokens/s and utilisation in the trailer of each call, for weighted balancing"
    )
    stream_stall_s: float = Field(
        20.0, gt=0, description="seconds that a stream waits for its caller to read a result; then it is ended"
    )

    tls_cert: Path | None = Field(None, description="PEM file with the server's certificate chain; turns TLS on")
    tls_key: Path | None = Field(None, description="PEM file with its private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file with the authorities of callers' certificates, which are then required"
    )
    token_file: Path | None = Field(
        None, description="bearer tokens that callers must show, `NAME TOKEN` a line; read again when it changes"
    )
    caller_tokens_per_s: int = Field(0, ge=0, description="tokens a second for each caller, on average; 0: no limit")
    caller_max_calls: int = Field(0, ge=0, description="calls at a time for each caller; 0: no limit")

    callers: tuple[CallerSettings, ...] = Field(
        (),
        description="what single callers may do beside calling, and how urgent they may be, a [[callers]] each in the "
        "TOML file with name, rights and max_priority; as JSON elsewhere: "
        '[{"name": "team-a", "rights": ["no-log"], "max_priority": "batch"}]',
    )

    hang_s: float = Field(10.0, gt=0, description="seconds without progress after which the engine counts as hung")
    give_up_s: float = Field(
        60.0, gt=0, description="seconds that a hung or failing engine gets before the process ends with code 3"
    )
    drain_delay_s: float = Field(
        4.0, ge=0, description="seconds between NOT_SERVING and refusing new calls: check interval × fall + 1"
    )
    grace_s: float = Field(30.0, ge=0, description="seconds that calls in flight get to finish after that")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log lines")
    log_format: Literal["text", "json"] = Field("text", description="of the log lines")
    loggers: str = Field("", description="levels of single parts, as in access=off,health=debug")
    test_log: Path | None = Field(
        None,
        description="file for the access lines of calls that callers keep out of the log; without it they leave none",
    )
    metrics_listen: str = Field("", description="HOST:PORT for Prometheus metrics over HTTP; empty: none")
    trace_endpoint: str = Field(
        "", description="URL of an OTLP collector over gRPC, as in http://127.0.0.1:4317; empty: none"
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of the calls that are traced where the caller doesn't say"
    )
    alert_url: str = Field("", description="webhook that errors in the log are posted to; empty: none")
    alert_format: Literal["json", "jandi"] = Field("json", description="of these posts")

    @field_validator("listen", "health_listen")
    @classmethod
    def _check_listen(cls, value: str, info: ValidationInfo) -> str:
        if value.startswith("unix:"):
            socket_path(value)
            return value
        if value.startswith("unix-abstract:"):
            raise ValueError("abstract sockets are not supported (expected HOST:PORT or unix:PATH)")
        if value or info.field_name == "listen":
            split_address(value, "HOST:PORT or unix:PATH")
        return value

    @field_validator("metrics_listen", "ready_listen", "http_listen")
    @classmethod
    def _check_address(cls, value: str) -> str:
        if value:
            split_address(value)
        return value

    @field_validator("http_host")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(_HOST, host) for host in value):
            raise ValueError("expected names or addresses without ports, or *")
        return value

    @field_validator("alert_url", "trace_endpoint")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("expected an http or https URL")
        return value

    @field_validator("loggers")
    @classmethod
    def _check_loggers(cls, value: str) -> str:
        parse_levels(value)
        return value

    @field_validator("callers")
    @classmethod
    def _check_callers(cls, value: tuple[CallerSettings, ...]) -> tuple[CallerSettings, ...]:
        names = [caller.name for caller in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names must differ, these are there twice: {', '.join(sorted(map(repr, twice)))}")
        return value

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[ModelSettings, ...], info: ValidationInfo) -> tuple[ModelSettings, ...]:
        if value and (short := [name for name in ("model", "options", "served_model_name") if info.data.get(name)]):
            raise ValueError(f"{', '.join(short)}: for one model alone, doesn't go with models")
        names = [model.name for model in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"names must differ, these are there twice: {', '.join(sorted(twice))}")
        single = {model.name for model in value if not model.members}
        for model in value:
            if unknown := [member for member in model.members if member not in single]:
                raise ValueError(f"{model.name}: members: no single models: {', '.join(unknown)}")
        return value

    def of(self, model: ModelSettings) -> "ServerConfig":
        """Return the configuration of a server on one of `models` alone."""
        own = {name: getattr(model, name) for name in _OF_ONE_MODEL if name != "path"}
        changes = {name: value for name, value in own.items() if value is not None}
        changes |= {"model": model.path, "options": model.options, "served_model_name": model.name, "models": ()}
        return self.model_copy(update=changes)

    @field_validator("tls_key", "tls_client_ca")
    @classmethod
    def _check_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        has_certificate = info.data.get("tls_cert") is not None
        if value is not None and not has_certificate:
            raise ValueError("needs tls_cert")
        if info.field_name == "tls_key" and value is None and has_certificate:
            raise ValueError("tls_cert needs it")
        return value

    @property
    def authenticates(self) -> bool:
        """Whether callers prove who they are."""
        return self.token_file is not None or self.tls_client_ca is not None

    # Validators of single fields, also where two are meant: one of the whole would be silent while any field is bad.
    @field_validator("max_waiting_tokens")
    @classmethod
    def _check_waiting_tokens(cls, value: int, info: ValidationInfo) -> int:
        return _at_least(value, "max_tokens_per_request", info)

    @field_validator("max_tokens_per_sentence")
    @classmethod
    def _check_sentence_tokens(cls, value: int, info: ValidationInfo) -> int:
        most = for_long_sentences(info.data.get("max_tokens_in_flight", 2 * value + 2)) - 2  # two boundaries
        if value > most:
            raise ValueError(f"must not be more than {most}, what max_tokens_in_flight leaves to one sentence")
        return value

    @field_validator("max_stream_tokens")
    @classmethod
    def _check_stream_tokens(cls, value: int, info: ValidationInfo) -> int:
        return _at_least(value, "max_tokens_per_sentence", info)

    @field_validator("max_waiting_mib")
    @classmethod
    def _check_waiting_mib(cls, value: int) -> int:
        if value * 2**20 < MAX_RESPONSE_BYTES:
            raise ValueError(f"must be at least {MAX_RESPONSE_BYTES // 2**20}, one response")
        return value


def _at_least(value: int, smaller: str, info: ValidationInfo) -> int:
    least = info.data.get(smaller, value)
    if value < least:
        raise ValueError(f"must not be less than {smaller}, {least}")
    return value
