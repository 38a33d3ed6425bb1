"""The sizes of the character alphabet: what options and weights depend on, without NumPy."""

from typing import Final

MAX_CHARACTERS: Final = 50
"""Character ids of a token."""
MAX_TOKEN_BYTES: Final = MAX_CHARACTERS - 2
"""Bytes of a token that are read; begin and end of word take the other two places."""
CHARACTER_COUNT: Final = 262
"""Different character ids: 256 bytes, five marks, and 0."""
