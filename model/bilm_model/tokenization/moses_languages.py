"""What is known of the Moses tokenizer without loading sacremoses, which takes a third of a second."""

from importlib.metadata import version
from typing import Final

from bilm_model.errors import LanguageError

MOSES_LANGUAGES: Final = frozenset(
    (
        *("as", "bn", "ca", "cs", "de", "el", "en", "es", "et", "fi", "fr", "ga", "gu", "hi", "hu", "is", "it", "kn"),
        *("lt", "lv", "ml", "mni", "mr", "nl", "or", "pa", "pl", "pt", "ro", "ru", "sk", "sl", "sv", "ta", "te", "tdt"),
        *("yue", "zh", "ja", "ko"),
    )
)
"""Those with abbreviations of their own in sacremoses, and those whose script has rules of its own."""


def check_language(language: str) -> None:
    """Check that Moses has rules for a language; sacremoses would take English without a word.

    Raises:
        LanguageError: if it has none.
    """
    if language not in MOSES_LANGUAGES:
        raise LanguageError(f"expected one of {', '.join(sorted(MOSES_LANGUAGES))}, found {language!r}")


def moses_name(language: str) -> str:
    """Return the tokenizer's name, for people and for `GetModel`.

    Raises:
        PackageNotFoundError: if sacremoses isn't installed.
    """
    return f"moses-{language} (sacremoses {version('sacremoses')})"
