"""Which tokens of a sentence come back: what a request asks for, checked against the sentence's tokens."""

from collections.abc import Sequence

import numpy as np
from bilm_api.constants import MAX_CHOSEN_PER_TOKEN, Reason
from bilm_model.engine.types import TokenChoice
from numpy.typing import NDArray

from bilm_server.errors import RefusalError
from bilm_server.inference.types import AskedTokens, Sentence, Span

Indices = NDArray[np.int64]

_MAX_CHARACTERS = 2**20
"""Of chosen tokens together, unless the sentence has more: a long token that is chosen again and again would make a
message that can't be sent."""


def choose(asked: AskedTokens, sentence: Sentence, text_bytes: int | None, max_tokens: int) -> TokenChoice:
    """Return the choice of tokens that a request asks for.

    Args:
        asked: what it asks for.
        sentence: tokenised.
        text_bytes: length of the text that it was; None: it came as tokens.
        max_tokens: that may be chosen, each counted as often as it is; `MAX_CHOSEN_PER_TOKEN` of each may be fewer.

    Raises:
        RefusalError: SELECTION_INVALID.
    """
    max_tokens = min(max_tokens, MAX_CHOSEN_PER_TOKEN * len(sentence.tokens))
    if asked.rows is not None:
        return TokenChoice(_rows(asked.rows, sentence.tokens, max_tokens))
    if not sentence.output.pooled:
        raise _invalid("spans: they need a pooling")
    _check_count("spans", len(asked.spans), max_tokens)
    match asked.unit:
        case "tokens":
            starts, ends = _bounds(asked.spans, len(sentence.tokens), "tokens")
        case "bytes":
            if text_bytes is None:
                raise _invalid("spans.unit: bytes need a text, and the sentence came as tokens")
            starts, ends = _touched(*_bounds(asked.spans, text_bytes, "bytes"), sentence)
        case unit:
            raise _invalid(f"spans.unit: unsupported value {unit} (expected tokens or bytes)")
    lengths = ends - starts
    if (n_chosen := int(lengths.sum())) > max_tokens:
        raise _invalid(f"spans: {n_chosen} tokens together are more than {max_tokens}")
    rows = np.arange(n_chosen) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return TokenChoice(rows, lengths)


def _rows(asked: Sequence[int], tokens: Sequence[str], max_tokens: int) -> Indices:
    if not tokens:
        raise _invalid("rows: the sentence has no tokens")
    _check_count("rows", len(asked), max_tokens)
    rows = np.fromiter(asked, np.int64, len(asked))
    if (highest := int(rows.max())) >= len(tokens):
        raise _invalid(f"rows: {highest} is out of range (the sentence has {len(tokens)} tokens)")
    n_characters = sum([len(tokens[row]) for row in asked])
    if n_characters > _MAX_CHARACTERS and n_characters > sum(map(len, tokens)):
        raise _invalid(f"rows: {n_characters} characters together are more than {_MAX_CHARACTERS}")
    return rows


def _check_count(field: str, count: int, limit: int) -> None:
    if not count:
        raise _invalid(f"{field}: none (expected at least one)")
    if count > limit:
        raise _invalid(f"{field}: {count} are more than {limit}")


def _bounds(spans: Sequence[Span], length: int, unit: str) -> tuple[Indices, Indices]:
    """Return where spans begin and end, all of which have something of a sentence of a length."""
    starts = np.fromiter([span.start for span in spans], np.int64, len(spans))
    ends = np.fromiter([span.end for span in spans], np.int64, len(spans))
    if (bad := np.flatnonzero((starts >= ends) | (ends > length))).size:
        first = int(bad[0])
        raise _invalid(
            f"spans[{first}]: {starts[first]} to {ends[first]} (expected a range that isn't empty, of the sentence's "
            f"{length} {unit})"
        )
    return starts, ends


def _touched(starts: Indices, ends: Indices, sentence: Sentence) -> tuple[Indices, Indices]:
    """Return the ranges of tokens that ranges of bytes have something of."""
    firsts = np.searchsorted(np.array(sentence.ends), starts, side="right")
    behind = np.searchsorted(np.array(sentence.starts), ends, side="left")
    if (bad := np.flatnonzero(firsts >= behind)).size:
        first = int(bad[0])
        raise _invalid(f"spans[{first}]: no token has any of the bytes {starts[first]} to {ends[first]}")
    return firsts, behind


def _invalid(message: str) -> RefusalError:
    return RefusalError(Reason.SELECTION_INVALID, message)
