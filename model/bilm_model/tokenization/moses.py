"""The Moses tokenizer. The rules are sacremoses'; its tokens are found again in the text here."""

from sacremoses import MosesTokenizer

from bilm_model.errors import AlignmentError
from bilm_model.tokenization.moses_languages import check_language, moses_name
from bilm_model.tokenization.offsets import in_bytes
from bilm_model.tokenization.types import TokenizedText


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
        """Part of sacremoses' interface."""
        return self._lower_letters.issuperset(text)


class SacremosesTokenizer:
    """The Moses tokenizer by sacremoses, nothing escaped."""

    def __init__(self, language: str) -> None:
        """Load the language's rules.

        Raises:
            LanguageError: if Moses doesn't know the language.
        """
        check_language(language)
        self._tokenizer = _Moses(language)
        self.name = moses_name(language)

    def __call__(self, text: str) -> TokenizedText:
        """See `Tokenizer`."""
        return in_bytes(text, _align(text, self._tokenizer.tokenize(text, escape=False)))


def _align(text: str, tokens: list[str]) -> list[tuple[int, int, str]]:
    """Find each token's characters in the text, in order.

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
            raise AlignmentError("the tokenizer changed characters of the text")
        start = position if start is None else start
        position += 1
    return start or 0, position
