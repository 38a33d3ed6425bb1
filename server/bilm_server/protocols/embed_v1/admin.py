"""`bilm_api.v1.AdminService`: what operators do with a running server."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import Reason
from bilm_api.v1 import embed_pb2, embed_pb2_grpc

from bilm_server.config import Right
from bilm_server.errors import RefusalError
from bilm_server.observability.call_record import current_call
from bilm_server.security.callers import CallerRights

if TYPE_CHECKING:
    from bilm_server.embedding.model_set import Changes  # torch comes with it

    Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(embed_pb2_grpc.AdminServiceServicer):
    """The RPC methods, for servers that know their callers."""

    def __init__(self, reload: Callable[[], "Awaitable[Changes]"], rights: CallerRights) -> None:
        """Set the parts.

        Args:
            reload: reads models and callers again; returns what has changed, or raises RefusalError where that can't be
                done.
            rights: of callers.
        """
        self._reload, self._rights = reload, rights

    async def Reload(  # noqa: N802 - the contract's name
        self, request: embed_pb2.ReloadRequest, context: "Context"
    ) -> embed_pb2.ReloadResponse:
        """Read models and callers again."""
        if not self._rights.has(current_call().caller, Right.RELOAD):
            raise RefusalError(Reason.RIGHT_MISSING, f'this caller hasn\'t the right "{Right.RELOAD}"')
        done = await self._reload()
        return embed_pb2.ReloadResponse(added=done.added, replaced=done.replaced, removed=done.removed, kept=done.kept)
