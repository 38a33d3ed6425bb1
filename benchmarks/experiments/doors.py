"""Other protocols against `Embed`, on one server; and `Embed` against the commit before there were any.

`python -m benchmarks.experiments.doors` takes about six minutes; each comparison takes turns, so that what else the
machine does hits both.
"""

import argparse
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import RunningServer, ServerProcess
from bilm_system.terminal import run_command

from benchmarks.experiments.in_process import Effort
from benchmarks.experiments.served import SERVER_ARGUMENTS
from benchmarks.load.callers_load import ClosedLoad
from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import read_sentences
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.sections import run_sections
from benchmarks.trees import PRESENT, work_tree

CALLERS, PER_CALL = 16, 32
BEFORE = "7ead49d"
"""The last commit that served `Embed` alone."""
BEFORE_TARGET = 0.97

_WARM_S = 1.0
_TOKENS, _TEXTS = "embed", "embed-texts"


@dataclass(frozen=True)
class Case:
    """Calls of one protocol.

    Attributes:
        what: in words.
        flags: of the load generator.
        against: the case of `Embed` with the same sentences and results; "": it is one.
        target: per cent of that one's tokens/s; None: reported only.
    """

    what: str
    flags: Mapping[str, str]
    against: str = ""
    target: float | None = None


# /v1/embeddings takes texts only, and returns one layer
CASES: Mapping[str, Case] = {
    _TOKENS: Case("Embed, tokens, all layers", {"protocol": "bilm"}),
    "kserve": Case("ModelInfer", {"protocol": "kserve"}, _TOKENS, 95.0),
    "http-octets": Case("/v1/embed, raw tensors", {"protocol": "http-octets"}, _TOKENS),
    _TEXTS: Case("Embed, texts, top layer", {"protocol": "bilm", "content": "texts", "layers": "top"}),
    "http-base64": Case("/v1/embeddings, base64", {"protocol": "http-base64", "layers": "top"}, _TEXTS, 80.0),
    "http-float": Case("/v1/embeddings, float", {"protocol": "http-float", "layers": "top"}, _TEXTS),
}


def other_protocols(report: Findings, model: str, sentences: Sequence[Sequence[str]], effort: Effort) -> None:
    """Measure calls of 32 mean-pooled sentences by each protocol.

    Texts are separated at white space, which takes little, so that what the protocols take shows.
    """
    with _serving(model) as (server, address), ExitStack() as stack:
        loads = {}
        for name, case in CASES.items():
            target = address if case.flags["protocol"].startswith("http") else server.target
            generator = stack.enter_context(LoadGenerator(target, len(sentences), **case.flags))
            loads[name] = ClosedLoad(server, generator, CALLERS, PER_CALL, _WARM_S, effort.window_s)
        found, cpu_ms = _measured(loads, effort.rounds)
    generator_ms = {name: load.generator_ms_per_call() for name, load in loads.items()}
    details = {"cpu_ms_per_call_of_all_threads": cpu_ms, "generator_cpu_ms_per_call": generator_ms}
    report.detail("doors", {"tokens_per_s": found, **details})
    for name, case in CASES.items():
        report.add(Finding(f"doors/{name}", f"{case.what}, {PER_CALL} a call", Spread.of(found[name]), "tokens/s"))
        if case.against:
            share, cpu = ratio(found[name], found[case.against]), ratio(cpu_ms[case.against], cpu_ms[name])
            report.add(
                Finding(f"doors/{name}/share", "  against Embed", share.times(100), "%", case.target),
                Finding(f"doors/{name}/cpu", "  calls a second of the processor, against Embed", cpu.times(100), "%"),
            )


def against_before(
    report: Findings, model: str, sentences: Sequence[Sequence[str]], effort: Effort, commit: str = BEFORE
) -> None:
    """Measure `Embed` on a server of the present tree, with HTTP on, and on one of an earlier commit."""
    with work_tree(commit) as before, ExitStack() as stack:
        present, _ = stack.enter_context(_serving(model, PRESENT.environment))
        earlier = stack.enter_context(ServerProcess(model, SERVER_ARGUMENTS, environment=before.environment))
        loads = {}
        for name, server in (("present", present), ("before", earlier)):
            generator = stack.enter_context(LoadGenerator(server.target, len(sentences)))
            loads[name] = ClosedLoad(server, generator, CALLERS, PER_CALL, _WARM_S, effort.window_s)
        found, cpu_ms = _measured(loads, effort.rounds)
    report.detail("before", {"tokens_per_s": found, "cpu_ms_per_call_of_all_threads": cpu_ms})
    times, cpu = ratio(found["present"], found["before"]), ratio(cpu_ms["before"], cpu_ms["present"])
    report.add(
        Finding("doors/before", f"Embed, {PER_CALL} a call: before", Spread.of(found["before"]), "tokens/s"),
        Finding("doors/present", "  present, with HTTP on", Spread.of(found["present"]), "tokens/s"),
        Finding("doors/ratio", "  present against before", times, "×", BEFORE_TARGET),
        Finding("doors/ratio/cpu", "  calls a second of the processor, against before", cpu, "×"),
    )


def _measured(loads: Mapping[str, ClosedLoad], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return tokens a second and the server's processor time a call, by turns, after a round that doesn't count."""
    contestants: dict[str, Contestant] = {name: load.tokens_per_s for name, load in loads.items()}
    interleave(contestants, 1)
    for load in loads.values():
        load.forget()
    found = interleave(contestants, rounds)
    return found, {name: load.cpu_ms_per_call() for name, load in loads.items()}


@contextmanager
def _serving(model: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[RunningServer, str]]:
    """Yield a server and its address for HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = (*SERVER_ARGUMENTS, "--tokenizer", "whitespace", "--http-listen", address)
    with ServerProcess(model, flags, environment=environment) as server:
        yield server, address


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:small", help="(%(default)s)")
    parser.add_argument("--before", default=BEFORE, help="commit to compare with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="that count (%(default)s)")
    parser.add_argument("--window-s", type=float, default=2.0, help="of each measurement (%(default)s)")
    parser.add_argument("--only", nargs="+", help="sections: protocols before")
    parser.add_argument("--out", type=Path, default=RESULTS / "doors.json", help="(%(default)s)")
    arguments = parser.parse_args()
    sentences, effort = read_sentences(1024), Effort(arguments.rounds, arguments.window_s, singles=0)
    settings = {name: getattr(arguments, name) for name in ("model", "before", "rounds", "window_s")}
    report = new_report("doors", "benchmarks.experiments.doors", settings)
    sections = {
        "protocols": lambda: other_protocols(report, arguments.model, sentences, effort),
        "before": lambda: against_before(report, arguments.model, sentences, effort, arguments.before),
    }
    run_sections(sections, arguments.only)
    report.write(arguments.out)
    report.print_summary()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.doors", main))
