"""Faults at random moments while every kind of caller is at work, each of whose answers is known.

    python -m tests.fault.chaos --minutes 5 --seed 1

A supervisor restarts a real server; callers of all kinds (chaos_callers; chaos_doors over HTTP and the Open Inference
Protocol) go to it directly and through a proxy; faults come as the seed has it (chaos_schedule, chaos_faults). Ends
with 0 if there was no wrong answer, no call that hung beyond its deadline, no failure that no fault explains, no leak
and no error in the server's log; 1 otherwise. Where it may, it runs in a network namespace of its own, in which packets
can be lost, too.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from bilm_client import Client

from tests.fault.chaos_bad_requests import MAX_REQUEST_TOKENS
from tests.fault.chaos_callers import CHANNEL_OPTIONS, LIMIT_S
from tests.fault.chaos_faults import STALL_S, Injector
from tests.fault.chaos_records import Recorder, read_records
from tests.fault.chaos_report import Holdings, Outcome, failures, table, write_json
from tests.fault.chaos_schedule import KINDS, PACKETS, schedule
from tests.fault.chaos_supervisor import Supervisor
from tests.fault.packets import PacketFilter, enter_namespace
from tests.fault.proxy import FaultyProxy
from tests.support.processes import ROOT, descriptors, free_port, module_command, resident_bytes
from tests.support.server_processes import ProcessServer

_MAX_STREAM_TOKENS = 8192
_FLAGS = {
    "max-tokens-per-request": MAX_REQUEST_TOKENS,
    "max-waiting-tokens": MAX_REQUEST_TOKENS,  # so one request can tell whether all room has been given back
    "max-tokens-per-sentence": _MAX_STREAM_TOKENS,
    "max-stream-tokens": _MAX_STREAM_TOKENS,
    "max-waiting-mib": 16,
    "max-stream-mib": 16,
    "token-cache-mib": 4,
    "input-cache-mib": 4,
    "threads": 1,
    "stream-stall-s": STALL_S,
    "drain-delay-s": 0.2,
    "grace-s": 3,
    "log-format": "json",
}
_MIB = 2**20
_SETTLE_S = 8.0
"""Of the run's time, for the calls under way to end and for what is looked at afterwards."""
_LEAST_S = 20.0
_CALLERS_TIMEOUT_S = 120.0


class Run:
    """One run.

    Args:
        seed: Of the schedule and the callers.
        kinds: Of faults.
        folder: For the log and the records.
        in_namespace: Whether packets may be lost.
    """

    def __init__(self, seed: int, kinds: Sequence[str], folder: Path, in_namespace: bool) -> None:
        self._seed, self._kinds, self._folder = seed, kinds, folder
        self._http_port = free_port()
        settings = {**_FLAGS, "http-listen": f"127.0.0.1:{self._http_port}"}
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        self._server = ProcessServer(*flags, log=folder / "server.log")
        self._supervisor = Supervisor(self._server)
        self._packets = PacketFilter((self._server.port, self._http_port), in_namespace)
        self._recorder = Recorder(folder / "injector.jsonl")
        self._callers_file = folder / "callers.jsonl"
        self.outcome = Outcome(seed)

    def run(self, until_s: float, n_rounds: int | None = None) -> None:
        """Runs until that time on the monotonic clock, or a little longer; or for so many rounds of all faults.

        Raises:
            Exception: What kept the run itself from going on; all its processes have ended.
        """
        begun_s = time.monotonic()
        self._recorder.open()
        with ExitStack() as stack:
            stack.callback(self._recorder.close)
            stack.callback(self._supervisor.give_up)
            self._supervisor.start()
            proxies = [stack.enter_context(FaultyProxy(port)) for port in (self._server.port, self._http_port)]
            callers = stack.enter_context(self._callers(*proxies))
            self._go_through(callers, proxies, until_s - _SETTLE_S, n_rounds)
            self._supervisor.stop()
        self._collect()
        self.outcome.seconds = time.monotonic() - begun_s

    def _go_through(
        self, callers: "subprocess.Popen[str]", proxies: Sequence[FaultyProxy], until_s: float, n_rounds: int | None
    ) -> None:
        self.outcome.exact = _said(callers)["exact"]
        before = self._held()
        _tell(callers, "go\n")
        skipped = () if self._packets.available else [kind for kind in self._kinds if kind in PACKETS]
        kinds = [kind for kind in self._kinds if kind not in skipped]
        if skipped:
            self.outcome.skipped = f"{', '.join(skipped)} (they need nft and a network namespace)"
        injector = Injector(
            self._server,
            self._supervisor,
            self._recorder,
            http_port=self._http_port,
            proxies=proxies,
            packets=self._packets,
        )
        self.outcome.windows = injector.windows
        for fault in islice(schedule(self._seed, kinds), None if n_rounds is None else n_rounds * len(kinds)):
            if time.monotonic() >= until_s:
                break
            injector.inject(fault)
        assert callers.stdin is not None
        callers.stdin.close()
        told = _said(callers)
        self.outcome.hung = told["hung"]
        self.outcome.holdings["callers"] = _holdings(told["before"], told["after"])
        self._take_all_room()
        self.outcome.holdings["server"] = _holdings(before, self._held_at_last(before["descriptors"]))

    def _take_all_room(self) -> None:
        """One request and one item of a stream that need all the room there is: none may have been lost."""
        with Client(self._server.target, channel_options=CHANNEL_OPTIONS) as client:
            half = ["w"] * (MAX_REQUEST_TOKENS // 2)
            with self._recorder.call("all room", "direct", LIMIT_S):
                client.embed([half, half], pool="mean", timeout_s=LIMIT_S)
            with self._recorder.call("all room", "direct", LIMIT_S):
                list(client.embed_stream([["w"] * _MAX_STREAM_TOKENS], pool="mean", timeout_s=LIMIT_S))

    @contextmanager
    def _callers(self, proxy: FaultyProxy, http_proxy: FaultyProxy) -> "Iterator[subprocess.Popen[str]]":
        command = module_command("tests.fault.chaos_load", "--direct", self._server.target, "--proxy", proxy.target)
        command += ["--direct-http", f"127.0.0.1:{self._http_port}", "--proxy-http", http_proxy.target]
        command += ["--records", str(self._callers_file), "--seed", str(self._seed)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
                process.wait(_CALLERS_TIMEOUT_S)
            finally:
                process.kill()

    def _held(self) -> dict[str, float]:
        pid = self._server.pid
        return {"descriptors": descriptors(pid), "resident_mib": resident_bytes(pid) / _MIB}

    def _held_at_last(self, descriptors_before: float) -> dict[str, float]:
        end_s = time.monotonic() + _SETTLE_S
        while (held := self._held())["descriptors"] > descriptors_before and time.monotonic() < end_s:
            time.sleep(0.1)
        return held

    def _collect(self) -> None:
        outcome = self.outcome
        self._recorder.close()
        outcome.records = [*read_records(self._callers_file), *read_records(self._folder / "injector.jsonl")]
        outcome.ends, outcome.start_s = self._supervisor.ends, self._supervisor.start_s
        lines = self._server.text().splitlines()
        outcome.log_lines = len(lines)
        outcome.log_errors = [line for line in lines if _is_error(line)]


def _said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the callers' process ended with {process.wait()}"
    said: dict[str, Any] = json.loads(line)
    return said


def _tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def _holdings(before: dict[str, float], after: dict[str, float]) -> Holdings:
    return Holdings(
        int(before["descriptors"]), int(after["descriptors"]), before["resident_mib"], after["resident_mib"]
    )


def _is_error(line: str) -> bool:
    """Whether the server says so itself; a line that a kill cut short, or one of gRPC's, isn't JSON."""
    try:
        found = json.loads(line)
    except ValueError:
        return "Traceback" in line
    return found["level"] in {"ERROR", "CRITICAL"}


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return kinds


def main() -> int:
    """Runs it.

    Returns:
        0 if the run has passed, else 1.
    """
    parser = argparse.ArgumentParser(description="Faults at random moments under load.")
    parser.add_argument("--minutes", type=float, default=5.0, help="in all, starts and clearing up included")
    parser.add_argument("--rounds", type=int, help="so many times each fault, however long that takes")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same faults in the same order")
    parser.add_argument("--faults", type=_kinds, default=KINDS, help=f"a list of: {','.join(KINDS)} (all)")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--keep", type=Path, help="an empty folder for the server's log and the calls")
    arguments = parser.parse_args()
    end_s = math.inf if arguments.rounds else time.monotonic() + max(_LEAST_S, 60 * arguments.minutes)
    in_namespace = enter_namespace("tests.fault.chaos")
    with tempfile.TemporaryDirectory(prefix="bilm-chaos-") as folder:
        run = Run(arguments.seed, arguments.faults, arguments.keep or Path(folder), in_namespace)
        run.run(end_s, arguments.rounds)
    print(table(run.outcome))
    if arguments.json is not None:
        write_json(run.outcome, arguments.json)
    return 1 if failures(run.outcome) else 0


if __name__ == "__main__":
    sys.exit(main())
