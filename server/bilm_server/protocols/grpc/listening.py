"""The addresses that the server listens on, and gRPC's options for them."""

from collections.abc import Callable

import grpc
from bilm_api.constants import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES

from bilm_server.addresses import socket_path
from bilm_server.config import ServerConfig
from bilm_server.errors import BindError
from bilm_server.protocols.grpc.connections import connection_options
from bilm_server.protocols.grpc.unix_sockets import UnixSocket
from bilm_server.security.tls import server_credentials

_MIB = 2**20
_MAX_HEADER_BYTES = 16 * 1024
_WINDOW_BYTES = 256 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES + _MIB),  # a response is bounded before it is computed
    ("grpc.max_concurrent_streams", 256),
    # A caller's headers; between gRPC's soft and hard limit a call would be refused at random
    ("grpc.max_metadata_size", _MAX_HEADER_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_HEADER_BYTES),
    # Bytes of a stream that are sent and not read yet: a fixed window, as gRPC's probing lets it grow to megabytes
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    # A second server on the port must fail, not take half of the connections
    ("grpc.so_reuseport", 0),
)


Tls = Callable[[], grpc.ServerCredentials | None]
"""Returns the credentials of an address when it is first bound; None: no TLS."""


def no_tls() -> None:
    """Return no credentials."""


def channel_options(config: ServerConfig, max_connections: int) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for the server that answers calls."""
    return (*_OPTIONS, *connection_options(max_connections, config.max_connection_age_s))


def credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Return credentials for TLS, if that is configured.

    Raises:
        ConfigurationError: if a file isn't what it should be.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    return server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)


class TcpAddress:
    """HOST:PORT to listen on; a free port that was found is kept."""

    def __init__(self, name: str, listen: str, tls: Tls = no_tls) -> None:
        """Keep what `bind` needs.

        Args:
            name: of the setting, for errors.
            listen: HOST:PORT; port 0: any free one.
            tls: returns its credentials.
        """
        self._name, self._listen, self._tls = name, listen, tls

    def bind(self, server: grpc.aio.Server) -> str:
        """Have a server that has not started listen here.

        Returns:
            The target for clients.

        Raises:
            BindError: if the address can't be listened on.
            ConfigurationError: if the files of TLS can't be used.
        """
        add, tls = server.add_insecure_port, self._tls()
        try:
            port = add(self._listen) if tls is None else server.add_secure_port(self._listen, tls)
        except RuntimeError as error:
            raise BindError(f"{self._name}: can't listen on {self._listen}") from error
        self._listen = f"{self._listen.rpartition(':')[0]}:{port}"
        return self._listen

    def release(self) -> None:
        """Do nothing: gRPC closes the port with its server."""


class UnixAddress:
    """unix:PATH to listen on; one server at a time owns the path, until `release`."""

    def __init__(self, name: str, listen: str, tls: Tls = no_tls) -> None:
        """Keep what `bind` needs.

        Args:
            name: of the setting, for errors.
            listen: unix:PATH or unix:///PATH.
            tls: returns its credentials.
        """
        self._name, self._listen, self._tls = name, listen, tls
        self._socket = UnixSocket(socket_path(listen))

    def bind(self, server: grpc.aio.Server) -> str:
        """Have a server that has not started listen here, in place of one before it.

        Returns:
            The target for clients.

        Raises:
            BindError: if another server listens here, or the path can't be used.
            ConfigurationError: if the files of TLS can't be used.
        """
        try:
            self._socket.claim()
            self._socket.bind(server, self._tls())
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise BindError(f"{self._name}: can't listen on {self._listen}{place}: {error.strerror}") from error
        except RuntimeError as error:
            raise BindError(f"{self._name}: can't listen on {self._listen}") from error
        return self._listen

    def release(self) -> None:
        """Remove the socket, if it is our own, and own the path no more; idempotent."""
        self._socket.release()


Address = TcpAddress | UnixAddress


def address(name: str, listen: str, tls: Tls = no_tls) -> Address:
    """Return what listens on HOST:PORT, unix:PATH or unix:///PATH."""
    kind = UnixAddress if listen.startswith("unix:") else TcpAddress
    return kind(name, listen, tls)
