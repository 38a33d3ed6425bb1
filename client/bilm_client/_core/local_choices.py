"""Chosen rows and spans where the server can't choose: it is asked for whole sentences, and the client cuts and pools.

The vectors are added up in the server's order, so what is pooled has the server's bits, save that scaling to length 1
may round the last bit another way.
"""

from bisect import bisect_left, bisect_right
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import numpy as np
from bilm_api.constants import Reason
from numpy.typing import NDArray

from bilm_client._core.chosen import Choice
from bilm_client._core.inputs import Input
from bilm_client._core.options import Options
from bilm_client.errors import SentenceError
from bilm_client.results import Embedding, Vectors

_LEAST_NORM = np.float32(1e-12)

_OptionsT = TypeVar("_OptionsT", bound=Options)


def whole_options(options: _OptionsT) -> _OptionsT:
    """Return what to ask for of whole sentences, so that the rest can be done here."""
    if not options.pooled:
        return options
    # Pooling comes before scaling, and both before rounding
    return replace(options, pool="none", l2_normalize=False, dtype="float32")


def choose_here(whole: Embedding, source: Input, options: Options, index: int) -> Embedding | SentenceError:
    """Return what a server that can choose would have returned.

    Args:
        whole: What `whole_options` brought.
        source: The sentence.
        options: What the caller asks for.
        index: The sentence's number in the call.
    """
    try:
        if not options.pooled:
            return whole if source.choice is None else _rows_of(whole, source.choice)
        return replace(whole, vectors=_pooled(whole, source, options))
    except _RefusedError as error:
        return SentenceError(str(error), index=index, reason=error.reason.value, code=grpc.StatusCode.INVALID_ARGUMENT)


class _RefusedError(Exception):
    """Why a server would refuse the sentence."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _rows_of(whole: Embedding, choice: Choice) -> Embedding:
    rows = _checked_rows(choice, len(whole.tokens))
    vectors = whole.vectors[..., list(rows), :]
    vectors.flags.writeable = False
    offsets = None if whole.offsets is None else tuple(whole.offsets[row] for row in rows)
    return replace(whole, tokens=tuple(whole.tokens[row] for row in rows), vectors=vectors, offsets=offsets)


def _pooled(whole: Embedding, source: Input, options: Options) -> Vectors:
    n_tokens, choice = len(whole.tokens), source.choice
    if not n_tokens:
        raise _RefusedError(Reason.POOLING_EMPTY, "a sentence without tokens can't be pooled")
    if choice is None:
        found = _pool(whole.vectors, range(n_tokens), options)
    elif choice.rows is not None:
        found = _pool(whole.vectors, _checked_rows(choice, n_tokens), options)
    else:
        ranges = _checked_spans(choice, whole, source.text_bytes)
        found = np.stack([_pool(whole.vectors, rows, options) for rows in ranges], axis=-2)
    if options.l2_normalize:
        norms = np.sqrt(np.square(found).sum(axis=-1, keepdims=True))
        found = found / np.maximum(norms, _LEAST_NORM)
    return _rounded(found, options)


def _pool(vectors: Vectors, rows: "range | tuple[int, ...]", options: Options) -> NDArray[np.float32]:
    combine: Any = np.maximum if options.pool == "max" else np.add
    total: NDArray[np.float32] = vectors[..., rows[0], :].astype(np.float32)
    for row in rows[1:]:
        combine(total, vectors[..., row, :], out=total)
    return total / np.float32(len(rows)) if options.pool == "mean" else total


def _rounded(vectors: NDArray[np.float32], options: Options) -> Vectors:
    found: Vectors = vectors
    if options.dtype == "float16":
        with np.errstate(over="ignore"):  # beyond 65,504 is infinity
            found = vectors.astype(np.float16)
    elif options.dtype == "bfloat16":
        bits = np.ascontiguousarray(vectors).view(np.uint32)
        # To the nearest, ties to even; NaN has no neighbour
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        found = np.where(np.isnan(vectors), vectors, nearest.view(np.float32))
    found.flags.writeable = False
    return found


def _checked_rows(choice: Choice, n_tokens: int) -> tuple[int, ...]:
    rows = choice.rows or ()
    if not rows:
        raise _RefusedError(Reason.SELECTION_INVALID, "rows: none (expected at least one)")
    if (highest := max(rows)) >= n_tokens:
        message = f"rows: {highest} is out of range (the sentence has {n_tokens} tokens)"
        raise _RefusedError(Reason.SELECTION_INVALID, message)
    return rows


def _checked_spans(choice: Choice, whole: Embedding, text_bytes: int) -> list[range]:
    if not choice.spans:
        raise _RefusedError(Reason.SELECTION_INVALID, "spans: none (expected at least one)")
    length = text_bytes if choice.in_bytes else len(whole.tokens)
    found = [_tokens_of(start, end, choice, whole) for start, end in choice.spans]
    for number, ((start, end), tokens) in enumerate(zip(choice.spans, found, strict=True)):
        if start >= end or end > length or not tokens:
            message = f"spans[{number}]: {start} to {end} (expected a range with a token, and within {length})"
            raise _RefusedError(Reason.SELECTION_INVALID, message)
    return found


def _tokens_of(start: int, end: int, choice: Choice, whole: Embedding) -> range:
    if not choice.in_bytes or whole.offsets is None:
        return range(start, end)
    first = bisect_right(whole.offsets, start, key=lambda bounds: bounds[1])
    return range(first, bisect_left(whole.offsets, end, key=lambda bounds: bounds[0]))
