"""A token becomes 50 character ids: its UTF-8 bytes between two marks. Pure.

Source: `ELMoCharacterMapper` of AllenNLP and `UnicodeCharsVocabulary` of bilm-tf. There, ids run from 0 to 260 (bytes,
then the five marks), and 1 is added at the end so that 0 can stand for 'no token here'. Here the marks have their
final values from the start.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bilm_model.alphabet import CHARACTER_COUNT, MAX_CHARACTERS, MAX_TOKEN_BYTES
from bilm_model.errors import CharacterError

NO_TOKEN = 0
_BYTE_SHIFT = 1
BEGIN_SENTENCE = 256 + _BYTE_SHIFT
END_SENTENCE = 257 + _BYTE_SHIFT
BEGIN_WORD = 258 + _BYTE_SHIFT
END_WORD = 259 + _BYTE_SHIFT
PADDING = 260 + _BYTE_SHIFT

CharacterIds = NDArray[np.int16]
"""Character ids, shape (tokens, MAX_CHARACTERS)."""

BEGIN_TOKEN, END_TOKEN = "<S>", "</S>"


def _boundary_row(mark: int) -> CharacterIds:
    row = np.full(MAX_CHARACTERS, PADDING, dtype=np.int16)
    row[:3] = BEGIN_WORD, mark, END_WORD
    row.setflags(write=False)
    return row


_BOUNDARY_ROWS = {
    BEGIN_TOKEN.encode(): _boundary_row(BEGIN_SENTENCE),
    END_TOKEN.encode(): _boundary_row(END_SENTENCE),
}


def token_bytes(token: str) -> bytes:
    """Return the UTF-8 bytes of a token.

    Raises:
        CharacterError: if the token is empty, or holds half of a surrogate pair and so has no UTF-8 form.
    """
    if not token:
        raise CharacterError("a token is empty")
    try:
        return token.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CharacterError(f"a token is not valid Unicode: {error.reason}") from error


def is_truncated(token: str) -> bool:
    """Return whether the token has more bytes than are read."""
    # No character takes more than 4 bytes: most tokens needn't be encoded to know.
    return len(token) * 4 > MAX_TOKEN_BYTES and len(token_bytes(token)) > MAX_TOKEN_BYTES


def read_bytes(token: str) -> bytes:
    """Return the bytes of a token that the model reads: two tokens that share them have the same vector.

    Raises:
        CharacterError: as `token_bytes`.
    """
    return token_bytes(token)[:MAX_TOKEN_BYTES]


def bytes_ids(tokens: Sequence[bytes]) -> CharacterIds:
    """Return the character ids (tokens, MAX_CHARACTERS) of tokens, from the bytes that are read of them.

    A token longer than `MAX_TOKEN_BYTES` has been cut there, in the middle of a character if need be, as the published
    models were trained. "<S>" and "</S>" are the sentence boundaries.
    """
    lengths = np.array([len(token) for token in tokens], dtype=np.intp)
    letters = np.frombuffer(b"".join(token.ljust(MAX_TOKEN_BYTES) for token in tokens), dtype=np.uint8)
    letters = letters.reshape(-1, MAX_TOKEN_BYTES)
    ids = np.full((len(tokens), MAX_CHARACTERS), PADDING, dtype=np.int16)
    ids[:, 0] = BEGIN_WORD
    np.add(letters, _BYTE_SHIFT, out=ids[:, 1:-1], where=np.arange(MAX_TOKEN_BYTES) < lengths[:, None], dtype=np.int16)
    ids[np.arange(len(tokens)), 1 + lengths] = END_WORD
    for row, token in enumerate(tokens):
        if token in _BOUNDARY_ROWS:
            ids[row] = _BOUNDARY_ROWS[token]
    return ids


def token_ids(token: str) -> CharacterIds:
    """Return the character ids (MAX_CHARACTERS,) of one token.

    Raises:
        CharacterError: as `token_bytes`.
    """
    ids: CharacterIds = character_ids([token])[0]
    return ids


def character_ids(tokens: Iterable[str]) -> CharacterIds:
    """Return the character ids (tokens, MAX_CHARACTERS) of several tokens.

    Raises:
        CharacterError: as `token_bytes`.
    """
    return bytes_ids([read_bytes(token) for token in tokens])


def with_boundaries(tokens: Sequence[str]) -> tuple[str, ...]:
    """A sentence as the model reads it; one without tokens has no boundaries either."""
    return (BEGIN_TOKEN, *tokens, END_TOKEN) if tokens else ()


def check_ids(ids: CharacterIds) -> None:
    """Make sure that every id has a row in the embedding.

    On a GPU an index error is an assertion of the device that ends the process's use of it: so look here, on the host.

    Raises:
        CharacterError: naming the first bad id and its place.
    """
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < CHARACTER_COUNT):
        place = np.argwhere((ids < 0) | (ids >= CHARACTER_COUNT))[0]
        found = ids[tuple(place)]
        raise CharacterError(f"character id at {tuple(map(int, place))}: expected 0 to 261, found {found}")
