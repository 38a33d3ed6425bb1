"""The training loop: epochs over a text, a model file after each."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bilm_model.bilm import Bilm, initialize
from bilm_model.training.corpus import Text, Vocabulary, Window, index_text, read_lines, windows
from bilm_model.training.evaluation import Perplexity, perplexity
from bilm_model.training.objective import BilmObjective
from bilm_model.training.recipe import Optimisation, Recipe
from bilm_model.weights import single_file

MODEL_FILE, SOFTMAX_FILE, LOG_FILE = "model.safetensors", "softmax.pt", "log.jsonl"


@dataclass(frozen=True)
class EpochReport:
    """A line of the log.

    Attributes:
        epoch: from 1.
        train_loss: mean negative log likelihood per token, both directions, with dropout, in nats.
        valid: perplexities on the validation text.
        tokens_per_s: training speed, each token counted once for both directions.
        minutes: since the start of the run.
    """

    epoch: int
    train_loss: float
    valid: Perplexity
    tokens_per_s: float
    minutes: float


def train(recipe: Recipe, train_path: Path, valid_path: Path, out: Path, device: str = "cpu") -> None:
    """Trains a biLM; leaves the model (float32), the softmax and a log in `out`.

    Raises:
        CorpusError: if a text can't be used.
    """
    started = time.monotonic()
    lines = read_lines(train_path)
    vocabulary = Vocabulary.of(lines)
    text = index_text(lines, vocabulary)
    valid = index_text(read_lines(valid_path), vocabulary)
    objective = new_objective(recipe, vocabulary).to(device)
    step = _Stepper(objective, recipe.optimisation, _windows_per_epoch(text, recipe.optimisation))
    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, recipe.optimisation.epochs + 1):
        begun = time.monotonic()
        loss = _epoch(step, text, recipe.optimisation, f"epoch {epoch}/{recipe.optimisation.epochs}")
        speed = len(text.tokens) / (time.monotonic() - begun)
        found = perplexity(objective, valid)
        _save(objective, vocabulary, out)
        _log(out, EpochReport(epoch, loss, found, speed, (time.monotonic() - started) / 60))


def new_objective(recipe: Recipe, vocabulary: Vocabulary) -> BilmObjective:
    """The untrained biLM of a recipe, with its softmax; seeds torch's random numbers."""
    torch.manual_seed(recipe.seed)
    bilm = initialize(Bilm(recipe.architecture), torch.Generator().manual_seed(recipe.seed))
    optimisation = recipe.optimisation
    return BilmObjective(bilm, len(vocabulary.words), optimisation.softmax_cutoffs, optimisation.dropout)


def load_objective(recipe: Recipe, run: Path) -> tuple[BilmObjective, Vocabulary]:
    """What `train` left in a folder."""
    stored = torch.load(run / SOFTMAX_FILE, weights_only=True)
    vocabulary = Vocabulary(tuple(stored["words"]))
    objective = new_objective(recipe, vocabulary)
    objective.softmax.load_state_dict(stored["softmax"])
    _, tensors, _ = single_file.read(run / MODEL_FILE)
    objective.bilm.load_state_dict(tensors)
    return objective, vocabulary


def pairs(text: Text, batch: int, steps: int) -> Iterator[tuple[Window, Window]]:
    """Windows of a text and of the same text reversed."""
    return zip(windows(text, batch, steps), windows(text.reversed(), batch, steps), strict=True)


class _Stepper:
    """One step of the optimiser for each window."""

    def __init__(self, objective: BilmObjective, optimisation: Optimisation, windows_per_epoch: int) -> None:
        self.objective = objective
        self._clip = optimisation.gradient_clip
        self._optimiser = torch.optim.Adam(objective.parameters(), lr=optimisation.learning_rate)
        rate = _schedule(optimisation.warmup_steps, windows_per_epoch * optimisation.epochs)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, rate)

    def __call__(self, loss: torch.Tensor) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), self._clip)
        self._optimiser.step()
        self._schedule.step()
        # The row of 'no token here' must stay what the published format takes it for
        self.objective.bilm.encoder.char_cnn.embedding.data[0] = 0.0


def _schedule(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return rate


def _epoch(step: _Stepper, text: Text, optimisation: Optimisation, title: str) -> float:
    objective = step.objective.train()
    state = objective.bilm.zero_state(optimisation.batch)
    total, count = 0.0, 0
    bar = tqdm(total=_windows_per_epoch(text, optimisation), desc=title, unit="step")
    for pair in pairs(text, optimisation.batch, optimisation.steps):
        sums, counts, state = objective(text.types, pair, state)
        step(sums.sum() / int(counts.sum()))
        total, count = total + float(sums.detach().sum()), count + int(counts.sum())
        bar.set_postfix_str(f"loss {total / count:.3f}", refresh=False)
        bar.update()
    bar.close()
    return total / count


def _windows_per_epoch(text: Text, optimisation: Optimisation) -> int:
    return math.ceil((len(text.tokens) - 1) // optimisation.batch / optimisation.steps)


def _save(objective: BilmObjective, vocabulary: Vocabulary, out: Path) -> None:
    bilm = objective.bilm
    single_file.write(out / MODEL_FILE, bilm.config, {k: v.cpu() for k, v in bilm.state_dict().items()})
    torch.save({"words": list(vocabulary.words), "softmax": objective.softmax.state_dict()}, out / SOFTMAX_FILE)


def _log(out: Path, report: EpochReport) -> None:
    line = json.dumps(asdict(report))
    tqdm.write(line)
    with (out / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
