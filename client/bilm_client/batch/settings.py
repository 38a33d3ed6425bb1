"""The settings of a run: by flag, by environment (`BILM_EMBED_…`) or by a TOML file, in that order."""

from pathlib import Path
from typing import Any, Literal

import grpc
from bilm_system.files import check_writable, same_file
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from bilm_client._core.balancing import as_target
from bilm_client._core.options import PriorityName
from bilm_client.cli.settings_sources import credentials_from_files, load_command_settings
from bilm_client.policy import Balance


class RunSettings(BaseSettings):
    """Turn text into vectors: one sentence a line in, one dataset a sentence out."""

    model_config = SettingsConfigDict(
        env_prefix="BILM_EMBED_",
        frozen=True,
        extra="forbid",
        validate_default=True,
        cli_prog_name="bilm-embed",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    input: CliPositionalArg[str] = Field(description="UTF-8 text, one sentence a line; - reads standard input")
    output: CliPositionalArg[Path] = Field(description="ends in .hdf5 or .h5 (layout of `allennlp elmo`) or .npz")

    config: Path | None = Field(None, description="TOML file with any of these choices, named as the flags with _")
    target: str = Field(
        "127.0.0.1:50051",
        min_length=1,
        description="HOST:PORT or unix:PATH of the server, or IP:PORT,IP:PORT,… of several",
    )
    balance: Balance = Field("first", description="of several addresses: which server gets a call")
    model: str = Field(
        "",
        description="name of the server's model, by default its default one; or a model to compute with in this "
        "process: a name that ends in .safetensors or .hdf5, or has a / in it",
    )
    in_process: bool = Field(False, description="compute in this process, without --model by the model that ships")
    options: Path | None = Field(None, description="in process: published options of a published weight file")
    device: str = Field("auto", min_length=1, description="in process: cpu, cuda, cuda:N or auto (a GPU if any)")
    precision: Literal["float32", "bfloat16", "auto"] = Field("float32", description="in process: of the products")
    tokenizer: Literal["moses", "whitespace"] = Field("moses", description="in process: for --raw")
    tokenizer_language: str = Field("en", min_length=2, description="in process: whose rules Moses follows")
    tls: bool = Field(False, description="connect by TLS; a file of certificates or a key implies it")
    ca_file: Path | None = Field(None, description="PEM file of certificates to trust; by default those of gRPC")
    cert_file: Path | None = Field(None, description="PEM file of the own certificate, for mutual TLS")
    key_file: Path | None = Field(None, description="PEM file of its key")
    token_file: Path | None = Field(None, description="file with the bearer token for the server")
    proxy: bool = Field(True, description="use the proxy that http_proxy and the like name")
    raw: bool = Field(
        False, description="tokenise, by the server or by --tokenizer; otherwise white space separates tokens"
    )
    layers: Literal["all", "top", "average"] = Field("all", description="which layers")
    pool: Literal["none", "mean", "max"] = Field("none", description="over the tokens of a sentence")
    dtype: Literal["float32", "float16"] = Field("float32", description="number format of the datasets")
    carry_state: bool = Field(False, description="read the file as one text: each line goes on from the one before")
    use_sentence_keys: bool = Field(False, description="sentences as keys instead of line numbers")
    forget_sentences: bool = Field(False, description="leave out the dataset sentence_to_index")
    skip_blank: bool = Field(False, description="pass over blank lines; otherwise they are an error")
    errors: Path | None = Field(
        None, description="list bad lines here (JSON lines) and go on; otherwise the first one stops the run"
    )
    resume: bool = Field(
        False, description="continue an interrupted run of the same input, options, model and precision"
    )
    overwrite: bool = Field(False, description="start anew whatever is there")
    priority: PriorityName = Field(
        "batch", description="batch: steps aside for interactive callers, where the server can"
    )
    batch_tokens: int = Field(2048, ge=1, description="tokens a request, about")
    concurrency: int = Field(4, ge=1, description="requests under way")
    timeout_s: float = Field(600.0, gt=0, description="seconds that one request may take")
    patience_s: float = Field(600.0, ge=0, description="seconds to go on trying while the server can't be reached")

    # Of single fields, also where two are meant: a validator of the whole runs only once every field is good, and then
    # a bad value would hide what it has to say.
    @field_validator("target")
    @classmethod
    def _check_target(cls, value: str) -> str:
        return as_target(value)

    @field_validator("output")
    @classmethod
    def _check_output(cls, value: Path, info: ValidationInfo) -> Path:
        if value.suffix.lower() not in (".hdf5", ".h5", ".npz"):
            raise ValueError("expected a name that ends in .hdf5, .h5 or .npz")
        check_writable(value, beside=(".journal", ".part"))
        if same_file(value, Path(info.data.get("input", "-"))):
            raise ValueError("the input is this file")
        return value

    @field_validator("errors")
    @classmethod
    def _check_errors(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None:
            check_writable(value)
            for other in ("input", "output"):
                if same_file(value, Path(info.data.get(other, "-"))):
                    raise ValueError(f"the {other} is this file")
        return value

    @field_validator("overwrite")
    @classmethod
    def _check_overwrite(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("resume"):
            raise ValueError("resume and overwrite exclude each other")
        return value

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

    @property
    def computes(self) -> bool:
        """Whether the model is this process's own."""
        return self.in_process or "/" in self.model or self.model.endswith((".safetensors", ".hdf5"))

    def recorded(self) -> dict[str, Any]:
        """Return the settings that decide what a result looks like; a run can only be resumed with the same ones."""
        names = ("raw", "layers", "pool", "dtype", "carry_state", "use_sentence_keys", "forget_sentences", "skip_blank")
        return {name: getattr(self, name) for name in names}


def load_settings(argv: list[str]) -> RunSettings:
    """Read flags, environment and TOML file.

    Raises:
        UsageError: A value is bad; the message lists all of them.
        SystemExit: There is --help, or a flag that doesn't exist.
    """
    return load_command_settings(RunSettings, argv)
