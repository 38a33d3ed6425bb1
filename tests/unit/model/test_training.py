import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bilm_model.config import SIZES
from bilm_model.training.corpus import BOUNDARY, CorpusError, Vocabulary, index_text, read_lines, windows
from bilm_model.training.evaluation import perplexity
from bilm_model.training.loop import load_objective, new_objective
from bilm_model.training.main import main
from bilm_model.training.recipe import Optimisation, Recipe
from bilm_model.weights.loading import load

LINES = [["the", "cat", "sat"], [], ["a", "dog", "ran", "the", "other", "way"], ["the", "end"]]
VOCABULARY = Vocabulary.of(LINES)
OPTIMISATION = Optimisation(
    epochs=40,
    batch=2,
    steps=4,
    learning_rate=0.01,
    warmup_steps=10,
    gradient_clip=1.0,
    dropout=0.0,
    softmax_cutoffs=(5,),
)


def test_the_vocabulary_is_ordered_by_frequency() -> None:
    assert VOCABULARY.words[:2] == ("</S>", "the")
    assert list(VOCABULARY.words[2:]) == sorted(VOCABULARY.words[2:])


def test_forward_and_backward_predict_every_token_and_end_of_line_once() -> None:
    text = index_text(LINES, VOCABULARY)
    words = {index: word for word, index in VOCABULARY.classes().items()}
    for direction in (text, text.reversed()):
        (window,) = windows(direction, 1, 1000)
        predicted = [words[c] for c in window.targets[window.counted]]
        # one stream leaves nothing over but the last token's missing successor
        assert sorted(predicted) == sorted([word for line in LINES for word in line] + ["</S>"] * len(LINES))


def test_windows_go_on_where_the_last_one_ended() -> None:
    text = index_text(LINES, VOCABULARY)
    parts = list(windows(text, 3, 2))
    tokens = np.concatenate([part.tokens for part in parts])
    assert tokens.T.ravel().tolist() == text.tokens[: tokens.size].tolist()
    targets = np.concatenate([part.targets for part in parts])
    assert targets.T.ravel().tolist() == text.classes[1 : tokens.size + 1].tolist()


def test_unknown_words_count_as_unk() -> None:
    vocabulary = Vocabulary(("</S>", "<unk>", "a"))
    assert index_text([["a", "new"]], vocabulary).classes.tolist() == [BOUNDARY, 2, 1, BOUNDARY]
    with pytest.raises(CorpusError, match="'new' is not in the vocabulary"):
        index_text([["new"]], Vocabulary(("</S>", "a")))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_unusable_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="text"):
        read_lines(path)


def test_too_little_text_for_the_streams() -> None:
    with pytest.raises(CorpusError, match="too few"):
        list(windows(index_text([["a"]], Vocabulary(("</S>", "a"))), 8, 4))


def test_perplexity_is_that_of_the_full_softmax() -> None:
    """Against float64, word by word, with the adaptive softmax's own full distribution."""
    recipe = Recipe(seed=3, architecture=SIZES["tiny"], optimisation=OPTIMISATION)
    objective = new_objective(recipe, VOCABULARY)
    text = index_text(LINES, VOCABULARY)
    found = perplexity(objective, text)
    objective = objective.double().requires_grad_(False)
    for direction, part, value in zip((0, 1), (text, text.reversed()), (found.forward, found.backward), strict=True):
        vectors = objective.bilm.encoder(torch.from_numpy(part.types[part.tokens]).long())
        total = 0.0
        h, c = (torch.zeros(2, 1, n, dtype=torch.float64) for n in (8, 32))
        for t in range(len(part.tokens) - 1):
            x, ends = vectors[t : t + 1], []
            for k, layer in enumerate(objective.bilm.directions[direction].layers):  # type: ignore[arg-type]
                y, c_k = layer.step(layer.input(x), h[k], c[k])
                ends.append((y, c_k))
                x = x + y if k else y
            h, c = (torch.stack(parts) for parts in zip(*ends, strict=True))
            if not part.begins[t + 1]:
                total -= float(objective.softmax.log_prob(x)[0, part.classes[t + 1]])
        n_predicted = sum(map(len, LINES)) + len(LINES)
        assert value == pytest.approx(np.exp(total / n_predicted), rel=1e-4)


def _write_recipe(folder: Path, **changes: object) -> Path:
    optimisation = {**OPTIMISATION.model_dump(), **changes}
    lines = ["seed = 1", "[architecture]", "char_dim = 8", "filters = [[1, 8], [2, 16], [3, 16]]"]
    lines += ["projection_dim = 16", "cell_dim = 48", "[optimisation]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in optimisation.items()]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines))
    return path


def test_five_sentences_are_learnt_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"sentence number {n} says {n} {n}\n" for n in ("one", "two", "three", "four", "five")))
    recipe, out = _write_recipe(tmp_path), tmp_path / "run"
    arguments = ["--train", str(text), "--valid", str(text), "--out", str(out), "--device", "cpu"]
    assert main(["run", str(recipe), *arguments]) == 0
    report = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert report["valid"]["forward"] < 3
    assert report["valid"]["backward"] < 3
    capsys.readouterr()
    assert main(["eval", str(recipe), str(out), str(text)]) == 0
    assert f"forward {report['valid']['forward']:.1f}" in capsys.readouterr().out
    assert load(str(out / "model.safetensors")).bilm.config.cell_dim == 48


def test_the_same_seed_gives_the_same_losses() -> None:
    recipe = Recipe(seed=3, architecture=replace(SIZES["tiny"]), optimisation=OPTIMISATION)
    first, second = (perplexity(new_objective(recipe, VOCABULARY), index_text(LINES, VOCABULARY)) for _ in range(2))
    assert first == second


def test_every_error_of_a_recipe_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _write_recipe(tmp_path, epochs=0, dropout=1.5)
    assert main(["run", str(recipe), "--train", "x", "--valid", "x", "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert "optimisation.epochs" in errors
    assert "optimisation.dropout" in errors


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(_write_recipe(tmp_path)), str(tmp_path), str(tmp_path)]) == 1
    assert "softmax.pt" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        load_objective(Recipe(seed=1, architecture=SIZES["tiny"], optimisation=OPTIMISATION), tmp_path)
