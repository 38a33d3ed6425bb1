"""A service whose methods come when the model is loaded; until then each of them is refused with MODEL_LOADING."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc
from bilm_api.constants import Reason

from bilm_server.errors import RefusalError

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

RETRY_AFTER_MS: Final = 1000
"""Pushback of a call that comes while the model loads, which takes seconds."""


async def _refuse(requests: AsyncIterator[bytes], context: "Context") -> None:
    raise RefusalError(Reason.MODEL_LOADING, "the model is being loaded; try again", RETRY_AFTER_MS)


LOADING: Final["Handler"] = grpc.stream_stream_rpc_method_handler(_refuse)
"""Answers the calls of every method while the model loads."""


class LateService(grpc.GenericRpcHandler):
    """The methods of a service, for any number of grpc servers; used from the event loop only.

    Generated code adds the service here as it would to a server.
    """

    def __init__(self, service: str, methods: Collection[str]) -> None:
        """Keep which methods there will be.

        Args:
            service: full name.
            methods: names.
        """
        self._names = frozenset(f"/{service}/{method}" for method in methods)
        self._handlers: tuple[grpc.GenericRpcHandler, ...] = ()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Take the service: from here on calls reach it. Part of a grpc server's interface."""
        self._handlers = tuple(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take nothing more: part of a grpc server's interface, for methods that are found faster."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler | None":
        """Return what answers a call; part of grpc's interface."""
        if handler_call_details.method not in self._names:
            return None
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next(filter(None, found), LOADING)
