"""What the tests of training share: small texts, a small recipe, `bilm-train` in this process."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bilm_model.config import BilmConfig
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.main import main
from bilm_training.runs.records import EpochRecord, StepRecord
from bilm_training.runs.run_folder import RunFolder
from bilm_training.runs.run_log import RunLog
from bilm_training.trainer import RunWriters
from torch import Tensor

TINY = BilmConfig(char_dim=3, filters=((1, 4), (2, 5), (3, 6)), projection_dim=6, cell_dim=9)

TEXT = "the cat sat\n\na dog ran the other way\nthe end\n"


def random_text(n_lines: int, seed: int = 0) -> str:
    """Lines of up to 12 words of 40 different ones; some are empty."""
    draw = random.Random(seed)
    words = [f"w{n}" + "é" * (n % 5) for n in range(40)]
    return "".join(" ".join(draw.choices(words, k=draw.randint(0, 12))) + "\n" for _ in range(n_lines))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def open_text(folder: Path, text: str | bytes) -> Corpus:
    return Corpus.open(write(folder / "text", text))


def vocabulary_of(corpus: Corpus) -> Vocabulary:
    """Every word of a text, in the order in which they first stand there."""
    return Vocabulary(("</S>", *dict.fromkeys(t for t in naive_tokens(corpus.path) if t not in ("<S>", "</S>"))))


def streams_of(corpus: Corpus, n_streams: int = 1, n_steps: int = 1000) -> Streams:
    return Streams(corpus, vocabulary_of(corpus), n_streams, n_steps)


def naive_tokens(path: Path) -> list[str]:
    """A text's words and boundaries, read in one go."""
    lines = path.read_bytes().decode().split("\n")
    if not lines[-1]:
        lines.pop()
    return [token for line in lines for token in ("<S>", *line.split(), "</S>")]


EPOCH_STEPS = 16
RECIPE = """
seed = 3

[data]
train = "train"
valid = "valid"
typos = 0.2

[architecture]
char_dim = 3
filters = [[1, 4], [2, 5], [3, 6]]
projection_dim = 6
cell_dim = 9

[softmax]
cutoffs = [8, 20]

[optimisation]
epochs = 3
batch = 4
steps = 8
learning_rate = 0.01
warmup_steps = 5
gradient_clip = 1.0
dropout = 0.3
checkpoint_steps = 6
"""


def write_recipe(folder: Path) -> Path:
    """A recipe of 3 epochs of `EPOCH_STEPS`, and its texts, which it names relative to the folder."""
    write(folder / "train", random_text(66, seed=1))
    write(folder / "valid", random_text(10, seed=2))
    return write(folder / "recipe.toml", RECIPE)


# ---- runs in the working directory -----------------------------------------------------------------------------------

RUN = RunFolder(Path("run"))
COMMON = ("--device", "cpu", "--threads", "1")


def train(*settings: str, writers: RunWriters | None = None) -> int:
    """Begins a run; settings as for --set."""
    changes = (f"--set={setting}" for setting in settings)
    return main(["run", "recipe.toml", "--out", "run", *COMMON, *changes], writers)


def resume() -> int:
    return main(["resume", "run", *COMMON])


@dataclass(eq=False)
class ActingLog(RunLog):
    """A log that does something as soon as a step is in it, or before an epoch is."""

    at: int = 0
    after_step: Callable[[], object] = int
    before_epoch: Callable[[], object] = int

    def step(self, record: StepRecord) -> None:
        super().step(record)
        if record.step == self.at:
            self.after_step()

    def epoch(self, record: EpochRecord) -> None:
        self.before_epoch()
        super().epoch(record)


def after_step(step: int, action: Callable[[], object]) -> RunWriters:
    """What has something happen as soon as a step is in the log."""
    return RunWriters(new_log=partial(ActingLog, at=step, after_step=action))


def checkpoint(folder: RunFolder) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder.checkpoint, weights_only=True)
    return content


def records(path: Path) -> list[dict[str, Any]]:
    """A log, without what a clock has part in."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in lines]


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """To the bit, however nested."""
    assert type(found) is type(expected), place
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{place}.{n}")
    else:
        assert found == expected, place
