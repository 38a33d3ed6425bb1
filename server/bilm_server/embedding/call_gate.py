"""What every call passes through, whatever its protocol: who calls, what that caller may have, and who observes."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, Protocol

from bilm_server.config import Right
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.errors import Code, RefusalError
from bilm_server.observability.call_record import CallObserver, CallRecord, enter, is_marked, leave
from bilm_server.security.auth import AuthContext, Caller, Metadata
from bilm_server.security.callers import CallerRights

NO_AUTH_CONTEXT: Final[AuthContext] = MappingProxyType({})
"""Of a connection that proves nothing."""


class Identifies(Protocol):
    """What a gate asks of an `Authenticator`."""

    def identify(self, metadata: Metadata, peer: str, auth_context: AuthContext) -> Caller:
        """Return who calls, or raise a RefusalError."""


class CallGate:
    """Lets calls in; used from the event loop only.

    A door makes a `CallRecord` and does all of a call within `call`. Nothing of a request needs to be read before:
    a caller that isn't known, or has as many calls as it may, is refused first.
    """

    def __init__(
        self,
        authenticator: Identifies,
        rights: CallerRights,
        limits: CallerLimits,
        observers: Sequence[CallObserver],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep what calls pass through.

        Args:
            authenticator: names callers, or refuses them.
            rights: of callers.
            limits: of each caller by itself.
            observers: see every call, in this order; each must neither raise nor take long.
            clock: seconds, monotonic.
        """
        self._authenticator, self._rights, self._limits = authenticator, rights, limits
        self._observers, self._clock = tuple(observers), clock

    @contextmanager
    def call(
        self, call: CallRecord, auth_context: AuthContext = NO_AUTH_CONTEXT, *, keeps_held: bool = False
    ) -> Iterator[None]:
        """Observe a call from begin to end, and let it in.

        The record ends with the code and the reason of the RefusalError that leaves the context. A code that the door
        has set before another error leaves it stays.

        Args:
            call: becomes the current call.
            auth_context: what the connection proves of the caller, as grpc's `auth_context` has it.
            keeps_held: whether the door itself gives back what the call holds of the server, `CallRecord.held`, once
                its response is sent; else it is given back at the end of the context.

        Raises:
            RefusalError: UNAUTHENTICATED or CALLER_LIMIT.
        """
        begun_s = self._clock()
        for observer in self._observers:
            observer.begin(call)
        token = enter(call)
        try:
            self._let_in(call, auth_context)
            yield
            call.code = call.code or Code.OK
        except RefusalError as error:
            call.code, call.reason = error.code, error.reason.value
            raise
        except asyncio.CancelledError:
            call.code = call.code or Code.CANCELLED
            raise
        except Exception:
            call.code = call.code or Code.UNKNOWN
            raise
        finally:
            leave(token)
            if not keeps_held:
                call.held.close()
            call.duration_s = self._clock() - begun_s
            for observer in self._observers:
                observer.end(call)

    def _let_in(self, call: CallRecord, auth_context: AuthContext) -> None:
        call.caller = self._authenticator.identify(call.metadata, call.peer, auth_context).name
        call.is_test = is_marked(call.metadata) and self._rights.has(call.caller, Right.NO_LOG)
        call.held.add(self._limits.call(call.caller).release)
