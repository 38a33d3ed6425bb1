"""One stream of EmbedStream over a synchronous channel, for both clients.

gRPC writes from a thread of its own, and a reader thread delivers what comes; both end with the connection. The
asynchronous client goes this way too: where a write meets the end of a call, grpc.aio (1.85.1) reports the write's
failure as the call's status, INTERNAL, and the server's own status is lost; measured for one refused stream in five.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
from bilm_api.v1 import embed_pb2 as pb

from bilm_client.errors import BilmError, ServiceError, UnavailableError

# Messages (of at most 16 MiB) that lie ready for a caller who doesn't take them: with two, one is read while another
# is worked on, and beyond that flow control holds the server back.
_READ_AHEAD = 2
_JOIN_TIMEOUT_S = 5.0

Delivery = pb.EmbedStreamResponse | BilmError
Call = Any  # a grpc.Call that is also an iterator of responses: gRPC's types have no one name for it
Connect = Callable[[Iterator[pb.EmbedStreamRequest]], Call]
Translate = Callable[[grpc.RpcError], BilmError]


class Connection:
    """One stream.

    Args:
        connect: Starts the call, given its requests.
        translate: Makes the package's exception from gRPC's.
        opening: The first messages.
        deliver: Takes each response and, last, the error that ended the stream (its proper end is one too); called in
            the reader thread.
    """

    def __init__(
        self,
        connect: Connect,
        translate: Translate,
        opening: list[pb.EmbedStreamRequest],
        deliver: Callable[[Delivery], None],
    ) -> None:
        self._requests: SimpleQueue[pb.EmbedStreamRequest | None] = SimpleQueue()
        for request in opening:
            self._requests.put(request)
        self._slots = threading.Semaphore(_READ_AHEAD)
        self._stopped = threading.Event()
        self._call = connect(iter(self._requests.get, None))
        arguments = (self._call, translate, deliver, self._slots, self._stopped)
        self._reader = threading.Thread(target=_read, args=arguments, name="bilm-stream-reader", daemon=True)
        self._reader.start()

    def send(self, request: pb.EmbedStreamRequest) -> None:
        """Hand a message to gRPC's writer."""
        self._requests.put(request)

    def half_close(self) -> None:
        """Say that no more messages come."""
        self._requests.put(None)

    def taken(self) -> None:
        """Say that a delivered response has been taken, so that another may be read."""
        self._slots.release()

    def close(self) -> None:
        """Cancel the call, if it is still under way; its threads end."""
        self._stopped.set()
        self._call.cancel()
        self._requests.put(None)
        self._slots.release()

    def join(self) -> None:
        """Wait for the reader thread of a closed connection."""
        self._reader.join(_JOIN_TIMEOUT_S)


def _read(
    call: Call,
    translate: Translate,
    deliver: Callable[[Delivery], None],
    slots: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    # A function, not a method: the thread must not keep an abandoned connection alive.
    try:
        while slots.acquire() and not stopped.is_set():
            deliver(next(call))
    except StopIteration:
        deliver(_ended_early())
    except grpc.RpcError as error:
        failure = translate(error)
        failure.__cause__ = error
        deliver(failure)


def _ended_early() -> ServiceError:
    """The error for a server that ends a stream in good order; one only if results are still due."""
    return UnavailableError("the server ended the stream before all results had come", code=grpc.StatusCode.UNAVAILABLE)
