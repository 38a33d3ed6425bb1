"""The keyword arguments of `embed` and `embed_stream`: their types for overloads, their values, and their checks.

Each client's methods take `**keywords`, show the fields of the class that holds them as their signature, and pass them
on as one object.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypedDict, TypeVar, cast

from bilm_client._core.inputs import check_bool, check_state
from bilm_client._core.options import DTypeName, LayersName, Options, PoolName, PriorityName, ScalarMix

WINDOW = 64
WINDOW_TOKENS = 16_384
RETURN_STATE_EVERY = 16

# Arguments that may be large, and differ from call to call.
_CARRYING = frozenset({"states", "initial_state"})

_Arguments = TypeVar("_Arguments", bound=Options)
_Method = TypeVar("_Method", bound=Callable[..., Any])


class OutputKeywords(TypedDict, total=False):
    """What is returned for each sentence, and how urgent it is."""

    layers: LayersName
    pool: PoolName
    dtype: DTypeName
    mix: ScalarMix | None
    l2_normalize: bool
    priority: PriorityName
    timeout_s: float | None


class EmbedKeywords(OutputKeywords, total=False):
    """The keyword arguments of `embed`, less `on_error`, on which its result type depends."""

    states: Sequence[bytes | None] | None
    return_states: bool


class StreamKeywords(OutputKeywords, total=False):
    """The keyword arguments of `embed_stream`, less `on_error`, on which its result type depends."""

    return_states: bool
    carry_state: bool
    initial_state: bytes | None
    return_state_every: int
    window: int
    window_tokens: int


@dataclass(frozen=True, slots=True)
class EmbedArguments(Options):
    """The keyword arguments of one `embed`; states are checked with their sentences."""

    states: Sequence[bytes | None] | None = None
    return_states: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class StreamArguments(Options):
    """The keyword arguments of one `embed_stream`.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
    """

    return_states: bool = False
    carry_state: bool = False
    initial_state: bytes | None = None
    return_state_every: int = RETURN_STATE_EVERY
    window: int = WINDOW
    window_tokens: int = WINDOW_TOKENS
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        check_bool("return_states", self.return_states)
        check_bool("carry_state", self.carry_state)
        _check_positive_int("return_state_every", self.return_state_every)
        _check_positive_int("window", self.window)
        _check_positive_int("window_tokens", self.window_tokens)
        if check_state("initial_state", self.initial_state) and not self.carry_state:
            raise ValueError("initial_state must be given with carry_state=True only, got one without")


def keywords_of(arguments: type[Options]) -> Callable[[_Method], _Method]:
    """Show the fields of a class of arguments in the signature of a method that takes them as `**keywords`."""
    shown = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(arguments)
    ]

    def decorate(method: _Method) -> _Method:
        signature = inspect.signature(method)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        method.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return method

    return decorate


def parse_keywords(arguments: type[_Arguments], method: str, keywords: Mapping[str, Any]) -> _Arguments:
    """Check the keyword arguments of a method.

    Raises:
        TypeError: An argument isn't one of the method's or has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
    """
    if unknown := keywords.keys() - arguments.__dataclass_fields__.keys():
        raise TypeError(f"{method}() got an unexpected keyword argument {min(unknown)!r}")
    if _CARRYING.isdisjoint(keywords):
        try:
            checked: _Arguments = _checked(cast("Any", arguments), tuple(keywords), *keywords.values())
            return checked
        except TypeError:
            pass  # a value that can't be hashed; or one of a wrong type, which the next line names
    return arguments(**keywords)


@lru_cache(maxsize=256, typed=True)  # calls with equal options share them; `typed` tells 1 from True
def _checked(arguments: type[Any], names: tuple[str, ...], *values: Any) -> Any:
    return arguments(**dict(zip(names, values, strict=True)))


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
