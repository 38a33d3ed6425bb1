"""`Elmo` against AllenNLP's numbers: the golden vectors, and the published module where its environment is."""

import json
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from bilm_model.elmo import Elmo, batch_to_ids
from torch import Tensor

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-elmo" / "bin" / "python"
TOLERANCE = 1e-5


def _files(folder: Path) -> tuple[str, str]:
    return str(folder / "options.json"), str(folder / "weights.hdf5")


class GoldenBatches:
    """The golden sentences, and an `Elmo` whose mixes are one layer each."""

    def __init__(self, folder: Path, *, carry_state: bool) -> None:
        self.sentences: list[list[str]] = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
        with h5py.File(folder / "expected.hdf5") as file:
            self.stateless = [file[f"stateless/{i}"][()] for i in range(len(self.sentences))]
            self.batches: list[list[int]] = json.loads(file["stateful"].attrs["batches"])
            self.stateful = [
                [file[f"stateful/{b}/{j}"][()] for j in range(len(batch))] for b, batch in enumerate(self.batches)
            ]
        n_layers = len(self.stateless[0])
        self.elmo = Elmo(*_files(folder), n_layers, carry_state=carry_state).eval()
        state = self.elmo.state_dict()
        for k in range(n_layers):
            state[f"scalar_mix_{k}.scalar_parameters.{k}"] = torch.tensor([1e4])
        self.elmo.load_state_dict(state)

    def check(self, numbers: list[int], expected: list[np.ndarray[Any, Any]]) -> None:
        with torch.no_grad():
            found = self.elmo(batch_to_ids([self.sentences[i] for i in numbers]))
        layers = torch.stack(found["elmo_representations"]).numpy()
        for row, want in enumerate(expected):
            n_tokens = want.shape[1]
            assert found["mask"][row].sum() == n_tokens
            assert np.abs(layers[:, row, :n_tokens] - want).max(initial=0.0) < TOLERANCE
            assert not layers[:, row, n_tokens:].any()


def test_golden_sentences_alone_and_together(golden: Path) -> None:
    golden_batches = GoldenBatches(golden, carry_state=False)
    numbers = list(range(len(golden_batches.sentences)))
    for i in numbers:
        golden_batches.check([i], [golden_batches.stateless[i]])
    golden_batches.check(numbers, golden_batches.stateless)


def test_golden_batches_with_carried_state(golden: Path) -> None:
    golden_batches = GoldenBatches(golden, carry_state=True)
    for _ in range(2):
        golden_batches.elmo.reset_states()
        for numbers, expected in zip(golden_batches.batches, golden_batches.stateful, strict=True):
            golden_batches.check(numbers, expected)


BATCHES = [
    [["The", "play", "was", "a", "success"], ["naïve"], [], ["<S>", "word", "x" * 60]],
    [["Two", "rows"], ["only", "now"]],
    [["five"], ["rows", "where", "two", "were"], ["a"], ["b", "c"], ["d"]],
]
VOCABULARY = ["@@PADDING@@", "@@UNKNOWN@@", "The", "play", "was"]
WORDS, WORD_IDS = [["The", "play", "was"], ["was", "The"]], [[2, 3, 4], [4, 2, 0]]
# Without layer norm, which the published package calls a lost function for; see tests/unit/model/test_elmo.py
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_output_representations": 2, "dropout": 0.0},
    "boundaries": {"num_output_representations": 1, "dropout": 0.0, "keep_sentence_boundaries": True},
    "fixed": {"num_output_representations": 1, "dropout": 0.0, "scalar_mix_parameters": [0.3, -1.0, 2.0, 0.5]},
    "dropout": {"num_output_representations": 2, "dropout": 0.5},
}


def _variants(golden: Path) -> dict[str, dict[str, Any]]:
    n_layers = json.loads((golden / "options.json").read_text(encoding="utf-8"))["lstm"]["n_layers"] + 1
    cut = {**VARIANTS["fixed"], "scalar_mix_parameters": VARIANTS["fixed"]["scalar_mix_parameters"][:n_layers]}
    return {**VARIANTS, "fixed": cut}


@pytest.fixture(scope="module")
def published(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Elmo]:
    """What the published module found, in its folder, and the module whose state it has loaded."""
    if not PYTHON.exists():
        pytest.skip("needs the published module's environment: make .venv-elmo/.installed")
    work = tmp_path_factory.mktemp("published")
    ours = Elmo(*_files(golden), 2, requires_grad=True, dropout=0.0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in ours.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    torch.save(ours.state_dict(), work / "ours.pt")
    spec = {
        "batches": BATCHES,
        "variants": _variants(golden),
        "vocabulary": VOCABULARY,
        "words": WORDS,
        "word_ids": WORD_IDS,
    }
    (work / "sentences.json").write_text(json.dumps(spec), encoding="utf-8")
    script = ROOT / "tests" / "parity" / "published_elmo.py"
    done = subprocess.run([PYTHON, script, golden, work], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return work, torch.load(work / "found.pt", weights_only=True), ours


def _compare(found: Any, expected: list[Tensor]) -> None:
    *vectors, mask = expected
    assert torch.equal(found["mask"], mask)
    for ours, theirs in zip(found["elmo_representations"], vectors, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_module_has_the_same_numbers(
    variant: str, golden: Path, published: tuple[Path, dict[str, Any], Elmo]
) -> None:
    _, expected, _ = published
    assert torch.equal(batch_to_ids(BATCHES[0]), expected["ids"])
    elmo = Elmo(*_files(golden), **_variants(golden)[variant])
    torch.manual_seed(0)
    for batch, want in zip(BATCHES, expected[variant], strict=True):
        _compare(elmo(batch_to_ids(batch)), want)


@pytest.mark.slow
def test_the_published_module_carries_the_same_state_and_caches_the_same_words(
    golden: Path, published: tuple[Path, dict[str, Any], Elmo]
) -> None:
    _, expected, _ = published
    carrying = Elmo(*_files(golden), 1, dropout=0.0, carry_state=True)
    for batch, want in zip(BATCHES, expected["carried"], strict=True):
        _compare(carrying(batch_to_ids(batch)), want)
    caching = Elmo(*_files(golden), 1, dropout=0.0, vocab_to_cache=VOCABULARY)
    _compare(caching(batch_to_ids(WORDS), torch.tensor(WORD_IDS)), expected["cached"])


@pytest.mark.slow
def test_the_published_module_has_the_same_gradients_in_the_same_order(
    golden: Path, published: tuple[Path, dict[str, Any], Elmo]
) -> None:
    _, expected, _ = published
    elmo = Elmo(*_files(golden), 2, requires_grad=True, dropout=0.0)
    first, second = elmo(batch_to_ids(BATCHES[0]))["elmo_representations"]
    (first.square().sum() + second.sin().sum()).backward()
    assert [name for name, _ in elmo.named_parameters()] == expected["names"]
    for name, parameter in elmo.named_parameters():
        torch.testing.assert_close(parameter.grad, expected["gradients"][name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_checkpoints_load_both_ways(golden: Path, published: tuple[Path, dict[str, Any], Elmo]) -> None:
    work, expected, ours = published
    _compare(ours(batch_to_ids(BATCHES[0])), expected["loaded"])
    theirs = torch.load(work / "theirs.pt", weights_only=True)
    elmo = Elmo(*_files(golden), 2, dropout=0.0)
    assert {name: tensor.shape for name, tensor in elmo.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    elmo.load_state_dict(theirs)
    for name, tensor in elmo.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
