import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from bilm_server.observability.alert_groups import Alert, AlertEvent, AlertGroups
from bilm_server.observability.alerts import ATTEMPTS, AlertHandler

NEVER = float("inf")


def event(line: int = 1, message: str = "it failed") -> AlertEvent:
    return AlertEvent(0.0, "ERROR", "bilm_server.errors", "bilm_server/x.py", line, message)


def told(alerts: list[Alert]) -> list[dict[int, int]]:
    return [{found.line: count for found, count in alert.groups} for alert in alerts]


# ---- which messages are due ----


def test_the_first_error_of_a_place_is_told_at_once_and_the_next_ones_together() -> None:
    groups = AlertGroups(interval_s=60)
    groups.add(event(), 100)
    assert groups.due_at_s() == 100
    assert told(groups.take(100)) == [{1: 1}]
    assert groups.due_at_s() == NEVER
    for now_s in range(101, 131):
        groups.add(event(message=f"at {now_s}"), now_s)
    assert groups.due_at_s() == 160
    assert groups.take(159.9) == []
    (alert,) = groups.take(160)
    assert told([alert]) == [{1: 30}]
    assert alert.groups[0][0].message == "at 130"


def test_a_place_that_was_quiet_for_an_interval_is_told_at_once_again() -> None:
    groups = AlertGroups(interval_s=60)
    groups.add(event(), 0)
    groups.take(0)
    groups.add(event(), 61)
    assert told(groups.take(61)) == [{1: 1}]


def test_places_that_were_quiet_make_room_for_others() -> None:
    groups = AlertGroups(interval_s=60, max_places=2)
    for line, now_s in ((1, 0), (2, 1), (3, 59), (4, 61)):
        groups.add(event(line), now_s)
        alerts = groups.take(now_s)
        assert (told(alerts), alerts[0].n_elsewhere) == (([{}], 1) if line == 3 else ([{line: 1}], 0))


def test_so_many_a_minute_and_the_last_one_sums_up() -> None:
    groups = AlertGroups(interval_s=60, per_minute=3)
    for line in range(1, 6):
        groups.add(event(line), 0)
    assert told(groups.take(0)) == [{1: 1}, {2: 1}, {3: 1, 4: 1, 5: 1}]
    groups.add(event(6), 1)
    assert groups.take(1) == []
    assert groups.due_at_s() == 60
    assert told(groups.take(60)) == [{6: 1}]


def test_places_are_bounded_and_the_others_counted() -> None:
    groups = AlertGroups(max_places=2, per_minute=10)
    for line in range(1, 1001):
        groups.add(event(line), 0)
    alerts = groups.take(0)
    assert told(alerts) == [{1: 1}, {2: 1}, {}]
    assert alerts[-1].n_elsewhere == 998
    assert sum(alert.count for alert in alerts) == 1000
    assert groups.due_at_s() == NEVER


def test_at_the_end_nothing_waits_for_its_interval() -> None:
    groups = AlertGroups(interval_s=60)
    groups.add(event(), 0)
    groups.take(0)
    groups.add(event(), 1)
    assert told(groups.take(1, everything=True)) == [{1: 1}]


# ---- a real webhook ----


class Webhook:
    """Keeps what it gets, and answers as it is told."""

    def __init__(self) -> None:
        self.got: queue.Queue[tuple[dict[str, str], Any]] = queue.Queue()
        self.status = 200
        self.answer = threading.Event()
        self.answer.set()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.got.put(({key.lower(): value for key, value in self.headers.items()}, json.loads(body)))
                webhook.answer.wait()
                self.send_response(webhook.status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/secret-of-the-webhook"

    def __enter__(self) -> "Webhook":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answer.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as webhook:
        yield webhook


HURRIED = {"post_timeout_s": 0.2, "retry_pause_s": 0.01}


@contextmanager
def alerting(url: str, **kwargs: Any) -> Iterator[tuple[AlertHandler, logging.Logger]]:
    style = kwargs.pop("style", "json")
    times = {name: kwargs.pop(name) for name in HURRIED if name in kwargs}
    handler = AlertHandler(url, style, "replica-1:50051", AlertGroups(**kwargs), **times)
    logger = logging.getLogger("bilm_server.errors")
    logging.getLogger().addHandler(handler)
    handler.start()
    try:
        yield handler, logger
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def fail(logger: logging.Logger) -> None:
    try:
        raise KeyError("the caller's confidential text")
    except KeyError:
        logger.exception("%s failed", "Embed")


def test_an_error_is_posted_with_its_place_and_without_the_exceptions_text(webhook: Webhook) -> None:
    with alerting(webhook.url) as (_, logger):
        logger.warning("not severe enough")
        fail(logger)
        headers, body = webhook.got.get(timeout=60)
    assert headers["content-type"] == "application/json"
    assert body.pop("time").endswith("+00:00")
    raised_line = body.pop("raised_line")
    assert 0 < raised_line < body.pop("line")
    assert body == {
        "server": "replica-1:50051", "level": "ERROR", "logger": "bilm_server.errors", "file": "server/test_alerts.py",
        "message": "Embed failed", "exception": "KeyError", "raised_file": "server/test_alerts.py", "count": 1,
    }  # fmt: skip


def test_a_webhook_of_this_machine_is_reached_without_a_proxy(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with alerting(webhook.url) as (_, logger):
        fail(logger)
        assert webhook.got.get(timeout=60)


def test_jandi_gets_its_own_format(webhook: Webhook) -> None:
    with alerting(webhook.url, style="jandi") as (_, logger):
        fail(logger)
        headers, body = webhook.got.get(timeout=60)
    assert headers["accept"] == "application/vnd.tosslab.jandi-v2+json"
    assert headers["content-type"] == "application/json"
    assert set(body) == {"body", "connectColor", "connectInfo"}
    assert body["body"] == "bilm-serve: ERROR on replica-1:50051"
    assert body["connectColor"].startswith("#")
    assert all(set(info) == {"title", "description"} for info in body["connectInfo"])
    place, server = body["connectInfo"]
    assert "server/test_alerts.py:" in place["title"]
    assert "bilm_server.errors" in place["title"]
    assert "Embed failed\nKeyError at server/test_alerts.py:" in place["description"]
    assert server == {"title": "Server", "description": "replica-1:50051"}
    assert "confidential" not in json.dumps(body)


@pytest.mark.parametrize("style", ["json", "jandi"])
def test_many_errors_at_many_places_are_few_messages(webhook: Webhook, style: str) -> None:
    webhook.answer.clear()  # the first message keeps the thread until all errors are logged
    with alerting(webhook.url, style=style, per_minute=2) as (handler, logger):
        logger.error("first")
        webhook.got.get(timeout=60)
        for number in range(3000):
            place = logging.LogRecord("bilm_server.errors", logging.ERROR, "a/b.py", number % 30, "again", (), None)
            logger.handle(place)
        webhook.answer.set()
        _, body = webhook.got.get(timeout=60)
        with pytest.raises(queue.Empty):
            webhook.got.get(timeout=0.2)
    assert handler.dropped == 0
    if style == "json":
        assert body["count"] == 3000
        assert [place["count"] for place in body["places"]] == [100] * 10
    else:
        assert body["body"] == "bilm-serve: 3000 more errors on replica-1:50051"
        assert len(body["connectInfo"]) == 11


def test_what_is_under_way_at_the_end_is_sent(webhook: Webhook) -> None:
    with alerting(webhook.url) as (handler, logger):
        for number in range(3):
            logger.error("number %d", number)
        handler.stop()
    bodies = [webhook.got.get_nowait()[1] for _ in range(webhook.got.qsize())]
    assert sum(body["count"] for body in bodies) == 3
    logger.error("after the end")
    handler.emit(logging.makeLogRecord({"levelno": logging.ERROR}))
    assert handler.dropped == 1


# ---- a webhook that fails ----


def wait_until(condition: Callable[[], bool]) -> None:
    """For what a thread does without telling."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "bilm_server.observability.alerts"]


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (429, 3), (404, 1), (302, 1)])
def test_a_webhook_that_refuses_costs_the_alert_alone(
    webhook: Webhook, caplog: pytest.LogCaptureFixture, status: int, attempts: int
) -> None:
    caplog.set_level(logging.INFO)
    webhook.status = status
    with alerting(webhook.url, interval_s=0, **HURRIED) as (handler, logger):
        logger.error("told to nobody")
        wait_until(lambda: handler.dropped == 1)
        assert webhook.got.qsize() == attempts
        logger.error("neither")
        wait_until(lambda: handler.dropped == 2)
        webhook.status = 200
        logger.error("told")
        wait_until(lambda: len(failures(caplog)) == 2)
    # One line when it begins and one when it ends, and the secret in neither
    assert failures(caplog) == [
        f"the webhook takes no alerts: HTTP status {status}", "the webhook takes alerts again"
    ]  # fmt: skip
    assert "secret" not in caplog.text


@pytest.mark.parametrize("kind", ["dead", "slow", "hangs up", "talks nonsense"])
def test_a_webhook_that_is_broken_costs_the_alert_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/secret"
        answering = threading.Thread(target=_answer, args=(listener, kind))
        if kind == "dead":
            listener.close()
        elif kind != "slow":  # which accepts connections, as the kernel does, and nothing else
            answering.start()
        with alerting(url, **HURRIED) as (handler, logger):
            for number in range(1000):
                logger.error("number %d", number)
            wait_until(lambda: handler.dropped > 0)
            if answering.ident is not None:
                answering.join()
            handler.stop(60)
            assert not {thread for thread in set(threading.enumerate()) - before if thread.name == "alerts"}
    assert "secret" not in caplog.text


def _answer(listener: socket.socket, kind: str) -> None:
    for _ in range(ATTEMPTS):
        connection, _ = listener.accept()
        with connection:
            if kind == "talks nonsense":
                connection.recv(65536)
                connection.sendall(b"nonsense\r\n\r\n")


def test_stopping_is_bounded_where_the_webhook_hangs(webhook: Webhook) -> None:
    webhook.answer.clear()
    with alerting(webhook.url) as (handler, logger):
        logger.error("it hangs")
        webhook.got.get(timeout=60)
        handler.stop(0.1)  # before the answer, which comes after it
        webhook.answer.set()


def test_arguments_that_do_not_fit_are_counted(webhook: Webhook) -> None:
    with alerting(webhook.url) as (handler, _):
        handler.handle(logging.LogRecord("x", logging.ERROR, "x.py", 1, "%d", ("many",), None))
        assert handler.dropped == 1
