"""Threads that share one client: a process that calls a server as it is told, one JSON line for each request.

An application with a thread for each of its own callers looks like this.
"""

import argparse
import json
import sys
import threading
import time
from itertools import count
from typing import Any

from bilm_client import Client

from benchmarks.load.sentences import read_sentences

Reply = dict[str, Any]


class ThreadCallers:
    """Threads that each call again as soon as the response is there.

    Args:
        client: that all of them use.
        sentences: to embed, in turn.
    """

    def __init__(self, client: Client, sentences: list[list[str]]) -> None:
        self._client, self._sentences = client, sentences
        self._turn = count()

    def closed(self, threads: int, per_call: int, warm_s: float, seconds: float) -> Reply:
        """Return what ended in a window after the first seconds."""
        begin_s = time.perf_counter() + warm_s
        end_s = begin_s + seconds
        done: list[tuple[int, int]] = []
        failures: list[BaseException] = []

        def caller() -> None:
            try:
                while time.perf_counter() < end_s and not failures:
                    part = self._part(per_call)
                    self._client.embed(part, layers="all", pool="mean")
                    if begin_s <= time.perf_counter() < end_s:
                        done.append((len(part), sum(map(len, part))))
            except BaseException as error:
                failures.append(error)

        running = [threading.Thread(target=caller) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failures:
            return {"error": repr(failures[0])}
        sentences, tokens = (sum(column) for column in zip((0, 0), *done, strict=True))
        return {"calls": len(done), "sentences": sentences, "tokens": tokens, "seconds": seconds}

    def _part(self, size: int) -> list[list[str]]:
        first = next(self._turn) * size
        return [self._sentences[(first + offset) % len(self._sentences)] for offset in range(size)]


def main() -> None:
    """Run until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--sentences", type=int, required=True, help="of WikiText-2's test part, the first")
    parser.add_argument("--coalesce-ms", type=float, help="send concurrent calls together (not)")
    arguments = parser.parse_args()
    options: dict[str, Any] = {} if arguments.coalesce_ms is None else {"coalesce_ms": arguments.coalesce_ms}
    with Client(arguments.target, **options) as client:
        callers = ThreadCallers(client, read_sentences(arguments.sentences))
        for line in sys.stdin:
            request = json.loads(line)
            assert request.pop("do") == "closed"
            print(json.dumps(callers.closed(**request)), flush=True)


if __name__ == "__main__":
    main()
