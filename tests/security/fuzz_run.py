"""Fuzzes a server for some minutes: connections that go wrong, and requests that are almost right, over gRPC and HTTP.

One third of the time goes to the checks in process, guided by coverage; two thirds to a real bilm-serve over TCP, whose
log, answers, descriptors and memory are watched. Inputs follow from the seed; those that find something are saved.

    python -m tests.security.fuzz_run --minutes 10 --seed 1
"""

import argparse
import base64
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from bilm_api.inference import open_inference_pb2
from bilm_api.v1 import embed_pb2
from bilm_server.addresses import split_address
from google.protobuf.message import DecodeError

from tests.security.fuzz_frames import FRAME_KINDS, Case
from tests.security.fuzz_http1 import HttpCase, HttpReply, exchange, http_complaints
from tests.security.fuzz_http2 import Connection, Reply, messages
from tests.security.fuzz_requests import HTTP_KINDS
from tests.security.security_support import LISTENS_ANEW_S, Watch, WatchedServer
from tests.support.processes import MIB, ROOT, module_command, resident_bytes
from tests.support.tensors import arrays

# What would look like a leak is kept small: what is remembered of words, oneDNN's kernels for each number of rows (it
# keeps 1,024), and what glibc keeps of the memory that was freed, in as many arenas as there are threads
SERVER_FLAGS = (
    "--token-cache-mib", "1", "--input-cache-mib", "1", "--log-level", "info", "--reflection",
    "--http-listen", "127.0.0.1:0"
)  # fmt: skip
SERVER_ENVIRONMENT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
_TIMEOUT_S, _SILENCE_S = 20.0, 0.02
_WARM_ROUNDS, _WATCH_ROUNDS = 300, 20  # the engine's buffers grow with what they have had to hold
_MAX_GROWTH_BYTES = 96 * MIB
_OURS = re.compile(r"internal error; the server's log|Unexpected <class")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_BROKEN = {grpc.StatusCode.UNKNOWN.value[0], grpc.StatusCode.INTERNAL.value[0]}

AnyCase = Case | HttpCase
AnyReply = Reply | HttpReply
Judge = Callable[[AnyCase, AnyReply], Iterable[str]]

KINDS: tuple[Callable[[random.Random], AnyCase], ...] = (*FRAME_KINDS, *HTTP_KINDS)


@dataclass
class Report:
    """What a run did and found.

    Attributes:
        inputs: how many of each kind.
        statuses: how calls ended.
        complaints: what was wrong, with the kind and the number of the input (or of the last of several).
        figures: descriptors and memory, for people.
    """

    inputs: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    complaints: list[tuple[str, int, str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"inputs: {sum(self.inputs.values()):,}"
        yield from (f"  {kind}: {count:,}" for kind, count in self.inputs.items())
        yield "calls ended: " + ", ".join(f"{name} {count:,}" for name, count in self.statuses.most_common())
        yield from self.figures
        yield f"complaints: {len(self.complaints)}"
        yield from (f"  {kind} {number}: {text}" for kind, number, text in self.complaints[:20])


def new_case(seed: int, kind: int, number: int) -> AnyCase:
    """The input of this seed, kind and number; always the same."""
    function = KINDS[kind]
    return function(random.Random(f"{seed}:{function.__name__}:{number}"))


def fuzz_server(
    seed: int, rounds: range, end_s: float, failures: Path | None = None, judge: Judge | None = None
) -> Report:
    """Send inputs of each kind in turn.

    Args:
        seed: Of the inputs.
        rounds: Their numbers.
        end_s: When to stop at the latest, on `time.monotonic`.
        failures: A file for what was found.
        judge: Says what is wrong with a reply; None: `complaints`.
    """
    report = Report()
    with WatchedServer(*SERVER_FLAGS, environment=SERVER_ENVIRONMENT, fresh=True) as server:
        watch, warm_bytes, samples = Watch(server), 0, list[int]()
        half_s = (time.monotonic() + end_s) / 2
        for number in rounds:
            if time.monotonic() >= end_s or not server.alive:
                break
            for kind, function in enumerate(KINDS):
                case = new_case(seed, kind, number)
                _try(server, case, report, (function.__name__, number), judge or complaints)
            if number % _WATCH_ROUNDS == 0:
                _watch(watch, report, number)
                samples.append(resident_bytes(server.pid) if server.alive else 0)
            is_warm = number - rounds.start >= min(_WARM_ROUNDS, len(rounds) // 2) or time.monotonic() >= half_s
            if is_warm and not warm_bytes:
                warm_bytes = resident_bytes(server.pid)
        _watch(watch, report, rounds.stop)
        if server.alive:
            _compare_resources(server, watch, warm_bytes, report)
            quarters = [samples[i * (len(samples) - 1) // 4] // MIB for i in range(5)]
            report.figures.append(f"resident memory at each quarter of the inputs: {quarters} MiB")
    if failures is not None and report.complaints:
        _save(seed, report, failures)
    return report


def _try(server: WatchedServer, case: AnyCase, report: Report, name: tuple[str, int], judge: Judge) -> None:
    """One input on a connection of its own."""
    lines = len(server.bad_lines)
    end_s = time.monotonic() + LISTENS_ANEW_S
    while True:
        try:
            reply = _exchanged(server, case)
            break
        except (ConnectionRefusedError, ConnectionResetError):
            if time.monotonic() > end_s:
                report.complaints.append((*name, "the server doesn't take connections"))
                return
            time.sleep(0.005)
    report.inputs[name[0]] += 1
    _count(reply, report)
    found = [*judge(case, reply), *(f"in the log: {line}" for line in server.bad_lines[lines:])]
    report.complaints += [(*name, text) for text in found]


def _exchanged(server: WatchedServer, case: AnyCase) -> AnyReply:
    if isinstance(case, HttpCase):
        return exchange(split_address(server.http_address), case, _TIMEOUT_S, _SILENCE_S)
    with Connection(server.address, _TIMEOUT_S) as connection:
        return connection.exchange(case.data, case.expected, _SILENCE_S if case.settles else 0.0)


def complaints(case: AnyCase, reply: AnyReply) -> Iterator[str]:
    """Say what is wrong with a reply."""
    if isinstance(case, HttpCase):
        assert isinstance(reply, HttpReply)
        yield from http_complaints(case, reply)
    else:
        assert isinstance(reply, Reply)
        yield from _grpc_complaints(case, reply)


def _grpc_complaints(case: Case, reply: Reply) -> Iterator[str]:
    if not reply.closed:
        yield f"the connection is still open {_TIMEOUT_S:g} s later"
    for stream in set(case.expected) - reply.ended:
        if not reply.refused:
            yield f"the call on stream {stream} has no status"
    for stream, (code, text) in reply.statuses.items():
        # INTERNAL may come from the C core, for frames that are no gRPC; UNKNOWN may not
        if code == grpc.StatusCode.UNKNOWN.value[0] or _OURS.search(text):
            yield f"the call on stream {stream} ended in {_name(code)}: {text}"
    yield from _judge_answers(case, reply)


def _judge_answers(case: Case, reply: Reply) -> Iterator[str]:
    for stream, kind in case.answers:
        for body in messages(reply.bodies.get(stream, b"")):
            try:
                answer = kind.FromString(body)
            except DecodeError:
                yield f"the answer on stream {stream} doesn't parse"
                continue
            if isinstance(answer, open_inference_pb2.ModelInferResponse):
                arrays(answer)  # raises where a tensor's bytes aren't those of its shape
                continue
            assert isinstance(answer, embed_pb2.EmbedResponse | embed_pb2.EmbedStreamResponse)
            results = answer.results if isinstance(answer, embed_pb2.EmbedResponse) else [answer]
            for result in results:
                if result.error.code in _BROKEN:
                    yield f"a sentence on stream {stream} ended in {_name(result.error.code)}"


def _count(reply: AnyReply, report: Report) -> None:
    if isinstance(reply, HttpReply):
        report.statuses.update(f"HTTP {response.status}" for response in reply.responses)
        return
    report.statuses.update(_name(code) for code, _ in reply.statuses.values())
    report.statuses["reset"] += len(reply.resets.keys() - reply.statuses.keys())
    report.statuses["GOAWAY"] += reply.goaway is not None


def _name(code: int) -> str:
    return _CODES[code].name if code in _CODES else str(code)


def _watch(watch: Watch, report: Report, number: int) -> None:
    report.complaints += [("before", number, text) for text in watch.complaints() if not text.startswith("in the log")]


def _compare_resources(server: WatchedServer, watch: Watch, warm_bytes: int, report: Report) -> None:
    descriptors, resident = watch.settled_descriptors(), resident_bytes(server.pid)
    report.figures += [
        f"descriptors of the server: {watch.first_descriptors} before, {descriptors} after",
        f"resident memory: {watch.first_bytes // MIB} MiB before, {warm_bytes // MIB} warm, {resident // MIB} after",
        f"lines of the C core in the log: {server.core_lines}",
    ]
    if descriptors > watch.first_descriptors:
        report.complaints.append(("all", 0, "descriptors leak"))
    if resident > warm_bytes + _MAX_GROWTH_BYTES:
        report.complaints.append(("all", 0, "memory leaks"))


def _save(seed: int, report: Report, path: Path) -> None:
    kinds = {function.__name__: i for i, function in enumerate(KINDS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for kind, number, text in report.complaints:
            line = {"seed": seed, "kind": kind, "number": number, "complaint": text}
            if kind in kinds:
                line["data"] = base64.b64encode(new_case(seed, kinds[kind], number).data).decode()
            file.write(json.dumps(line) + "\n")


def fuzz_in_process(seed: int, seconds: int, failures: Path) -> Report:
    """Runs `fuzz_fields` under atheris, in a process of its own: libFuzzer doesn't come back."""
    failures.parent.mkdir(parents=True, exist_ok=True)
    options = [f"-seed={seed}", f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=20000"]
    options += ["-print_final_stats=1", f"-artifact_prefix={failures.parent}/fuzz-fields-"]
    command = module_command("tests.security.fuzz_fields", *options)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"^stat::(\w+):\s+(\d+)", done.stderr, re.MULTILINE)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    report = Report(figures=[f"places in the code that inputs in process reached: {covered[-1] if covered else 0}"])
    report.inputs["in process"] = {name: int(value) for name, value in found}.get("number_of_executed_units", 0)
    if done.returncode:
        report.complaints.append(("in process", 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"))
    return report


def main() -> int:
    """Runs what the arguments say; exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (%(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs (%(default)d)")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz/failures.jsonl"), help="file (%(default)s)")
    parser.add_argument("--only", metavar="N", type=int, help="inputs of this number only, to repeat a finding")
    arguments = parser.parse_args()
    begun_s, total_s = time.monotonic(), 60 * arguments.minutes
    reports = []
    rounds = range(10**9)
    if arguments.only is not None:
        rounds = range(arguments.only, arguments.only + 1)
    else:
        reports.append(fuzz_in_process(arguments.seed, max(1, int(total_s / 3)), arguments.failures))
    reports.append(fuzz_server(arguments.seed, rounds, begun_s + total_s, arguments.failures))
    for report in reports:
        print("\n".join(report.lines()))
    print(f"seed {arguments.seed}, {(time.monotonic() - begun_s) / 60:.1f} minutes")
    return 1 if any(report.complaints for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
