import pytest
from bilm_api.v1 import embed_pb2
from bilm_server.requests import SentenceLimits, priced_tokens

LIMITS = SentenceLimits(tokens=50, text_bytes=600)


@pytest.mark.parametrize(
    ("text", "n_tokens"),
    [
        ("", 0),
        (" \t\n\u2003", 0),
        ("a", 1),
        (" a ", 1),
        ("a" * 6, 1),
        ("a" * 7, 2),
        ("ä" * 3, 1),
        ("ä" * 4, 2),
        ("🙂" * 3, 2),
        ("a" * 600, 100),
        ("a" * 601, 0),  # refused without being tokenised
        ("ä" * 301, 0),
    ],
)
def test_text_is_priced_by_its_bytes(text: str, n_tokens: int) -> None:
    assert priced_tokens([embed_pb2.Sentence(text=text)], LIMITS) == (0, n_tokens)


@pytest.mark.parametrize(("given", "n_tokens"), [(0, 0), (1, 1), (50, 50), (51, 0)])
def test_tokens_are_priced_as_they_are(given: int, n_tokens: int) -> None:
    sentence = embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=["a long token"] * given))
    assert priced_tokens([sentence], LIMITS) == (n_tokens, 0)


def test_a_sentence_without_input_costs_nothing() -> None:
    assert priced_tokens([embed_pb2.Sentence()], LIMITS) == (0, 0)


def test_a_request_is_priced_as_the_sum_of_its_sentences() -> None:
    sentences = [embed_pb2.Sentence(text="seven b"), embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=["a"] * 3))]
    assert priced_tokens(sentences * 2, LIMITS) == (6, 4)
