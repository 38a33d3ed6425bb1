import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bilm_server
import pytest
from bilm_api.constants import Priority
from bilm_server import log_levels
from bilm_server.errors import Code
from bilm_server.log_levels import OFF, PARTS, parse_levels
from bilm_server.observability.access_log import AccessLog, caller_trace_id
from bilm_server.observability.call_record import CallRecord
from bilm_server.observability.log_setup import Logs, configure_logs
from bilm_server.observability.log_writer import LineWriter

SERVER = Path(bilm_server.__file__).parent
ACCESS = "bilm_server.observability.access_log"
TRACE = "0af7651916cd43dd8448eb211c80319c"

Configure = Callable[..., Logs]


@pytest.fixture
def configure(capfd: pytest.CaptureFixture[str]) -> Iterator[Configure]:
    """configure_logs, undone at the end."""
    root, configured = logging.getLogger(), list[Logs]()
    handlers, level = root.handlers[:], root.level

    def configure(*args: Any, **kwargs: Any) -> Logs:
        root.handlers.clear()  # pytest's own: basicConfig would close them
        configured.append(configure_logs(*args, **kwargs))
        return configured[-1]

    yield configure
    for found in configured:
        found.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for names in PARTS.values():
        for name in names:
            logging.getLogger(name).setLevel(logging.NOTSET)


def a_call(**changes: Any) -> CallRecord:
    call = CallRecord("Embed", "ipv4:127.0.0.1:4711", model="tiny", caller="batch", code=Code.OK, duration_s=0.0123)
    call.sentences, call.tokens, call.queue_s, call.inference_s = 2, 9, 0.001, 0.01
    for name, value in changes.items():
        setattr(call, name, value)
    return call


def written(found: Logs, capfd: pytest.CaptureFixture[str]) -> list[str]:
    found.flush()
    return capfd.readouterr().err.splitlines()


# ---- lines ----


def test_a_call_is_found_by_its_callers_name_of_it(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("info", "text")
    AccessLog().end(a_call(request_id="order 17"))
    (line,) = written(found, capfd)
    assert line.endswith('request_id="order 17"')


def test_a_call_leaves_one_json_object(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("info", "json")
    AccessLog(lambda call: TRACE).end(a_call())
    (line,) = map(json.loads, written(found, capfd))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line.pop("line") > 0
    assert line == {
        "level": "INFO", "logger": ACCESS, "file": "access_log.py", "message": "Embed OK",
        "method": "Embed", "code": "OK", "model": "tiny", "duration_ms": 12.3, "queue_ms": 1.0,
        "inference_ms": 10.0, "sentences": 2,
        "failed_sentences": 0, "tokens": 9, "caller": "batch", "peer": "ipv4:127.0.0.1:4711", "trace_id": TRACE,
    }  # fmt: skip


def test_text_lines_have_the_same_fields(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("info", "text")
    AccessLog().end(a_call(code=Code.RESOURCE_EXHAUSTED, reason="OVERLOADED", priority=Priority.BATCH))
    (line,) = written(found, capfd)
    assert f"INFO {ACCESS} access_log.py:" in line
    assert line.endswith(
        "Embed RESOURCE_EXHAUSTED method=Embed code=RESOURCE_EXHAUSTED reason=OVERLOADED model=tiny duration_ms=12.3 "
        "queue_ms=1.0 inference_ms=10.0 sentences=2 failed_sentences=0 tokens=9 priority=batch caller=batch "
        "peer=ipv4:127.0.0.1:4711"
    )


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_comes_from_outside_makes_no_lines(
    configure: Configure, capfd: pytest.CaptureFixture[str], style: str
) -> None:
    found = configure("info", style)
    AccessLog().end(a_call(caller="me\nERROR forged \x1b[2J"))
    logging.getLogger("bilm_server.errors").warning("bad name %s", "a\rb\nc\x1b")
    lines = written(found, capfd)
    assert len(lines) == 2
    assert not re.search(r"[\x00-\x1f\x7f]", "".join(lines))


def test_the_trace_is_the_callers_where_nothing_else_is_known() -> None:
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    assert caller_trace_id(a_call(metadata=(("other", "x"), ("traceparent", parent)))) == TRACE
    for bad in ("", "garbage", parent + "\nforged", parent.upper()):
        assert caller_trace_id(a_call(metadata=(("traceparent", bad),))) == ""


def test_an_exception_in_a_json_line_names_the_place_of_the_raise(
    configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    found = configure("info", "json")
    try:
        parse_levels("nonsense")
    except ValueError:
        logging.getLogger("bilm_server.errors").exception("it failed")
    (line,) = map(json.loads, written(found, capfd))
    exception = line["exception"]
    assert (line["file"], exception["type"], exception["file"]) == (
        "test_logs.py",
        "ValueError",
        "bilm_server/log_levels.py",
    )
    source = Path(log_levels.__file__).read_text().splitlines()
    assert "raise ValueError" in source[exception["line"] - 1]
    assert exception["traceback"].startswith("Traceback")


# ---- switches ----


def test_what_any_caller_can_bring_about_is_no_error_of_grpcs(
    configure: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    found, log = configure("info", "text"), logging.getLogger("grpc._cython.cygrpc")
    log.exception(UnicodeDecodeError("utf-8", b"a caller's \xff", 0, 1, "a caller's"))
    log.error("ExecuteBatchError raised in core by servicer method [/bilm_api.v1.EmbedService/Embed]")
    log.error("Unexpected [KeyError] raised by servicer method [/bilm_api.v1.EmbedService/Embed]")
    (line,) = written(found, capfd)
    assert "Unexpected [KeyError]" in line


def test_each_part_is_switched_by_itself(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("warning", "text", parse_levels("health=debug, access=off,model=error"))
    logging.getLogger("bilm_server.protocols.grpc.health").debug("seen: health")
    AccessLog().end(a_call())
    logging.getLogger("bilm_model.engine.cpu.backend").warning("not seen: model")
    logging.getLogger("bilm_server.inference.worker").info("not seen: level of all")
    logging.getLogger("bilm_server.inference.worker").warning("seen: inference")
    assert [line.rpartition(" seen: ")[2] for line in written(found, capfd)] == ["health", "inference"]


def test_levels_of_before_are_gone(configure: Configure) -> None:
    configure("info", "text", parse_levels("access=off"))
    configure("info", "text")
    assert logging.getLogger(ACCESS).isEnabledFor(logging.INFO)


@pytest.mark.parametrize("text", ["acess=off", "access", "access=loud", "=off"])
def test_unknown_parts_and_levels_are_listed_with_what_is_known(text: str) -> None:
    with pytest.raises(ValueError, match="expected PART=LEVEL") as error:
        parse_levels(f"health=info,{text}")
    assert repr(text) in str(error.value)
    assert "health=info" not in str(error.value)
    for known in (*PARTS, "debug", "off"):
        assert known in str(error.value)
    assert parse_levels("") == {}
    assert parse_levels("access=off") == {"access": OFF}


def test_every_module_that_logs_belongs_to_a_part() -> None:
    known = tuple(name for names in PARTS.values() for name in names)
    logging_modules = [path for path in SERVER.rglob("*.py") if "getLogger(__name__)" in path.read_text()]
    assert logging_modules
    for path in logging_modules:
        name = ".".join(("bilm_server", *path.relative_to(SERVER).with_suffix("").parts))
        assert any(name == part or name.startswith(f"{part}.") for part in known), name


def test_a_part_inside_another_one_is_switched_by_itself(configure: Configure) -> None:
    (inner,), (outer,) = PARTS["watchdog"], PARTS["inference"]
    configure("info", "text", parse_levels("inference=off"))
    assert logging.getLogger(inner).isEnabledFor(logging.INFO)
    assert not logging.getLogger(f"{outer}.worker").isEnabledFor(logging.ERROR)


# ---- test calls ----


def test_a_test_call_leaves_no_line(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("debug", "text")
    AccessLog().end(a_call(is_test=True))
    assert written(found, capfd) == []


def test_a_test_call_goes_to_the_test_log(
    configure: Configure, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "test.log"
    path.write_text("before\n")
    found = configure("info", "json", test_log=path)
    AccessLog().end(a_call(is_test=True))
    AccessLog().end(a_call())
    assert len(written(found, capfd)) == 1
    before, line = path.read_text().splitlines()
    assert before == "before"
    assert json.loads(line)["logger"] == "bilm_server.test"
    found.close()
    AccessLog().end(a_call(is_test=True))
    assert len(path.read_text().splitlines()) == 2


# ---- what may go wrong ----


class Pipe:
    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.writer = LineWriter(self.write_end, lambda lost: f"lost {lost}")
        self.writer.start()
        self._text = b""

    def read(self, done: Callable[[list[str]], bool]) -> list[str]:
        """All lines so far, as soon as they are as they should be."""
        while not done(lines := self._text.decode().split("\n")[:-1]):
            self._text += os.read(self.read_end, 65536)
        return lines

    def close(self) -> None:
        os.close(self.read_end)  # first: a thread that hangs in a write wakes up by it
        self.writer.close()
        os.close(self.write_end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_a_reader_that_is_stuck_costs_lines_and_no_time(pipe: Pipe) -> None:
    line = "x" * 1023
    for _ in range(10_000):  # 10 MiB; the queue holds 4, the pipe hardly anything: who waits hangs
        pipe.writer.write(line)
    assert 5_000 < pipe.writer.dropped < 7_000
    assert not pipe.writer.flush(0.01)
    lost, seen = pipe.writer.dropped, 10_000 - pipe.writer.dropped
    pipe.read(lambda found: found.count(line) == seen)
    assert pipe.writer.flush()
    pipe.writer.write("again")
    found = pipe.read(lambda found: found[-1] == "again")
    assert len(found) - found.count(line) < 10
    assert sum(int(notice.removeprefix("lost ")) for notice in found if notice not in (line, "again")) == lost


def test_lines_of_calls_are_gathered_until_one_is_urgent() -> None:
    """The first line after a pause is written at once; the next ones would be after the longest time there is."""
    written, n_bytes = list[bytes](), 3 * len("line 0\n")
    seen = threading.Event()

    def write(_: int, data: memoryview) -> int:
        written.append(bytes(data))
        seen.set()
        return len(data)

    writer = LineWriter(0, str, write=write, gather_s=threading.TIMEOUT_MAX)
    writer.start()
    writer.write(lambda: "of a lone call")
    assert seen.wait(60)
    assert written == [b"of a lone call\n"]
    for _ in range(2):
        for number in range(3):
            writer.write(partial("line {}".format, number))
        assert writer.flush()
    assert [len(each) for each in written[1:]] == [n_bytes, n_bytes]
    seen.clear()
    writer.write(lambda: "of a call")
    writer.write("an error")
    assert seen.wait(60)
    assert written[3:] == [b"of a call\nan error\n"]
    writer.write(lambda: "last")
    writer.close()
    assert written[4:] == [b"last\n"]


def test_a_line_that_cannot_be_formatted_is_lost_alone(pipe: Pipe) -> None:
    pipe.writer.write("first")
    pipe.writer.write(lambda: str(1 // 0))
    pipe.writer.write(lambda: "formatted by the thread")
    assert pipe.writer.flush()
    assert pipe.writer.dropped == 1
    pipe.writer.write("last")
    assert pipe.read(lambda found: found[-1:] == ["last"]) == ["first", "formatted by the thread", "lost 1", "last"]


def test_lines_keep_their_order_whoever_writes_them(pipe: Pipe) -> None:
    def write(name: int) -> None:
        for number in range(200):
            pipe.writer.write(f"{name} {number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    found = pipe.read(lambda found: len(found) == 800)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [line for line in found if line.startswith(f"{name} ")] == [f"{name} {n}" for n in range(200)]


def test_a_descriptor_that_does_not_block_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    for number in range(2000):
        pipe.writer.write(f"{number} {'x' * 1000}")
    assert [int(line.split()[0]) for line in pipe.read(lambda found: len(found) == 2000)] == list(range(2000))
    assert pipe.writer.dropped == 0


def test_a_full_disk_costs_the_lines_alone(tmp_path: Path) -> None:
    path, room = tmp_path / "log", [25]

    def write(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        n_written = os.write(descriptor, data[: room[0]])
        room[0] -= n_written
        return n_written

    full = os.open(path, os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(full, lambda lost: f"lost {lost}", write=write)
    writer.start()
    for line in ("0123456789", "abcdefghij", "torn apart", "never seen"):
        writer.write(line)
        assert writer.flush()
    assert writer.dropped == 2
    room[0] = 1000
    writer.write("again")
    assert writer.flush()
    assert path.read_text().splitlines() == ["0123456789", "abcdefghij", "tor", "lost 2", "again"]
    writer.close()
    writer.write("after the end")
    assert writer.dropped == 3
    os.close(full)


_PROGRAM = """
import logging, sys
from bilm_server.observability.log_setup import configure_logs
logs = configure_logs("info", "json")
for number in range(1000):
    logging.getLogger("bilm_server.errors").error("line %d", number)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("bilm_server.errors").exception("failed")
logs.flush()
print(logs.dropped)
"""


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_the_service_goes_on_where_nothing_can_be_logged(redirection: str, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = f'exec "$0" "$1" {redirection}'
    found = subprocess.run(
        ["sh", "-c", command, sys.executable, str(program)], check=False, capture_output=True, text=True, timeout=240
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "1001\n", "")


def test_what_was_logged_last_is_written_at_the_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.replace("logs.flush()", ""))
    found = subprocess.run([sys.executable, str(program)], check=False, capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert [line["message"] for line in lines] == [*(f"line {n}" for n in range(1000)), "failed"]


def test_arguments_that_do_not_fit_cost_the_line_alone(configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
    found = configure("info", "text")
    logging.getLogger("bilm_server.errors").error("%d lines", "many")
    logging.getLogger("bilm_server.errors").error("next")
    first, second = written(found, capfd)
    assert first.endswith("1 log lines were lost")
    assert second.endswith("next")
    assert found.dropped == 1


def test_the_test_log_is_not_for_everybody(configure: Configure, tmp_path: Path) -> None:
    configure("info", "text", test_log=tmp_path / "test.log")
    assert (tmp_path / "test.log").stat().st_mode & 0o007 == 0
    with pytest.raises(FileNotFoundError):
        configure("info", "text", test_log=tmp_path / "missing" / "test.log")
