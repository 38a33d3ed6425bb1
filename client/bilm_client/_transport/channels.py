"""Every channel of this package is made here; imports no numpy."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc
from bilm_system.proxies import channel_options

from bilm_client.errors import ForkedError

if TYPE_CHECKING:
    from bilm_client._core.settings import Settings

ChannelOptions = Sequence[tuple[str, Any]]

_FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
_OFF = frozenset({"0", "f", "false", "n", "no"})


class _FirstUse:
    """The process in which this package first made a channel; 0: none has."""

    process_id = 0


def sync_channel(settings: "Settings") -> grpc.Channel:
    """Return a synchronous channel of a client; it connects with its first call."""
    return new_channel(
        settings.target, settings.channel_arguments(), credentials=settings.credentials, proxy=settings.proxy
    )


def async_channel(settings: "Settings") -> grpc.aio.Channel:
    """Return an asynchronous channel of a client; it connects with its first call."""
    arguments = _arguments(settings.target, settings.channel_arguments(), settings.proxy)
    if settings.credentials is None:
        return grpc.aio.insecure_channel(settings.target, arguments)
    return grpc.aio.secure_channel(settings.target, settings.credentials, arguments)


def new_channel(
    target: str, options: ChannelOptions = (), *, credentials: grpc.ChannelCredentials | None = None, proxy: bool = True
) -> grpc.Channel:
    """Return a synchronous channel; it connects with its first call.

    Args:
        target: The server's address, as gRPC takes it.
        options: Channel arguments; they replace those that this function gives.
        credentials: TLS credentials; None: plaintext.
        proxy: Whether the environment's proxy is used, where the target isn't on this machine.

    Raises:
        ForkedError: The process is a fork of one that used gRPC, and gRPC's fork support is off.
    """
    arguments = _arguments(target, options, proxy)
    if credentials is None:
        return grpc.insecure_channel(target, arguments)
    return grpc.secure_channel(target, credentials, arguments)


def _arguments(target: str, options: ChannelOptions, proxy: bool) -> list[tuple[str, Any]]:
    _check_process()
    return list({**dict(channel_options(target, proxy=proxy)), **dict(options)}.items())


def _check_process() -> None:
    if not _FirstUse.process_id:
        _FirstUse.process_id = os.getpid()
    setting = os.environ.get(_FORK_SUPPORT, "")
    if _FirstUse.process_id != os.getpid() and setting.lower() in _OFF:
        raise ForkedError(
            f"process {_FirstUse.process_id} used gRPC before it forked this one, which can't use it while gRPC's fork "
            f"support is off: {_FORK_SUPPORT} is {setting!r} (expected 1, or unset)"
        )
