"""The addresses that the server listens on, and gRPC's options for them."""

from pathlib import Path

import grpc

from bilm_server.config import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, ServerConfig
from bilm_server.descriptors import connection_options
from bilm_server.tls import server_credentials

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
    # What a stream has sent and nobody has read yet: a fixed window, where gRPC's probing lets it grow to megabytes
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    # A second server on the port must fail, not take half of the connections
    ("grpc.so_reuseport", 0),
)


class BindError(Exception):
    """An address can't be listened on."""


def channel_options(config: ServerConfig, max_connections: int) -> tuple[tuple[str, int], ...]:
    """GRPC's options of the server that answers calls."""
    return (*_OPTIONS, *connection_options(max_connections, config.max_connection_age_s))


def credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """For TLS, if that is configured.

    Raises:
        ConfigurationError: if a file isn't what it should be.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    return server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)


def bind(server: grpc.aio.Server, name: str, listen: str, tls: grpc.ServerCredentials | None = None) -> str:
    """Has a server listen on HOST:PORT or unix:PATH.

    Args:
        server: that has not started.
        name: of the choice, for the error.
        listen: the address; port 0: any free one.
        tls: None: none.

    Returns:
        Where clients find it.

    Raises:
        BindError: if that can't be.
    """
    try:
        port = server.add_insecure_port(listen) if tls is None else server.add_secure_port(listen, tls)
    except RuntimeError as error:
        raise BindError(f"{name}: can't listen on {listen}") from error
    if listen.startswith("unix:"):
        if not Path(listen.removeprefix("unix:")).exists():
            raise BindError(f"{name}: can't listen on {listen}")
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"
