"""An engine in a process of its own, of any source tree: does as it is told, one JSON line for each request.

The packages are those that PYTHONPATH names; `--api` says how their engine is driven.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from benchmarks.load.sentences import read_sentences, sentence_of
from benchmarks.load.steady import LoadSentence, SteadyLoad, Work

Reply = dict[str, Any]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what it is asked for.

    Attributes:
        engine: Warm, with known words.
        output: Of every sentence.
        backend: What computes, for people to read.
    """

    engine: Any
    output: Any
    backend: str


class EngineWorker:
    """Measures an engine.

    Args:
        loaded: the engine; nobody else uses it.
        sentences: to embed.
        in_flight: at most so many; None: as many as it takes.
    """

    def __init__(self, loaded: LoadedEngine, sentences: Sequence[Sequence[str]], in_flight: int | None) -> None:
        self._loaded, self._sentences = loaded, sentences
        self._load = SteadyLoad(loaded.engine, sentences, in_flight, loaded.output)

    def about(self) -> Reply:
        """Return what computes."""
        return {"backend": self._loaded.backend}

    def full(self, seconds: float) -> Reply:
        """Return what was done in a while with all rows taken."""
        work = self._load.measure(seconds)
        return {**asdict(work), **_rates(work)}

    def singles(self, first: int, count: int) -> Reply:
        """Return the latency of one sentence after another."""
        self._drain()
        sentences = cycle([*self._sentences[first:], *self._sentences[:first]])
        return {"latencies_ms": [self._timed_ms(next(sentences)) for _ in range(count)]}

    def paced(self, n_tokens: int, count: int, pause_s: float) -> Reply:
        """Return the latencies of one sentence of so many tokens, each time after a pause."""
        self._drain()
        tokens = sentence_of(n_tokens, self._sentences)
        latencies_ms = []
        for _ in range(count):
            time.sleep(pause_s)
            latencies_ms.append(self._timed_ms(tokens))
        return {"latencies_ms": latencies_ms}

    def _timed_ms(self, tokens: Sequence[str]) -> float:
        engine, sentence = self._loaded.engine, LoadSentence(tuple(tokens), self._loaded.output)
        begun_s = time.perf_counter()
        engine.join([sentence])
        while not engine.advance():
            pass
        return 1e3 * (time.perf_counter() - begun_s)

    def _drain(self) -> None:
        while self._loaded.engine.in_flight:
            self._loaded.engine.advance()


def _rates(work: Work) -> Reply:
    return {
        "tokens_per_s": work.tokens_per_s,
        "steps_per_s": work.steps_per_s,
        "steps_per_cpu_s": work.steps_per_cpu_s,
        "join_us": work.join_us if work.joined else None,
    }


def _load_present(arguments: argparse.Namespace, sentences: Sequence[Sequence[str]]) -> LoadedEngine:
    from bilm_model.engine.backends import new_backend  # noqa: PLC0415
    from bilm_model.engine.options import EngineOptions  # noqa: PLC0415

    from benchmarks.load.engines import batch_of, engine_of, load_bilm, output_of, show_all_words  # noqa: PLC0415
    from benchmarks.references.idle_backend import IdleBackend  # noqa: PLC0415

    bilm = load_bilm(arguments.model)
    options = EngineOptions(precision=arguments.precision, max_rows=arguments.rows)
    output = output_of(arguments.layers, arguments.pool, arguments.dtype)
    batch = batch_of(bilm, options, IdleBackend if arguments.idle else new_backend)
    show_all_words(batch, sentences)
    return LoadedEngine(engine_of(batch, bilm.config), output, batch.backend)


def _load_former(arguments: argparse.Namespace, sentences: Sequence[Sequence[str]]) -> LoadedEngine:
    from benchmarks.references.former_engine import former_output, new_former_engine  # noqa: PLC0415
    from benchmarks.references.idle_backend import IdleBackend  # noqa: PLC0415

    options = {"precision": arguments.precision, "max_rows": arguments.rows}
    engine = new_former_engine(arguments.model, options, sentences, IdleBackend if arguments.idle else None)
    return LoadedEngine(engine, former_output(arguments.layers, arguments.pool, arguments.dtype), engine.backend)


def _set_threads(threads: int | None) -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def _serve(worker: EngineWorker) -> None:
    requests: dict[str, Callable[..., Reply]] = {
        "about": worker.about,
        "full": worker.full,
        "singles": worker.singles,
        "paced": worker.paced,
    }
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(requests[request.pop("do")](**request)), flush=True)


def main() -> None:
    """Run until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", choices=("present", "former"), required=True)
    parser.add_argument("--model", default="", help="as bilm-serve's --model")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--sentences", type=int, required=True, help="of WikiText-2's test part, the first")
    parser.add_argument("--rows", type=int, help="(the engine's default)")
    parser.add_argument("--in-flight", type=int, help="sentences (as many as the engine takes)")
    parser.add_argument("--layers", default="top")
    parser.add_argument("--pool", default="mean")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (one for each core that this process may use)")
    parser.add_argument("--one-core", action="store_true", help="use one core only")
    parser.add_argument("--idle", action="store_true", help="with a back end that computes nothing")
    arguments = parser.parse_args()
    if arguments.one_core:  # before torch starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    _set_threads(arguments.threads)
    sentences = read_sentences(arguments.sentences)
    load = _load_present if arguments.api == "present" else _load_former
    _serve(EngineWorker(load(arguments, sentences), sentences, arguments.in_flight))


if __name__ == "__main__":
    main()
