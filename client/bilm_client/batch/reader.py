"""The input: a file of lines, read twice, once to know it and once to embed it.

A line ends with LF, or with CR LF; any other line break (CR, form feed, U+2028) is white space within its line. The
last line needs no end. A byte order mark at the beginning of the file is no part of the text.
"""

import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bilm_system.files import check_readable, reason, text_start

from bilm_client.batch.outputs.layout import RUN_KEY
from bilm_client.batch.settings import RunSettings
from bilm_client.cli.settings_sources import UsageError

_SHOWN = 20
_MAX_KEY_BYTES = 65_000  # a zip archive's names, and so an .npz's, end at 65,535
_TAKEN_KEYS = (b".", RUN_KEY.encode())


@dataclass(frozen=True)
class Line:
    """A sentence of the input.

    Attributes:
        index: from 0; the key of its dataset.
        text: without the white space around it.
        error: why it can't be embedded, or "".
    """

    index: int
    text: str
    error: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens; of raw text a guess, the words."""
        return len(self.text.split())


@dataclass(frozen=True)
class InputText:
    """A scanned input.

    Attributes:
        path: of the text; standard input has been copied to a file.
        start: byte at which the text begins: 3 behind a byte order mark, otherwise 0.
        sha256: of the file's bytes, in hexadecimal digits.
        n_lines: sentences to embed.
        n_tokens: of all of them.
    """

    path: Path
    start: int
    sha256: str
    n_lines: int
    n_tokens: int

    def lines(self) -> Iterator[Line]:
        """Yield the sentences in order, without blank lines."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            yield from _lines(file)

    def identity(self) -> dict[str, str]:
        """Return what makes a run one of this text, for its journal and output.

        Earlier versions read a byte order mark as a part of the first token: their runs don't go together with ours.
        """
        mark = {"byte_order_mark": "skipped"} if self.start else {}
        return {"input_sha256": self.sha256} | mark


@contextlib.contextmanager
def open_input(settings: RunSettings) -> Iterator[InputText]:
    """Scan the input.

    Raises:
        UsageError: It can't be read, has no sentence, or has lines that the settings don't allow; all are listed.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(_seekable(settings.input))
            text = _scan(path, settings)
        except (OSError, ValueError) as error:
            raise UsageError(f"input: {settings.input}: {reason(error)}") from error
        yield text


@contextlib.contextmanager
def _seekable(name: str) -> Iterator[Path]:
    """Yield a file that can be read more than once: standard input and pipes are copied."""
    path = Path(name)
    if name == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        with _spooled(sys.stdin.buffer) as copy:
            yield copy
    elif path.is_fifo():
        with path.open("rb") as pipe, _spooled(pipe) as copy:
            yield copy
    else:
        check_readable(path)
        yield path


@contextlib.contextmanager
def _spooled(stream: BinaryIO) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="bilm-embed-") as copy:
        shutil.copyfileobj(stream, copy)
        copy.flush()
        yield Path(copy.name)


def _scan(path: Path, settings: RunSettings) -> InputText:
    blank: list[int] = []
    bad_keys: list[int] = []
    seen: set[bytes] = set()
    n_lines = n_tokens = n_all = 0
    with path.open("rb") as file:
        start = text_start(file.read(4))
        file.seek(start)
        for line in _lines(file):
            blank += range(n_all, line.index)
            n_all = line.index + 1
            n_lines, n_tokens = n_lines + 1, n_tokens + line.n_tokens
            if settings.use_sentence_keys and not line.error:
                name = line.text.encode()
                digest = hashlib.sha256(name).digest()[:16]
                if not _is_key(name) or digest in seen:
                    bad_keys.append(line.index)
                seen.add(digest)
        blank += range(n_all, _count_lines(path))
    if blank and not settings.skip_blank:
        raise UsageError(f"input: blank lines: {_numbers(blank)} (--skip-blank passes over them)")
    if bad_keys:
        reasons = f"a / or NUL, more than {_MAX_KEY_BYTES} bytes, a name of our own, or a twin above"
        raise UsageError(f"input: no keys ({reasons}): lines {_numbers(bad_keys)}")
    if not n_lines:
        raise UsageError("input: no sentence in it")
    return InputText(path, start, _sha256(path), n_lines, n_tokens)


def _is_key(name: bytes) -> bool:
    """Return whether both kinds of output can have a dataset of this name."""
    return not (b"/" in name or b"\0" in name or name in _TAKEN_KEYS or len(name) > _MAX_KEY_BYTES)


def _lines(file: BinaryIO) -> Iterator[Line]:
    for index, data in enumerate(file):
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield Line(index, data.decode("utf-8", "replace").strip(), f"not UTF-8: {error.reason}")
            continue
        if text:
            yield Line(index, text)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(indices: list[int]) -> str:
    """Return line numbers for people, from 1."""
    shown = ", ".join(str(index + 1) for index in indices[:_SHOWN])
    return shown if len(indices) <= _SHOWN else f"{shown} and {len(indices) - _SHOWN} more"
