"""Calls of several threads, failures, deadlines and the end of an embedder, on an engine that tests hold."""

from __future__ import annotations

import gc
import pickle
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client import ClientClosedError, RetryPolicy, SentenceError
from bilm_client._core.settings import NO_DEADLINE, Settings
from bilm_client.client import TransportClient
from bilm_client.errors import DeadlineError, ModelVersionError
from bilm_local import LocalEmbedder
from bilm_local.loading import LocalModel, LocalSettings, load_local
from bilm_local.transport import LocalTransport
from bilm_model.errors import ModelError, WeightsError

from tests.support.hooked_engine import HookedEngine

CHOSEN = LocalSettings(
    path="random:tiny", options=None, device="cpu", precision="float32", tokenizer="moses", tokenizer_language="en"
)
SETTINGS = Settings(target="here", retry=RetryPolicy(max_attempts=1))
LIMIT_S = 20.0


@dataclass
class Hooked:
    """Loads models whose engines have hooks."""

    engines: list[HookedEngine[Any]] = field(default_factory=list)

    def load(self, chosen: LocalSettings) -> LocalModel:
        model = load_local(chosen)
        self.engines.append(HookedEngine(model.engine))
        return replace(model, engine=self.engines[-1])

    @property
    def engine(self) -> HookedEngine[Any]:
        return self.engines[-1]


@pytest.fixture
def hooked() -> Hooked:
    return Hooked()


@pytest.fixture
def embedder(hooked: Hooked) -> Iterator[TransportClient]:
    with TransportClient(SETTINGS, partial(LocalTransport, CHOSEN, hooked.load)) as found:
        found.model_info()
        yield found


@dataclass
class Gate:
    """Holds the engine before each of its rounds until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(LIMIT_S)


def refuse(*words: str) -> Any:
    """Return a hook that fails at sentences that have one of these words."""

    def join(sentences: Sequence[Any]) -> None:
        if any(word in sentence.tokens for sentence in sentences for word in words):
            raise RuntimeError("as the test wants it")

    return join


def request(word: str, count: int, priority: pb.Priority = pb.PRIORITY_INTERACTIVE) -> pb.EmbedRequest:
    sentences = [pb.Sentence(tokens=pb.Tokens(tokens=[word]))] * count
    options = pb.EmbedOptions(layers=pb.LAYERS_TOP, pooling=pb.POOLING_MEAN, data_type=pb.DATA_TYPE_FLOAT32)
    return pb.EmbedRequest(sentences=sentences, options=options, priority=priority)


def joined_behind_a_round(hooked: Hooked, *requests: pb.EmbedRequest) -> list[str]:
    """Return the words that join together, of calls that come while a round is computed."""
    transport = LocalTransport(CHOSEN, hooked.load, SETTINGS)
    transport.list_models(NO_DEADLINE)
    joined: list[list[str]] = []
    gate = Gate()
    with hooked.engine.hooked(join=lambda all_: joined.append([each.tokens[0] for each in all_]), advance=gate):
        calls = [transport.start_embed(request("first", 1), NO_DEADLINE)]
        assert gate.reached.wait(LIMIT_S)
        calls += [transport.start_embed(each, NO_DEADLINE) for each in requests]
        gate.opened.set()
        for call in calls:
            assert all(each.HasField("embedding") for each in call.result().results)
    transport.close()
    assert joined[0] == ["first"]
    return joined[1]


def test_calls_of_several_threads_share_rounds_in_turns(hooked: Hooked) -> None:
    joined = joined_behind_a_round(hooked, request("a", 3), request("b", 2))
    assert joined == ["a", "b", "a", "b", "a"]


def test_batch_calls_join_behind_interactive_ones_but_for_a_share_of_the_turns(hooked: Hooked) -> None:
    joined = joined_behind_a_round(hooked, request("batch", 5, pb.PRIORITY_BATCH), request("a", 20))
    found = [index for index, word in enumerate(joined) if word == "batch"]
    assert found == [7, 15, 22, 23, 24]


def test_threads_get_their_own_results(embedder: TransportClient) -> None:
    sentences = {name: [[name, f"word{n}"] for n in range(40)] for name in "abcd"}
    alone = {name: embedder.embed(each) for name, each in sentences.items()}
    with ThreadPoolExecutor(4) as threads:
        together = dict(zip(sentences, threads.map(embedder.embed, sentences.values()), strict=True))
    for name in sentences:
        pairs = zip(alone[name], together[name], strict=True)
        assert all(np.array_equal(one.vectors, other.vectors) for one, other in pairs)


def test_a_sentence_that_fails_by_itself_fails_alone(embedder: TransportClient, hooked: Hooked) -> None:
    with hooked.engine.hooked(join=refuse("bad")):
        found = embedder.embed([["good"], ["bad"], ["better"]], on_error="return")
        assert isinstance(found[1], SentenceError)
        assert (found[1].reason, found[1].code.name, found[1].index) == ("INTERNAL", "INTERNAL", 1)
        streamed = list(embedder.embed_stream([["bad"], ["good"]], on_error="return", carry_state=True))
    assert isinstance(streamed[0], SentenceError)
    [good] = embedder.embed([["good"]])
    for each in (found[0], streamed[1]):
        assert not isinstance(each, SentenceError)
        assert np.array_equal(each.vectors, good.vectors)


def test_a_call_ends_at_its_deadline_and_leaves_nothing(embedder: TransportClient, hooked: Hooked) -> None:
    gate = Gate()
    with hooked.engine.hooked(advance=gate):
        with pytest.raises(DeadlineError):
            embedder.embed([["late"]], timeout_s=0.05)
        with pytest.raises(DeadlineError):
            list(embedder.embed_stream([["late"]], timeout_s=0.05))
        gate.opened.set()
        embedder.embed([["next"]])
    assert not hooked.engine.present


def test_ctrl_c_ends_a_call_and_leaves_the_embedder(embedder: TransportClient, hooked: Hooked) -> None:
    gate = Gate()

    def interrupt() -> None:
        assert gate.reached.wait(LIMIT_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with hooked.engine.hooked(advance=gate):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            embedder.embed([["a"]] * 500)
        thread.join()
        gate.opened.set()
        assert len(embedder.embed([["next"]])) == 1
    assert not hooked.engine.present


def test_closing_ends_calls_and_streams(embedder: TransportClient, hooked: Hooked) -> None:
    gate = Gate()
    with hooked.engine.hooked(advance=gate), ThreadPoolExecutor(3) as threads:
        call = threads.submit(embedder.embed, [["a"]] * 500)
        stream = threads.submit(list, embedder.embed_stream([["a"]] * 500))
        assert gate.reached.wait(LIMIT_S)
        closing = threads.submit(embedder.close)
        gate.opened.set()
        closing.result(LIMIT_S)
        for each in (call, stream):
            with pytest.raises(ClientClosedError):
                each.result(LIMIT_S)
    with pytest.raises(ClientClosedError):
        embedder.embed("a")


def test_a_stream_that_is_dropped_leaves_nothing(embedder: TransportClient, hooked: Hooked) -> None:
    stream = embedder.embed_stream([["a"]] * 500)
    next(stream)
    stream.close()
    embedder.embed("a")
    assert not hooked.engine.present


def test_an_embedder_that_nothing_holds_ends_its_thread(hooked: Hooked) -> None:
    embedder = TransportClient(SETTINGS, partial(LocalTransport, CHOSEN, hooked.load))
    embedder.embed("a")
    [thread] = [each for each in threading.enumerate() if each.name == "bilm-local"]
    gone = weakref.ref(embedder)
    del embedder
    gc.collect()
    assert gone() is None
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_model_that_cant_be_loaded_is_tried_again_with_the_next_call(hooked: Hooked) -> None:
    errors = [WeightsError("not there"), WeightsError("still not there")]

    def load(chosen: LocalSettings) -> LocalModel:
        if errors:
            raise errors.pop(0)
        return hooked.load(chosen)

    with TransportClient(SETTINGS, partial(LocalTransport, CHOSEN, load)) as embedder:
        with pytest.raises(WeightsError, match="not there"):
            embedder.embed("a")
        with pytest.raises(WeightsError, match="still not there"):
            list(embedder.embed_stream(["a"]))
        assert len(embedder.embed("a")) == 1
    assert len(hooked.engines) == 1


def test_another_version_than_expected_is_refused() -> None:
    embedder = LocalEmbedder("random:tiny", device="cpu", expected_model_version="another")
    with embedder, pytest.raises(ModelVersionError, match="expected 'another'"):
        embedder.embed("a")


def test_it_pickles_as_its_arguments() -> None:
    embedder = LocalEmbedder("random:tiny", device="cpu", tokenizer="whitespace")
    with embedder, pickle.loads(pickle.dumps(embedder)) as other:
        assert np.array_equal(other.embed("a b.")[0].vectors, embedder.embed("a b.")[0].vectors)
        assert other.model_info().tokenizer == "whitespace"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": 3}, TypeError),
        ({"options": 3}, TypeError),
        ({"precision": "float64"}, ValueError),
        ({"tokenizer": "spacy"}, ValueError),
        ({"timeout_s": 0}, ValueError),
    ],
)
def test_arguments_that_cant_be_are_named(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        LocalEmbedder(**arguments)


@pytest.mark.parametrize("arguments", [{"device": "abacus"}, {"path": "/nowhere"}, {"tokenizer_language": "xx"}])
def test_what_cant_be_loaded_is_said_by_the_first_call(arguments: dict[str, Any]) -> None:
    with LocalEmbedder(**{"path": "random:tiny", **arguments}) as embedder, pytest.raises(ModelError):
        embedder.model_info()
