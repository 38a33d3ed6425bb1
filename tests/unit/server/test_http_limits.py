"""What the HTTP door lets a connection have: time, bytes, and others beside it; and the order of what it sends."""

import asyncio
import logging
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bilm_api.constants import MAX_REQUEST_BYTES
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.errors import Code
from bilm_server.inference.types import Sentence
from bilm_server.protocols.http.bodies import Bodies
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse

from tests.support.embedders import until
from tests.support.fake_engine import FakeEngine
from tests.support.http_calls import read_to_end
from tests.support.http_doors import HEAD, opened, statuses, whole


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client does, it is no error of the server's."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("sent", [b"", b"POST /v1/em", HEAD, HEAD + b"content-length: 9\r\n\r\n{"])
async def test_a_slow_sender_is_let_go(sent: bytes) -> None:
    async with opened(request_timeout_s=0.05) as it:
        with await it.connect() as connection:
            connection.sendall(sent)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == (b"HTTP/1.1 408" if sent.endswith(b"{") else b"")
        assert (await it.embeddings()).status == 200


@pytest.mark.parametrize("sent", [b"POST /v1/em", HEAD, HEAD + b"content-length: 9\r\n\r\n{"])
async def test_a_slow_sender_behind_a_whole_request_is_let_go(sent: bytes) -> None:
    async with opened(request_timeout_s=0.05) as it:
        with await it.connect() as connection:
            connection.sendall(whole(b'{"input":"a"}') + sent)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert statuses(answer) == [b"200", b"408"] if sent.endswith(b"{") else [b"200"]


async def test_a_connection_outlives_the_time_of_a_request_that_was_refused_early() -> None:
    """The rest of its body comes behind the refusal, and ends it."""
    async with opened(request_timeout_s=0.5) as it:
        with await it.connect() as connection:
            connection.sendall(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            assert (await asyncio.to_thread(connection.recv, 12)) == b"HTTP/1.1 404"
            connection.sendall(b"12345678")
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            await until(lambda: loop.time() > begun_s + 1.6)  # later than the connection's own timer
            connection.sendall(whole(b'{"input":"a"}', b"connection: close\r\n"))
            answer = await asyncio.to_thread(read_to_end, connection)
        assert statuses(answer) == [b"200"]


async def test_a_body_that_drips_behind_its_refusal_is_let_go() -> None:
    async with opened(request_timeout_s=0.05) as it:
        with await it.connect() as connection:
            connection.sendall(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 404"


async def test_the_time_of_a_request_is_not_that_of_its_call() -> None:
    engine = FakeEngine[Sentence]()
    engine.go_on.clear()
    async with opened(engine=engine, request_timeout_s=0.01) as it:
        calling = asyncio.create_task(it.embeddings())
        await asyncio.to_thread(engine.computing.wait, 60)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await until(lambda: loop.time() > begun_s + 1.2)  # later than the connection's own timer
        engine.go_on.set()
        assert (await calling).status == 200


async def test_a_client_that_reads_nothing_is_let_go() -> None:
    async with opened(stall_s=0.05, loaded=False) as it:
        it.app.open({"http/models": _large_response})
        with await it.connect() as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: bool(it.ended.records) and it.door.n_connections == 0)
        (record,) = it.ended.records
        assert record.code is Code.OK
        assert len((await it.get("/v1/models")).body) == 2**24


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with opened(max_connections=2) as it:
        kept = [await it.connect(), await it.connect()]
        await until(lambda: it.door.n_connections == 2)
        with await it.connect() as third:
            assert await asyncio.to_thread(read_to_end, third) == b""
        kept.pop().close()
        await until(lambda: it.door.n_connections == 1)
        assert (await it.embeddings()).status == 200
        kept.pop().close()


async def test_bodies_have_a_bound_together() -> None:
    async with opened(bodies=Bodies(max_arriving_bytes=100_000)) as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: 300000\r\n\r\n" + b" " * 200_000)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 429"
        assert b"retry-after-ms: 1000" in answer
        assert (await it.embeddings()).status == 200


async def test_a_client_that_leaves_within_its_body_is_cancelled() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: 300000\r\n\r\n{")
            await until(lambda: it.door.n_connections == 1)
        await until(lambda: bool(it.ended.records))
        assert [record.code for record in it.ended.records] == [Code.CANCELLED]


@pytest.mark.parametrize("sent", [HEAD + b"content-length: 9\r\n\r\n{", whole(b'{"input":"stuck"}')])
async def test_a_client_that_leaves_gives_back_its_place_among_its_callers_calls(sent: bytes) -> None:
    """In the middle of its body, or of its call."""
    async with opened(caller_limits=CallerLimits(0, 1, 1)) as it:
        for number in range(3):
            with await it.connect() as connection:
                connection.sendall(sent)
                await until(lambda: it.door.n_connections == 1)
            await until(lambda number=number: len(it.ended.records) == number + 1)  # type: ignore[misc]
        assert {record.reason for record in it.ended.records} == {""}
        assert (await it.embeddings()).status == 200


async def test_a_body_that_is_announced_as_too_large_is_not_waited_for() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % (100 * MAX_REQUEST_BYTES))
            answer = await asyncio.to_thread(read_to_end, connection)
        assert answer[:12] == b"HTTP/1.1 413"


async def test_calls_in_one_write_are_answered_in_their_order() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(whole(b'{"input":"a"}') + whole(b"{"))
            connection.sendall(whole(b'{"input":"b"}', b"connection: close\r\n"))
            answer = await asyncio.to_thread(read_to_end, connection)
        assert statuses(answer) == [b"200", b"400", b"200"]


async def test_encoded_bodies_are_refused() -> None:
    async with opened() as it:
        answer = await it.embeddings(headers={"content-encoding": "gzip"})
    assert answer.status == 415


@pytest.mark.parametrize("path", [b"/v1/embeddings", b"/nothing"])
async def test_a_body_that_breaks_off_is_refused_once(path: bytes) -> None:
    head = HEAD.replace(b"/v1/embeddings", path) + b"transfer-encoding: chunked\r\n\r\n"
    async with opened() as it:
        for first in (b"1\r\n{\r\n", b""):
            with await it.connect() as connection:
                connection.sendall(head + first + b"no length\r\n")
                answer = await asyncio.to_thread(read_to_end, connection)
            assert statuses(answer) == [b"400"]
        await until(lambda: len(it.ended.records) == 2)


async def test_a_client_that_resets_its_connection_at_once_is_no_error() -> None:
    """Its address is known from the accepting: the transport has none any more."""
    async with opened() as it:
        for _ in range(20):
            with await it.connect() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: it.door.n_connections == 0)
        assert (await it.embeddings()).status == 200
        assert [record.peer.partition(":")[0] for record in it.ended.records] == ["ipv4"]


async def test_without_descriptors_it_waits_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with opened() as it:
        host, _, port = it.door.address.rpartition(":")
        with socket.socket() as connection:
            with no_more_descriptors():
                connection.connect((host, int(port)))
                await until(lambda: "can't accept a connection: Too many open files" in caplog.text)
            connection.sendall(whole(b'{"input":"a"}', b"connection: close\r\n"))
            assert statuses(await asyncio.to_thread(read_to_end, connection)) == [b"200"]


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process open none in the context."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(0)  # the lowest that is free
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_two_lengths_of_one_body_are_refused_and_end_the_connection() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
            answer = await asyncio.to_thread(read_to_end, connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"expected one of them" in answer


# ---- draining ----

UNFINISHED = (b"", b"POST /v1/em", HEAD, whole(b'{"input":"a"}') + b"POST /v1/em")


@pytest.mark.parametrize("sent", UNFINISHED)
async def test_a_drain_does_not_wait_for_a_request_that_has_not_come(sent: bytes) -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(sent)
            await until(lambda: it.door.n_connections == 1 and len(it.ended.records) == sent.count(b"input"))
            await it.door.drain(60.0)
            answer = await asyncio.to_thread(read_to_end, connection)
        assert statuses(answer) == [b"200"] * sent.count(b"input")


async def test_a_drain_closes_a_connection_that_was_accepted_just_before() -> None:
    async with opened() as it:
        connecting = asyncio.create_task(it.connect())
        while it.door.n_connections == 0:  # noqa: ASYNC110 - before the connection's own task begins
            await asyncio.sleep(0)
        await it.door.drain(60.0)
        with await connecting as connection:
            assert await asyncio.to_thread(read_to_end, connection) == b""


async def test_a_drain_ends_a_client_that_is_stuck_in_its_body() -> None:
    async with opened() as it:
        with await it.connect() as connection:
            connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n{")
            assert (await asyncio.to_thread(connection.recv, 25)).startswith(b"HTTP/1.1 100")  # the call waits for it
            await it.door.drain(0.05)
            assert await asyncio.to_thread(read_to_end, connection) == b""
        assert [record.code for record in it.ended.records] == [Code.CANCELLED]


async def test_a_drain_ends_a_client_that_reads_nothing() -> None:
    async with opened(loaded=False) as it:
        it.app.open({"http/models": _large_response})
        with await it.connect() as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: bool(it.ended.records))
            await it.door.drain(0.05)
            assert it.door.n_connections == 0
        assert [record.code for record in it.ended.records] == [Code.OK]


async def _large_response(_: HttpRequest) -> HttpResponse:
    return HttpResponse(b"x" * 2**24)
