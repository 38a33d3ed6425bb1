"""`bilm-train`: train a biLM on plain text, measure what it knows, and make it ready to serve."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from bilm_model.bilm import Bilm, initialize
from bilm_model.engine.device import default_threads, resolve_device
from bilm_model.errors import ModelError
from bilm_model.training.corpus import Vocabulary
from bilm_model.training.learner import Objective
from bilm_model.training.loop import Trainer
from bilm_model.training.objective import BilmObjective
from bilm_model.training.recipe import PRESETS, Recipe, read_recipe
from bilm_model.training.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Exit code 0; 1 with the reason on standard error; 130 when stopped by a signal."""
    arguments = _parser().parse_args(argv)
    try:
        torch.set_num_threads(arguments.threads or default_threads())
        code: int = arguments.run(arguments) or 0
    except (ModelError, OSError) as error:
        print(f"bilm-train: {error}", file=sys.stderr)
        return 1
    return code


def _run(arguments: argparse.Namespace) -> int:
    device = resolve_device(arguments.device)
    texts = [f"data.{name}={value}" for name in ("train", "valid") if (value := getattr(arguments, name)) is not None]
    recipe = read_recipe(arguments.recipe, [*texts, *arguments.set])
    return _train(Trainer.start(recipe, RunFolder(arguments.out), new_objective, device))


def _resume(arguments: argparse.Namespace) -> int:
    folder = RunFolder.of_run(arguments.run_folder)
    return _train(Trainer.resume(folder, new_objective, resolve_device(arguments.device)))


def _train(trainer: Trainer) -> int:
    def stop(signal_number: int, frame: FrameType | None) -> None:
        trainer.stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    folder = trainer.folder
    if not trainer.run():
        print(f"stopped; go on with  bilm-train resume {folder.path}", file=sys.stderr)
        return 130
    print(f"{folder.model}: serve it with  bilm-serve --model {folder.model}")
    return 0


def new_objective(recipe: Recipe, vocabulary: Vocabulary, device: torch.device) -> Objective:
    """The untrained biLM of a recipe, with what it is trained under; seeds torch's random numbers."""
    torch.manual_seed(recipe.seed)
    bilm = initialize(Bilm(recipe.architecture), torch.Generator().manual_seed(recipe.seed))
    return BilmObjective(bilm, len(vocabulary.words), recipe.softmax, recipe.optimisation.dropout).to(device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilm-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    common.add_argument("--threads", type=int, help="CPU threads (one for each core that this process may use)")

    run = commands.add_parser("run", parents=[common], help="train a biLM")
    run.add_argument("recipe", help=f"a TOML file, or a preset: {', '.join(PRESETS)}")
    run.add_argument("--train", type=Path, help="text, a sentence or paragraph a line, UTF-8 (data.train)")
    run.add_argument("--valid", type=Path, help="text to measure after each epoch (data.valid)")
    run.add_argument("--out", type=Path, required=True, help="folder for the run; must not hold one yet")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. optimisation.epochs=3")
    run.set_defaults(run=_run)

    resume = commands.add_parser("resume", parents=[common], help="go on with a run from its last checkpoint")
    resume.add_argument("run_folder", type=Path, metavar="RUN")
    resume.set_defaults(run=_resume)
    return parser


if __name__ == "__main__":
    sys.exit(main())
