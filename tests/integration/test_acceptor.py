"""One bad frame ends grpc.aio's accept loop; the server must outlive it."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import hpack
import pytest
from bilm_api.v1 import embed_pb2
from bilm_server.compute import ModelCompute
from bilm_server.jobs import Computed, Job
from integration_support import PLAIN, RunningServer, tokens

REQUEST = embed_pb2.EmbedRequest(options=PLAIN, sentences=[tokens("a")])


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@contextmanager
def call_with_a_bad_path(target: str) -> Iterator[socket.socket]:
    """A call whose :path is not UTF-8, on a connection of its own."""
    headers = hpack.Encoder().encode(
        [(":method", "POST"), (":scheme", "http"), (b":path", b"/canary\xff"), (":authority", "a"),
         ("content-type", "application/grpc"), ("te", "trailers")],
        huffman=False,
    )  # fmt: skip
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, headers))
        connection.sendall(frame(0, 1, 1, bytes(5)))
        yield connection


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it didn't come about"
        time.sleep(0.005)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_the_server_outlives_a_bad_path(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start("--health-listen", "127.0.0.1:0")
    known = server.stub().Embed(REQUEST).results[0].embedding.tensor.data
    entered, go_on, advance = threading.Event(), threading.Event(), ModelCompute.advance

    def advance_when_told(compute: ModelCompute) -> list[tuple[Job, Computed]]:
        entered.set()
        assert go_on.wait(20)
        return advance(compute)

    monkeypatch.setattr(ModelCompute, "advance", advance_when_told)
    in_flight = server.stub().Embed.future(REQUEST)
    assert entered.wait(10)
    target = server.target
    with call_with_a_bad_path(target):
        wait_until(lambda: any(record.name == "bilm_server.acceptor" for record in caplog.records))
    go_on.set()
    assert in_flight.result(20).results[0].embedding.tensor.data == known
    again = server.stub().Embed(REQUEST, timeout=20, wait_for_ready=True)
    assert again.results[0].embedding.tensor.data == known
    assert server.target == target
    told = [record for record in caplog.records if record.name.startswith("bilm_server.") and "grpc" in record.message]
    assert [(record.name, record.levelno) for record in told] == [("bilm_server.acceptor", logging.WARNING)]
    assert "canary" not in caplog.text


def test_as_often_as_anybody_likes(start: Callable[..., RunningServer]) -> None:
    server = start("--grace-s", "0")
    before = 0
    for number in range(12):
        with call_with_a_bad_path(server.target) as connection:
            while connection.recv(4096):  # closed with the port
                pass
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(20)
        if number == 3:
            before = descriptors()
    wait_until(lambda: descriptors() <= before)
