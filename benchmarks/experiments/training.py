"""`make bench-training`: tokens learnt a second, against the published order of work, in one run.

The published order (bilm-tf): every token of a window goes through the convolutions, for each direction anew; the LSTMs
take one Python step a token, and each step has its own product with the input; gradients by autograd. Both learn the
same windows under the same softmax with the same optimiser, and give the same losses.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Spread, interleave, ratio
from bilm_model.bilm import Bilm, BilmState, initialize
from bilm_model.config import BilmConfig
from bilm_model.device import default_threads, resolve_device
from bilm_model.kernels.product_paths import ProductPath
from bilm_system.terminal import run_command
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams, WindowPair
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.learner import Learner
from bilm_training.objectives.language_model import BilmObjective
from bilm_training.recipe import Recipe, read_recipe
from torch import Tensor

from benchmarks.machine import new_report
from benchmarks.paths import RESULTS, WIKITEXT
from benchmarks.references.published_order import PublishedOrder
from benchmarks.references.roofline import Roofline, multiply_adds

TARGET = 4.0
MAX_DIFFERENCE = 1e-4  # nats a token
_BACK_AND_FORTH = 3  # a product forward, and two for its gradients
_GPU_ROWS, _GPU_PRODUCTS, _GPU_TRIES = 8192, 50, 5  # of the measure of a GPU's product rate


class PublishedObjective(BilmObjective):
    """The same loss in the published order of work."""

    def layers(
        self, pair: WindowPair, state: BilmState, bfloat16: ProductPath | None
    ) -> tuple[list[list[Tensor]], BilmState]:
        """See `BilmObjective`; rounding is what autocast makes of it."""
        order = PublishedOrder(self.bilm)
        device = self.bilm.encoder.char_cnn.embedding.device
        found, ends = [], []
        for d, window in enumerate(pair.directions):
            ids = torch.from_numpy(pair.types[window.tokens]).long().to(device)  # (S, B, 50)
            x = order.encode(ids).float()
            layers, *end = self._direction(order, d, x, state)
            found.append([x, *layers])
            ends.append(end)
        h, c = (torch.stack(parts, dim=1).detach() for parts in zip(*ends, strict=True))
        return found, BilmState(h, c)

    def _direction(
        self, order: PublishedOrder, d: int, x: Tensor, state: BilmState
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """One Python step a token: x (S, B, P) -> what each layer gives, h and c after the window."""
        layers: list[Tensor] = []
        ends = []
        for k, cell in enumerate(order.cells(d)):
            x = self.dropout(x)
            h, c, outputs = state.h[k, d], state.c[k, d], []
            for x_step in x:
                h, c = order.step(x_step, h, c, cell)
                outputs.append(h)
            ends.append((h, c))
            y = torch.stack(outputs)
            layers.append(y + x if k and self.bilm.config.residual == "published" else y)
            x = layers[-1]
        return layers, torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])


class Contestant:
    """Learns window after window.

    Args:
        kind: of the objective.
        recipe: of the run.
        streams: to learn from.
        steps: windows a round.
        device: to learn on.
    """

    def __init__(
        self, kind: type[BilmObjective], recipe: Recipe, streams: Streams, *, steps: int, device: torch.device
    ) -> None:
        torch.manual_seed(recipe.seed)
        bilm = initialize(Bilm(recipe.architecture), torch.Generator().manual_seed(recipe.seed))
        self._objective = kind(bilm, len(streams.vocabulary.words), recipe.softmax, recipe.optimisation.dropout)
        self._objective.to(device)
        self._learner = Learner(self._objective, recipe.optimisation, streams.n_windows, device)
        self._states: tuple[BilmState, ...] = self._objective.zero_state(streams.n_streams)
        self._windows: Iterator[WindowPair] = cycle(islice(streams.windows(), 2 * steps))
        self._steps, self._device = steps, device

    def tokens_per_s(self) -> float:
        """Measure a round; a token counts once for both directions."""
        n_tokens, begun = 0, time.perf_counter()
        for pair in islice(self._windows, self._steps):
            learnt = self._learner.learn(pair, self._states)
            self._states = learnt.states
            n_tokens += pair.forward.tokens.size
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return n_tokens / (time.perf_counter() - begun)

    def first_loss(self) -> float:
        """Return the loss of the first window, in nats a token; without dropout."""
        self._objective.eval()
        with torch.no_grad():
            sums, counts, _ = self._objective(next(self._windows), self._states, None)
        self._objective.train()
        return float(sums.sum()) / int(counts.sum())


def main() -> None:
    """Run everything."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or default_threads())
    device = resolve_device(arguments.device)
    texts = [f"data.{name}={arguments.text}" for name in ("train", "valid")]
    recipe = read_recipe(arguments.preset, [*texts, "optimisation.warmup_steps=0", *arguments.set])
    streams = _streams(recipe)
    settings = {"preset": arguments.preset, "batch": streams.n_streams, "steps": streams.n_steps, "device": str(device)}
    settings |= {"windows_a_round": arguments.windows, "rounds": arguments.rounds, "threads": torch.get_num_threads()}
    report = new_report("training", "benchmarks.experiments.training", settings)

    def contestant(kind: type[BilmObjective], precision: str) -> Contestant:
        changed = recipe.optimisation.model_copy(update={"precision": precision})
        changed_recipe = recipe.model_copy(update={"optimisation": changed})
        return Contestant(kind, changed_recipe, streams, steps=arguments.windows, device=device)

    team = {
        "published order, float32": contestant(PublishedObjective, "float32"),
        "ours, float32": contestant(BilmObjective, "float32"),
        "ours, bfloat16": contestant(BilmObjective, "bfloat16"),
    }
    losses = {name: one.first_loss() for name, one in team.items()}
    if max(losses.values()) - min(losses.values()) > MAX_DIFFERENCE:
        raise SystemExit(f"the contestants don't compute the same: {losses}")
    for one in team.values():
        one.tokens_per_s()  # warm
    found = interleave({name: one.tokens_per_s for name, one in team.items()}, arguments.rounds)
    _report(report, found, recipe, device)
    report.write(arguments.out)
    report.print_summary()


def _report(report: Findings, found: dict[str, list[float]], recipe: Recipe, device: torch.device) -> None:
    published = found["published order, float32"]
    for name, speeds in found.items():
        report.add(Finding(name, f"tokens learnt a second, {name}", Spread.of(speeds), "tokens/s"))
    for name in ("ours, float32", "ours, bfloat16"):
        target = TARGET if name == "ours, float32" else None
        report.add(
            Finding(f"{name}, ratio", f"{name} against the published order", ratio(found[name], published), "×", target)
        )
    per_token = _BACK_AND_FORTH * multiply_adds(recipe.architecture)
    for name, dtype in (("ours, float32", torch.float32), ("ours, bfloat16", torch.bfloat16)):
        roof = _multiply_adds_per_s(recipe.architecture, dtype, device)
        share = Spread.of(found[name]).times(100 * per_token / roof)
        report.add(Finding(f"{name}, roofline", f"{name}: LSTM products' share of the machine's rate", share, "%"))
    report.detail("tokens_per_s", found)


def _multiply_adds_per_s(config: BilmConfig, dtype: torch.dtype, device: torch.device) -> float:
    if device.type == "cpu":
        return Roofline(config, dtype).multiply_adds_per_s()
    n_in, n_out = config.projection_dim, 4 * config.cell_dim
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((_GPU_ROWS, n_in), (n_in, n_out)))
    rates = []
    for _ in range(_GPU_TRIES):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(_GPU_PRODUCTS):
            torch.mm(x, weight)
        torch.cuda.synchronize(device)
        rates.append(_GPU_PRODUCTS * _GPU_ROWS * n_in * n_out / (time.perf_counter() - begun))
    return max(rates)


def _streams(recipe: Recipe) -> Streams:
    counts: Counter[str] = Counter()
    corpus = Corpus.open(recipe.data.train, counts)
    vocabulary = Vocabulary.of(counts, recipe.data.max_words)
    return Streams(corpus, vocabulary, recipe.optimisation.batch, recipe.optimisation.steps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.training", description=__doc__)
    parser.add_argument("--preset", default="small", help="or a recipe's file (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as bilm-train run")
    parser.add_argument("--text", type=Path, default=WIKITEXT / "train.txt", help="(%(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="windows a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.training", main))
