"""Chosen rows and spans of a fake's sentence."""

from collections.abc import Sequence
from typing import NamedTuple

from bilm_api.v1 import embed_pb2 as pb


class FakeChoice(NamedTuple):
    """What of a sentence comes back.

    Attributes:
        parts: Rows, of each span by itself.
        spans: Whether it is spans that are chosen.
    """

    parts: list[list[int]]
    spans: bool

    @property
    def possible(self) -> bool:
        """Whether there is something, and no span is empty or out of range."""
        return bool(self.parts) and all(self.parts)


def choice_of(sentence: pb.Sentence, n_tokens: int, bounds: Sequence[tuple[int, int]]) -> FakeChoice | None:
    """Return what a sentence of so many tokens chooses; None: all of it.

    Args:
        sentence: The message.
        n_tokens: Its tokens.
        bounds: Where each of them begins and ends, in bytes, if it came as text.
    """
    match sentence.WhichOneof("selection"):
        case "rows":
            rows = list(sentence.rows.rows)
            return FakeChoice([rows if max(rows, default=0) < n_tokens else []], spans=False)
        case "spans":
            length = n_tokens
            if sentence.spans.unit == pb.SPAN_UNIT_BYTES:
                length = len(sentence.text.encode())
            else:
                bounds = [(row, row + 1) for row in range(n_tokens)]
            return FakeChoice([_touched(span, bounds, length) for span in sentence.spans.spans], spans=True)
        case _:
            return None


def _touched(span: pb.Span, bounds: Sequence[tuple[int, int]], length: int) -> list[int]:
    if not span.start < span.end <= length:
        return []
    return [row for row, (start, end) in enumerate(bounds) if start < span.end and span.start < end]
