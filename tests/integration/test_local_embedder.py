"""In process everything is as from a server: bits, tokens, states, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bilm_client import Chosen, Client, ScalarMix, SentenceError
from bilm_client.errors import InvalidRequestError
from bilm_local import LocalEmbedder

from tests.support.servers import TINY, LoopServer

if TYPE_CHECKING:
    from bilm_client.results import Embedding

MIX = ScalarMix([0.3, -1, 0.5], gamma=1.5)
TEXT = "Naïve “quotes”, don't they?"
SENTENCES: list[Any] = [TEXT, ["its", "own", "tokens"], "", [], ["日本", "x" * 60], "A " * 200]
OPTIONS = [
    {},
    {"layers": "top", "dtype": "float16"},
    {"layers": "average", "dtype": "bfloat16", "l2_normalize": True},
    {"layers": "mix", "mix": MIX},
    {"layers": "mix", "mix": ScalarMix([1, 0, 2], layer_norm=True), "pool": "max"},
    {"pool": "mean", "l2_normalize": True},
    {"priority": "batch"},
]


@pytest.fixture(scope="module")
def embedder() -> Iterator[LocalEmbedder]:
    with LocalEmbedder(TINY, device="cpu") as found:
        yield found


@pytest.fixture
def client(server: LoopServer) -> Iterator[Client]:
    with Client(server.target) as found:
        yield found


def as_values(found: Embedding | SentenceError) -> Any:
    """Everything of a result but who computed it."""
    if isinstance(found, SentenceError):
        return type(found), found.index, found.reason, found.code, found.message
    bits = found.vectors.dtype, found.vectors.shape, found.vectors.tobytes()
    return found.tokens, bits, found.truncated, found.offsets, found.state, found.model_version


def assert_equal(local: Any, remote: Any) -> None:
    assert [as_values(each) for each in local] == [as_values(each) for each in remote]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_and_refusals_are_a_servers(embedder: LocalEmbedder, client: Client, options: dict[str, Any]) -> None:
    arguments = {"on_error": "return", **options}
    local = embedder.embed(SENTENCES, return_states=True, **arguments)
    assert_equal(local, client.embed(SENTENCES, return_states=True, **arguments))
    assert_equal(local, embedder.embed_stream(SENTENCES, return_states=True, **arguments))


@pytest.mark.parametrize(
    "sentence",
    [["a", ""], Chosen(["a"], rows=[1]), Chosen(["a"], rows=[]), Chosen("", rows=[0]), ["a"] * 32_769],
    ids=["empty token", "row out of range", "no row", "no token", "too long"],
)
@pytest.mark.parametrize("method", ["embed", "embed_stream"])
def test_a_refused_sentence_has_a_servers_error(
    embedder: LocalEmbedder, client: Client, sentence: Any, method: str
) -> None:
    sentences = [["good"], sentence, ["good"]]
    local, remote = [list(getattr(each, method)(sentences, on_error="return")) for each in (embedder, client)]
    assert isinstance(local[1], SentenceError)
    assert_equal(local, remote)


def test_chosen_rows_and_spans_are_a_servers(embedder: LocalEmbedder, client: Client) -> None:
    rows = [Chosen(TEXT, rows=[2, 0, 2]), Chosen(["a", "b"], rows=[1])]
    spans = [
        Chosen(TEXT, spans=[(0, 3), (6, 14)], span_unit="characters"),
        Chosen(TEXT, spans=[(1, 4)], span_unit="bytes"),
        Chosen(["a", "b", "c"], spans=[(0, 2), (1, 3)]),
        Chosen("a  b", spans=[(1, 2)], span_unit="bytes"),  # no token has any of it
    ]
    for sentences, pool in ((rows, "none"), (rows, "max"), (spans, "mean")):
        arguments: dict[str, Any] = {"pool": pool, "on_error": "return"}
        local = embedder.embed(sentences, **arguments)
        assert_equal(local, client.embed(sentences, **arguments))
        assert_equal(local, embedder.embed_stream(sentences, **arguments))
    assert isinstance(local[-1], SentenceError)
    assert local[-1].reason == "SELECTION_INVALID"


def test_states_continue_on_either_side(embedder: LocalEmbedder, client: Client) -> None:
    document = [["one", "two"], "three, four", [], ["a", ""], ["five"]]
    arguments: dict[str, Any] = {"carry_state": True, "return_state_every": 2, "on_error": "return"}
    local = list(embedder.embed_stream(document, **arguments))
    assert_equal(local, client.embed_stream(document, **arguments))
    [first] = embedder.embed([["one"]], return_states=True)
    assert_equal(embedder.embed([["two"]], states=[first.state]), client.embed([["two"]], states=[first.state]))
    [error] = embedder.embed([["two"]], states=[b"no state"], on_error="return")
    assert isinstance(error, SentenceError)
    assert error.reason == "STATE_INVALID"


def test_a_mix_that_float32_cant_hold_is_refused_as_by_a_server(embedder: LocalEmbedder, client: Client) -> None:
    for each in (embedder, client):
        with pytest.raises(InvalidRequestError) as raised:
            each.embed("a", layers="mix", mix=ScalarMix([1e300, 0, 0]))
        assert raised.value.reason == "MIX_INVALID"


def test_the_model_is_described_as_a_server_does(embedder: LocalEmbedder, client: Client) -> None:
    local, remote = embedder.model_info(), client.model_info()
    for name in ("version", "layer_count", "width", "cell_size", "parameter_count", "tokenizer", "state_bytes"):
        assert getattr(local, name) == getattr(remote, name), name
    assert (local.inputs, local.contexts, local.features) == (remote.inputs, remote.contexts, remote.features)
    assert embedder.list_models() == (local,)
    assert [embedder.health(name) for name in ("", f"model:{local.name}")] == ["SERVING", "SERVING"]
    assert embedder.health("model:another") == "SERVICE_UNKNOWN"


def test_more_than_a_part_holds_has_the_same_bits_in_any_company(embedder: LocalEmbedder) -> None:
    sentences = [[f"w{number}", "b"] * (1 + number % 7) for number in range(4500)]
    found = embedder.embed(sentences, layers="top")
    for index in (0, 1, 4095, 4096, 4499):
        [alone] = embedder.embed([sentences[index]], layers="top")
        assert np.array_equal(found[index].vectors, alone.vectors)
