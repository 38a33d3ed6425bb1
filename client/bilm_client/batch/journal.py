"""What a run has done so far, in a file that survives a kill at any moment.

HDF5 files don't: one that was being written may not open again. So results go to the end of a journal, each with a
checksum, and the output is made from it when all are there. A record is a header (lengths and CRC-32 of what follows,
little-endian), a description in JSON, the vectors' bytes and the state. A record that was cut off is dropped.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from bilm_system.files import check_readable, lock, naming, reason
from numpy.typing import NDArray

from bilm_client.cli.settings_sources import UsageError

_HEADER = struct.Struct("<IQQI")  # lengths of description, vectors and state; CRC-32 of the three
_MAX_DESCRIPTION_BYTES = 2**20


class JournalBusyError(UsageError):
    """Another run is writing it."""


@dataclass(frozen=True, eq=False)
class JournalRecord:
    """The outcome of one line.

    Attributes:
        index: Number of the line, from 0.
        n_tokens: Tokens that were embedded.
        vectors: None if the line failed.
        reason: The server's reason, if the line failed.
        message: What was wrong, if the line failed.
        state: The state after the line, where the run carries states and the server returned one.
    """

    index: int
    n_tokens: int
    vectors: NDArray[np.generic] | None
    reason: str = ""
    message: str = ""
    state: bytes = b""


@dataclass(eq=False)
class Journal:
    """An open journal; made by `create` or `reopen`.

    Attributes:
        path: The file.
        identity: Input hash, options and model of the run.
        locked: False where the file system has no locks, so that nothing keeps a second run out.
    """

    path: Path
    identity: dict[str, Any]
    locked: bool
    _file: BinaryIO = field(repr=False)

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any]) -> Self:
        """Start a journal; one that is there is lost.

        Raises:
            UsageError: The file can't be made.
            OSError: Its beginning can't be written; there is no file then.
            JournalBusyError: Another run is writing it.
        """
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        except OSError as error:
            raise UsageError(f"{path}: {reason(error)}") from error
        locked = _lock(file, path, lock)
        file.truncate()  # not before it is ours
        journal = cls(path, identity, locked, file)
        try:
            journal._write(identity, b"", b"")
            journal.flush()
        except OSError:
            path.unlink()
            raise
        return journal

    @classmethod
    def reopen(cls, path: Path, take_lock: Callable[[BinaryIO], bool] = lock) -> Self:
        """Open a journal that a run left behind and cut off what isn't whole.

        Raises:
            UsageError: The file can't be opened, or even its beginning is damaged.
            JournalBusyError: Its run is still going on.
        """
        try:
            check_readable(path)
            file = path.open("r+b")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {reason(error)}") from error
        locked = _lock(file, path, take_lock)
        first = _read(file)
        if first is None:
            file.close()
            raise UsageError(f"{path}: the journal's beginning is damaged; start anew with --overwrite")
        journal = cls(path, first[0], locked, file)
        for _ in journal.records():
            pass
        journal._file.truncate()  # records() stopped at the end of the last whole one
        return journal

    def append(self, record: JournalRecord) -> None:
        """Add a record.

        Raises:
            OSError: The file can't be written; names it, as the errors of `flush` and `close` do.
        """
        description: dict[str, Any] = {"index": record.index, "n_tokens": record.n_tokens}
        data = b""
        if record.vectors is None:
            description |= {"reason": record.reason, "message": record.message}
        else:
            description |= {"shape": record.vectors.shape, "dtype": record.vectors.dtype.str}
            data = record.vectors.tobytes()
        with naming(self.path):
            self._file.seek(0, os.SEEK_END)
            self._write(description, data, record.state)

    def flush(self) -> None:
        """Hand everything to the operating system: a kill of this process loses nothing from here on."""
        with naming(self.path):
            self._file.flush()

    def records(self) -> Iterator[JournalRecord]:
        """Yield all records, from the start."""
        self.flush()
        self._file.seek(0)
        _read(self._file)
        while (found := _read(self._file)) is not None:
            description, data, state = found
            vectors = None
            if "shape" in description:
                vectors = np.frombuffer(data, description["dtype"]).reshape(description["shape"])
            yield JournalRecord(
                index=description["index"],
                n_tokens=description["n_tokens"],
                vectors=vectors,
                reason=description.get("reason", ""),
                message=description.get("message", ""),
                state=state,
            )

    def rewind_to_state(self) -> None:
        """Drop what came after the last state, from which a run that carries states continues."""
        self._file.seek(0)
        _read(self._file)
        end = self._file.tell()
        while (found := _read(self._file)) is not None:
            if found[2]:
                end = self._file.tell()
        self._file.truncate(end)

    def close(self) -> None:
        """Close the file, which stays."""
        with naming(self.path):
            self._file.close()

    def _write(self, description: dict[str, Any], data: bytes, state: bytes) -> None:
        text = json.dumps(description).encode()
        checksum = zlib.crc32(state, zlib.crc32(data, zlib.crc32(text)))
        self._file.writelines((_HEADER.pack(len(text), len(data), len(state), checksum), text, data, state))


def _read(file: BinaryIO) -> tuple[dict[str, Any], bytes, bytes] | None:
    """Return the next record; None, and leave the position before it, if it isn't whole."""
    start = file.tell()
    size = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if len(header) == _HEADER.size:
        n_text, n_data, n_state, checksum = _HEADER.unpack(header)
        # lengths that can't be are damage, not a reason to ask for so much memory
        # (zeros are what a crash of the machine may leave, and their checksum fits)
        if 0 < n_text <= _MAX_DESCRIPTION_BYTES and start + _HEADER.size + n_text + n_data + n_state <= size:
            text, data, state = file.read(n_text), file.read(n_data), file.read(n_state)
            if zlib.crc32(state, zlib.crc32(data, zlib.crc32(text))) == checksum:
                return json.loads(text), data, state
    file.seek(start)
    return None


def _lock(file: BinaryIO, path: Path, take_lock: Callable[[BinaryIO], bool]) -> bool:
    """Return whether there are locks at all."""
    try:
        locked = take_lock(file)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError("finished, and removed it, in the meantime")
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise JournalBusyError(f"{path}: another run is writing it") from error
    return locked
