"""Rows and spans that a caller asks for, checked against a sentence's tokens.

Legend: N chosen tokens, n spans.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bilm_model.engine.types import Span, TokenChoice
from bilm_model.errors import ChoiceError

Indices = NDArray[np.int64]

_MAX_CHARACTERS = 2**20
"""Of chosen tokens together, unless the sentence has more: a long token that is chosen again and again would make a
message that can't be sent."""


def choose_rows(rows: Sequence[int], tokens: Sequence[str], max_tokens: int) -> TokenChoice:
    """Return the choice of single tokens.

    Args:
        rows: Their indices, not negative, in the order in which they come back.
        tokens: Of the sentence.
        max_tokens: That may be chosen, each counted as often as it is.

    Raises:
        ChoiceError: There are none, too many, or one is out of range.
    """
    if not tokens:
        raise ChoiceError("rows: the sentence has no tokens")
    _check_count("rows", len(rows), max_tokens)
    found = np.fromiter(rows, np.int64, len(rows))
    if (highest := int(found.max())) >= len(tokens):
        raise ChoiceError(f"rows: {highest} is out of range (the sentence has {len(tokens)} tokens)")
    n_characters = sum([len(tokens[row]) for row in rows])
    if n_characters > _MAX_CHARACTERS and n_characters > sum(map(len, tokens)):
        raise ChoiceError(f"rows: {n_characters} characters together are more than {_MAX_CHARACTERS}")
    return TokenChoice(found)


def choose_spans(spans: Sequence[Span], n_tokens: int, max_tokens: int) -> TokenChoice:
    """Return the choice of ranges of a sentence's `n_tokens` tokens; `max_tokens` as for `choose_rows`.

    Raises:
        ChoiceError: There are none, too many, or one is empty or out of range.
    """
    _check_count("spans", len(spans), max_tokens)
    return _ranges(*_bounds(spans, n_tokens, "tokens"), max_tokens)


def choose_byte_spans(
    spans: Sequence[Span], n_bytes: int, starts: Sequence[int], ends: Sequence[int], max_tokens: int
) -> TokenChoice:
    """Return the choice of the tokens that ranges of a text's bytes have something of.

    Args:
        spans: The ranges.
        n_bytes: Length of the text in UTF-8.
        starts: First byte of each token.
        ends: Byte after the last of each token.
        max_tokens: As for `choose_rows`.

    Raises:
        ChoiceError: As for `choose_spans`, or a range has nothing of any token.
    """
    _check_count("spans", len(spans), max_tokens)
    first_bytes, end_bytes = _bounds(spans, n_bytes, "bytes")
    firsts = np.searchsorted(np.array(ends), first_bytes, side="right")
    behind = np.searchsorted(np.array(starts), end_bytes, side="left")
    if (bad := np.flatnonzero(firsts >= behind)).size:
        first = int(bad[0])
        raise ChoiceError(f"spans[{first}]: no token has any of the bytes {first_bytes[first]} to {end_bytes[first]}")
    return _ranges(firsts, behind, max_tokens)


def _ranges(starts: Indices, ends: Indices, max_tokens: int) -> TokenChoice:
    """Return the choice of ranges of tokens, (n,) each, none of them empty."""
    lengths = ends - starts
    if (n_chosen := int(lengths.sum())) > max_tokens:
        raise ChoiceError(f"spans: {n_chosen} tokens together are more than {max_tokens}")
    rows = np.arange(n_chosen) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return TokenChoice(rows, lengths)


def _check_count(field: str, count: int, limit: int) -> None:
    if not count:
        raise ChoiceError(f"{field}: none (expected at least one)")
    if count > limit:
        raise ChoiceError(f"{field}: {count} are more than {limit}")


def _bounds(spans: Sequence[Span], length: int, unit: str) -> tuple[Indices, Indices]:
    """Return where spans begin and end, all of which have something of a sentence of a length."""
    starts = np.fromiter([span.start for span in spans], np.int64, len(spans))
    ends = np.fromiter([span.end for span in spans], np.int64, len(spans))
    if (bad := np.flatnonzero((starts >= ends) | (ends > length))).size:
        first = int(bad[0])
        raise ChoiceError(
            f"spans[{first}]: {starts[first]} to {ends[first]} (expected a range that isn't empty, of the sentence's "
            f"{length} {unit})"
        )
    return starts, ends
