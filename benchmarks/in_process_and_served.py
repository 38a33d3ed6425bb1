"""The model in this process against the same model through the server, in one run, taken in turns.

Real sentences (WikiText-2, test). Writes a JSON file with the figures, the machine and the commit.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bilm_client.aio import AsyncClient
from bilm_client.testing.server import ServerProcess
from bilm_model.engine.batch import BatchEngine, Sentence
from bilm_model.scalar_mix import Selection
from bilm_model.weights.loading import load

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "wikitext-2" / "test.txt"
RESULTS = Path(__file__).parent / "results"
BATCH_TOKENS = 2048  # the server's default
CALLS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Figures:
    """What one round of one contestant gave.

    Attributes:
        tokens_per_s: many sentences at once.
        latencies_ms: one sentence at a time, each.
    """

    tokens_per_s: float
    latencies_ms: list[float]


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments()
    sentences = read_sentences(arguments.data, arguments.tokens)
    singles = sentences[:: max(1, len(sentences) // arguments.singles)][: arguments.singles]
    report: dict[str, Any] = {
        "benchmark": "in_process_and_served",
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "settings": {"tokens": sum(map(len, sentences)), "singles": len(singles), "rounds": arguments.rounds},
        "models": {},
    }
    for source in arguments.models:
        name = source or "default"
        report["models"][name] = found = compare(source, sentences, singles, arguments.rounds)
        print(f"{name}: {json.dumps(found, indent=1)}")
    RESULTS.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def compare(source: str, sentences: list[list[str]], singles: list[list[str]], rounds: int) -> dict[str, Any]:
    """Both contestants, in turns, after one round that doesn't count."""
    engine = BatchEngine(load(source).bilm, torch.device("cpu"), "float32")
    with ServerProcess(model=source, arguments=("--log-level", "warning")) as server:
        in_process: list[Figures] = []
        served: list[Figures] = []
        for _ in range(rounds + 1):
            in_process.append(run_in_process(engine, sentences, singles))
            served.append(asyncio.run(run_served(server.target, sentences, singles)))
    return summarise(in_process[1:], served[1:])


def summarise(in_process: list[Figures], served: list[Figures]) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken round by round."""
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(in_process, served, strict=True)]
    found: dict[str, Any] = {"served_share_of_tokens_per_s": round(median(ratios), 3)}
    for name, rounds in (("in_process", in_process), ("served", served)):
        latencies = [latency for figures in rounds for latency in figures.latencies_ms]
        found[name] = {
            "tokens_per_s": round(median(figures.tokens_per_s for figures in rounds)),
            "one_sentence_p50_ms": round(float(np.percentile(latencies, 50)), 2),
            "one_sentence_p99_ms": round(float(np.percentile(latencies, 99)), 2),
        }
    return found


def run_in_process(engine: BatchEngine, sentences: list[list[str]], singles: list[list[str]]) -> Figures:
    """The engine as the server drives it, without the server: all layers, mean over the tokens, float32."""
    selection = Selection("all", "mean")

    def embed(batch: list[list[str]]) -> list[bytes]:
        embedded = engine.run([Sentence(tokens) for tokens in batch])
        return [selection(sentence.layers).numpy().tobytes() for sentence in embedded]

    begun_s = time.perf_counter()
    for batch in batches(sentences):
        embed(batch)
    seconds = time.perf_counter() - begun_s
    latencies = []
    for tokens in singles:
        begun_s = time.perf_counter()
        embed([tokens])
        latencies.append(1e3 * (time.perf_counter() - begun_s))
    return Figures(sum(map(len, sentences)) / seconds, latencies)


async def run_served(target: str, sentences: list[list[str]], singles: list[list[str]]) -> Figures:
    """The same through the server, several calls in flight."""
    async with AsyncClient(target, timeout_s=600.0) as client:

        def embed(batch: list[list[str]]) -> Awaitable[Any]:
            return client.embed(batch, layers="all", pool="mean")

        await embed(sentences[:1])  # opens the connection
        begun_s = time.perf_counter()
        await _several(batches(sentences), embed)
        seconds = time.perf_counter() - begun_s
        latencies = []
        for tokens in singles:
            begun_s = time.perf_counter()
            await embed([tokens])
            latencies.append(1e3 * (time.perf_counter() - begun_s))
    return Figures(sum(map(len, sentences)) / seconds, latencies)


async def _several(work: Iterator[list[list[str]]], embed: Callable[[list[list[str]]], Awaitable[Any]]) -> None:
    async def worker() -> None:
        for batch in work:
            await embed(batch)

    await asyncio.gather(*(worker() for _ in range(CALLS_IN_FLIGHT)))


def batches(sentences: list[list[str]]) -> Iterator[list[list[str]]]:
    """Sentences in order, as many as the server computes together."""
    batch: list[list[str]] = []
    n_tokens = 0
    for tokens in sentences:
        if batch and n_tokens + len(tokens) + 2 > BATCH_TOKENS:
            yield batch
            batch, n_tokens = [], 0
        batch.append(tokens)
        n_tokens += len(tokens) + 2
    yield batch


def read_sentences(path: Path, n_tokens: int) -> list[list[str]]:
    """Sentences of a text, until they have so many tokens; the text has white space between tokens."""
    sentences: list[list[str]] = []
    sentence: list[str] = []
    total = 0
    for token in path.read_text(encoding="utf-8").split():
        sentence.append(token)
        if token in (".", "?", "!"):
            sentences.append(sentence)
            total, sentence = total + len(sentence), []
            if total >= n_tokens:
                break
    return sentences


def machine() -> dict[str, Any]:
    """Where this was measured."""
    cpu = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["", "random:small"], help="as bilm-serve --model takes them")
    parser.add_argument("--data", type=Path, default=DATA, help="text with white space between tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8_000, help="of the throughput runs (%(default)s)")
    parser.add_argument("--singles", type=int, default=100, help="sentences taken one at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "in_process_and_served.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
