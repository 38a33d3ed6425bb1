"""What is checked before the port opens, and without torch: models' headers, tokenizers' languages."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

from bilm_model.errors import LanguageError, ModelError
from bilm_model.tokenization.tokenizers import deferred_tokenizer
from bilm_model.tokenization.types import Tokenizer
from bilm_model.weights.header import ModelHeader, inspect

from bilm_server.config import ModelSettings, ServerConfig
from bilm_server.errors import ConfigurationError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """A model that is to be served.

    Attributes:
        name: that requests may give.
        config: of a server on it alone.
        weight: of its share of the device's time.
        header: what is known of it without its weights.
    """

    name: str
    config: ServerConfig
    weight: float
    header: ModelHeader


@dataclass(frozen=True)
class EnsemblePlan:
    """Models whose vectors are to be concatenated.

    Attributes:
        name: that requests may give.
        members: names of the models, in the order of their vectors.
        layers: of each of them, those that are the ensemble's, ascending.
    """

    name: str
    members: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ServingPlan:
    """What is to be served.

    Attributes:
        names: of models and ensembles, the default one first.
        models: by name.
        ensembles: by name.
    """

    names: tuple[str, ...]
    models: Mapping[str, ModelPlan]
    ensembles: Mapping[str, EnsemblePlan]


def plan_serving(config: ServerConfig) -> ServingPlan:
    """Check each model's files and shapes, and that its tokenizer can be had; return what is to be served.

    Raises:
        ModelError: if a model can't be served.
        ConfigurationError: if there is no such tokenizer, or an ensemble doesn't fit together.
    """
    if not config.models:
        (plan,) = _plan_models([(config, 1.0)])
        return ServingPlan((plan.name,), {plan.name: plan}, {})
    single = [(config.of(model), model.weight) for model in config.models if not model.members]
    models = {plan.name: plan for plan in _plan_models(single)}
    ensembles = {model.name: _plan_ensemble(model, models) for model in config.models if model.members}
    return ServingPlan(tuple(model.name for model in config.models), models, ensembles)


def _plan_models(models: Sequence[tuple[ServerConfig, float]]) -> list[ModelPlan]:
    """Return the plans of all models, or raise what is wrong with any of them."""
    found: list[ModelPlan] = []
    errors: list[ConfigurationError | ModelError] = []
    for config, weight in models:
        try:
            configured_tokenizer(config)
        except ConfigurationError as error:
            errors.append(error)
        try:
            found.append(_plan_model(config, weight))
        except ModelError as error:
            errors.append(error)
    if len(errors) > 1:
        raise ConfigurationError("\n".join(dict.fromkeys(map(str, errors)))) from errors[0].__cause__
    if errors:
        raise errors[0]
    return found


def _plan_model(config: ServerConfig, weight: float) -> ModelPlan:
    header = inspect(config.model, config.options)
    name = served_name(config, header.name)
    if not config.served_model_name and name != header.name:
        _log.warning(
            "model name %r has characters that a name can't have, or too many: served as %r", header.name, name
        )
    return ModelPlan(name, config, weight, header)


def _plan_ensemble(settings: ModelSettings, models: Mapping[str, ModelPlan]) -> EnsemblePlan:
    members = [models[name] for name in settings.members]
    tokenizers = {(each.config.tokenizer, each.config.tokenizer_language) for each in members}
    if len(tokenizers) > 1:
        raise ConfigurationError(f"models: {settings.name}: its members have different tokenizers")
    counts = [each.header.config.layer_count for each in members]
    n_shared = min(counts)
    layers = settings.layers or tuple(tuple(range(count - n_shared, count)) for count in counts)
    for member, count, wanted in zip(members, counts, layers, strict=True):
        if wanted[-1] >= count:
            raise ConfigurationError(
                f"models: {settings.name}: layers: {member.name} has no layer {wanted[-1]}, its last one is {count - 1}"
            )
    return EnsemblePlan(settings.name, settings.members, layers)


def served_name(config: ServerConfig, found: str) -> str:
    """Return the name that a model is served under: the configured one, or that of its file or folder made to fit."""
    return config.served_model_name or re.sub(r"[^A-Za-z0-9._-]", "-", found)[:64] or "model"


def configured_tokenizer(config: ServerConfig) -> Tokenizer:
    """Return the tokenizer for raw text; what takes long to load is loaded with the first one, or before.

    Raises:
        ConfigurationError: if it doesn't know the language, or what it needs isn't installed.
    """
    try:
        return deferred_tokenizer(config.tokenizer, config.tokenizer_language)
    except LanguageError as error:
        raise ConfigurationError(f"tokenizer_language: {error}") from error
    except PackageNotFoundError as error:
        raise ConfigurationError(f"tokenizer: {config.tokenizer} needs {error.name}, which isn't installed") from error
