"""`make demo`: serves the model that ships, embeds a sample, and shows that the vectors mean something.

With --page it then serves the page for browsers, until Ctrl+C.
"""

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from bilm_client import Client
from bilm_client.testing.server import ServerProcess

HERE = Path(__file__).parent
SAMPLE = HERE / "sample.txt"
LAYER = 1  # of 0, 1, 2; the middle one knows most about meaning in context
# (line, word): each word is shown with its nearest neighbours in the other sentences
SHOWN = ((4, "play"), (5, "play"), (10, "season"), (13, "season"), (15, "bank"), (18, "bank"), (60, "patietns"))
N_NEIGHBOURS = 3
QUIET = ("--log-level", "warning")
PAGE = "--page"


def main() -> int:
    """Run the demo; return the exit code."""
    show_sample()
    if PAGE in sys.argv[1:]:
        return serve_page()
    print("\nThe same in a browser, for sentences that you type: make demo PAGE=1")
    return 0


def show_sample() -> None:
    """Embed the sample through a server, and print what came out."""
    lines = [line.split() for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(model="", arguments=QUIET) as server:
        with Client(server.target) as client:
            info = client.model_info()
        print(f"serving {info.name}, version {info.version}: {info.parameter_count:,} parameters, {info.backend}")
        output = Path(folder) / "sample.hdf5"
        command = [sys.executable, "-m", "bilm_client.batch", str(SAMPLE), str(output), "--target", server.target]
        subprocess.run(command, check=True)  # noqa: S603 - our own program
        with h5py.File(output) as file:
            vectors = [file[str(i)][()] for i in range(len(lines))]
    for i in range(2):
        print(f'  dataset "{i}": shape {vectors[i].shape} = (layers, tokens, width), {vectors[i].dtype}')
    show_neighbours(lines, vectors)


def show_neighbours(lines: list[list[str]], vectors: list[np.ndarray]) -> None:
    """For a few words, which words of other sentences have the most similar vectors (cosine)."""
    places = [(i, t) for i, line in enumerate(lines) for t in range(len(line))]
    matrix = np.stack([vectors[i][LAYER, t] for i, t in places])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    print("\nnearest neighbours in context (cosine):")
    for number, word in SHOWN:
        line, t = number - 1, lines[number - 1].index(word)
        print(f"\n  {excerpt(lines[line], t)}")
        similarity = matrix @ matrix[places.index((line, t))]
        others = [k for k in np.argsort(-similarity) if places[k][0] != line]
        for k in others[:N_NEIGHBOURS]:
            i, u = places[k]
            print(f"    {similarity[k]:.2f}  {excerpt(lines[i], u)}")


def excerpt(line: list[str], t: int, reach: int = 5) -> str:
    """A word with what stands around it."""
    words = [f"[{word}]" if i == t else word for i, word in enumerate(line)]
    return " ".join(words[max(0, t - reach) : t + reach + 1])


def serve_page() -> int:
    """Serve the page on a free port of the loopback until Ctrl+C; return the server's exit code."""
    flags = ("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay-s", "0")
    command = [sys.executable, "-m", "bilm_server", *flags]
    with subprocess.Popen(  # noqa: S603 - our own program
        command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as server:
        assert server.stderr is not None  # noqa: S101
        try:
            for line in server.stderr:
                sys.stderr.write(line)
                if found := re.search(r"HTTP on (http://[0-9.:]+)", line):
                    print(f"\nOpen {found[1]}/ in a browser. Ctrl+C ends the server.\n", flush=True)
        except KeyboardInterrupt:  # the server got it, too
            sys.stderr.write(server.communicate()[1])
    return server.returncode


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has every character
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
