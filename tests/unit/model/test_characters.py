import numpy as np
import pytest
from bilm_model import characters
from bilm_model.errors import CharacterError
from hypothesis import given
from hypothesis import strategies as st


def test_a_token_is_its_bytes_between_marks() -> None:
    row = characters.token_ids("ab")
    assert row.tolist() == [259, ord("a") + 1, ord("b") + 1, 260] + [261] * 46


def test_korean_is_its_bytes() -> None:
    row = characters.token_ids("울")
    assert row[1:4].tolist() == [byte + 1 for byte in "울".encode()]


@pytest.mark.parametrize(("token", "mark"), [("<S>", 257), ("</S>", 258)])
def test_boundaries(token: str, mark: int) -> None:
    assert characters.token_ids(token).tolist() == [259, mark, 260] + [261] * 47


def test_long_tokens_are_cut_at_48_bytes_even_inside_a_character() -> None:
    token = "a" * 47 + "é"
    assert characters.token_ids(token)[48:].tolist() == ["é".encode()[0] + 1, 260]
    assert characters.is_truncated(token)
    assert not characters.is_truncated("a" * 48)


@given(st.text(min_size=1).filter(lambda token: token not in ("<S>", "</S>")))
def test_ids_hold_the_token(token: str) -> None:
    row = characters.token_ids(token)
    characters.check_ids(row[None])
    end = int(np.argmax(row == characters.END_WORD))
    data = bytes((row[1:end] - 1).tolist())
    assert data == token.encode()[:48]
    assert characters.is_truncated(token) == (len(token.encode()) > 48)
    assert (row[end + 1 :] == characters.PADDING).all()


@pytest.mark.parametrize("token", ["", "\ud800"])
def test_what_is_no_token(token: str) -> None:
    with pytest.raises(CharacterError):
        characters.token_ids(token)


@pytest.mark.parametrize("bad", [-1, 262])
def test_ids_are_checked_on_the_host(bad: int) -> None:
    ids = characters.character_ids(["a", "b"])
    ids[1, 7] = bad
    with pytest.raises(CharacterError, match=rf"\(1, 7\): expected 0 to 261, found {bad}"):
        characters.check_ids(ids)


def test_a_sentence_without_tokens_has_no_boundaries() -> None:
    assert characters.with_boundaries([]) == ()
    assert characters.character_ids([]).shape == (0, 50)
