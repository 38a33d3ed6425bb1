"""Calls of the client while packets get lost, in a network namespace; prints what came of them, as JSON.

python -m tests.fault.lossy_network FOLDER
"""

import json
import random
import sys
import time
from collections import Counter
from typing import Any

from bilm_client import Client, Keepalive, RetryPolicy
from bilm_client.errors import ServiceError

from tests.fault.known_answers import OPTIONS, KnownAnswers, WrongAnswerError
from tests.fault.packets import DROP, RESET, PacketFilter, enter_namespace
from tests.support.processes import descriptors, resident_bytes, wait_until
from tests.support.server_processes import ProcessServer

_LIMIT_S = 60.0
_SHORT_LIMIT_S = 1.5
_CALLS = 60
_FEW_CALLS = 4
_MAX_TOKENS = 60
# An answer of several packets whose first ones have arrived is beyond gRPC's retries: such sentences are left out here
_FAST = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_PATIENT = RetryPolicy(initial_backoff_s=0.3, throttle_tokens=1000)
# The operating system gives a connection up whose bytes haven't been acknowledged for so long; where only the server
# was told of a reset, a client that waits for an answer learns of it by its next ping
_QUICK = Keepalive(time_s=21.0, timeout_s=2.0)


class Calls:
    """Makes calls and counts how they end."""

    def __init__(self, target: str, known: KnownAnswers) -> None:
        self._target, self._known = target, known
        self._short = [i for i, sentence in enumerate(known.corpus) if len(sentence) < _MAX_TOKENS]
        self._chance = random.Random(1)

    def make(self, n_calls: int, limit_s: float) -> dict[str, Any]:
        """Makes calls one after another, on one client."""
        wrong, failed, slowest_s = [], Counter[str](), 0.0
        with Client(self._target, retry=_PATIENT, keepalive=_QUICK, channel_options=_FAST) as client:
            for _ in range(n_calls):
                begun_s = time.monotonic()
                try:
                    self._ask(client, limit_s)
                except WrongAnswerError as error:
                    wrong.append(str(error))
                except ServiceError as error:
                    failed[error.code.name] += 1
                slowest_s = max(slowest_s, time.monotonic() - begun_s)
        right = n_calls - len(wrong) - failed.total()
        return {"right": right, "wrong": wrong, "failed": failed, "slowest_s": slowest_s, "limit_s": limit_s}

    def _ask(self, client: Client, limit_s: float) -> None:
        options, index = self._chance.randrange(len(OPTIONS)), self._chance.choice(self._short)
        (found,) = client.embed([self._known.corpus[index]], **OPTIONS[options], timeout_s=limit_s)
        self._known.check(found, options, index)


def main() -> None:
    """Runs it."""
    if not enter_namespace("tests.fault.lossy_network"):
        sys.exit("needs a network namespace")
    with ProcessServer(fresh=True) as server:
        print(json.dumps(_measure(server)))


def _measure(server: ProcessServer) -> dict[str, dict[str, Any]]:
    known = KnownAnswers()
    with Client(server.target) as client:
        known.ask(client)
    calls, packets = Calls(server.target, known), PacketFilter((server.port,), True)
    calls.make(_FEW_CALLS, _LIMIT_S)
    before = _held(server)
    found = {}
    for name, per_mille, verdict in (("lost packets", 50, DROP), ("packet resets", 20, RESET)):
        hit = packets.packets_hit
        with packets.rule(per_mille, verdict):
            found[name] = calls.make(_CALLS, _LIMIT_S)
        found[name]["packets_hit"] = packets.packets_hit - hit
    with packets.rule(1000, DROP):
        found["dead"] = calls.make(_FEW_CALLS, _SHORT_LIMIT_S)
    found["healed"] = calls.make(_FEW_CALLS, _LIMIT_S)
    wait_until(lambda: descriptors(server.pid) <= before[0] + 2, "the server closes the connections", 60.0)
    after = _held(server)
    names = ("descriptors_before", "mib_before", "descriptors_after", "mib_after")
    return {**found, "held": dict(zip(names, (*before, *after), strict=True))}


def _held(server: ProcessServer) -> tuple[int, float]:
    return descriptors(server.pid), resident_bytes(server.pid) / 2**20


if __name__ == "__main__":
    main()
