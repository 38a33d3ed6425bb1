"""Real servers, in this process, on a free port."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.kernels.product_paths import ProductPath
from bilm_server.app import build_server
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.served_model import load_served_model
from grpc_health.v1 import health_pb2_grpc

TINY = "random:tiny"
PLAIN = embed_pb2.EmbedOptions(
    layers=embed_pb2.LAYERS_ALL, pooling=embed_pb2.POOLING_NONE, data_type=embed_pb2.DATA_TYPE_FLOAT32
)


class RunningServer:
    """A server on an event loop of its own, as a deployment has it."""

    def __init__(self, config: ServerConfig, bfloat16: ProductPath | None = None) -> None:
        self.server = build_server(config, load_served_model(config, bfloat16))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._channels: list[grpc.Channel] = []

    def start(self) -> None:
        self._thread.start()
        self.call(self.server.start)

    def stop(self) -> None:
        for channel in self._channels:
            channel.close()
        self.call(self.server.stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Awaits a coroutine function of the server's on its loop."""
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(30)

    @property
    def target(self) -> str:
        return self.server.target

    def channel(self) -> grpc.Channel:
        channel = grpc.insecure_channel(self.target, options=[("grpc.max_receive_message_length", 20 * 2**20)])
        self._channels.append(channel)
        return channel

    def stub(self) -> embed_pb2_grpc.EmbedServiceStub:
        return embed_pb2_grpc.EmbedServiceStub(self.channel())


@contextmanager
def running(*flags: str, bfloat16: ProductPath | None = None) -> Iterator[RunningServer]:
    """A server with these flags.

    Args:
        flags: of `bilm-serve`.
        bfloat16: how its machine computes bfloat16 products; None: as the present one does.
    """
    server = RunningServer(load_config(["--listen", "127.0.0.1:0", "--drain-delay-s", "0", *flags]), bfloat16)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods


def tokens(*words: str, **fields: Any) -> embed_pb2.Sentence:
    return embed_pb2.Sentence(tokens=embed_pb2.Tokens(tokens=words), **fields)


def options(**changes: Any) -> embed_pb2.EmbedOptions:
    found = embed_pb2.EmbedOptions()
    found.CopyFrom(PLAIN)
    found.MergeFrom(embed_pb2.EmbedOptions(**changes))
    return found
