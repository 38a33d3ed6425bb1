"""Debian's Chromium without a window, driven by its DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

COMMAND_TIMEOUT_S = 60.0
_END = b"\0"
"""Behind each message."""
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# Chromium reads from descriptor 3 and writes to 4
_AS_3_AND_4 = "\n".join(
    (
        "import os, sys",
        "os.dup2(int(sys.argv[1]), 3)",
        "os.dup2(int(sys.argv[2]), 4)",
        "os.execv(sys.argv[3], sys.argv[3:])",
    )
)
_WHEN = """
new Promise((resolve, reject) => {
  const check = () => {
    let found;
    try { found = (%s); } catch (error) { reject(error); return; }
    if (found) { observer.disconnect(); resolve(found); }
  };
  const observer = new MutationObserver(check);
  observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
  check();
})
"""


class Tab:
    """A page in Chromium.

    Attributes:
        problems: what the console, the network and the security policy have complained of.
    """

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.problems: list[str] = []
        self._commands, self._answers = commands, answers
        self._waiting: dict[int, queue.Queue[Mapping[str, Any]]] = {}
        self._lock = threading.Lock()
        self._last_id = 0
        self._loaded = threading.Event()
        self._session = ""
        self._reader = threading.Thread(target=self._read, name="chromium")
        self._reader.start()

    def open(self) -> None:
        """Attach to a page, and begin to collect problems."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def join(self) -> None:
        """Wait until Chromium, which has ended, is read to its end."""
        self._reader.join()

    def send(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Send a command; return its result."""
        answer: queue.Queue[Mapping[str, Any]] = queue.Queue()
        with self._lock:
            self._last_id += 1
            message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
            if self._session:
                message["sessionId"] = self._session
            self._waiting[self._last_id] = answer
            self._commands.write(json.dumps(message).encode() + _END)
            self._commands.flush()
        try:
            found = answer.get(timeout=COMMAND_TIMEOUT_S)
        except queue.Empty:
            raise AssertionError(f"Chromium has no answer to {method} {parameters}: {self.problems}") from None
        assert "error" not in found, (method, found)
        result: Mapping[str, Any] = found["result"]
        return result

    def navigate(self, url: str) -> None:
        """Show a page; return when it has loaded."""
        self._loaded.clear()
        found = self.send("Page.navigate", url=url)
        assert "errorText" not in found, found
        assert self._loaded.wait(COMMAND_TIMEOUT_S), f"{url} doesn't load"

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, a promise's when it is there."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def when(self, expression: str) -> Any:
        """Return an expression's value as soon as the document makes it true."""
        return self.evaluate(_WHEN % expression)

    def press(self, key: str, text: str = "", *, control: bool = False, shift: bool = False) -> None:
        """Press a key and let it go.

        Args:
            key: as `KeyboardEvent.key` has it.
            text: what it types.
            control: with the control key.
            shift: with the shift key.
        """
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
        event: dict[str, Any] = {
            "key": key,
            "code": "Space" if key == " " else key,
            "windowsVirtualKeyCode": codes[key],
            "modifiers": 2 * control + 8 * shift,
        }
        typed = {"text": text} if text else {}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Put a text where the focus is, as an input method would."""
        self.send("Input.insertText", text=text)

    def show_as(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window and the theme of the system."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, whole: bool = True) -> bytes:
        """Return the page as a PNG, or what of it is in the window."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _read(self) -> None:
        rest = b""
        while part := os.read(self._answers.fileno(), 1 << 16):
            *messages, rest = (rest + part).split(_END)
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: Mapping[str, Any]) -> None:
        if "id" in message:
            self._waiting.pop(message["id"]).put(message)
            return
        parameters = message["params"]
        match message["method"]:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.exceptionThrown":
                self.problems.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                entry = parameters["entry"]
                self.problems.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")


@contextmanager
def chromium() -> Iterator[Tab]:
    """Yield an empty page; skip the test where there is no Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs the program chromium")
    with tempfile.TemporaryDirectory(prefix="bilm-chromium-", ignore_cleanup_errors=True) as profile:
        theirs_in, ours_out = _pipe()
        ours_in, theirs_out = _pipe()
        command = [sys.executable, "-c", _AS_3_AND_4, str(theirs_in), str(theirs_out), path, *_FLAGS]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", f"--disk-cache-dir={Path(profile) / 'cache'}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        with os.fdopen(ours_out, "wb") as commands, os.fdopen(ours_in, "rb") as answers:
            tab = Tab(commands, answers)
            try:
                tab.open()
                yield tab
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                tab.join()


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, neither of which is one of the descriptors that Chromium uses."""
    ends = os.pipe()
    try:
        reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    finally:
        for end in ends:
            os.close(end)
    return reading, writing
