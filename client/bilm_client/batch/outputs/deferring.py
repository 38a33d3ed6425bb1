"""A file for HDF5, which can't take a failed write: it reports some hundred errors and ends the process by SIGSEGV.

The first failure is kept, to be raised when HDF5 isn't running. What is written from then on stays in memory, so that
HDF5 reads what it has written and closes in peace; that is the rest of one dataset and HDF5's cache of its structure.
"""

import os
from io import FileIO


class DeferringFile:
    """What h5py needs of a file object; no method raises.

    Attributes:
        error: the first failure; None: all that was written is in the file.
    """

    def __init__(self, file: FileIO) -> None:
        """Wrap a file.

        Args:
            file: Empty, opened for reading and writing without a buffer, which would fail later.
        """
        self._file = file
        self._position = self._size = 0
        self._kept: list[tuple[int, bytes]] = []
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raise what has failed so far.

        Raises:
            OSError: The file can't be written.
            KeyboardInterrupt: It came while HDF5 was writing.
        """
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, of which HDF5 asks for absolute ones and the end."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def write(self, data: memoryview) -> int:
        """Write at the position, or keep the first error."""
        start, n_bytes = self._position, len(data)
        try:
            n_written = 0
            while self.error is None and n_written < n_bytes:
                n_written += os.pwrite(self._file.fileno(), data[n_written:], start + n_written)
        except BaseException as error:  # KeyboardInterrupt, too, mustn't go through HDF5
            self.error = error
        if self.error is not None:
            self._kept.append((start, bytes(data)))
        self._position = start + n_bytes
        self._size = max(self._size, self._position)
        return n_bytes

    def readinto(self, buffer: memoryview) -> int:
        """Read from the position; what can't be read is zero."""
        start, n_bytes = self._position, len(buffer)
        data = b""
        try:
            data = os.pread(self._file.fileno(), n_bytes, start)
        except BaseException as error:
            self.error = self.error or error
        buffer[:] = data.ljust(n_bytes, b"\0")
        for place, kept in self._kept:
            first, last = max(start, place), min(start + n_bytes, place + len(kept))
            if first < last:
                buffer[first - start : last - start] = kept[first - place : last - place]
        self._position = start + n_bytes
        return n_bytes

    def read(self, size: int) -> bytes:
        """Read from the position; what can't be read is zero."""
        data = bytearray(size)
        self.readinto(memoryview(data))
        return bytes(data)

    def truncate(self, size: int) -> int:
        """Set the size, which HDF5 does when it closes the file."""
        try:
            if self.error is None:
                self._file.truncate(size)
        except BaseException as error:
            self.error = error
        self._size = size
        return size

    def flush(self) -> None:
        """Do nothing: there is no buffer."""
