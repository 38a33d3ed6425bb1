"""Source trees to compare: this one, and the commit that a change started from, in a work tree of its own.

Both run in this environment, whose dependencies suit both: PYTHONPATH names the tree's folders and comes before what is
installed.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paths import ROOT

BEFORE = "f49e53e"
"""The last commit of the engine that planned sentence by sentence."""

_FOLDERS = ("system", "proto", "model", "server", "client")
_LOADED = "import bilm_model; print(bilm_model.__file__)"


class WorkTreeError(Exception):
    """The commit isn't in this repository, or its code isn't what a process would load."""


@dataclass(frozen=True)
class Tree:
    """A source tree.

    Attributes:
        root: Its folder.
        engine_api: How its engine is driven: "present" by `Engine`, "former" by `FormerEngine`.
    """

    root: Path
    engine_api: str = "present"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that runs this tree's packages."""
        folders = [str(path) for name in _FOLDERS if (path := self.root / name).is_dir()]
        return {"PYTHONPATH": os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))}

    def check(self) -> None:
        """Check that a process with `environment` loads this tree's packages.

        Raises:
            WorkTreeError: If it loads others.
        """
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            [sys.executable, "-c", _LOADED], check=True, capture_output=True, text=True, env=environment
        )
        if not Path(done.stdout.strip()).resolve().is_relative_to(self.root.resolve()):
            raise WorkTreeError(f"bilm_model would be loaded from {done.stdout.strip()}, not from {self.root}")


PRESENT = Tree(ROOT)


@contextmanager
def work_tree(commit: str = BEFORE) -> Iterator[Tree]:
    """Check a commit out into a folder that is removed at the end; SIGTERM ends the program in order meanwhile.

    Raises:
        WorkTreeError: If git can't check it out, or processes would load other code.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="bilm-before-") as folder:
        root = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            tree = Tree(root, "former")
            tree.check()
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(root))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorkTreeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
