"""Injects the faults of a chaos run, and notes when each began and ended."""

import contextlib
import itertools
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import grpc
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc

from tests.fault.chaos_bad_requests import MAX_REQUEST_TOKENS
from tests.fault.chaos_records import Recorder, Window
from tests.fault.chaos_schedule import Fault
from tests.fault.chaos_supervisor import Supervisor
from tests.fault.known_answers import PLAIN, bare_options, endless_items, sentence
from tests.fault.packets import DROP, RESET, PacketFilter
from tests.fault.proxy import FaultyProxy
from tests.support.http_calls import deaf_client, raw_request
from tests.support.processes import ROOT, module_command, wait_until
from tests.support.server_processes import START_TIMEOUT_S, ProcessServer

STALL_S = 3
"""--stream-stall-s of the server: longer than any fault, so that it meets nobody who reads."""

# Without probing the bandwidth, gRPC buffers no more than 64 KiB for a stream that isn't read
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
_CALL_LIMIT_S = 10.0
_BURST_CALLS = 80
_SLOW_STREAMS = 4
_OVERSIZED_BYTES = 24 * 2**20
_MAX_DELAY_S = 0.15
_LARGE_REQUEST = raw_request("/v1/embed", {"sentences": [{"tokens": ["w"] * (MAX_REQUEST_TOKENS // 16)}] * 2})
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = bytes(3) + b"\x04" + bytes(5)


class Injector:
    """Injects faults into a server, its proxy, its network and its callers."""

    def __init__(
        self,
        server: ProcessServer,
        supervisor: Supervisor,
        recorder: Recorder,
        *,
        http_port: int,
        proxies: Sequence[FaultyProxy],
        packets: PacketFilter,
    ) -> None:
        self._server, self._http_port, self._supervisor, self._proxies = server, http_port, supervisor, proxies
        self._packets, self._recorder = packets, recorder
        self.windows: list[Window] = []

    def inject(self, fault: Fault) -> None:
        """Injects a fault and returns when it is over."""
        time.sleep(fault.pause_s)
        begun_s = time.monotonic()
        try:
            note = self._act(fault)
        finally:
            self.windows.append(Window(fault.kind, begun_s, time.monotonic()))
        self.windows[-1] = Window(fault.kind, begun_s, time.monotonic(), note)

    def _act(self, fault: Fault) -> str:
        method: Callable[[Fault], str | None] = getattr(self, "_" + fault.kind.replace(" ", "_"))
        return method(fault) or ""

    # ---- the process ----

    def _kill(self, fault: Fault) -> str:
        """Sometimes a second time, while it starts."""
        times = 2 if fault.hardness < 0.25 else 1
        for again in range(times):
            if again:
                time.sleep(fault.length_s)
            self._supervisor.ends_with(-signal.SIGKILL)
            self._server.send_signal(signal.SIGKILL)
            self._until_another_process()
        self._until_serving()
        return f"{times} ×"

    def _drain(self, fault: Fault) -> None:
        self._supervisor.ends_with(0)
        self._server.send_signal(signal.SIGTERM)
        self._until_serving()

    def _stop(self, fault: Fault) -> None:
        self._server.send_signal(signal.SIGSTOP)
        try:
            time.sleep(fault.length_s)
        finally:
            self._server.send_signal(signal.SIGCONT)

    def _until_another_process(self) -> None:
        ends = len(self._supervisor.ends)
        wait_until(lambda: len(self._supervisor.ends) > ends, "the process ends")

    def _until_serving(self) -> None:
        assert self._supervisor.serving.wait(START_TIMEOUT_S), "the server didn't come back"

    # ---- the network ----

    def _cut(self, fault: Fault) -> None:
        self._reset()

    def _reset(self) -> None:
        for proxy in self._proxies:
            proxy.reset()

    def _finish_client(self, fault: Fault) -> None:
        self._half_open("client", fault)

    def _finish_server(self, fault: Fault) -> None:
        self._half_open("server", fault)

    def _half_open(self, side: Literal["client", "server"], fault: Fault) -> None:
        """One end hears of the end of the connection; for the other it lasts until the reset."""
        for proxy in self._proxies:
            proxy.finish(side)
        time.sleep(fault.length_s)
        self._reset()

    def _swallow(self, fault: Fault) -> None:
        for proxy in self._proxies:
            proxy.swallow()
        time.sleep(fault.length_s)
        self._reset()

    def _hold(self, fault: Fault) -> None:
        for proxy in self._proxies:
            proxy.hold()
        time.sleep(fault.length_s)
        for proxy in self._proxies:
            proxy.go_on()

    def _delay(self, fault: Fault) -> str:
        for proxy in self._proxies:
            proxy.delay_s = _MAX_DELAY_S * fault.hardness
        time.sleep(fault.length_s)
        for proxy in self._proxies:
            proxy.delay_s = 0.0
        return f"{1000 * _MAX_DELAY_S * fault.hardness:.0f} ms"

    def _refuse(self, fault: Fault) -> None:
        for proxy in self._proxies:
            proxy.refusing = True
            proxy.reset()
        time.sleep(fault.length_s)
        for proxy in self._proxies:
            proxy.refusing = False

    def _lost_packets(self, fault: Fault) -> str:
        return self._filtered(fault, 20 + round(80 * fault.hardness), DROP)

    def _packet_resets(self, fault: Fault) -> str:
        return self._filtered(fault, 2 + round(8 * fault.hardness), RESET)

    def _black_hole(self, fault: Fault) -> str:
        return self._filtered(fault, 1000, DROP)

    def _filtered(self, fault: Fault, per_mille: int, verdict: str) -> str:
        with self._packets.rule(per_mille, verdict):
            time.sleep(fault.length_s)
        return f"{per_mille / 10} %"

    # ---- other callers ----

    def _vanish(self, fault: Fault) -> None:
        """A process with streams under way is killed."""
        command = module_command("tests.fault.vanishing_client", self._server.target)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
            try:
                assert child.stdout is not None
                child.stdout.readline()  # its streams are under way, or the server is away
                time.sleep(fault.length_s * fault.hardness / 4)
            finally:
                child.kill()

    def _slow_readers(self, fault: Fault) -> None:
        """Streams and HTTP clients that send and never read, until the server has had enough of them."""
        with self._channel() as channel, contextlib.ExitStack() as stack:
            for _ in range(_SLOW_STREAMS):
                stack.enter_context(deaf_client(f"127.0.0.1:{self._http_port}", _LARGE_REQUEST))
            streams = [
                embed_pb2_grpc.EmbedServiceStub(channel).EmbedStream(endless_items(), timeout=_CALL_LIMIT_S)
                for _ in range(_SLOW_STREAMS)
            ]
            time.sleep(STALL_S + fault.length_s / 2)
            for stream in streams:
                stream.cancel()

    def _bad_frames(self, fault: Fault) -> None:
        """Connections that say something else than HTTP, or nothing more after a good beginning."""
        noise = random.Random(fault.hardness).randbytes(4096)
        sent = (
            noise,
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST /v1/embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{",
            _HTTP2_PREFACE,
            _HTTP2_PREFACE + noise,
            _HTTP2_PREFACE + _SETTINGS + b"\xff\xff\xff" + noise,
            _HTTP2_PREFACE + _SETTINGS + bytes(2) + b"\x08\x01\x05" + bytes(3) + b"\x01" + noise[:8],
        )
        with contextlib.ExitStack() as stack:
            for port, data in itertools.product((self._server.port, self._http_port), sent):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                connection.sendall(data)
            time.sleep(fault.length_s / 2)

    def _oversized(self, fault: Fault) -> None:
        """Messages of several times the limit, all at once."""
        with self._channel() as channel:
            embed: Any = channel.unary_unary("/bilm_api.v1.EmbedService/Embed")
            self._finish_all("oversized", [embed.future(bytes(_OVERSIZED_BYTES), timeout=_CALL_LIMIT_S)] * 3)

    def _burst(self, fault: Fault) -> None:
        """Many times what is admitted, at once: each call is answered, or refused with a time to come back."""
        request = pb.EmbedRequest(
            options=bare_options(PLAIN), sentences=[sentence(MAX_REQUEST_TOKENS // 32) for _ in range(4)]
        )
        with self._channel() as channel:
            stub = embed_pb2_grpc.EmbedServiceStub(channel)
            self._finish_all("burst", [stub.Embed.future(request, timeout=_CALL_LIMIT_S) for _ in range(_BURST_CALLS)])

    def _finish_all(self, caller: str, calls: list[Any]) -> None:
        expected = "RESOURCE_EXHAUSTED" if caller == "oversized" else "OK"
        for call in calls:
            with self._recorder.call(caller, "direct", _CALL_LIMIT_S, expected):
                call.result()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(
            self._server.target, [*_OWN_CONNECTION, ("grpc.max_receive_message_length", -1)]
        ) as channel:
            yield channel
