"""The settings of a run: by flag, by environment (`BILM_BENCH_…`) or by a TOML file, in that order."""

from pathlib import Path
from typing import Any, Literal

import grpc
from bilm_api.constants import NO_LOG_KEY
from bilm_client._core.balancing import as_target
from bilm_client._core.options import PriorityName
from bilm_client.cli.settings_sources import credentials_from_files, load_command_settings
from bilm_client.policy import Balance
from bilm_system.files import check_readable, check_writable, is_special
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliToggleFlag, SettingsConfigDict

from bilm_bench.conditions import Condition
from bilm_bench.workload.schedule import Step, parse_duration_s, parse_ramp

NO_LOG = (NO_LOG_KEY, "1")
"""Metadata by which a server keeps a call out of its access log."""


class BenchSettings(BaseSettings):
    """Put a server under load and report latencies, throughput, errors, health, memory and descriptors."""

    model_config = SettingsConfigDict(
        env_prefix="BILM_BENCH_",
        env_prefix_target="all",
        frozen=True,
        extra="forbid",
        validate_default=True,
        cli_prog_name="bilm-bench",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    config: Path | None = Field(None, description="TOML file with any of these choices, named as the flags with _")
    target: str = Field(
        "127.0.0.1:50051",
        min_length=1,
        description="HOST:PORT or unix:PATH of the server, or IP:PORT,IP:PORT,… of several",
    )
    balance: Balance = Field("first", description="of several addresses: which server gets a call")
    model: str = Field("", description="name of the server's model; by default its default one")

    text: Path = Field(description="UTF-8 text whose sentences are sent; a sentence a line, or see --running")
    running: bool = Field(False, description="the lines are paragraphs: cut them into sentences, skip headings (= … =)")
    raw: bool = Field(False, description="the server tokenises; otherwise white space separates the tokens")
    sentences: int = Field(1000, ge=1, description="of the text, the first so many")
    seed: int = Field(0, description="of the order of the sentences and of the moments of sending")

    loop: Literal["open", "closed"] = Field(
        "open", description="open: calls come when they come (Poisson); closed: each caller waits for its answer"
    )
    rate: float = Field(50.0, gt=0, allow_inf_nan=False, description="sentences/s of an open loop")
    callers: int = Field(8, ge=1, description="of a closed loop")
    ramp: str = Field("", description="a step for each load (rates or callers): 50,100,200 or from:to:steps")
    step_s: float = Field(10.0, gt=0, allow_inf_nan=False, description="seconds of a step, or of a run without ramp")
    soak: str = Field("", description="instead of --step-s: a long run (90s, 30m, 2h) with slopes an hour")
    warm_up_s: float = Field(1.0, ge=0, allow_inf_nan=False, description="seconds under load before anything counts")

    sentences_per_call: int = Field(1, ge=1, description="sentences in one Embed")
    connections: int = Field(8, ge=1, le=10_000, description="used in turn; a server takes some 256 calls on each")
    layers: Literal["all", "top", "average"] = Field("all", description="which layers")
    pool: Literal["none", "mean", "max"] = Field("none", description="over the tokens of a sentence")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="number format on the wire")
    priority: PriorityName = Field("interactive", description="of every call; batch steps aside for interactive ones")
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="deadline of a call")
    retry: bool = Field(False, description="as the client does: what callers see; otherwise one attempt a call")
    max_in_flight: int = Field(4096, ge=1, description="calls under way; an open loop counts further ones as NOT_SENT")

    verify: bool = Field(False, description="compare each answer with that to the sentence alone, before the run")
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description="largest difference; 0: the same bits")

    token_file: Path | None = Field(None, description="file with our bearer token")
    metadata: list[str] | None = Field(None, description="of every call, NAME=VALUE; several by comma or repeated")
    # A flag of its own kind: argparse takes --no-log for the negation of --log.
    no_log: CliToggleFlag[bool] = Field(
        False, description="mark the calls as tests: they leave no access log (x-bilm-no-log)"
    )
    tls: bool = Field(False, description="connect by TLS")
    ca_file: Path | None = Field(None, description="certificates to trust (PEM); implies --tls")
    cert_file: Path | None = Field(None, description="our certificate (PEM), for a server that asks; implies --tls")
    key_file: Path | None = Field(None, description="the key of --cert-file (PEM)")
    proxy: bool = Field(True, description="use the proxy that http_proxy and the like name")

    server_pid: int | None = Field(None, ge=1, description="the server's process here: memory, descriptors from /proc")
    metrics_url: str = Field("", pattern=r"^(https?://.+)?$", description="or the server's Prometheus page: the same")
    sample_s: float = Field(1.0, ge=0.1, allow_inf_nan=False, description="between samples; at most 600 are kept")

    json_file: Path | None = Field(None, alias="json", description="write the report here")
    html_file: Path | None = Field(None, alias="html", description="write a page with plots here (extra `bench`)")
    fail_on: list[str] | None = Field(
        None, description="exit code 1 if so: accepted.p99_ms>500, error_rate>0.01, …; several by comma or repeated"
    )

    # Of single fields, also where two are meant: a validator of the whole runs only once every field is good, and then
    # a bad value would hide what it has to say.
    @field_validator("target")
    @classmethod
    def _check_target(cls, value: str) -> str:
        return as_target(value)

    @field_validator("ramp")
    @classmethod
    def _check_ramp(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("loop") == "closed" and not all(load == int(load) for load in parse_ramp(value)):
            raise ValueError("callers must be whole numbers")
        if value:
            parse_ramp(value)
        return value

    @field_validator("soak")
    @classmethod
    def _check_soak(cls, value: str, info: ValidationInfo) -> str:
        if value:
            parse_duration_s(value)
            if info.data.get("ramp"):
                raise ValueError("soak and ramp exclude each other")
        return value

    @field_validator("tolerance")
    @classmethod
    def _check_tolerance(cls, value: float, info: ValidationInfo) -> float:
        if value and not info.data.get("verify", True):
            raise ValueError("goes with verify only")
        return value

    @field_validator("metadata", "fail_on", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: list[str] | None) -> list[str] | None:
        for entry in value or ():
            name, separator, _ = entry.partition("=")
            if not (separator and name) or name != name.lower() or name.startswith("grpc-") or name.endswith("-bin"):
                raise ValueError("expected NAME=VALUE with a name in lower case, not grpc-… or …-bin")
        return value

    @field_validator("ca_file", "cert_file", "key_file", "token_file")
    @classmethod
    def _check_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            check_readable(value)
        return value

    @field_validator("key_file")
    @classmethod
    def _check_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("cert_file", value) is None):
            raise ValueError("cert_file and key_file go together")
        return value

    @field_validator("metrics_url")
    @classmethod
    def _check_metrics_url(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("server_pid") is not None:
            raise ValueError("server_pid and metrics_url exclude each other")
        return value

    @field_validator("json_file", "html_file")
    @classmethod
    def _check_report(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and not is_special(value):
            check_writable(value, beside=(".part",))
        if value is not None and info.field_name == "html_file" and value == info.data.get("json_file"):
            raise ValueError("json names this file, too")
        return value

    @field_validator("fail_on")
    @classmethod
    def _check_conditions(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        chosen = info.data
        for condition in map(Condition.parse, value or ()):
            if condition.name.startswith("server.") and not (chosen.get("server_pid") or chosen.get("metrics_url")):
                raise ValueError(f"{condition.name} needs server_pid or metrics_url")
            if condition.name.endswith("_per_hour") and not chosen.get("soak"):
                raise ValueError(f"{condition.name} needs soak")
            if condition.name == "wrong_answers" and not chosen.get("verify"):
                raise ValueError("wrong_answers needs verify")
        return value

    def steps(self) -> tuple[Step, ...]:
        """Return the loads of the run, one after another."""
        if self.ramp:
            return tuple(Step(load, self.step_s) for load in parse_ramp(self.ramp))
        length_s = parse_duration_s(self.soak) if self.soak else self.step_s
        return (Step(self.rate if self.loop == "open" else float(self.callers), length_s),)

    def conditions(self) -> tuple[Condition, ...]:
        """Return what must not be; a wrong result is one without being named."""
        wrong = ("wrong_answers>0",) if self.verify else ()
        return tuple(Condition.parse(text) for text in dict.fromkeys((*wrong, *(self.fail_on or ()))))

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of every call, less the token."""
        given = tuple((name, value) for name, _, value in (entry.partition("=") for entry in self.metadata or ()))
        return (*given, *((NO_LOG,) if self.no_log else ()))

    def credentials(self) -> tuple[grpc.ChannelCredentials | None, str | None]:
        """Return credentials (None: plaintext) and token (None: none) from their files.

        Raises:
            UsageError: A file can't be used.
        """
        return credentials_from_files(
            self.target,
            tls=self.tls,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            token_file=self.token_file,
        )

    def shown(self) -> dict[str, Any]:
        """Return the settings for a report; of metadata, which may hold secrets, the names."""
        choices = self.model_dump(mode="json", exclude={"config", "metadata", "json_file", "html_file"})
        return {**choices, "metadata": [name for name, _ in self.call_metadata()]}


def load_settings(argv: list[str]) -> BenchSettings:
    """Read flags, environment and TOML file.

    Raises:
        UsageError: A value is bad; the message lists all of them.
        SystemExit: There is --help, or a flag that doesn't exist.
    """
    return load_command_settings(BenchSettings, argv)
