"""`bilm-train`: train a biLM on plain text, measure what it knows, and make it ready to serve."""

import argparse
import json
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from bilm_model.bilm import Bilm, initialize
from bilm_model.device import default_threads, resolve_device
from bilm_model.errors import ModelError
from bilm_model.weights.convert import convert, is_single_file
from bilm_model.weights.loading import load
from bilm_system.files import message, write_text
from bilm_system.terminal import run_command

from bilm_training.data.corpus import Corpus
from bilm_training.data.streams import valid_streams
from bilm_training.data.vocabulary import Vocabulary
from bilm_training.evaluation.knowledge.neighbours import AMBIGUOUS_WORDS, neighbours, read_sentences
from bilm_training.evaluation.knowledge.probes import probe
from bilm_training.evaluation.knowledge.report import Knowledge, Neighbourhood, read_knowledge
from bilm_training.evaluation.perplexity import Perplexity, perplexity
from bilm_training.objectives.distillation import new_distillation
from bilm_training.objectives.language_model import BilmObjective
from bilm_training.objectives.objective import Objective
from bilm_training.recipe import PRESETS, Recipe, read_recipe
from bilm_training.runs.checkpoints import load_best, read_vocabulary
from bilm_training.runs.compare import compare
from bilm_training.runs.run_folder import RunFolder
from bilm_training.trainer import RunWriters, Trainer

_STOPPED = 130


def main(argv: list[str] | None = None, writers: RunWriters | None = None) -> int:
    """Run a command. Return 0; 1 with the reason on standard error; 130 when stopped by a signal.

    Args:
        argv: the command line; None: the process's.
        writers: what runs are written by; None: files in the run's folder.
    """
    return run_command("bilm-train", partial(_main, argv, writers or RunWriters()))


def _main(argv: list[str] | None, writers: RunWriters) -> int:
    arguments = _parser().parse_args(argv, argparse.Namespace(writers=writers))
    try:
        if "threads" in arguments:
            torch.set_num_threads(arguments.threads or default_threads())
        code: int = arguments.run(arguments) or 0
    except (ModelError, OSError) as error:
        print(f"bilm-train: {message(error)}", file=sys.stderr)
        return 1
    return code


# ---- run, distill, resume --------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    return _start(arguments, [])


def _distill(arguments: argparse.Namespace) -> int:
    return _start(arguments, [f"distillation.teacher={json.dumps(arguments.teacher, ensure_ascii=False)}"])


def _start(arguments: argparse.Namespace, overrides: list[str]) -> int:
    device = resolve_device(arguments.device)
    for name in ("train", "valid"):
        if getattr(arguments, name) is not None:
            overrides.append(f"data.{name}={json.dumps(str(getattr(arguments, name)), ensure_ascii=False)}")
    recipe = read_recipe(arguments.recipe, [*overrides, *arguments.set])
    folder = RunFolder(arguments.out)
    with folder.taken():
        return _train(Trainer.start(recipe, folder, new_objective, device, writers=arguments.writers))


def _resume(arguments: argparse.Namespace) -> int:
    folder = RunFolder.of_run(arguments.run_folder)
    with folder.taken():
        device = resolve_device(arguments.device)
        return _train(Trainer.resume(folder, new_objective, device, writers=arguments.writers))


def _train(trainer: Trainer) -> int:
    if trainer.products is not None:
        slower = "; float32 may be faster (--set optimisation.precision=auto)" if trainer.products.rounded else ""
        print(f"products in bfloat16: {trainer.products.description}{slower}", file=sys.stderr)

    def stop(signal_number: int, frame: FrameType | None) -> None:
        trainer.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = trainer.folder
    try:
        finished = trainer.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not finished:
        print(f"stopped; go on with  bilm-train resume {folder.path}", file=sys.stderr)
        return _STOPPED
    print(f"{folder.model}: serve it with  bilm-serve --model {folder.model}")
    return 0


def new_objective(recipe: Recipe, vocabulary: Vocabulary, device: torch.device) -> Objective:
    """Return the untrained biLM of a recipe, with what it is trained under; seeds torch's random numbers.

    Raises:
        ModelError: if the recipe's teacher can't be had, or doesn't go with the student.
    """
    if recipe.distillation is not None:
        return new_distillation(recipe, vocabulary, device)
    torch.manual_seed(recipe.seed)
    bilm = initialize(Bilm(recipe.architecture), torch.Generator().manual_seed(recipe.seed))
    return BilmObjective(bilm, len(vocabulary.words), recipe.softmax, recipe.optimisation.dropout).to(device)


# ---- eval, compare, export -------------------------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> None:
    if not (arguments.text or arguments.treebank or arguments.neighbours):
        raise ModelError("nothing to measure: name a --text, a --treebank or --neighbours")
    for option in ("words", "layer"):
        if getattr(arguments, option) is not None and not arguments.neighbours:
            raise ModelError(f"--{option}: goes with --neighbours only")
    for option in ("text", "treebank", "neighbours"):
        names = [path.name for path in getattr(arguments, option)]
        if len(set(names)) < len(names):
            raise ModelError(f"--{option}: {', '.join(names)}: what is found is kept by name, and so names must differ")
    device = str(resolve_device(arguments.device))
    source = Path(arguments.model)
    folder = RunFolder.of_run(source) if source.is_dir() and RunFolder(source).config.exists() else None
    bilm = load(str(folder.model) if folder else arguments.model).bilm
    found = Knowledge(
        tuple(probe(bilm, treebank, seed=arguments.seed, device=device) for treebank in arguments.treebank),
        tuple(_neighbourhood(bilm, text, arguments, device) for text in arguments.neighbours),
        _perplexities(folder, arguments.text, device),
    )
    try:
        if folder is not None:
            merged = _with_earlier(found, folder).to_dict()
            write_text(folder.eval, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    finally:  # where the file can't be written, this is left
        print(found.markdown())
    if folder is not None:
        print(f"written to {folder.eval}")


def _perplexities(folder: RunFolder | None, texts: list[Path], device: str) -> dict[str, Perplexity]:
    if not texts:
        return {}
    if folder is None:
        raise ModelError("--text: perplexity needs the softmax, which is in a run's folder only, not in a model's file")
    recipe, vocabulary = read_recipe(str(folder.config)), read_vocabulary(folder)
    if recipe.distillation is not None:
        raise ModelError(f"--text: {folder.path} has learnt vectors, not words: it has no perplexity")
    objective = new_objective(recipe, vocabulary, torch.device(device))
    load_best(folder, objective)
    return {text.name: perplexity(objective, valid_streams(Corpus.open(text), vocabulary)) for text in texts}


def _neighbourhood(bilm: Bilm, text: Path, arguments: argparse.Namespace, device: str) -> Neighbourhood:
    words = tuple(arguments.words.split(",")) if arguments.words else AMBIGUOUS_WORDS
    layer = 1 if arguments.layer is None else arguments.layer
    found = neighbours(bilm, read_sentences(text), words, layer=layer, device=device)
    return Neighbourhood(text.name, layer, found)


def _with_earlier(found: Knowledge, folder: RunFolder) -> Knowledge:
    """Return what was found, with what only an earlier evaluation has measured."""
    if not folder.eval.exists():
        return found
    earlier = read_knowledge(folder.eval)
    treebanks = {report.name: report for report in (*earlier.treebanks, *found.treebanks)}
    texts = {neighbourhood.text: neighbourhood for neighbourhood in (*earlier.neighbourhoods, *found.neighbourhoods)}
    merged = earlier.perplexity | found.perplexity
    return replace(found, treebanks=(*treebanks.values(),), neighbourhoods=(*texts.values(),), perplexity=merged)


def _compare(arguments: argparse.Namespace) -> None:
    print(compare(arguments.runs, arguments.out))


def _export(arguments: argparse.Namespace) -> None:
    folder = RunFolder.of_run(arguments.run_folder)
    if not folder.model.exists():
        raise ModelError(f"{folder.path}: no epoch has ended yet, so there is no model")
    dtype = arguments.dtype or ("float16" if is_single_file(arguments.output) else "float32")
    version = convert(load(str(folder.model)), arguments.output, dtype, overwrite=arguments.overwrite)
    print(f"{arguments.output}: version {version}; serve it with  bilm-serve --model {arguments.output}")


# ---- the command line ------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilm-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    device.add_argument("--threads", type=_positive, help="CPU threads (one for each core that this process may use)")
    _add_training(commands, device)
    _add_evaluation(commands, device)

    comparison = commands.add_parser("compare", help="tables and plots of several runs")
    comparison.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    comparison.add_argument("--out", type=Path, metavar="FOLDER", help="also write compare.md and plots there")
    comparison.set_defaults(run=_compare)

    export = commands.add_parser("export", help="write a run's best model as one file, or as published files")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("output", type=Path, help="a file that ends in .safetensors, or a folder for published files")
    export.add_argument("--dtype", choices=("float32", "float16"), help="(a file float16, published files float32)")
    export.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    export.set_defaults(run=_export)
    return parser


def _add_training(commands: Any, device: argparse.ArgumentParser) -> None:
    start = argparse.ArgumentParser(add_help=False, parents=[device])
    start.add_argument("recipe", help=f"a TOML file, or a preset: {', '.join(PRESETS)}")
    start.add_argument("--train", type=Path, help="text, a sentence or paragraph a line, UTF-8 (data.train)")
    start.add_argument("--valid", type=Path, help="text to measure after each epoch (data.valid)")
    start.add_argument("--out", type=Path, required=True, metavar="RUN", help="new folder for the run")
    start.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. optimisation.epochs=3")

    run = commands.add_parser("run", parents=[start], help="train a biLM")
    run.set_defaults(run=_run)

    distill = commands.add_parser("distill", parents=[start], help="train a small biLM on a large one's layer vectors")
    distill.add_argument("--teacher", required=True, help="the large one, as bilm-serve's --model")
    distill.set_defaults(run=_distill)

    resume = commands.add_parser("resume", parents=[device], help="go on with a run from its last checkpoint")
    resume.add_argument("run_folder", type=Path, metavar="RUN")
    resume.set_defaults(run=_resume)


def _add_evaluation(commands: Any, device: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser("eval", parents=[device], help="measure what a biLM has learnt")
    evaluate.add_argument("model", metavar="RUN", help="a run's folder; or a model, as bilm-serve's --model")
    several: dict[str, Any] = {"type": Path, "action": "append", "default": []}
    evaluate.add_argument("--text", **several, help="perplexity on this text")
    treebank = "probe for parts of speech: a folder of Universal Dependencies, with train and test parts"
    evaluate.add_argument("--treebank", **several, metavar="FOLDER", help=treebank)
    neighbourhood = "nearest occurrences of ambiguous words in this text, or *.conllu"
    evaluate.add_argument("--neighbours", **several, metavar="TEXT", help=neighbourhood)
    evaluate.add_argument("--words", metavar="W,W", help=f"the ambiguous words ({','.join(AMBIGUOUS_WORDS)})")
    evaluate.add_argument("--layer", type=int, help="whose vectors neighbours are found by (1)")
    evaluate.add_argument("--seed", type=int, default=1, help="of the random biLM and the typos (%(default)s)")
    evaluate.set_defaults(run=_evaluate)


if __name__ == "__main__":
    sys.exit(main())
