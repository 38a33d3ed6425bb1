"""A recipe: everything that makes a training run what it is, in one TOML file.

A file may begin from a preset (`preset = "mini"`) and say only what differs.
"""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from bilm_model.config import BilmConfig
from bilm_model.errors import ConfigError
from bilm_system.files import read_text, reason
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

PRESETS = ("mini", "small", "medium", "original", "student")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Section):
    """What is learnt from."""

    train: Path = Field(description="text, UTF-8, a sentence or paragraph a line")
    valid: Path = Field(description="text to measure on after each epoch")
    max_words: int | None = Field(None, ge=2, description="words that the softmax knows; the rest counts as <unk>")
    typos: float = Field(0.0, ge=0, le=1, description="share of the words that are read with a typo while learning")


class Softmax(_Section):
    """The softmax over the vocabulary, used in training and for perplexities; it isn't served."""

    kind: Literal["adaptive", "full"] = Field("adaptive", description="adaptive or full")
    cutoffs: tuple[int, ...] = Field((2000, 10000), description="where the adaptive softmax's clusters begin")
    divisor: float = Field(2.0, ge=1, description="each cluster's vectors are smaller by this factor")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.cutoffs) != sorted(set(self.cutoffs)) or any(cutoff < 1 for cutoff in self.cutoffs):
            raise ValueError(f"cutoffs: expected positive numbers, each above the last, found {self.cutoffs}")
        return self


class Optimisation(_Section):
    """How the weights are learnt."""

    epochs: int = Field(ge=1, description="times through the text")
    batch: int = Field(ge=1, description="streams read together, of each direction")
    steps: int = Field(ge=1, description="tokens that a gradient reaches back")
    optimiser: Literal["adam", "adamw", "adagrad", "sgd"] = Field("adam", description="adam, adamw, adagrad or sgd")
    learning_rate: float = Field(gt=0, description="peak, after a linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="cosine or linear, from the peak down to 0; or constant"
    )
    warmup_steps: int = Field(0, ge=0, description="steps until the peak")
    weight_decay: float = Field(0.0, ge=0, description="as the optimiser takes it")
    gradient_clip: float = Field(gt=0, description="bound of the gradient's Euclidean norm")
    dropout: float = Field(ge=0, lt=1, description="before each LSTM layer and the softmax")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="of the products' factors, float32, bfloat16, or auto: bfloat16 where the processor has such "
        "products; the rest is float32",
    )
    checkpoint_steps: int = Field(500, ge=1, description="steps from one checkpoint to the next")


class Distillation(_Section):
    """Learning a teacher's layer vectors instead of words."""

    teacher: str = Field(description="as bilm-serve's --model")
    map: Literal["linear", "identity"] = Field(
        "linear",
        description="from the student's vectors to the teacher's: learnt, and left behind after training; or identity, "
        "so that the student's vectors can stand for the teacher's (projection_dim must be the same)",
    )


class Recipe(_Section):
    """A training run."""

    seed: int = Field(ge=0, lt=2**63, description="of the initial weights, of dropout and of typos")
    data: Data
    architecture: BilmConfig
    softmax: Softmax = Softmax()
    optimisation: Optimisation
    distillation: Distillation | None = None

    @field_validator("architecture", mode="wrap")
    @classmethod
    def _describes_a_bilm(cls, value: Any, validated: ValidatorFunctionWrapHandler) -> BilmConfig:
        try:
            config: BilmConfig = validated(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error  # for pydantic to list it with the others
        return config

    @model_validator(mode="after")
    def _clusters_have_a_size(self) -> Self:
        n_clusters = len(self.softmax.cutoffs)
        smallest = self.architecture.projection_dim // self.softmax.divisor**n_clusters
        if self.softmax.kind == "adaptive" and smallest < 1:
            raise ValueError(
                f"softmax: divided by {self.softmax.divisor:g} for each of {n_clusters} clusters, nothing is left of "
                f"architecture.projection_dim {self.architecture.projection_dim}"
            )
        return self


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a preset's name or a TOML file. Paths in it are relative to where the command runs.
        overrides: "key=value" each, the value as TOML would have it; a bare word is text.

    Raises:
        ConfigError: listing every bad value.
    """
    content = _preset(source) if source in PRESETS else _with_preset(_parse(Path(source)), source)
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [": ".join((source, *_place(item["loc"]), item["msg"])) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _place(loc: Sequence[int | str]) -> Sequence[str]:
    """Return the place of a value; nothing for what is about the recipe as a whole."""
    return (".".join(map(str, loc)),) if loc else ()


def _with_preset(content: dict[str, Any], source: str) -> dict[str, Any]:
    name = content.pop("preset", None)
    if name is None:
        return content
    if name not in PRESETS:
        raise ConfigError(f"{source}: preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return _merged(_preset(name), content)


def _preset(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files(__package__) / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        presets = ", ".join(PRESETS)
        raise ConfigError(f"{path}: neither a file nor a preset ({presets})") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {reason(error)}") from error


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key=value, like optimisation.epochs=3")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    content[key] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(recipe: Recipe) -> str:
    """Return the whole recipe, every default written out; `read_recipe` reads it back."""
    return tomli_w.dumps(TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude_none=True))
