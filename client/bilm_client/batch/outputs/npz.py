"""NumPy's archive: the same names as in HDF5, as arrays."""

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilm_client.batch.outputs.layout import RUN_KEY, SENTENCES_KEY, Write, WriteSentences


@contextlib.contextmanager
def write_npz(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, WriteSentences]]:
    """Write an .npz file; it is whole when the context has ended without an error.

    Yields:
        A function that writes an array, and one that writes `sentence_to_index`.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def write(key: str, vectors: NDArray[np.generic]) -> None:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(vectors, order="C"), allow_pickle=False)
            archive.writestr(f"{key}.npy", buffer.getbuffer())

        def write_sentences(sentences: dict[str, str]) -> None:
            write(SENTENCES_KEY, np.array([json.dumps(sentences)]))

        yield write, write_sentences
        write(RUN_KEY, np.array(json.dumps(run)))


def read_npz_run(path: Path) -> str | None:
    """Return the JSON of the run that made a file; None if it wasn't made by this program."""
    with np.load(path) as file:
        return str(file[RUN_KEY]) if RUN_KEY in file else None
