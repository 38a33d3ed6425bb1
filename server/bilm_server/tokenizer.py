"""Raw text -> tokens with their places. The tokenizers are libraries'; finding the places again is ours."""

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from bilm_api.constants import Reason
from sacremoses import MosesTokenizer
from sacremoses.corpus import NonbreakingPrefixes

from bilm_server.config import ConfigurationError
from bilm_server.errors import RefusalError

# Those with abbreviations of their own, and those whose script has rules of its own.
_LANGUAGES = {*NonbreakingPrefixes().available_langs.values(), "ja", "ko"}


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
        """Tokenises one sentence.

        Raises:
            RefusalError: TEXT_NOT_TOKENIZABLE, if the tokens can't be found again in the text.
        """


class WhitespaceTokenizer:
    """What Unicode white space leaves."""

    name = "whitespace"

    def __call__(self, text: str) -> TokenizedText:
        """See `Tokenizer`."""
        return _in_bytes(text, [(match.start(), match.end(), match.group()) for match in re.finditer(r"\S+", text)])


class _Moses(MosesTokenizer):  # type: ignore[misc]
    """sacremoses, with its tests for letters whose time depends on the text, not on Unicode's tables.

    As it is, a word that ends in a period (as "x.y.") costs 3 ms: a text of 4 KiB takes seconds.
    """

    def __init__(self, language: str) -> None:
        super().__init__(lang=language)
        self._letters, self._lower_letters = frozenset(self.IsAlpha), frozenset(self.IsLower)

    def isanyalpha(self, text: str) -> bool:
        """Part of sacremoses' interface."""
        return not self._letters.isdisjoint(text)

    def islower(self, text: str) -> bool:
        """Likewise."""
        return self._lower_letters.issuperset(text)


class SacremosesTokenizer:
    """The Moses tokenizer by sacremoses, nothing escaped."""

    def __init__(self, language: str) -> None:
        if language not in _LANGUAGES:  # sacremoses would take English without a word
            raise ConfigurationError(f"tokenizer_language: expected one of {', '.join(sorted(_LANGUAGES))}")
        self._tokenizer = _Moses(language)
        self.name = f"moses-{language} (sacremoses {version('sacremoses')})"

    def __call__(self, text: str) -> TokenizedText:
        """See `Tokenizer`."""
        return _in_bytes(text, _align(text, self._tokenizer.tokenize(text, escape=False)))


def new_tokenizer(kind: str, language: str) -> Tokenizer:
    """The tokenizer of a configuration.

    Raises:
        ConfigurationError: if Moses doesn't know the language.
    """
    return WhitespaceTokenizer() if kind == "whitespace" else SacremosesTokenizer(language)


def _align(text: str, tokens: list[str]) -> list[tuple[int, int, str]]:
    """Finds each token's characters in the text, in order.

    Moses inserts and removes white space and removes control characters, so that a token may not stand in the text as
    one piece; but its characters do, one after another.
    """
    places, position = [], 0
    for token in tokens:
        start = position
        # A later copy of the token is no find: only what Moses drops may lie between two tokens. And looking for one
        # through the whole text, for each token that Moses has changed, would take quadratic time.
        while not text.startswith(token, start) and start < len(text) and _is_dropped(text[start]):
            start += 1
        end = start + len(token)
        if not text.startswith(token, start):
            start, end = _align_characters(text, token, position)
        places.append((start, end, token))
        position = end
    return places


def _is_dropped(character: str) -> bool:
    return character.isspace() or not character.isprintable()


def _align_characters(text: str, token: str, position: int) -> tuple[int, int]:
    start = None
    for character in token:
        position = text.find(character, position)
        if position < 0:
            raise RefusalError(Reason.TEXT_NOT_TOKENIZABLE, "the tokenizer changed characters of the text")
        start = position if start is None else start
        position += 1
    return start or 0, position


def _in_bytes(text: str, places: list[tuple[int, int, str]]) -> TokenizedText:
    if text.isascii():
        bounds = [(start, end) for start, end, _ in places]
    else:
        offsets = _byte_offsets(text)
        bounds = [(offsets[start], offsets[end]) for start, end, _ in places]
    return TokenizedText(
        tokens=tuple(token for _, _, token in places),
        starts=tuple(start for start, _ in bounds),
        ends=tuple(end for _, end in bounds),
    )


def _byte_offsets(text: str) -> list[int]:
    """For each character, and for the end, its offset in UTF-8."""
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode("utf-8")))
    return offsets
