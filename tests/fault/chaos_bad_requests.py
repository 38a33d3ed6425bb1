"""Requests that must be refused, each with the one status that is meant for it, whatever goes on besides."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_client.errors import sentence_error

from tests.fault.known_answers import PLAIN, KnownAnswers, WrongAnswerError, bare_options

MAX_REQUEST_TOKENS = 16_384
"""--max-tokens-per-request of the server."""

_SERVICE = "/bilm_api.v1.EmbedService"
_TOO_LARGE_BYTES = 5 * 2**20
_NOT_PROTOBUF = b"\xff\xff\xff\xff"
_NOT_UTF8 = pb.EmbedRequest(model="mark").SerializeToString().replace(b"mark", b"\xc3(\xc3(")


@dataclass(frozen=True)
class BadRequest:
    """A request and what must come of it.

    Attributes:
        expected: The status, and the reason where the server gives one.
        send: Sends it.
    """

    expected: str
    send: Callable[[], object]


class BadRequests:
    """Makes them, for one channel."""

    def __init__(self, channel: grpc.Channel, known: KnownAnswers, limit_s: float) -> None:
        self._known, self._limit_s = known, limit_s
        # Bytes go out as they are
        self._embed: Any = channel.unary_unary(f"{_SERVICE}/Embed")
        self._nothing: Any = channel.unary_unary(f"{_SERVICE}/Nothing")
        self._stream: Any = channel.stream_stream(f"{_SERVICE}/EmbedStream")

    def choose(self, chance: random.Random) -> BadRequest:
        """One of all kinds."""
        choices = [*self._frames(), *self._messages(), *self._streams()]
        return chance.choice(choices)

    def check_bad_sentences(self) -> None:
        """Sends bad sentences among good ones; those must be refused, and these answered.

        Raises:
            WrongAnswerError: Something else came back.
            grpc.RpcError: The call failed.
        """
        good = self._known.message(0)
        bad = (
            pb.Sentence(tokens=pb.Tokens(tokens=["a", ""])),
            pb.Sentence(),
            pb.Sentence(text="a", state=b"bad"),
            pb.Sentence(text="a b", rows=pb.Rows(rows=[0, 2])),
        )
        request = pb.EmbedRequest(options=bare_options(PLAIN), sentences=[good, *bad, good])
        response = pb.EmbedResponse.FromString(self._send(request.SerializeToString()))
        first, *failed, last = response.results
        for result in (first, last):
            self._known.check_message(result.embedding, PLAIN, 0)
        reasons = [sentence_error(result.error, 0).reason for result in failed]
        if reasons != ["TOKEN_EMPTY", "SENTENCE_MISSING", "STATE_INVALID", "SELECTION_INVALID"]:
            raise WrongAnswerError(f"bad sentences were answered with {reasons}")

    def _send(self, data: bytes) -> bytes:
        answer: bytes = self._embed(data, timeout=self._limit_s)
        return answer

    def _frames(self) -> Iterator[BadRequest]:
        for data in (_NOT_PROTOBUF, _NOT_UTF8):
            yield BadRequest("INVALID_ARGUMENT MALFORMED_REQUEST", lambda data=data: self._send(data))  # type: ignore[misc]
        yield BadRequest("RESOURCE_EXHAUSTED", lambda: self._send(bytes(_TOO_LARGE_BYTES)))
        yield BadRequest("UNIMPLEMENTED METHOD_NOT_FOUND", lambda: self._nothing(b"", timeout=self._limit_s))

    def _messages(self) -> Iterator[BadRequest]:
        for expected, change in _CHANGES:
            request = self._known.request(PLAIN, [0])
            change(request)
            data = request.SerializeToString()
            yield BadRequest(expected, lambda data=data: self._send(data))  # type: ignore[misc]

    def _streams(self) -> Iterator[BadRequest]:
        start = pb.EmbedStreamRequest(start=pb.StreamStart(options=bare_options(PLAIN))).SerializeToString()
        item = pb.EmbedStreamRequest(item=pb.StreamItem(id=1, sentence=self._known.message(0))).SerializeToString()
        cases = (
            ("STREAM_ORDER", [item]),
            ("STREAM_ORDER", [start, item, start]),
            ("MALFORMED_REQUEST", [_NOT_PROTOBUF]),
            ("MALFORMED_REQUEST", [start, item, _NOT_PROTOBUF]),
        )
        for reason, messages in cases:
            yield BadRequest(f"INVALID_ARGUMENT {reason}", lambda messages=messages: self._drain(messages))  # type: ignore[misc]

    def _drain(self, messages: list[bytes]) -> None:
        for _ in self._stream(iter(messages), timeout=self._limit_s):
            pass


def _no_sentences(request: pb.EmbedRequest) -> None:
    request.ClearField("sentences")


def _other_model(request: pb.EmbedRequest) -> None:
    request.model = "another"


def _other_version(request: pb.EmbedRequest) -> None:
    request.expected_model_version = "0"


def _unknown_layers(request: pb.EmbedRequest) -> None:
    request.options.layers = 77  # type: ignore[assignment] # no value of the contract


def _unknown_pooling(request: pb.EmbedRequest) -> None:
    request.options.pooling = 77  # type: ignore[assignment]


def _no_mix(request: pb.EmbedRequest) -> None:
    request.options.layers = pb.LAYERS_MIX


def _many_tokens(request: pb.EmbedRequest) -> None:
    half = pb.Sentence(tokens=pb.Tokens(tokens=["w"] * (MAX_REQUEST_TOKENS // 2)))
    request.sentences.extend([half, half])


_CHANGES = (
    ("INVALID_ARGUMENT SENTENCES_MISSING", _no_sentences),
    ("NOT_FOUND MODEL_NOT_FOUND", _other_model),
    ("FAILED_PRECONDITION MODEL_VERSION_MISMATCH", _other_version),
    ("INVALID_ARGUMENT LAYERS_INVALID", _unknown_layers),
    ("INVALID_ARGUMENT POOLING_INVALID", _unknown_pooling),
    ("INVALID_ARGUMENT MIX_INVALID", _no_mix),
    ("INVALID_ARGUMENT TOO_MANY_TOKENS", _many_tokens),
)
