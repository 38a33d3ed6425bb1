"""What a tokenizer is, and what it returns."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class TokenizedText:
    """Tokens and where they stand.

    Attributes:
        tokens: in order.
        starts: the first byte of each, counted in the text's UTF-8.
        ends: the byte after the last of each.
    """

    tokens: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class Tokenizer(Protocol):
    """Cuts text into tokens."""

    @property
    def name(self) -> str:
        """For people and for `GetModel`."""

    def __call__(self, text: str) -> TokenizedText:
        """Tokenise one sentence.

        Raises:
            AlignmentError: if the tokens can't be found again in the text.
        """
