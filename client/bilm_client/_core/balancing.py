"""Several servers behind one channel: their addresses as a target of gRPC, and the service config that spreads calls.

gRPC itself resolves, watches health, picks a server for each attempt and reads load reports.
"""

import ipaddress
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, get_args
from urllib.parse import unquote

from bilm_system.proxies import lists_addresses

from bilm_client.policy import Balance, RetryPolicy

_SERVER_NAMES = frozenset({"grpc.default_authority", "grpc.ssl_target_name_override"})
# gRPC's default of 10 s leaves out a server's reports for that long after each new connection.
_BLACKOUT = "1s"
_POLICIES: Final[dict[Balance, dict[str, object]]] = {
    "round_robin": {"round_robin": {}},
    "weighted": {"weighted_round_robin": {"blackoutPeriod": _BLACKOUT}},
}


def check_balance(balance: Balance) -> None:
    """Check the name of a way to balance.

    Raises:
        ValueError: There is none of that name.
    """
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be 'first', 'round_robin' or 'weighted', got {balance!r}")


def as_target(target: str | Sequence[str]) -> str:
    """Return a target of gRPC for an address, or for several of them.

    Args:
        target: One address as gRPC takes it, or several IP:PORT, as a sequence or separated by commas.

    Raises:
        TypeError: It is neither.
        ValueError: One of several addresses is something else; gRPC looks up a name only where it is the whole target.
    """
    if isinstance(target, str):
        if "," not in target or lists_addresses(target):
            return target
        addresses = [part.strip() for part in target.split(",")]
    elif isinstance(target, Sequence) and all(isinstance(part, str) for part in target):
        addresses = list(target)
    else:
        raise TypeError(f"target must be a str or a sequence of str, got {target!r}")
    return addresses[0] if len(addresses) == 1 else _list_target(addresses)


def each_target(target: str) -> list[str]:
    """Return a target for each address of a target of gRPC: several where it is a list, else the one."""
    if not lists_addresses(target):
        return [target]
    scheme, _, addresses = target.partition(":")
    return [f"{scheme}:{address}" for address in unquote(addresses).split(",")]


def check_server_name(target: str, channel_options: Iterable[tuple[str, Any]] = ()) -> None:
    """Check that a certificate can be held against a target's name.

    Raises:
        ValueError: The target lists several addresses, and the options give no name.
    """
    if lists_addresses(target) and not _SERVER_NAMES & {key for key, _ in channel_options}:
        raise ValueError(
            f"target: TLS can't verify {target!r}, a list without a name (expected a DNS name with these addresses, or "
            "the certificates' name in channel_options as grpc.default_authority)"
        )


def service_config(retry: RetryPolicy, balance: Balance, given: str | None = None, health_service: str = "") -> str:
    """Return the service config of a channel, as JSON: retry, balancing, and health checks where calls are spread.

    Args:
        retry: Of unary calls.
        balance: How calls are spread.
        given: Another service config, whose fields replace those of the client one by one; None: none.
        health_service: Name of what has to be SERVING, at the health service of each server.

    Raises:
        ValueError: `given` is no JSON object.
    """
    config: dict[str, object] = json.loads(retry.service_config())
    if balance in _POLICIES:  # gRPC's default is the first server, whose health it doesn't watch
        config["loadBalancingConfig"] = [_POLICIES[balance]]
        config["healthCheckConfig"] = {"serviceName": health_service}
    return json.dumps({**config, **_parsed(given)})


def _parsed(given: str | None) -> dict[str, object]:
    if given is None:
        return {}
    try:
        parsed = json.loads(given)
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"channel_options: grpc.service_config must be a JSON object, got {given!r}")
    return parsed


def _list_target(addresses: Sequence[str]) -> str:
    if not addresses:
        raise ValueError("target must have an address, got an empty list")
    hosts = [_ip_and_port(address) for address in addresses]
    if all(isinstance(ip, ipaddress.IPv4Address) for ip, _ in hosts):
        return "ipv4:" + ",".join(f"{ip}:{port}" for ip, port in hosts)
    # One list has one family: an IPv4 address goes by its mapped form, which gRPC connects to by IPv4
    return "ipv6:" + ",".join(f"[{_as_ipv6(ip)}]:{port}" for ip, port in hosts)


def _ip_and_port(address: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        ip = ipaddress.IPv6Address(host[1:-1]) if bracketed else ipaddress.IPv4Address(host)
        number = int(port) if port.isascii() and port.isdigit() else -1
    except ValueError:
        number = -1
    if not 0 < number < 65536:
        raise ValueError(
            f"target: {address!r} in a list (expected IPV4:PORT or [IPV6]:PORT; servers with names need a common DNS "
            "name, as in 'dns:///bilm-serve:50051')"
        )
    return ip, number


def _as_ipv6(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"::ffff:{ip}" if isinstance(ip, ipaddress.IPv4Address) else str(ip)
