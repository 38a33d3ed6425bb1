"""Several streams read in turns: each waits for its caller, who waits for another one of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2_grpc
from bilm_client import AsyncClient, Client

from tests.integration.integration_support import tokens
from tests.integration.test_stream import item, start_message
from tests.support.servers import LoopServer, serving

N_ITEMS = 8
ITEM_TOKENS = 1000
LIMITS = (f"--max-tokens-per-sentence={ITEM_TOKENS}", f"--max-stream-tokens={4 * ITEM_TOKENS}", "--stream-stall-s=600")
# Without probing the bandwidth, gRPC buffers 64 KiB for a caller that doesn't read: less than one result
OWN_SMALL_WINDOW = (("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0))
LIMIT_S = 120.0  # only what hangs takes so long
OPTIONS: dict[str, Any] = {"timeout_s": LIMIT_S, "channel_options": OWN_SMALL_WINDOW}


@pytest.fixture(scope="module")
def small_room() -> Iterator[LoopServer]:
    with serving(*LIMITS) as server:
        yield server


def documents(n_streams: int, n_tokens: int = ITEM_TOKENS) -> list[list[list[str]]]:
    return [[[f"w{stream}"] * n_tokens] * N_ITEMS for stream in range(n_streams)]


@pytest.mark.parametrize("n_streams", [2, 3, 10])
def test_streams_of_one_client(small_room: LoopServer, n_streams: int) -> None:
    with Client(small_room.target, **OPTIONS) as client:
        streams = [client.embed_stream(document) for document in documents(n_streams)]
        found = list(zip(*streams, strict=True))
    assert len(found) == N_ITEMS
    assert {each.tokens[0] for each in found[-1]} == {f"w{stream}" for stream in range(n_streams)}


@pytest.mark.parametrize("n_streams", [2, 10])
async def test_streams_of_one_asynchronous_client(small_room: LoopServer, n_streams: int) -> None:
    async with AsyncClient(small_room.target, **OPTIONS) as client:
        streams = [client.embed_stream(document) for document in documents(n_streams)]
        for _ in range(N_ITEMS):
            found = [await anext(stream) for stream in streams]
            assert [each.tokens[0] for each in found] == [f"w{stream}" for stream in range(n_streams)]
        assert [await anext(stream, None) for stream in streams] == [None] * n_streams


async def test_streams_of_several_clients(small_room: LoopServer) -> None:
    """Both kinds, in one thread: what one client holds, another one waits for."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(small_room.target, **OPTIONS)) for _ in range(3)]
        streams = [client.embed_stream(document) for client, document in zip(clients, documents(3), strict=True)]
        async with AsyncClient(small_room.target, **OPTIONS) as client:
            other = client.embed_stream(documents(1)[0])
            for _ in range(N_ITEMS):
                for stream in streams:
                    next(stream)
                await anext(other)


def test_a_stream_that_nobody_reads_holds_nothing_up(small_room: LoopServer) -> None:
    """The client receives what it asked for; the server holds nothing of it."""
    with Client(small_room.target, **OPTIONS) as client:
        unread = client.embed_stream([["w"] * ITEM_TOKENS] * 64)
        first = next(unread)
        for _ in range(3):
            [embedding] = client.embed_stream([["w"] * ITEM_TOKENS])
            np.testing.assert_array_equal(embedding.vectors, first.vectors)
        assert len(list(unread)) == 63


@pytest.mark.parametrize("n_streams", [2, 3])
def test_streams_of_a_caller_that_reads_nothing_ahead(small_room: LoopServer, n_streams: int) -> None:
    """As callers in other languages may: flow control holds the results of one stream while another is read."""
    messages = [start_message(), *(item(number, tokens(*["w"] * ITEM_TOKENS)) for number in range(N_ITEMS))]
    with ExitStack() as stack:
        streams: list[Any] = []
        for _ in range(n_streams):
            channel = stack.enter_context(grpc.insecure_channel(small_room.target, OWN_SMALL_WINDOW))
            stub = embed_pb2_grpc.EmbedServiceStub(channel)
            streams.append(stub.EmbedStream(iter(messages), timeout=LIMIT_S))
        for _ in range(N_ITEMS):
            for stream in streams:
                assert next(stream).rows.last


def test_the_window_counts_tokens(small_room: LoopServer) -> None:
    """A stream asks for no more than its memory shall hold, and for one sentence at least."""
    read = 0

    def sentences() -> Iterator[list[str]]:
        nonlocal read
        for _ in range(N_ITEMS):
            read += 1
            yield ["w"] * ITEM_TOKENS

    with Client(small_room.target, **OPTIONS) as client:
        for window_tokens, at_most in ((1, 1), (ITEM_TOKENS, 1), (ITEM_TOKENS + 1, 2), (3 * ITEM_TOKENS, 3)):
            read = 0
            for taken, _ in enumerate(client.embed_stream(sentences(), window_tokens=window_tokens)):
                assert read - taken <= at_most
            assert read == N_ITEMS


async def test_an_asynchronous_stream_is_received_while_its_loop_does_other_things(small_room: LoopServer) -> None:
    async with AsyncClient(small_room.target, **OPTIONS) as client:
        unread = client.embed_stream([["w"] * ITEM_TOKENS] * 16)
        await anext(unread)
        with Client(small_room.target, **OPTIONS) as other:  # which holds the loop
            assert len(list(other.embed_stream([["w"] * ITEM_TOKENS] * 4))) == 4
        assert len([each async for each in unread]) == 15
