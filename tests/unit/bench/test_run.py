"""bilm-bench against a scripted server: what it counts as what, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_bench.main import DONE, INTERRUPTED, STOPPED, UNUSABLE, VIOLATED, main
from bilm_bench.run import LoadRun
from bilm_bench.settings import load_settings
from bilm_bench.statistics.metrics import step_metrics
from bilm_bench.workload.calls import ONE_ATTEMPT, CallKind, CallResult, Request, client_settings, make_requests
from bilm_client.results import ModelInfo
from bilm_client.testing import FakeModel
from bilm_client.testing.service import FakeService
from grpc_health.v1 import health_pb2

from tests.support.processes import started

if TYPE_CHECKING:
    from bilm_api.v1 import embed_pb2 as pb

    from tests.support.scripted import Scripted

SENTENCES = ["one sentence .", "another one , a bit longer .", "the third"]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Bench:
    """Runs the command on a text of three sentences, and reads its report."""

    def __init__(self, folder: Path) -> None:
        self.text, self.json, self.html = folder / "text", folder / "report.json", folder / "report.html"
        self.text.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")

    def flags(self, target: str, *flags: str) -> list[str]:
        given = ["--target", target, "--text", str(self.text), "--json", str(self.json)]
        return [*given, "--warm-up-s", "0", "--connections", "2", "--step-s", "0.3", *flags]

    def __call__(self, target: str, *flags: str) -> int:
        return main(self.flags(target, *flags))

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.json.read_text(encoding="utf-8"))
        return found

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = self.report["figures"]
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_run(scripted: Scripted, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(scripted.target, "--rate", "40", "--sentences-per-call", "2", "--step-s", "1") == DONE
    found = bench.figures
    assert found["calls"] == found["accepted"]["calls"] == len(scripted.service.embed_requests) > 5
    assert found["failed"] == found["refused"]["calls"] == found["unfinished"] == 0
    assert found["offered_sentences_per_s"] == 2 * found["calls"]
    assert found["accepted"]["max_ms"] >= found["accepted"]["since_sent"]["max_ms"] > 0
    assert found["health"]["checks"] > 3
    assert found["health"]["not_serving"] == found["health"]["unanswered"] == 0
    assert found["bench"]["memory_mib_last"] > 10
    assert found["server"]["memory_mib_last"] is None
    assert bench.report["choices"]["rate"] == 40
    assert bench.report["text"] == {"sentences": 3, "tokens": 12, "median_tokens": 3, "longest_tokens": 7}
    out, err = capsys.readouterr()
    assert "open loop (Poisson), 1 s under load" in out
    assert "not read (--server-pid, --metrics-url)" in out
    assert err.startswith("bilm-bench: 40 sentences/s: ")


def test_the_same_seed_sends_the_same(scripted: Scripted, bench: Bench) -> None:
    sent = []
    for seed in ("1", "1", "2"):
        scripted.service.embed_requests.clear()
        assert bench(scripted.target, "--rate", "60", "--seed", seed) == DONE
        texts = [request.sentences[0].tokens.tokens[0] for request in scripted.service.embed_requests]
        sent.append((len(texts), sorted(texts)))
    assert sent[0] == sent[1]
    assert sent[0] != sent[2]


def test_what_is_asked_for_is_sent(scripted: Scripted, bench: Bench, tmp_path: Path) -> None:
    (token := tmp_path / "token").write_text("secret", encoding="utf-8")
    flags = ("--raw", "--layers", "top", "--pool", "mean", "--dtype", "float16", "--no-log", "--metadata", "x-a=b")
    assert bench(scripted.target, *flags, "--priority", "batch", "--token-file", str(token)) == DONE
    request, metadata = scripted.service.embed_requests[0], scripted.service.metadata
    assert request.sentences[0].text in SENTENCES
    options = request.options
    assert (options.layers, options.pooling, options.data_type, request.priority) == (2, 2, 2, 2)
    assert [metadata[name] for name in ("x-bilm-no-log", "x-a", "authorization")] == ["1", "b", "Bearer secret"]


def test_a_model_is_asked_for_by_its_name(scripted: Scripted, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.service.serve(FakeModel("en"), FakeModel("de", width=8))
    scripted.set_health(NOT_SERVING)
    scripted.set_health(health_pb2.HealthCheckResponse.SERVING, "model:de")
    assert bench(scripted.target, "--model", "de", "--verify", "--rate", "40") == DONE
    assert {request.model for request in scripted.service.embed_requests} == {"de"}
    assert bench.report["model"]["name"] == "de"
    assert bench.figures["health"]["checks"] > 0
    assert bench.figures["health"]["not_serving"] == bench.figures["health"]["unanswered"] == 0
    capsys.readouterr()
    scripted.set_health(health_pb2.HealthCheckResponse.SERVING)
    for balance in ("first", "round_robin"):
        assert bench(scripted.target, "--model", "fr", "--balance", balance) == STOPPED
        assert "MODEL_NOT_FOUND" in capsys.readouterr().err


def test_a_priority_needs_a_server_that_knows_it(
    scripted: Scripted, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.service.model.ClearField("features")
    assert bench(scripted.target, "--priority", "batch") == STOPPED
    assert capsys.readouterr().err == "bilm-bench: priority: the server (fake) doesn't know it\n"


def test_an_open_loop_goes_on_while_answers_wait_and_their_wait_counts(scripted: Scripted, bench: Bench) -> None:
    """The first call is answered after the tenth: a generator that waited would never get there."""
    hold = scripted.hold_next()
    answer_next = scripted.service.answered

    def release() -> None:
        for _ in range(10):
            answer_next.acquire()
        hold.released.set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(release)
        assert bench(scripted.target, "--rate", "60") == DONE
    found = bench.figures
    assert found["accepted"]["calls"] == found["calls"] > 10
    assert found["accepted"]["max_ms"] > 50  # the calls of that while lie further apart than this
    assert found["accepted"]["p50_ms"] < found["accepted"]["max_ms"]


def test_what_a_late_generator_makes_calls_wait_is_part_of_their_latency(answering: Scripted, bench: Bench) -> None:
    naps_s = [0.4]

    async def call(_request: Request) -> CallResult:
        if naps_s:
            time.sleep(naps_s.pop())  # noqa: ASYNC251 - the loop stands still, while calls are due
        return CallResult(CallKind.ACCEPTED, sentences=1)

    settings = load_settings(bench.flags(answering.target, "--rate", "60", "--step-s", "0.5"))
    requests = make_requests(SENTENCES, 1, pb.EmbedRequest())
    connection = client_settings(
        answering.target, timeout_s=5.0, retry=ONE_ATTEMPT, credentials=None, token=None, metadata=()
    )
    run = LoadRun(settings, requests, call, connection, lambda _step, _counters: None)
    measured = asyncio.run(run.measure(ModelInfo.from_proto(FakeService().get_model())))
    found = step_metrics(measured.total)
    accepted = found["accepted"]
    assert found["late_p99_ms"] > 200
    assert accepted["p90_ms"] > 200
    assert accepted["p90_ms"] > accepted["since_sent"]["p90_ms"] + 100


def test_calls_beyond_the_limit_are_counted_and_not_sent(scripted: Scripted, bench: Bench) -> None:
    hold = scripted.hold_next()

    def release() -> None:
        hold.arrived.wait()
        threading.Event().wait(0.3)  # as long as the step: other calls are due meanwhile
        hold.released.set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(release)
        assert bench(scripted.target, "--rate", "60", "--max-in-flight", "1") == DONE
    found = bench.figures
    assert [error["status"] for error in found["errors"]] == ["NOT_SENT"]
    assert found["failed"] == found["errors"][0]["calls"] == found["calls"] - found["accepted"]["calls"] > 0


def test_refusals_and_failures_are_told_apart(
    scripted: Scripted, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.fail_next(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 70, times=3)
    scripted.fail_next(grpc.StatusCode.RESOURCE_EXHAUSTED, "RESPONSE_TOO_LARGE", -1)
    scripted.fail_next(grpc.StatusCode.RESOURCE_EXHAUSTED)
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE)
    scripted.fail_next(grpc.StatusCode.INTERNAL, "INTERNAL")
    scripted.fail_next(grpc.StatusCode.CANCELLED)
    flags = ("--rate", "80", "--step-s", "1", "--fail-on", "error_rate>0", "--fail-on", "refused.with_pushback>=4")
    assert bench(scripted.target, *flags) == VIOLATED
    found = bench.figures
    refused = found["refused"]
    assert (refused["calls"], found["failed"]) == (6, 3)
    assert [refused[name] for name in ("with_pushback", "never_retry", "without_pushback")] == [3, 1, 2]
    assert refused["pushback_p50_ms"] == pytest.approx(70, rel=0.01)
    assert {(error["status"], error["reason"]): error["calls"] for error in found["errors"]} == {
        ("RESOURCE_EXHAUSTED", "OVERLOADED"): 3,
        ("RESOURCE_EXHAUSTED", "RESPONSE_TOO_LARGE"): 1,
        ("RESOURCE_EXHAUSTED", ""): 1,
        ("UNAVAILABLE", "SHUTTING_DOWN"): 1,
        ("UNAVAILABLE", ""): 1,
        ("INTERNAL", "INTERNAL"): 1,
        ("CANCELLED", ""): 1,
    }
    assert [condition["violated"] for condition in bench.report["conditions"]] == [True, False]
    out = capsys.readouterr().out
    assert "3 × RESOURCE_EXHAUSTED OVERLOADED: as scripted" in out
    assert "VIOLATED     not error_rate>0: " in out


def test_with_retry_callers_see_no_failure(scripted: Scripted, bench: Bench) -> None:
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE, times=2)
    assert bench(scripted.target, "--rate", "40", "--retry", "--fail-on", "failed>0") == DONE
    assert len(scripted.service.embed_requests) == bench.figures["calls"] + 2


def test_a_refused_caller_of_a_closed_loop_waits_for_the_pushback(scripted: Scripted, bench: Bench) -> None:
    scripted.fail_next(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 60_000, times=10_000)
    assert bench(scripted.target, "--loop", "closed", "--callers", "3") == DONE
    assert bench.figures["calls"] == bench.figures["refused"]["calls"] == 3


def test_sentences_that_fail_are_counted_by_reason(scripted: Scripted, bench: Bench) -> None:
    scripted.service.fake.failures[SENTENCES[0]] = "SENTENCE_TOO_LONG"
    flags = ("--rate", "90", "--sentences-per-call", "3", "--verify")
    assert bench(scripted.target, *flags) == DONE
    found = bench.figures
    assert found["sentence_errors"] == {"SENTENCE_TOO_LONG": found["accepted"]["calls"]}
    assert found["checked_answers"] == 3 * found["accepted"]["calls"] > 0


def spoil_once(scripted: Scripted, amount: float) -> None:
    """Lets one call of the load (the asking before it takes three) be answered a little differently."""

    def act(request: pb.EmbedRequest, _context: Any) -> pb.EmbedResponse:
        response = scripted.service.fake.embed(request)
        tensor = response.results[0].embedding.tensor
        vectors = np.frombuffer(tensor.data, "<f4").copy()
        vectors[-1] += amount
        tensor.data = vectors.tobytes()
        return response

    for _ in SENTENCES:
        scripted.answer_next()
    scripted.service.embed_acts.append(act)


@pytest.mark.parametrize(("tolerance", "wrong"), [("0", 1), ("1e-4", 1), ("1e-2", 0)])
def test_a_wrong_answer_is_found(scripted: Scripted, bench: Bench, tolerance: str, wrong: int) -> None:
    spoil_once(scripted, 1e-3)
    expected = VIOLATED if wrong else DONE
    assert bench(scripted.target, "--rate", "60", "--verify", "--tolerance", tolerance) == expected
    found = bench.figures
    assert found["wrong_answers"] == wrong
    assert found["checked_answers"] == found["accepted"]["calls"] > 5


def test_nan_is_wrong_whatever_the_tolerance(scripted: Scripted, bench: Bench) -> None:
    spoil_once(scripted, float("nan"))
    assert bench(scripted.target, "--rate", "60", "--verify", "--tolerance", "1000") == VIOLATED
    assert bench.figures["wrong_answers"] == 1


def test_an_answer_to_another_number_of_sentences_is_a_failure(scripted: Scripted, bench: Bench) -> None:
    def act(request: pb.EmbedRequest, _context: Any) -> pb.EmbedResponse:
        response = scripted.service.fake.embed(request)
        del response.results[:]
        return response

    scripted.service.embed_acts.append(act)
    assert bench(scripted.target, "--rate", "60") == DONE
    assert [(error["reason"], error["calls"]) for error in bench.figures["errors"]] == [("MALFORMED_RESPONSE", 1)]


def test_a_call_past_its_deadline(scripted: Scripted, bench: Bench) -> None:
    hold = scripted.hold_next()
    assert bench(scripted.target, "--rate", "40", "--timeout-s", "1") == DONE
    hold.released.set()
    assert "DEADLINE_EXCEEDED" in [error["status"] for error in bench.figures["errors"]]


def test_health_that_is_not_serving_is_told(scripted: Scripted, bench: Bench) -> None:
    scripted.set_health(NOT_SERVING)
    assert bench(scripted.target, "--fail-on", "health.not_serving>0") == VIOLATED
    health = bench.figures["health"]
    assert health["not_serving"] == health["checks"] > 0


def test_a_soak_samples_both_sides_and_gives_slopes(scripted: Scripted, bench: Bench) -> None:
    # This process is the server, too.
    flags = ("--soak", "2s", "--sample-s", "0.1", "--server-pid", str(os.getpid()))
    assert bench(scripted.target, *flags, "--fail-on", "server.memory_mib_per_hour>1e9") == DONE
    found = bench.figures
    for side in ("server", "bench"):
        assert found[side]["memory_mib_last"] > 10
        assert found[side]["descriptors_max"] > 5
        assert found[side]["memory_mib_per_hour"] is not None
        assert found[side]["descriptors_per_hour"] is not None
    samples = bench.report["samples"]
    assert len(samples) > 5
    assert sum(sample["accepted_per_s"] for sample in samples) > 0
    assert all(later["at_s"] > earlier["at_s"] for earlier, later in pairwise(samples))


class _MetricsPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = b"# HELP process_open_fds of us\nprocess_open_fds 17.0\nprocess_resident_memory_bytes 2.097152e+06\n"
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def metrics_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _MetricsPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_servers_memory_and_descriptors_from_its_metrics(
    scripted: Scripted, bench: Bench, metrics_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(scripted.target, "--metrics-url", metrics_url) == DONE
    server = bench.figures["server"]
    assert (server["memory_mib_first"], server["memory_mib_max"], server["descriptors_last"]) == (2, 2, 17)
    assert bench(scripted.target, "--metrics-url", metrics_url.replace("/metrics", "/other")) == UNUSABLE
    assert "metrics_url: neither" in capsys.readouterr().err
    assert bench(scripted.target, "--server-pid", str(2**22 + 1)) == UNUSABLE


def test_the_page_needs_nothing_else_and_shows_every_plot(scripted: Scripted, bench: Bench) -> None:
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE, "<script>", times=3)
    flags = ("--ramp", "20,60", "--sample-s", "0.1", "--html", str(bench.html), "--fail-on", "failed>0")
    assert bench(scripted.target, *flags) == DONE  # with a reason it is a refusal
    page = bench.html.read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)=["']?(?!#)""", page.replace('xlink:href="#', ""))
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#0\d0\d0\d\b", page)  # every colour of the plots became one of the page's
    assert [step["load"] for step in bench.report["steps"]] == [20, 60]


def test_no_encoding_of_the_terminal_costs_the_report(scripted: Scripted, bench: Bench) -> None:
    scripted.fail_next(grpc.StatusCode.UNAVAILABLE, "日本語", times=1)
    with redirect_stdout(terminal := io.TextIOWrapper(io.BytesIO(), "cp1252")):
        assert bench(scripted.target, "--html", str(bench.html)) == DONE
    assert "日本語" in str(bench.report)
    assert "日本語" in bench.html.read_text(encoding="utf-8")
    terminal.flush()
    assert isinstance(terminal.buffer, io.BytesIO)
    assert b"\\u65e5\\u672c\\u8a9e" in terminal.buffer.getvalue()


def test_a_full_disk_behind_the_terminal_costs_an_exit_code_only(
    scripted: Scripted, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as terminal, redirect_stdout(terminal):  # noqa: PTH123 - as a shell
        assert bench(scripted.target) == STOPPED
        assert bench.report["format"] == 1
    assert capsys.readouterr().err.endswith("bilm-bench: standard output: No space left on device\n")


def test_a_name_that_is_not_utf_8_costs_no_report(scripted: Scripted, bench: Bench) -> None:
    text = bench.text
    bench.text = text.with_name(os.fsdecode(b"caf\xe9"))
    text.rename(bench.text)
    assert bench(scripted.target, "--html", str(bench.html)) == DONE
    assert bench.report["choices"]["text"] == str(bench.text)


def test_no_server(bench: Bench, free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(f"127.0.0.1:{free_port}") == STOPPED
    error = capsys.readouterr().err
    assert error.startswith("bilm-bench: UNAVAILABLE")
    assert "Traceback" not in error
    assert not bench.json.exists()


def test_without_the_extra_it_says_what_to_install(bench: Bench) -> None:
    hide = "import sys; sys.modules['pydantic_settings'] = None; "
    start = f"from bilm_bench.main import main; sys.exit(main({bench.flags('nowhere')!r}))"
    process = subprocess.run([sys.executable, "-c", hide + start], capture_output=True, text=True, check=False)
    assert process.returncode == UNUSABLE
    assert "pip install 'bilm-serve[bench]'" in process.stderr


def test_ctrl_c_ends_the_load_and_reports(scripted: Scripted, bench: Bench) -> None:
    """In a process of its own, interrupted while a call of the load is under way."""
    hold = scripted.hold_next()
    flags = bench.flags(scripted.target, "--soak", "1h", "--html", str(bench.html))
    command = [sys.executable, "-W", "error", "-m", "bilm_bench", *flags]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert hold.arrived.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    hold.released.set()
    assert process.returncode == INTERRUPTED, err
    assert "interrupted" in out
    assert "Traceback" not in err
    assert bench.report["interrupted"]
    assert bench.figures["unfinished"] == 1
    assert "Interrupted." in bench.html.read_text(encoding="utf-8")
