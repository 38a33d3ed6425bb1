"""Training on a GPU against the same steps on a CPU."""

from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
from bilm_model.bilm import Bilm, initialize
from bilm_model.config import BilmConfig
from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import Streams
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.learner import Learner, TrainStepResult
from bilm_training.objectives.language_model import BilmObjective
from bilm_training.recipe import Optimisation, Softmax

pytestmark = pytest.mark.gpu

CONFIG = BilmConfig(char_dim=8, filters=((1, 16), (2, 32), (3, 48)), projection_dim=32, cell_dim=128)
N_STEPS = 5


def _learn(streams: Streams, device: str, precision: Literal["float32", "bfloat16"]) -> list[TrainStepResult]:
    bilm = initialize(Bilm(CONFIG), torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    softmax = Softmax(cutoffs=(10, 30))
    objective = BilmObjective(bilm, len(streams.vocabulary.words), softmax, dropout=0.0).to(device)
    optimisation = Optimisation(
        epochs=1, batch=8, steps=8, learning_rate=1e-3, gradient_clip=1.0, dropout=0.0, precision=precision
    )
    learner = Learner(objective, optimisation, streams.n_windows, torch.device(device))
    states, found = objective.zero_state(8), []
    for _, pair in zip(range(N_STEPS), streams.windows(), strict=False):
        learnt = learner.learn(pair, states)
        states = learnt.states  # type: ignore[assignment]
        found.append(learnt)
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_steps_are_those_of_the_cpu(
    precision: Literal["float32", "bfloat16"], tolerance: float, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    path.write_text("".join(f"word{n % 7} and {n % 50} more of {n * n % 31}\n" for n in range(200)))
    counts: Counter[str] = Counter()
    streams = Streams(Corpus.open(path, counts), Vocabulary.of(counts), 8, 8)
    on_cpu, on_gpu = _learn(streams, "cpu", "float32"), _learn(streams, "cuda:0", precision)
    assert len(on_cpu) == N_STEPS
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(found.sums, expected.sums, rtol=tolerance, atol=0)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=10 * tolerance)
