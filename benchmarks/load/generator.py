"""The load generator: a process of its own that calls a server as it is told, one JSON line for each wish and answer.

Its processor time is reported with every answer: on a small machine it takes from what the server has.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bilm_bench.statistics.percentiles import percentile
from bilm_bench.workload.schedule import arrivals_s

from benchmarks.load.callers import CallFailedError, LoadCaller
from benchmarks.load.sentences import read_sentences

_LAST_ANSWERS_S = 5.0
_FAILED_MS = 1e6  # a call that gave nothing took as good as for ever

PROTOCOLS = ("bilm", "kserve", "triton", "http-base64", "http-float", "http-octets")

Reply = dict[str, Any]


class Generator:
    """Calls with the sentences in turn."""

    def __init__(self, caller: LoadCaller, sentences: list[list[str]]) -> None:
        self._caller, self._sentences = caller, sentences
        self._requests: dict[tuple[int, int], Any] = {}
        self._next = 0

    async def show(self, index: int) -> Reply:
        """Return the vectors of one sentence."""
        return {"vectors": (await self._caller.call(self._request(index, 1)[0])).tolist()}

    async def singles(self, first: int, count: int) -> Reply:
        """Return the latency of one sentence after another."""
        latencies_ms = []
        for index in range(first, first + count):
            request, _ = self._request(index, 1)
            begun_s = time.perf_counter()
            await self._caller.call(request)
            latencies_ms.append(1e3 * (time.perf_counter() - begun_s))
        return {"latencies_ms": latencies_ms}

    async def closed(self, callers: int, per_call: int, warm_s: float, seconds: float) -> Reply:
        """Run callers that each call again as soon as the response is there.

        What ends in the window counts. The first calls are of all sizes, so that the callers don't go on in step.
        """
        begin_s = time.perf_counter() + warm_s
        end_s = begin_s + seconds
        done = {"calls": 0, "sentences": 0, "tokens": 0, "calls_in_all": 0}

        async def caller(number: int) -> None:
            size = -(-per_call * (number + 1) // callers)
            while time.perf_counter() < end_s:
                request, tokens = self._request(self._take(size), size)
                await self._caller.call(request)
                done["calls_in_all"] += 1
                if begin_s <= time.perf_counter() < end_s:
                    for name, count in (("calls", 1), ("sentences", size), ("tokens", tokens)):
                        done[name] += count
                size = per_call

        cpu_s, begun_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(callers)))
        cpu_s, took_s = time.process_time() - cpu_s, time.perf_counter() - begun_s
        per_call_ms = 1e3 * cpu_s / max(1, done["calls_in_all"])
        found = {"generator_cores": cpu_s / took_s, "generator_cpu_ms_per_call": per_call_ms}
        return {**done, "seconds": seconds, **found}

    async def open(self, rate: float, seconds: float, seed: int, max_in_flight: int) -> Reply:
        """Send calls at the moments of a Poisson process, however slow the responses are.

        A latency counts from the moment for which the call was meant. With too many calls under way it is given up.
        """
        draw = random.Random(seed)  # of the moments and, between them, of the sentences
        latencies_ms: list[float] = []
        late_ms: list[float] = []
        errors: dict[str, int] = {}
        in_flight: set[asyncio.Task[None]] = set()
        answered_tokens = 0

        async def one(request: Any, tokens: int, meant_s: float) -> None:
            nonlocal answered_tokens
            late_ms.append(1e3 * (time.perf_counter() - meant_s))
            try:
                await self._caller.call(request)
                latencies_ms.append(1e3 * (time.perf_counter() - meant_s))
                answered_tokens += tokens
            except CallFailedError as error:
                latencies_ms.append(_FAILED_MS)
                errors[str(error)[:120]] = errors.get(str(error)[:120], 0) + 1

        cpu_s, begun_s = time.process_time(), time.perf_counter()
        sent = 0
        for at_s in arrivals_s(rate, seconds, draw):
            if len(in_flight) >= max_in_flight:
                break
            meant_s = begun_s + at_s
            if (ahead_s := meant_s - time.perf_counter()) > 0:
                await asyncio.sleep(ahead_s)
            task = asyncio.create_task(one(*self._request(draw.randrange(len(self._sentences)), 1), meant_s))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
            sent += 1
        gave_up = len(in_flight) >= max_in_flight
        if in_flight:
            await asyncio.wait(in_flight, timeout=_LAST_ANSWERS_S)
        took_s = time.perf_counter() - begun_s
        answered = sum(latency < _FAILED_MS for latency in latencies_ms)
        await _cancel(in_flight)
        latencies_ms += [_FAILED_MS] * (sent - len(latencies_ms))
        found = {f"p{percent}_ms": percentile(latencies_ms or [_FAILED_MS], percent) for percent in (50, 95, 99)}
        return {
            **found,
            "offered_per_s": rate,
            "completed_per_s": answered / took_s,
            "tokens_per_s": answered_tokens / took_s,
            "sent": sent,
            "failed": sent - answered,
            "gave_up": gave_up,
            "errors": errors,
            "late_p99_ms": percentile(late_ms or [0.0], 99),
            "generator_cores": (time.process_time() - cpu_s) / took_s,
        }

    def _take(self, size: int) -> int:
        index, self._next = self._next, (self._next + size) % len(self._sentences)
        return index

    def _request(self, index: int, size: int) -> tuple[Any, int]:
        """Return the request for so many sentences from there on, and its tokens."""
        index %= len(self._sentences)
        if (index, size) not in self._requests:
            part = [self._sentences[(index + offset) % len(self._sentences)] for offset in range(size)]
            self._requests[index, size] = self._caller.prepare(part), sum(map(len, part))
        found: tuple[Any, int] = self._requests[index, size]
        return found


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _caller(arguments: argparse.Namespace) -> LoadCaller:
    if arguments.protocol == "triton":
        from benchmarks.load.triton_caller import TritonCaller  # noqa: PLC0415

        return TritonCaller(arguments.target)
    options = arguments.layers, arguments.pool, arguments.dtype
    if arguments.protocol == "kserve":
        from benchmarks.load.kserve_caller import KserveCaller  # noqa: PLC0415

        return KserveCaller(arguments.target, *options)
    if arguments.protocol.startswith("http-"):
        from benchmarks.load.http_caller import HttpCaller  # noqa: PLC0415

        return HttpCaller(arguments.target, arguments.protocol.removeprefix("http-"), *options)
    from benchmarks.load.bilm_caller import BilmCaller  # noqa: PLC0415

    return BilmCaller(arguments.target, *options, arguments.content, priority=arguments.priority, model=arguments.model)


async def _serve(arguments: argparse.Namespace) -> None:
    caller = _caller(arguments)
    generator = Generator(caller, read_sentences(arguments.sentences))
    wishes: dict[str, Callable[..., Awaitable[Reply]]] = {
        "show": generator.show,
        "singles": generator.singles,
        "closed": generator.closed,
        "open": generator.open,
    }
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        wish = json.loads(line)
        try:
            reply = await wishes[wish.pop("do")](**wish)
        except CallFailedError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)
    await caller.close()


def main() -> None:
    """Run until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--sentences", type=int, required=True, help="of WikiText-2's test part, the first")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--pool", default="mean")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--content", choices=("tokens", "texts"), default="tokens", help="of bilm (%(default)s)")
    parser.add_argument("--priority", choices=("interactive", "batch"), default="interactive", help="of bilm")
    parser.add_argument("--model", default="", help="name of bilm's (the default one)")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
