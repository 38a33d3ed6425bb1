"""A recipe: everything that makes a training run what it is, in one TOML file."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bilm_model.config import BilmConfig
from bilm_model.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimisation(_Section):
    """How the weights are learnt."""

    epochs: int = Field(ge=1)
    batch: int = Field(ge=1, description="streams read together, of each direction")
    steps: int = Field(ge=1, description="tokens that a gradient reaches back")
    learning_rate: float = Field(gt=0, description="peak; linear warm-up, then half a cosine down to 0")
    warmup_steps: int = Field(ge=0)
    gradient_clip: float = Field(gt=0, description="bound of the gradient's Euclidean norm")
    dropout: float = Field(ge=0, lt=1)
    softmax_cutoffs: tuple[int, ...] = Field(description="where the adaptive softmax's clusters begin")


class Recipe(_Section):
    """A training run."""

    seed: int
    architecture: BilmConfig
    optimisation: Optimisation


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        ConfigError: listing every bad value.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(content)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error
