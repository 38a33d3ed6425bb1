"""Which tokens of a sentence come back: what a caller chooses, and how it is written on the wire."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.options import Options

SpanUnit = Literal["tokens", "characters", "bytes"]
Ranges = tuple[tuple[int, int], ...]

_UNITS = ("tokens", "characters", "bytes")
_MAX_INDEX = 2**32 - 1
# Bytes that a row, and a span, takes on the wire, at most
_ROW_BYTES = 5
_SPAN_BYTES = 14
# Of text
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Chosen:
    """A sentence of which chosen tokens come back, in place of all of them.

    Which of them there are is checked by the server, or once the sentence's tokens are known: what can't be is the
    sentence's error, reason SELECTION_INVALID.

    Attributes:
        sentence: Text, or a sequence of tokens.
        rows: Indices of tokens, in the order in which their vectors come back, or are pooled; None: `spans` choose.
        spans: Ranges (start, end) of the sentence, without their ends, each of which is pooled to one vector.
        span_unit: What their ends count: "tokens", or "characters" of the text, or "bytes" of its UTF-8. A span that
            cuts a token takes it whole.

    Raises:
        TypeError: Something has the wrong type.
        ValueError: Not one of `rows` and `spans` is given, a number is negative or too large, or `span_unit` isn't a
            known one, or needs a text.
    """

    sentence: str | Sequence[str]
    rows: tuple[int, ...] | None
    spans: Ranges
    span_unit: SpanUnit

    def __init__(
        self,
        sentence: str | Sequence[str],
        *,
        rows: Iterable[int] | None = None,
        spans: Iterable[tuple[int, int]] | None = None,
        span_unit: SpanUnit = "tokens",
    ) -> None:
        if isinstance(sentence, Chosen):
            raise TypeError("sentence must be a str or a list of str, got a Chosen")
        if (rows is None) == (spans is None):
            raise ValueError(f"one of rows and spans must be given, got {'none' if rows is None else 'both'}")
        if span_unit not in _UNITS:
            raise ValueError(f"span_unit must be one of {', '.join(map(repr, _UNITS))}, got {span_unit!r}")
        if span_unit != "tokens" and (spans is None or not isinstance(sentence, str)):
            raise ValueError(f"span_unit must be 'tokens' without spans of a text, got {span_unit!r}")
        object.__setattr__(self, "sentence", sentence)
        object.__setattr__(self, "rows", None if rows is None else tuple(_index("rows", row) for row in rows))
        object.__setattr__(self, "spans", tuple(map(_span, () if spans is None else spans)))
        object.__setattr__(self, "span_unit", span_unit)

    def choice(self) -> "Choice":
        """Return the choice in the wire's units.

        Raises:
            ValueError: The text can't be written as UTF-8.
        """
        spans = self.spans
        if self.span_unit == "characters" and not str(self.sentence).isascii():
            offsets = list(_byte_offsets(str(self.sentence)))
            # What lies behind the text's end stays there
            spans = tuple((_at(offsets, start), _at(offsets, end)) for start, end in spans)
        return Choice(self.rows, spans, self.span_unit != "tokens")


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a sentence comes back, as the wire has it.

    Attributes:
        rows: Indices of tokens; None: spans.
        spans: Ranges of tokens or bytes.
        in_bytes: Whether they are of bytes.
    """

    rows: tuple[int, ...] | None
    spans: Ranges
    in_bytes: bool

    @property
    def request_bytes(self) -> int:
        """Bytes that it takes in a request, at most, beside those of any sentence."""
        return _ROW_BYTES * len(self.rows) if self.rows is not None else _SPAN_BYTES * len(self.spans)

    @property
    def token_estimate(self) -> int:
        """Tokens that are chosen, each counted as often as it is; a guess for spans of bytes."""
        if self.rows is not None:
            return len(self.rows)
        per_token = _BYTES_PER_TOKEN if self.in_bytes else 1
        return sum(max(0, end - start) // per_token + 1 for start, end in self.spans)

    def write(self, message: pb.Sentence) -> None:
        """Write it into a message."""
        if self.rows is not None:
            message.rows.SetInParent()  # where there are none, too
            message.rows.rows.extend(self.rows)
            return
        message.spans.unit = pb.SPAN_UNIT_BYTES if self.in_bytes else pb.SPAN_UNIT_TOKENS
        for start, end in self.spans:
            message.spans.spans.add(start=start, end=end)

    def check_pool(self, name: str, options: Options) -> None:
        """Let spans be asked for with a pooling only.

        Raises:
            ValueError: `name`, which is what messages call the sentence, has spans without.
        """
        if self.rows is None and not options.pooled:
            raise ValueError(f"pool must be 'mean' or 'max' for the spans of {name}, got {options.pool!r}")


def _index(name: str, value: int) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be ints, got {value!r}") from None
    if not 0 <= index <= _MAX_INDEX:
        raise ValueError(f"{name} must be from 0 to {_MAX_INDEX}, got {index}")
    return index


def _span(value: tuple[int, int]) -> tuple[int, int]:
    try:
        start, end = value
    except (TypeError, ValueError):
        raise TypeError(f"spans must be pairs of ints, got {value!r}") from None
    return _index("spans", start), _index("spans", end)


def _byte_offsets(text: str) -> Iterator[int]:
    """Yield the offset in UTF-8 of each character, and of the end."""
    offset = 0
    for character in text:
        yield offset
        offset += 1 if character < "\x80" else len(character.encode())
    yield offset


def _at(offsets: Sequence[int], index: int) -> int:
    return offsets[index] if index < len(offsets) else min(_MAX_INDEX, offsets[-1] + index - len(offsets) + 1)
