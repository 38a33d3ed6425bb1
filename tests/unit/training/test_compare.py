import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.errors import ModelError
from bilm_model.weights import single_file
from bilm_system.files import write_text
from bilm_training.errors import RunError
from bilm_training.evaluation.knowledge.report import Knowledge
from bilm_training.evaluation.knowledge.scores import ProbeScore, TreebankReport
from bilm_training.evaluation.perplexity import Perplexity
from bilm_training.runs import compare_plots
from bilm_training.runs.compare import compare
from bilm_training.runs.finished_run import read_runs
from bilm_training.runs.records import EpochRecord, StepRecord
from bilm_training.runs.run_folder import RunFolder

# forward, backward: the second is the best
PERPLEXITIES = ((100.0, 120.0), (50.0, 60.0), (70.0, 60.0))
PROBE = TreebankReport(
    name="UD_English-EWT",
    train_tokens=100,
    test_tokens=10,
    typos=1,
    tags=("NOUN", "VERB"),
    seed=1,
    model=(ProbeScore(0, 0.90, 0.85, True), ProbeScore(1, 0.95, 0.885, True)),
    random=(ProbeScore(0, 0.8, 0.7, True),),
    word_identity=ProbeScore(None, 0.86, 0.6, True),
)
PNG = b"\x89PNG\r\n"


def _run(path: Path, perplexities: Iterable[tuple[float, float]] = PERPLEXITIES, *, model: bool = True) -> RunFolder:
    """Ten steps an epoch, six seconds a step."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, "")
    epochs = [EpochRecord(n, 10 * n, 5.0, *pair, 1.0, 60.0 * n) for n, pair in enumerate(perplexities, start=1)]
    steps = [StepRecord(n, 1, 5, 5, 5, 1, 1, 1000.0 + n, 6.0 * n) for n in range(1, 10 * len(epochs) + 6)]
    write_text(folder.epochs, "".join(json.dumps(asdict(epoch)) + "\n" for epoch in epochs))
    write_text(folder.steps, "".join(json.dumps(asdict(step)) + "\n" for step in steps))
    if model and epochs:
        single_file.write(folder.model, SIZES["tiny"], random_bilm(SIZES["tiny"]).state_dict())
    return folder


def _evaluate(folder: RunFolder, *, tokens: int = 9, **perplexity: float) -> None:
    texts = {name: Perplexity(p - 1, p + 1, tokens) for name, p in perplexity.items()}
    write_text(folder.eval, json.dumps(Knowledge((PROBE,), perplexity=texts).to_dict()))


def _cells(table: str) -> list[dict[str, str]]:
    """Rows of a Markdown table."""
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def _tables(page: Path) -> list[list[dict[str, str]]]:
    return [_cells(part) for part in page.read_text(encoding="utf-8").split("\n\n") if part.startswith("|")]


def test_the_table_says_what_the_logs_say(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    _evaluate(folder, text=44.0)
    compare([folder.path], tmp_path / "out")
    (run,), (probe,) = _tables(tmp_path / "out" / "compare.md")
    assert run == {
        "run": "run",
        "size": f"{random_bilm(SIZES['tiny']).parameter_count / 1e6:.1f} M",
        "residual": "published",
        "steps": "35",
        "epochs": "3",
        "best": "2",
        "minutes": "3.5",
        "tokens/s": "1,018",
        "valid fwd": "50.0",
        "valid bwd": "60.0",
        "valid mean": "55.0",
        "text": "44.0",
    }
    assert probe == {
        "run": "run",
        "treebank": "UD_English-EWT",
        "best layer": "1",
        "POS %": "95.0",
        "with typos %": "88.5",
        "typo loss": "6.5",
        "random %": "80.0",
        "word identity %": "86.0",
    }


def test_a_student_s_figures_are_not_taken_for_perplexities(tmp_path: Path) -> None:
    learner, student = _run(tmp_path / "learner"), _run(tmp_path / "student", [(0.4, 0.5), (0.2, 0.3)])
    write_text(student.config, '[distillation]\nteacher = "learner"\n')
    write_text(learner.vocabulary, "the\n")
    write_text(student.vocabulary, "<unk>\n")
    shown = compare([learner.path, student.path], tmp_path / "out")
    (row,), (taught,) = _tables(tmp_path / "out" / "compare.md")
    assert (row["run"], row["valid mean"]) == ("learner", "55.0")
    assert {name: taught[name] for name in taught if name == "run" or "unexplained" in name} == {
        "run": "student",
        "unexplained fwd %": "20.0",
        "unexplained bwd %": "30.0",
        "unexplained mean %": "25.0",
    }
    assert "vocabularies" not in shown
    learners, students = compare_plots.perplexity, compare_plots.unexplained
    first, second = read_runs([learner.path, student.path])
    assert learners([first, second]) == learners([first])
    assert students([second]) is not None
    assert (learners([second]), students([first])) == (None, None)


def test_a_terminal_gets_the_same_aligned(tmp_path: Path) -> None:
    for name in ("run", "a-longer-name"):
        _evaluate(_run(tmp_path / name), text=44.0)
    shown = compare([tmp_path / "run", tmp_path / "a-longer-name"], tmp_path / "out")
    head, *rows = shown.split("\n\n")[0].splitlines()
    assert head.startswith("run            ")
    assert [row.split()[0] for row in rows] == ["run", "a-longer-name"]
    assert {row.index("published") for row in rows} == {head.index("residual")}
    assert len({len(line) for line in (head, *rows)}) == 1
    assert str(tmp_path / "out" / "compare.md") in shown


def test_what_a_run_does_not_have_yet_is_blank(tmp_path: Path) -> None:
    measured, halfway, fresh = (_run(tmp_path / name, p) for name, p in (("a", PERPLEXITIES), ("b", ()), ("c", ())))
    _evaluate(measured, text=44.0)
    fresh.steps.unlink()
    fresh.epochs.unlink()
    shown = compare([folder.path for folder in (measured, halfway, fresh)], tmp_path / "out")
    runs, probes = _tables(tmp_path / "out" / "compare.md")
    assert runs[1] == dict.fromkeys(runs[1], "–") | {
        "run": "b",
        "steps": "5",
        "epochs": "0",
        "minutes": "0.5",
        "tokens/s": "1,003",
    }
    assert runs[2] == dict.fromkeys(runs[2], "–") | {"run": "c", "steps": "0", "epochs": "0", "minutes": "0.0"}
    assert probes[1] == dict.fromkeys(probes[1], "–") | {"run": "b"}
    assert "b: no epoch finished yet" in shown


def test_a_run_without_evaluation_comes_with_a_hint(tmp_path: Path) -> None:
    folder = _run(tmp_path / "my run")
    shown = compare([folder.path], tmp_path / "out")
    ((run,),) = _tables(tmp_path / "out" / "compare.md")
    assert run["test"] == "–"
    assert f"bilm-train eval '{folder.path}'" in shown
    assert not (tmp_path / "out" / "probes.png").exists()
    assert "probes.png" not in (tmp_path / "out" / "compare.md").read_text()


def test_plots_lie_beside_the_page(tmp_path: Path) -> None:
    out, names = tmp_path / "out", ("_hidden", "price $1 $2")
    for name in names:
        _evaluate(_run(tmp_path / name), text=44.0)
    compare([tmp_path / name for name in names], out)
    for name in ("perplexity.png", "probes.png", "cost.png"):
        assert f"]({name})" in (out / "compare.md").read_text()
        assert (out / name).read_bytes().startswith(PNG)


def test_runs_of_any_length_and_number_can_be_drawn(tmp_path: Path) -> None:
    for n in range(10):
        _evaluate(_run(tmp_path / str(n), [(900.0 / (n + 1), 1000.0)] * (1 if n else 40), model=False), text=44.0)
    runs = read_runs([tmp_path / str(n) for n in range(10)])
    for draw in (compare_plots.perplexity, compare_plots.probes, compare_plots.cost):
        image = draw(runs)
        assert image is not None
        assert image.startswith(PNG)
        assert image != draw(runs[:9])


def test_a_diverged_run_is_left_out_of_the_plot(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", [(math.nan, 5.0)], model=False)
    write_text(folder.epochs, folder.epochs.read_text().replace("NaN", "null"))
    (run,) = read_runs([folder.path])
    assert run.best is None
    assert compare_plots.perplexity([run]) is None
    compare([folder.path], tmp_path / "out")
    ((row,),) = _tables(tmp_path / "out" / "compare.md")
    assert (row["epochs"], row["best"], row["valid mean"]) == ("1", "–", "–")


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = [_run(tmp_path / name, (), model=False).path for name in ("a/run", "b/run", "a/other", "b/x/run")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run", "other", "x/run"]
    assert [run.name for run in read_runs([paths[0], paths[0] / ".." / "run"])] == ["run"]


def test_different_texts_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    first, second, third = (_run(tmp_path / name) for name in "abc")
    _evaluate(first, text=44.0, other=50.0)
    _evaluate(second, tokens=1000, text=45.0)
    _evaluate(third, text=46.0)
    compare([folder.path for folder in (first, second, third)], tmp_path / "out")
    runs, _ = _tables(tmp_path / "out" / "compare.md")
    columns = ("text, 9 tokens", "text, 1,000 tokens", "other")
    assert [[run[column] for column in columns] for run in runs] == [
        ["44.0", "–", "50.0"],
        ["–", "45.0", "–"],
        ["46.0", "–", "–"],
    ]


def test_different_vocabularies_are_pointed_out(tmp_path: Path) -> None:
    folders = [_run(tmp_path / name, model=False) for name in "ab"]
    for folder, words in zip(folders, ("the\na\n", "the\n"), strict=True):
        write_text(folder.vocabulary, words)
    assert "vocabularies differ" in compare([folder.path for folder in folders])
    assert "vocabularies differ" not in compare([folders[0].path])


def test_every_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as error:
        compare([tmp_path / "none", _run(tmp_path / "run", model=False).path, tmp_path / "empty"])
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'none'}: no such folder",
        f"{tmp_path / 'empty'}: not the folder of a run (config.toml is missing)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("eval.json", '{"perplexity": {"text": {"forward": "low", "backward": 2}}}', "perplexity.text.forward: "),
        ("eval.json", "{", "Expecting property name"),
        ("model.safetensors", "no model", "not a model file"),
        ("steps.jsonl", "{}\n", "line 1: step: missing"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    folder = _run(tmp_path / "run", model=False)
    write_text(folder.path / name, content)
    with pytest.raises(ModelError, match=rf"{name}.*{reason}"):
        compare([folder.path])


def test_only_the_plots_need_matplotlib(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", model=False)

    def without_matplotlib() -> ModuleType:
        raise ModuleNotFoundError("No module named 'matplotlib'")

    assert "55.0" in compare([folder.path], load_plots=without_matplotlib)
    with pytest.raises(RunError, match="No module named 'matplotlib': .* pip install matplotlib"):
        compare([folder.path], tmp_path / "out", without_matplotlib)
