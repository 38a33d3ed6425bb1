"""Memory is bounded by what was configured, not by what callers send."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from bilm_api.v1 import embed_pb2, embed_pb2_grpc

from tests.integration.integration_support import tokens
from tests.support.processes import resident_bytes
from tests.support.server_processes import ProcessServer

MIB = 2**20
ALL_LAYERS = embed_pb2.EmbedOptions(
    layers=embed_pb2.LAYERS_ALL,
    pooling=embed_pb2.POOLING_NONE,
    data_type=embed_pb2.DATA_TYPE_FLOAT32,
    omit_tokens=True,
)
REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


def documents(n_documents: int, n_tokens: int) -> Iterator[embed_pb2.EmbedStreamRequest]:
    yield embed_pb2.EmbedStreamRequest(start=embed_pb2.StreamStart(options=ALL_LAYERS))
    for i in range(n_documents):
        words = [f"{'word' * (i % 7)}{j % 3000}" for j in range(n_tokens)]
        yield embed_pb2.EmbedStreamRequest(item=embed_pb2.StreamItem(id=i, sentence=tokens(*words)))


@pytest.mark.slow
@pytest.mark.parametrize(("n_tokens", "in_flight", "answers_mib"), [(500, 2048, 16), (10_000, 20_000, 128)])
def test_a_hundred_long_sentences_at_once(n_tokens: int, in_flight: int, answers_mib: int) -> None:
    """All in flight on ten streams, as fast as they can be sent; and unary calls, which are answered or refused."""
    limits = {
        "max_tokens_in_flight": in_flight,
        "max_tokens_per_sentence": n_tokens,
        "max_tokens_per_request": 10 * n_tokens,
        "max_waiting_tokens": 20 * n_tokens,
        "max_waiting_mib": answers_mib,
        "max_stream_tokens": 20 * n_tokens,
        "max_stream_mib": answers_mib,
        "max_rows": 16,
        "token_cache_mib": 1,
        "input_cache_mib": 64,
        "max_connection_age_s": 3600,  # a slow machine may take longer than the default
    }
    flags = [part for name, value in limits.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with (
        ProcessServer("--model", "random:small", *flags, fresh=True) as server,
        grpc.insecure_channel(server.target, options=[("grpc.max_receive_message_length", -1)]) as channel,
    ):
        before = resident_bytes(server.pid, "VmRSS")
        stub = embed_pb2_grpc.EmbedServiceStub(channel)
        streams = [stub.EmbedStream(documents(10, n_tokens)) for _ in range(10)]
        unary = [
            stub.Embed.future(embed_pb2.EmbedRequest(options=ALL_LAYERS, sentences=[tokens(*["w"] * n_tokens)]))
            for _ in range(20)
        ]
        with ThreadPoolExecutor(len(streams)) as readers:  # one that isn't read would keep the room from the others
            for done in readers.map(lambda stream: [m.id for m in stream if m.rows.last], streams):
                assert sorted(done) == list(range(10))
        codes = {call.code() for call in unary}
        assert codes <= {grpc.StatusCode.OK, *REFUSALS}
        grown = resident_bytes(server.pid, "VmHWM") - before
    # As the README has it; `small` has 3 layers of 256 numbers
    engine = in_flight * 5 * 128 * 4 + (2048 + n_tokens) * 2 * 3 * 256 * 4 + (1 + 64) * MIB
    answers = 2 * 2 * answers_mib * MIB
    assert grown < engine + answers + 200 * MIB
