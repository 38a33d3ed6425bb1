"""What happens to the process as a whole: stopped, killed, the clock, the log's disk, the model."""

import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_client import Client, HealthStatus, RetryPolicy
from bilm_client.errors import BilmError, DeadlineError, SentenceError, ServiceError, UnavailableError

from tests.fault.fault_support import missing, missing_namespace, unshare
from tests.fault.known_answers import OPTIONS, KnownAnswers
from tests.support.faulty_server import BROKEN, EXHAUST, HANG, LOSE, POISON
from tests.support.processes import descriptors, resident_bytes, wait_until
from tests.support.server_processes import ProcessServer

LIMIT_S = 30.0
MIB = 2**20
ONCE = RetryPolicy(max_attempts=1)
CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
)
EX_ENGINE_LOST = 3

Start = Callable[..., ProcessServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with flags of the test's own."""
    with ExitStack() as stack:
        yield lambda *flags, **keywords: stack.enter_context(ProcessServer(*flags, **keywords))


def known_answers(target: str) -> KnownAnswers:
    known = KnownAnswers()
    with Client(target) as client:
        known.ask(client)
    return known


def ask(client: Client, known: KnownAnswers, seed: int, n_calls: int = 5) -> None:
    chance = random.Random(seed)
    for _ in range(n_calls):
        options, index = chance.randrange(len(OPTIONS)), chance.randrange(len(known.corpus))
        (found,) = client.embed([known.corpus[index]], **OPTIONS[options])
        known.check(found, options, index)


# ---- stopped and killed ----


def test_stopped_and_killed(start: Start) -> None:
    server = start()
    known = known_answers(server.target)
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        ask(client, known, 1)
        _stop_and_go_on(server, client)
        ask(client, known, 2)
        _kill_under_load(server, client, known)
        with pytest.raises(UnavailableError):
            client.embed(["a"], timeout_s=LIMIT_S)
        server.start()
        wait_until(lambda: _health(client) is HealthStatus.SERVING, "the client finds the server again")
        ask(client, known, 3)
    assert server.terminate() == 0


def _stop_and_go_on(server: ProcessServer, client: Client) -> None:
    """While it is stopped, calls end at their deadlines; those that wait long enough are answered afterwards."""
    server.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError):
            client.embed(["a"], timeout_s=0.5)
        with pytest.raises(DeadlineError):
            list(client.embed_stream(["a"], timeout_s=0.5))
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(client.embed, ["a"])
            server.send_signal(signal.SIGCONT)
            assert len(patient.result(LIMIT_S)) == 1
    finally:
        server.send_signal(signal.SIGCONT)


def _kill_under_load(server: ProcessServer, client: Client, known: KnownAnswers) -> None:
    """Each caller is told by a status."""
    answered = threading.Semaphore(0)

    def call_until_it_fails(seed: int) -> ServiceError:
        try:
            while True:
                ask(client, known, seed, n_calls=1)
                answered.release()
        except ServiceError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(call_until_it_fails, seed) for seed in range(3)]
        for _ in range(20):  # all of them are at it
            answered.acquire()
        server.kill()
        for caller in callers:
            assert caller.result(LIMIT_S).code is grpc.StatusCode.UNAVAILABLE


def _health(client: Client) -> HealthStatus | None:
    try:
        return client.health(timeout_s=5.0)
    except BilmError:
        return None


# ---- the clock ----


@pytest.mark.slow
def test_nothing_depends_on_the_wall_clock(start: Start, tmp_path: Path) -> None:
    """Which jumps by years, both ways, under a server at work; the machine's own clock stays as it is."""
    if reason := missing("faketime"):
        pytest.skip(reason)
    clock = tmp_path / "clock"
    server = start("--grace-s", "5", environment=_faked_clock(clock), fresh=True)
    known = known_answers(server.target)
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        for seed, offset in enumerate(("+1h", "-1h", "+4000d", "-4000d")):
            stream = client.embed_stream(known.document(0), carry_state=True, window=1)
            known.check_in_document(next(stream), 0, 0)
            _set_clock(clock, offset)
            ask(client, known, seed)
            for position, found in enumerate(stream, start=1):
                known.check_in_document(found, 0, position)
            assert client.health(timeout_s=LIMIT_S) is HealthStatus.SERVING
            with pytest.raises(DeadlineError):
                client.embed([["w"] * 16_000], timeout_s=0.01)
        assert server.terminate() == 0
    years = set(re.findall(r"^(\d{4})-", server.text(), re.MULTILINE))
    assert len(years) >= 2, "the clock never jumped"


def _faked_clock(clock: Path) -> dict[str, str]:
    _set_clock(clock, "+0d")
    said = subprocess.run(
        ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=True
    )
    return {
        "LD_PRELOAD": said.stdout.strip(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


def _set_clock(clock: Path, offset: str) -> None:
    written = clock.with_suffix(".new")
    written.write_text(offset + "\n", encoding="ascii")
    written.replace(clock)


# ---- the log's disk ----


def test_a_log_that_cannot_be_written_costs_nothing(start: Start) -> None:
    server = start("--log-level", "debug", log=Path("/dev/full"))
    known = known_answers(server.target)
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        held = descriptors(server.pid), resident_bytes(server.pid)
        ask(client, known, 1, n_calls=200)
        assert descriptors(server.pid) <= held[0] + 2
        assert resident_bytes(server.pid) < held[1] + 32 * MIB
        assert client.health() is HealthStatus.SERVING
    assert server.terminate() == 0


def test_a_disk_that_fills_up_and_has_room_again(start: Start, tmp_path: Path) -> None:
    if reason := missing("sh", "mount") or missing_namespace("--mount"):
        pytest.skip(reason)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs "{disk}" && exec 2>>"{disk}/log" && exec "$@"'
    server = start(prefix=[*unshare("--mount"), "sh", "-c", script, "sh"], log=tmp_path / "log")
    inside = Path(f"/proc/{server.pid}/root{disk}")
    known = known_answers(server.target)
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        (inside / "filler").write_bytes(bytes(_free_bytes(inside)))
        ask(client, known, 1, n_calls=200)
        assert _free_bytes(inside) == 0
        (inside / "filler").unlink()
        ask(client, known, 2)
    with (inside / "log").open(encoding="utf-8", errors="replace") as log:  # the disk goes away with the process
        assert server.terminate() == 0
        assert "draining" in log.read()


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


# ---- the model ----


@pytest.fixture
def start_faulty(start: Start, tmp_path: Path) -> Callable[..., ProcessServer]:
    environment = {BROKEN: str(tmp_path / "broken")}
    return lambda *flags: start(*flags, module="tests.support.faulty_server", environment=environment)


def test_a_model_that_fails(start_faulty: Callable[..., ProcessServer], tmp_path: Path) -> None:
    """A poisoned request is its caller's alone; when all fails, everybody hears so, until it works again."""
    server = start_faulty("--give-up-s", "120")
    known = known_answers(server.target)
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        _poison(client, known)
        (tmp_path / "broken").touch()
        with pytest.raises(UnavailableError) as error:
            client.embed(["a"])
        assert error.value.reason == "MODEL_FAILING"
        wait_until(lambda: client.health() is HealthStatus.NOT_SERVING, "health follows")
        assert client.health("liveness") is HealthStatus.SERVING
        (tmp_path / "broken").unlink()
        wait_until(lambda: client.health() is HealthStatus.SERVING, "it recovers by itself")
        ask(client, known, 1)
    assert server.terminate() == 0


def _poison(client: Client, known: KnownAnswers) -> None:
    def good(seed: int) -> None:
        ask(client, known, seed, n_calls=20)

    def bad(word: str) -> tuple[Any, str]:
        try:
            client.embed([[word, "b", "c"]])
        except SentenceError as error:
            return error.code, error.reason
        return None, ""

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(good, seed) for seed in range(4)]
        for poisoned in pool.map(bad, [POISON, EXHAUST] * 5):
            assert poisoned == (grpc.StatusCode.INTERNAL, "INTERNAL")
        for other in others:
            other.result()


def test_a_model_that_hangs_ends_the_process(start_faulty: Callable[..., ProcessServer]) -> None:
    server = start_faulty("--hang-s", "1", "--give-up-s", "3")
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        with pytest.raises(UnavailableError) as error:
            client.embed([[HANG]])
        assert error.value.reason == "MODEL_FAILING"
        assert _health(client) in (HealthStatus.NOT_SERVING, None)
    assert server.wait() == EX_ENGINE_LOST


def test_a_device_that_breaks_ends_the_process_at_once(start_faulty: Callable[..., ProcessServer]) -> None:
    server = start_faulty("--give-up-s", str(20 * LIMIT_S))
    with Client(server.target, retry=ONCE, timeout_s=LIMIT_S, channel_options=CHANNEL) as client:
        with pytest.raises(UnavailableError) as error:
            client.embed([[LOSE]])
        assert error.value.reason in ("MODEL_FAILING", "")  # or the process was faster than its response
    assert server.wait() == EX_ENGINE_LOST
