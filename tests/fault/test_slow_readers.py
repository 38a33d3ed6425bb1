"""Callers that send and don't read, and callers that vanish: what they hold is bounded, and given back."""

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from bilm_client import Client, RetryPolicy
from bilm_client.errors import OverloadedError, service_error
from bilm_server.addresses import split_address
from bilm_server.embedding.admission import Admission, Cost
from bilm_server.observability.log_setup import is_no_client_error
from google.protobuf.message import Message

from tests.fault.known_answers import PLAIN, bare_options, endless_items, sentence
from tests.security.fuzz_http2 import INITIAL_WINDOW, call, opening, settings
from tests.security.security_support import EMBED_PATH, INFER_PATH
from tests.support.http_calls import deaf_client, embeddings, raw_request
from tests.support.processes import ROOT, descriptors, module_command, resident_bytes, started, wait_until
from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, serving
from tests.support.tensors import tokens

STALL_S = 1.0
ITEM_TOKENS = 1000
ROOM_TOKENS = 4 * ITEM_TOKENS
MIB = 2**20
LIMITS = (
    f"--stream-stall-s={STALL_S}",
    f"--max-tokens-per-sentence={ITEM_TOKENS}",
    f"--max-stream-tokens={ROOM_TOKENS}",
)
# Without probing the bandwidth, gRPC buffers 64 KiB for a caller that doesn't read: less than one item's result
OWN_SMALL_WINDOW = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
# How late the machine may be, which is busy with other things
SLACK_S = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving(*LIMITS) as server:
        yield server


def used_tokens(server: LoopServer) -> int:
    return server.stream_admission.used.tokens


@contextmanager
def deaf_streams(target: str, n_streams: int) -> Iterator[list[Any]]:
    """Streams that send without end and never read, each over a connection of its own."""
    with ExitStack() as stack:
        streams = []
        for _ in range(n_streams):
            channel = stack.enter_context(grpc.insecure_channel(target, OWN_SMALL_WINDOW))
            streams.append(embed_pb2_grpc.EmbedServiceStub(channel).EmbedStream(endless_items(ITEM_TOKENS)))
        yield streams


def until_full(server: LoopServer) -> None:
    """Until what the streams may hold is used up, and nothing gets on: nobody reads any more."""
    wait_until(lambda: used_tokens(server) == ROOM_TOKENS, "the room for streams is full")


def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """Reads a stream to its end; its status and the reason."""
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        found = service_error(error)
        return found.code, found.reason
    return grpc.StatusCode.OK, ""


@pytest.fixture(autouse=True)
def _no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A caller's behaviour is no error of the server's."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in filter(is_no_client_error, errors)] == []


def test_others_are_served_while_callers_do_not_read(server: LoopServer) -> None:
    with deaf_streams(server.target, 4) as streams, Client(server.target) as client:
        until_full(server)
        client.embed(["a"], timeout_s=SLACK_S)  # calls have room of their own
        assert len(list(client.embed_stream(["a", "b"], timeout_s=STALL_S + SLACK_S))) == 2
        wait_until(lambda: used_tokens(server) == 0, "all of them are ended", 4 * STALL_S + SLACK_S)
        for stream in streams:  # and each of them hears why, when it reads at last
            assert end_of(stream) == (grpc.StatusCode.UNAVAILABLE, "STREAM_STALLED")


def test_who_reads_slowly_is_not_ended(server: LoopServer) -> None:
    """Each result in less than the time allowed, all of them in more."""
    n_items = 24

    def items() -> Iterator[pb.EmbedStreamRequest]:
        yield pb.EmbedStreamRequest(start=pb.StreamStart(options=bare_options(PLAIN)))
        for number in range(n_items):
            yield pb.EmbedStreamRequest(item=pb.StreamItem(id=number, sentence=sentence(ITEM_TOKENS)))

    with grpc.insecure_channel(server.target) as channel:
        begun_s, found = time.monotonic(), 0
        for _ in embed_pb2_grpc.EmbedServiceStub(channel).EmbedStream(items()):
            threading.Event().wait(STALL_S / 8)
            found += 1
    assert found == n_items
    assert time.monotonic() - begun_s > 2 * STALL_S


def deaf_grpc_call(server: LoopServer, path: str, request: Message) -> socket.socket:
    """Return a connection with a call by hand: gRPC's clients read an answer whether anybody wants it or not."""
    connection = socket.create_connection(split_address(server.target))
    head = opening() + settings((INITIAL_WINDOW, 0))
    connection.sendall(head + call(1, path.encode(), request.SerializeToString()))
    return connection


def deaf_embed(server: LoopServer) -> socket.socket:
    request = pb.EmbedRequest(options=bare_options(PLAIN), sentences=[sentence(ITEM_TOKENS)] * 4)
    return deaf_grpc_call(server, EMBED_PATH, request)


def deaf_infer(server: LoopServer) -> socket.socket:
    return deaf_grpc_call(server, INFER_PATH, tokens(*[["w"] * ITEM_TOKENS] * 4))


def deaf_http(server: LoopServer) -> socket.socket:
    body = {"sentences": [{"tokens": ["w"] * ITEM_TOKENS}] * 4}
    return deaf_client(server.http.address, raw_request("/v1/embed", body, accept="application/octet-stream"))


@pytest.mark.parametrize("deaf", [deaf_embed, deaf_infer, deaf_http])
def test_an_answer_that_nobody_reads_counts_until_its_caller_leaves(
    deaf: Callable[[LoopServer], socket.socket],
) -> None:
    flags = (*LIMITS, "--stream-stall-s=60", "--max-waiting-mib=16", "--http-listen=127.0.0.1:0")
    with serving(*flags) as server, ExitStack() as stack:
        admission = server.admission
        client = stack.enter_context(Client(server.target, retry=RetryPolicy(max_attempts=1)))
        client.embed([["w"] * ITEM_TOKENS] * 4)
        wait_until(lambda: admission.used == Cost(0, 0), "what was read counts no more")
        response_bytes = 0
        while 2 * response_bytes + admission.used.response_bytes <= admission.capacity.response_bytes:
            held_bytes = admission.used.response_bytes
            stack.enter_context(deaf(server))
            wait_until(partial(_holds_more_than, admission, held_bytes), "the call is admitted")
            response_bytes = admission.used.response_bytes - held_bytes
            wait_until(lambda: admission.used.tokens == 0, "its answer is computed")
        with pytest.raises(OverloadedError):
            client.embed([["w"] * ITEM_TOKENS] * 8)
        client.embed(["a"])  # what is left is there for others
        stack.close()
        wait_until(lambda: admission.used == Cost(0, 0), "their answers are dropped")


def _holds_more_than(admission: Admission, response_bytes: int) -> bool:
    return admission.used.response_bytes > response_bytes


def test_a_caller_that_is_killed_leaves_nothing(server: LoopServer) -> None:
    """With SIGKILL, in the middle of its streams; long before anybody would notice a stall."""
    command = module_command("tests.fault.vanishing_client", server.target)
    with ExitStack() as stack:
        children = [stack.enter_context(started(command, cwd=ROOT, stdout=subprocess.PIPE)) for _ in range(2)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"under way\n"
        for child in children:
            child.kill()
    wait_until(lambda: used_tokens(server) == 0, "the work is given up")
    with Client(server.target) as client:  # all the room there is
        assert len(list(client.embed_stream([["w"] * ITEM_TOKENS] * 4, pool="mean", timeout_s=30.0))) == 4


def test_memory_does_not_grow_with_http_clients_that_do_not_read() -> None:
    """Wave after wave, each of which is let go by the stall."""
    request = raw_request("/v1/embed", {"sentences": [{"tokens": ["w"] * ITEM_TOKENS}] * 4})
    with ProcessServer(*LIMITS, "--http-listen=127.0.0.1:0") as server:
        before, idle = 0, descriptors(server.pid)
        for number in range(3):
            with ExitStack() as stack:
                for _ in range(6):
                    stack.enter_context(deaf_client(server.http_address, request))
                wait_until(lambda: descriptors(server.pid) > idle, "they are connected")
                wait_until(lambda: descriptors(server.pid) <= idle, "they are let go", 4 * STALL_S + SLACK_S)
            before = before or resident_bytes(server.pid)
            assert resident_bytes(server.pid) < before + 32 * MIB, number
        assert embeddings(server.http_address, {"input": "a"}).status == 200


def test_memory_does_not_grow_with_those_who_do_not_read(tmp_path: Path) -> None:
    """Wave after wave, none of them ever reads: what was computed for them isn't kept."""
    with ProcessServer(*LIMITS) as server, ExitStack() as stack, Client(server.target) as client:

        def wave() -> None:
            stack.enter_context(deaf_streams(server.target, 6))
            # Comes after all that they have asked for, and needs all the room there is
            list(client.embed_stream([["w"] * ITEM_TOKENS] * 4, pool="mean", timeout_s=6 * STALL_S + 6 * SLACK_S))

        wave()
        before = resident_bytes(server.pid)
        for _ in range(3):
            wave()
        assert resident_bytes(server.pid) < before + 32 * MIB
        connected = descriptors(server.pid)
        stack.close()
        wait_until(lambda: descriptors(server.pid) <= connected - 24, "the connections are closed")
