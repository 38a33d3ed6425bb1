"""The callers of a chaos run, in a process of their own: every kind of client, each call written down.

Says {"ready": …} on its standard output when it knows all answers, begins with a line on its standard input, ends with
that input's end, and says then what it held before and after.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bilm_client import AsyncClient, Client

from tests.fault.chaos_callers import LIMIT_S, AsyncCallers, Callers
from tests.fault.chaos_doors import HttpCallers, KserveCallers
from tests.fault.chaos_records import HANG_MARGIN_S, Recorder
from tests.fault.known_answers import KnownAnswers
from tests.support.processes import descriptors, resident_bytes

_THINK_S = 0.02
_THINK_AFTER_FAILURE_S = 0.2
_SETTLE_S = 10.0
_MIB = 2**20


class Load:
    """All callers, from their start to their end."""

    def __init__(self, targets: dict[str, str], http: dict[str, str], recorder: Recorder, seed: int) -> None:
        self._targets, self._http, self._recorder, self._seed = targets, http, recorder, seed
        self._known = KnownAnswers()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._callers: list[Callers | KserveCallers | HttpCallers] = []

    def learn(self) -> KnownAnswers:
        """Learns all answers, and does everything once that takes memory for good."""
        with Client(self._targets["direct"]) as client:
            self._known.ask(client)
        asyncio.run(self._warm_up())
        return self._known

    async def _warm_up(self) -> None:
        async with AsyncClient(self._targets["direct"]) as client:
            await client.embed(["a"])
            async for _ in client.embed_stream(["a"]):
                pass

    def start(self) -> None:
        """Starts the callers."""
        for path, target in self._targets.items():
            callers = Callers(path, target, self._recorder, self._known)
            self._callers.append(callers)
            for one in (callers.unary, callers.stream, callers.document, callers.bare_unary, callers.bare_stream):
                self._in_thread(f"{one.__name__}/{path}", one)
            if path == "direct":
                self._in_thread("bad", callers.bad)
                self._in_thread("health", callers.health)
            self._start_other_doors(path, target)
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._run_async()), name="async", daemon=True))
        self._threads[-1].start()

    def _start_other_doors(self, path: str, target: str) -> None:
        kserve = KserveCallers(path, target, self._recorder, self._known)
        http = HttpCallers(path, self._http[path], self._recorder, self._known)
        self._callers += [kserve, http]
        ones: dict[str, Callable[[random.Random], bool]]
        ones = {"kserve": kserve.infer, "http embeddings": http.embeddings, "http embed": http.embed}
        if path == "direct":
            ones |= {"bad http": http.bad, "http health": http.health}
        for name, one in ones.items():
            self._in_thread(f"{name}/{path}", one)

    def stop(self) -> list[str]:
        """Stops them; the names of those that still hadn't stopped long after every deadline."""
        self._stop.set()
        end_s = time.monotonic() + LIMIT_S + 2 * HANG_MARGIN_S
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        for callers in self._callers:
            callers.close()
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _in_thread(self, name: str, one: Callable[[random.Random], bool]) -> None:
        chance = random.Random(f"{self._seed} {name}")

        def run() -> None:
            while not self._stop.is_set():
                self._stop.wait(_THINK_S if one(chance) else _THINK_AFTER_FAILURE_S)

        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    async def _run_async(self) -> None:
        callers = [AsyncCallers(path, target, self._recorder, self._known) for path, target in self._targets.items()]
        ones = [one for each in callers for one in (each.unary, each.stream, each.document)]
        await asyncio.gather(*(self._repeat(number, one) for number, one in enumerate(ones)))
        for each in callers:
            await each.close()

    async def _repeat(self, number: int, one: Callable[[random.Random], Awaitable[bool]]) -> None:
        chance = random.Random(f"{self._seed} async {number}")
        while not self._stop.is_set():  # noqa: ASYNC110 - the pause is the caller's own
            await asyncio.sleep(_THINK_S if await one(chance) else _THINK_AFTER_FAILURE_S)


def holdings() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    return {"descriptors": descriptors(os.getpid()), "resident_mib": resident_bytes(os.getpid()) / _MIB}


def settled(before: dict[str, float]) -> dict[str, float]:
    """What it holds after its connections are closed, which takes gRPC a moment."""
    end_s = time.monotonic() + _SETTLE_S
    while holdings()["descriptors"] > before["descriptors"] and time.monotonic() < end_s:
        time.sleep(0.1)
    return holdings()


def main() -> None:
    """Runs the load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--direct", required=True)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--direct-http", required=True)
    parser.add_argument("--proxy-http", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    recorder = Recorder(arguments.records)
    targets = {"direct": arguments.direct, "proxy": arguments.proxy}
    http = {"direct": arguments.direct_http, "proxy": arguments.proxy_http}
    load = Load(targets, http, recorder, arguments.seed)
    known = load.learn()
    before = holdings()
    print(json.dumps({"ready": True, "exact": known.exact, "version": known.version}), flush=True)
    sys.stdin.readline()
    recorder.open()
    load.start()
    sys.stdin.read()
    hung = load.stop()
    recorder.close()
    print(json.dumps({"before": before, "after": settled(before), "hung": hung}), flush=True)


if __name__ == "__main__":
    main()
