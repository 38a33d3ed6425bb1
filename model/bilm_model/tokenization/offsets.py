"""From places in characters to places in bytes."""

from bilm_model.tokenization.types import TokenizedText


def in_bytes(text: str, places: list[tuple[int, int, str]]) -> TokenizedText:
    """Return the tokens (start, end, token), places in characters, with their places in bytes."""
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
