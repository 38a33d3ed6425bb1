"""Arguments of `embed` and `embed_stream`: their types for overloads, and their checks, shared by every client."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypedDict

from bilm_client._inputs import Input, Sentence, check_bool, check_state, parse_sentence, parse_sentences
from bilm_client._job import EmbedJob
from bilm_client._options import DTypeName, LayersName, OnError, Options, PoolName, ScalarMix
from bilm_client._session import StreamSession
from bilm_client._settings import Settings

WINDOW = 64
WINDOW_TOKENS = 16_384
RETURN_STATE_EVERY = 16


class OutputKeywords(TypedDict, total=False):
    """What is returned for each sentence."""

    layers: LayersName
    pool: PoolName
    dtype: DTypeName
    mix: ScalarMix | None
    l2_normalize: bool
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


def embed_job(
    settings: Settings,
    sentences: str | Iterable[Sentence],
    *,
    layers: LayersName,
    pool: PoolName,
    dtype: DTypeName,
    mix: ScalarMix | None,
    l2_normalize: bool,
    on_error: OnError,
    states: Sequence[bytes | None] | None,
    return_states: bool,
) -> EmbedJob:
    """Check the arguments of `embed`.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
    """
    options = Options(layers, pool, dtype, mix, l2_normalize, on_error)
    return EmbedJob(parse_sentences(sentences, states, return_states), options, settings)


def stream_session(
    settings: Settings,
    *,
    layers: LayersName,
    pool: PoolName,
    dtype: DTypeName,
    mix: ScalarMix | None,
    l2_normalize: bool,
    on_error: OnError,
    return_states: bool,
    carry_state: bool,
    initial_state: bytes | None,
    return_state_every: int,
    window: int,
    window_tokens: int,
    uniform: Callable[[], float],
) -> StreamSession:
    """Check the arguments of `embed_stream`, less its input.

    Raises:
        TypeError: An argument has the wrong type; the message names it.
        ValueError: An argument has a value that can't be; the message names it.
    """
    options = Options(layers, pool, dtype, mix, l2_normalize, on_error)
    check_bool("return_states", return_states)
    check_bool("carry_state", carry_state)
    _check_positive_int("return_state_every", return_state_every)
    _check_positive_int("window", window)
    _check_positive_int("window_tokens", window_tokens)
    state = check_state("initial_state", initial_state)
    if state and not carry_state:
        raise ValueError("initial_state must be given with carry_state=True only, got one without")
    return StreamSession(
        options,
        settings,
        window=window,
        window_tokens=window_tokens,
        uniform=uniform,
        carry_state=carry_state,
        state_every=return_state_every,
        initial_state=state,
    )


def by_stream_session(settings: Settings, job: EmbedJob, uniform: Callable[[], float]) -> StreamSession:
    """The session for those sentences of a job that an Embed can't bring."""
    options = replace(job.options, on_error="return")  # the job settles, by the sentence's number in the call
    return StreamSession(
        options, settings, window=WINDOW, window_tokens=WINDOW_TOKENS, uniform=uniform, version=job.version
    )


def stream_input(sentence: Sentence, index: int, return_state: bool) -> Input:
    """Check one sentence of a stream.

    Raises:
        TypeError: It is neither a str nor a sequence of str.
        ValueError: A string can't be written as UTF-8.
    """
    return parse_sentence(sentence, f"sentence {index}", return_state=return_state)


def check_iterable(sentences: object) -> None:
    """Check the input of `embed_stream`: a lone str would be taken for a sequence of letters.

    Raises:
        TypeError: It is a str or bytes.
    """
    if isinstance(sentences, str | bytes | bytearray):
        raise TypeError(f"sentences must be an iterable of sentences, got one {type(sentences).__name__}")


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
