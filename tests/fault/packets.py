"""Packets that get lost or are answered with a reset: by nft, in a network namespace of the process's own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.fault.fault_support import missing_namespace, unshare

DROP = "drop"
RESET = "reject with tcp reset"

_INSIDE = "BILM_TEST_NAMESPACE"
_TABLE = "inet faults"


def enter_namespace(module: str) -> bool:
    """Start the program anew in a network namespace, where that is possible; then the function doesn't return.

    Args:
        module: The program; it gets the arguments of this process.

    Returns:
        Whether this already is the namespace.
    """
    if not os.environ.get(_INSIDE) and not missing_namespace("--net"):
        os.environ[_INSIDE] = "1"
        up = 'ip link set lo up && exec "$@"'
        program = [*unshare("--net"), "sh", "-c", up, "sh", sys.executable, "-m", module, *sys.argv[1:]]
        os.execvp(program[0], program)
    return bool(os.environ.get(_INSIDE))


class PacketFilter:
    """Rules for the packets to and from some ports.

    Args:
        ports: The server's.
        in_namespace: Whether this is a namespace of our own; rules anywhere else would meet others.
    """

    def __init__(self, ports: Sequence[int], in_namespace: bool) -> None:
        self._ports = ports
        self.available = in_namespace and shutil.which("nft") is not None
        self.packets_hit = 0
        """Packets that rules have met so far."""

    @contextmanager
    def rule(self, per_mille: int, verdict: str) -> Iterator[None]:
        """Lets packets, chosen at random, meet a verdict for as long as the context lasts."""
        chosen = "" if per_mille == 1000 else f"numgen random mod 1000 < {per_mille}"
        _nft(
            f"add table {_TABLE}",
            f"add chain {_TABLE} faults {{ type filter hook input priority 0; }}",
            *(
                f"add rule {_TABLE} faults tcp {end} {port} {chosen} counter {verdict}"
                for port in self._ports
                for end in ("dport", "sport")
            ),
        )
        try:
            yield
        finally:
            self.packets_hit += _counted()
            _nft(f"delete table {_TABLE}")


def _counted() -> int:
    listed = subprocess.run(["nft", "--json", "list", "table", *_TABLE.split()], stdout=subprocess.PIPE, check=True)
    rules = [entry["rule"]["expr"] for entry in json.loads(listed.stdout)["nftables"] if "rule" in entry]
    return sum(part["counter"]["packets"] for expressions in rules for part in expressions if "counter" in part)


def _nft(*commands: str) -> None:
    subprocess.run(["nft", "-f", "-"], input="\n".join(commands), text=True, check=True)
