"""The choice of a tokenizer by its name."""

from bilm_model.tokenization.deferred import DeferredTokenizer
from bilm_model.tokenization.moses_languages import check_language, moses_name
from bilm_model.tokenization.types import Tokenizer
from bilm_model.tokenization.whitespace import WhitespaceTokenizer


def new_tokenizer(kind: str, language: str) -> Tokenizer:
    """Return a tokenizer.

    Args:
        kind: "whitespace" or "moses".
        language: whose rules Moses follows.

    Raises:
        LanguageError: if Moses doesn't know the language.
    """
    if kind == "whitespace":
        return WhitespaceTokenizer()
    # Not at the top: sacremoses may be missing where white space is all that is needed
    from bilm_model.tokenization.moses import SacremosesTokenizer  # noqa: PLC0415

    return SacremosesTokenizer(language)


def deferred_tokenizer(kind: str, language: str) -> Tokenizer:
    """Return a tokenizer that loads what takes long with the first text, or before by `DeferredTokenizer.load`.

    Args:
        kind: "whitespace" or "moses".
        language: whose rules Moses follows.

    Raises:
        LanguageError: if Moses doesn't know the language.
        PackageNotFoundError: if sacremoses is needed and isn't installed.
    """
    if kind == "whitespace":
        return WhitespaceTokenizer()
    check_language(language)
    return DeferredTokenizer(moses_name(language), lambda: new_tokenizer(kind, language))
