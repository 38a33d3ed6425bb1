"""A client process that opens and closes connections, and writes down what it and the server hold meanwhile.

`python -m tests.ulimit.churn KIND TARGET SERVER_PROCESS_ID CYCLES`, with KIND one of KINDS, writes a JSON object
a line on standard output.
"""

import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from bilm_client import Client
from bilm_client.aio import AsyncClient
from bilm_client.errors import UnavailableError
from bilm_client.policy import RetryPolicy

from tests.support.http_calls import embeddings
from tests.support.processes import descriptors, resident_bytes, wait_until
from tests.ulimit.ulimit_support import OWN_CONNECTION, Holding, channel, check

WARM_UP_SHARE = 5
"""One cycle in so many is a warm-up."""

_SENTENCES = [["one", "sentence"]]
_FAST_RETRY = RetryPolicy(max_attempts=3, initial_backoff_s=0.01, max_backoff_s=0.01)
_AT_A_TIME = 10

Cycles = Callable[[int], None]


def one_shot_checks(target: str) -> Cycles:
    def run(cycles: int) -> None:
        for _ in range(cycles):
            with channel(target) as connection:
                assert check(connection) == 1

    return run


def sync_clients(target: str) -> Cycles:
    def run(cycles: int) -> None:
        for _ in range(cycles):
            with Client(target, channel_options=OWN_CONNECTION) as client:
                assert len(client.embed(_SENTENCES)) == 1

    return run


def async_clients(target: str) -> Cycles:
    async def cycle() -> None:
        async with AsyncClient(target, channel_options=OWN_CONNECTION) as client:
            assert len(await client.embed(_SENTENCES)) == 1

    return _some_at_a_time(cycle)


def sync_streams(target: str) -> Cycles:
    def run(cycles: int) -> None:
        for _ in range(cycles):
            with Client(target, channel_options=OWN_CONNECTION) as client:
                assert len(list(client.embed_stream(_SENTENCES))) == 1

    return run


def http_calls(target: str) -> Cycles:
    """To /v1/embeddings, a connection each."""

    def run(cycles: int) -> None:
        for _ in range(cycles):
            assert embeddings(target, {"input": "one sentence"}).status == 200

    return run


def sync_retries(target: str) -> Cycles:
    """Of one client, which stays, by turns a call and a stream; the server is dead."""
    client = Client(target, retry=_FAST_RETRY, channel_options=OWN_CONNECTION)

    def run(cycles: int) -> None:
        for i in range(cycles):
            with suppress(UnavailableError):
                raise AssertionError(client.embed(_SENTENCES) if i % 2 else list(client.embed_stream(_SENTENCES)))

    return run


def async_retries(target: str) -> Cycles:
    """Of a new client each; the server is dead."""

    async def cycle() -> None:
        async with AsyncClient(target, retry=_FAST_RETRY, channel_options=OWN_CONNECTION) as client:
            with suppress(UnavailableError):
                raise AssertionError(await client.embed(_SENTENCES))

    return _some_at_a_time(cycle)


def leak(target: str) -> Cycles:
    """Clients that are never closed, and kept: what the measuring must see."""
    kept: list[Client] = []

    def run(cycles: int) -> None:
        for _ in range(cycles):
            kept.append(Client(target, channel_options=OWN_CONNECTION))
            kept[-1].embed(_SENTENCES)

    return run


KINDS = {
    each.__name__: each
    for each in (
        one_shot_checks,
        sync_clients,
        async_clients,
        sync_streams,
        http_calls,
        sync_retries,
        async_retries,
        leak,
    )
}


def _some_at_a_time(cycle: Callable[[], object]) -> Cycles:
    async def all_of_them(cycles: int) -> None:
        for begin in range(0, cycles, _AT_A_TIME):
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(_AT_A_TIME, cycles - begin)):
                    tasks.create_task(cycle())  # type: ignore[arg-type]

    runner = asyncio.Runner()  # one loop for all: grpc.aio keeps a thread for it
    return lambda cycles: runner.run(all_of_them(cycles))


def main(kind: str, target: str, server_process_id: str, cycles: str) -> None:
    run, total, server = KINDS[kind](target), int(cycles), int(server_process_id)
    done = 0
    for share in (1 / WARM_UP_SHARE, (1 + 1 / WARM_UP_SHARE) / 2, 1):
        run(int(total * share) - done)
        done = int(total * share)
        print(json.dumps(asdict(_settled(server, done))), flush=True)


def _settled(server: int, cycles: int) -> Holding:
    """What is held when closing has come to an end on both sides."""
    gc.collect()
    last, alike = (-1, -1), 0

    def still() -> bool:
        nonlocal last, alike
        now = descriptors(os.getpid()), descriptors(server)
        last, alike = now, alike + 1 if now == last else 0
        return alike == 20

    wait_until(still, "the numbers of descriptors stay")
    return Holding(cycles, last[0], resident_bytes(os.getpid()), last[1], resident_bytes(server))


if __name__ == "__main__":
    main(*sys.argv[1:])
