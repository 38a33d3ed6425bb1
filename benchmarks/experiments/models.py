"""Several models in one process: shares of the device, the bits of each, reloads under load, and memory.

`python -m benchmarks.experiments.models` takes about four minutes.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Spread
from bilm_client import Client
from bilm_client.testing.server import RunningServer, ServerProcess
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.weights import single_file
from bilm_server.checking import memory_sum
from bilm_server.config_sources import load_config
from bilm_server.preflight import plan_serving
from bilm_system.terminal import run_command

from benchmarks.experiments.served import SERVER_ARGUMENTS
from benchmarks.load.load import LoadGenerator
from benchmarks.load.pipe import PipeError
from benchmarks.load.sentences import read_sentences
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS

SHARE_TARGET = 90.0
"""Per cent of a third of what a model computes alone, while all three are saturated."""
NAMES: Mapping[str, str] = {"shipped": "", "small": "random:small", "tiny": "tiny"}
_CALLERS, _PER_CALL, _WARM_S = 4, 32, 1.0
_SHOWN = 8
_VERSION_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Served:
    """The server, and who calls its models.

    Attributes:
        server: its process.
        generators: by model, a process each.
        written: the file of the model that is replaced.
    """

    server: RunningServer
    generators: Mapping[str, LoadGenerator]
    written: Path

    def tokens_per_s(self, names: Sequence[str], window_s: float) -> dict[str, float]:
        """Return what models compute that are saturated at the same time."""

        def closed(name: str) -> float:
            answer = self.generators[name].closed(_CALLERS, _PER_CALL, _WARM_S, window_s)
            return float(answer["tokens"] / answer["seconds"])

        with ThreadPoolExecutor(len(names)) as pool:
            return dict(zip(names, pool.map(closed, names), strict=True))

    def version(self, name: str) -> str:
        """Return the version of a model."""
        with Client(self.server.target, model=name) as client:
            return client.model_info().version


def _write(path: Path, seed: int) -> str:
    new = path.with_suffix(".new")
    version = single_file.write(new, SIZES["tiny"], random_bilm(SIZES["tiny"], seed=seed).state_dict())
    new.replace(path)
    return version


def _flags(models: Mapping[str, str]) -> list[str]:
    return [part for name, path in models.items() for part in ("--model", f"{name}={path}")]


@contextmanager
def _serving(n_sentences: int) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="bilm-") as folder, ExitStack() as stack:
        written = Path(folder) / "tiny.safetensors"
        _write(written, 1)
        models = {**NAMES, "tiny": str(written)}
        first, *others = [f"{name}={path}" for name, path in models.items()]
        arguments = (*SERVER_ARGUMENTS, *(part for model in others for part in ("--model", model)))
        server = stack.enter_context(ServerProcess(first, arguments))
        generators = {
            name: stack.enter_context(LoadGenerator(server.target, n_sentences, model=name)) for name in models
        }
        yield Served(server, generators, written)


def shares(report: Findings, served: Served, rounds: int, window_s: float) -> None:
    """Measure each model alone, and all of them saturated, by turns."""
    names = [*NAMES]
    found: dict[str, list[float]] = {name: [] for name in names}
    served.tokens_per_s(names, window_s)  # a round that doesn't count
    for _ in range(rounds):
        alone = {name: served.tokens_per_s([name], window_s)[name] for name in names}
        together = served.tokens_per_s(names, window_s)
        for name in names:
            found[name].append(100 * len(names) * together[name] / alone[name])
    for name in names:
        what = f"{name}, of its third of the device while all are saturated"
        report.add(Finding(f"models/share/{name}", what, Spread.of(found[name]), "%", SHARE_TARGET))


def bits(report: Findings, served: Served, n_sentences: int) -> None:
    """Count sentences that have other vectors than from a server on their model alone."""
    differing = 0
    for name, path in ({**NAMES, "tiny": str(served.written)}).items():
        arguments = {"layers": "all", "pool": "none", "model": name}
        with ExitStack() as stack:
            alone = stack.enter_context(ServerProcess(f"{name}={path}", SERVER_ARGUMENTS))
            both = [
                stack.enter_context(LoadGenerator(target, n_sentences, **arguments))
                for target in (served.server.target, alone.target)
            ]
            for index in range(_SHOWN):
                found, expected = (generator.ask("show", index=index)["vectors"] for generator in both)
                differing += found != expected
    what = f"sentences with other bits than alone, of {_SHOWN * len(NAMES)}"
    report.add(_none("models/bits", what, differing))


def reloads(report: Findings, served: Served, count: int, window_s: float) -> None:
    """Replace a model under load, some times with a damaged file, and count calls that fail."""
    failed, changed = 0, 0
    for number in range(count):
        with ThreadPoolExecutor(len(NAMES)) as pool:
            calling = [
                pool.submit(each.closed, _CALLERS, _PER_CALL, _WARM_S, window_s) for each in served.generators.values()
            ]
            expected = _write(served.written, 10 + number)
            os.kill(served.server.process_id, signal.SIGHUP)
            _until_served(served, expected)
            served.written.write_bytes(served.written.read_bytes()[:-100])
            os.kill(served.server.process_id, signal.SIGHUP)
            for call in calling:
                failed += _failed(call)
            changed += served.version("tiny") != expected
    what = f"callers with a failed call in {count} reloads under load, and as many of a damaged file"
    report.add(_none("models/reload/failed", what, failed))
    report.add(_none("models/reload/changed", "  damaged files that changed something", changed))


def _none(key: str, what: str, count: int) -> Finding:
    return Finding(key, what, Spread.of([count]), "", 0.0, at_least=False)


def _failed(call: Any) -> bool:
    try:
        call.result()
    except PipeError as error:
        print(error, flush=True)
        return True
    return False


def _until_served(served: Served, version: str) -> None:
    deadline_s = time.monotonic() + _VERSION_TIMEOUT_S
    while served.version("tiny") != version:
        if time.monotonic() > deadline_s:
            raise TimeoutError("the new version isn't served")
        time.sleep(0.05)


def memory(report: Findings, served: Served) -> None:
    """Compare the most that the process had with the sum that `--check-config` shows."""
    status = Path(f"/proc/{served.server.process_id}/status").read_text(encoding="ascii")
    most_mib = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    models = {**NAMES, "tiny": "random:tiny"}
    config = load_config([*_flags(models), *SERVER_ARGUMENTS])
    bound = memory_sum(config, [*plan_serving(config).models.values()], config.max_connections).total / 2**20
    what = "most resident memory, with the versions that were replaced"
    report.add(Finding("models/memory", what, Spread.of([most_mib]), "MiB", bound, at_least=False))


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--window-s", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--reloads", type=int, default=3, help="under load (%(default)s)")
    parser.add_argument("--sentences", type=int, default=512, help="of WikiText-2's test part (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "models.json", help="(%(default)s)")
    arguments = parser.parse_args()
    n_sentences = len(read_sentences(arguments.sentences))
    settings = {"sentences": n_sentences, "callers": _CALLERS, "per_call": _PER_CALL, "rounds": arguments.rounds}
    report = new_report("models", "benchmarks.experiments.models", settings)
    with _serving(n_sentences) as served:
        bits(report, served, n_sentences)
        shares(report, served, arguments.rounds, arguments.window_s)
        reloads(report, served, arguments.reloads, arguments.window_s)
        memory(report, served)
    report.write(arguments.out)
    report.print_summary()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.models", main))
