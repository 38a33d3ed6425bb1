"""Which addresses are reached without a proxy, whatever the environment says: those of this machine.

gRPC and urllib send everything to the proxy that `http_proxy` and its siblings name, a loopback address too, where
`no_proxy` doesn't list it. A proxy on another machine can't reach this one's loopback addresses.
"""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

_UNIX_SCHEMES = frozenset({"unix", "unix-abstract"})
_NAMING_SCHEMES = frozenset({"dns", "ipv4", "ipv6"})
_LISTING_SCHEMES = frozenset({"ipv4", "ipv6"})

ChannelOption = tuple[str, str | int]

WITHOUT_PROXY: Sequence[ChannelOption] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.address_http_proxy_enabled_addresses", ""),
)
"""gRPC's channel arguments for no proxy: neither one for names, nor one for addresses."""


def channel_options(target: str, *, proxy: bool = True) -> Sequence[ChannelOption]:
    """Return the channel arguments that keep a channel from a proxy; none where one may be used.

    Args:
        target: Address as gRPC takes it. A list of addresses has no proxy: gRPC would ask it for the list as a whole.
        proxy: Whether the environment's proxy may be used where the address isn't on this machine.
    """
    return () if proxy and not (is_local_target(target) or lists_addresses(target)) else WITHOUT_PROXY


def is_local_target(target: str) -> bool:
    """Return whether a gRPC target is a Unix socket, or has a loopback address among its addresses."""
    scheme, colon, rest = target.partition(":")
    scheme = scheme.lower()
    if colon and scheme in _UNIX_SCHEMES:
        return True
    if not (colon and scheme in _NAMING_SCHEMES):
        return is_local_host(_host(target))
    if rest.startswith("//"):
        rest = rest[2:].partition("/")[2]  # what stands before it is the authority: the name server to ask
    return any(is_local_host(_host(address)) for address in unquote(rest).split(","))


def lists_addresses(target: str) -> bool:
    """Return whether a gRPC target lists several addresses; a name isn't looked up."""
    scheme, _, addresses = target.partition(":")
    return scheme.lower() in _LISTING_SCHEMES and "," in unquote(addresses)


def is_local_url(url: str) -> bool:
    """Return whether the host of an http or https URL is this machine."""
    return is_local_host(urlsplit(url).hostname or "")


def is_local_host(host: str) -> bool:
    """Return whether a host, without a port or brackets, is this machine; names are not looked up."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761: no name server is asked for these
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return _is_short_loopback(name)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def _is_short_loopback(name: str) -> bool:
    """Return whether a host is a loopback address in a short form, as in 127.1."""
    if not name[:1].isdigit():
        return False
    try:
        return ipaddress.IPv4Address(socket.inet_aton(name)).is_loopback
    except OSError:
        return False


def _host(address: str) -> str:
    """Return the host of HOST:PORT, HOST, [HOST]:PORT or [HOST]."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, colon, _ = address.rpartition(":")
    return host if colon and ":" not in host else address
