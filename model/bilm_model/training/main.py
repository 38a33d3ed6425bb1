"""`bilm-train`: train a biLM on plain text, and measure it."""

import argparse
import sys
from pathlib import Path

from bilm_model.engine.device import resolve_device
from bilm_model.errors import ModelError
from bilm_model.training.corpus import index_text, read_lines
from bilm_model.training.evaluation import perplexity
from bilm_model.training.loop import MODEL_FILE, load_objective, train
from bilm_model.training.recipe import read_recipe


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Exit code 0, or 1 with the reason on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ModelError, OSError) as error:
        print(f"bilm-train: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    device = str(resolve_device(arguments.device))
    train(read_recipe(arguments.recipe), arguments.train, arguments.valid, arguments.out, device)
    model = arguments.out / MODEL_FILE
    print(f"{model}: serve it with  bilm-serve --model {model}")


def _evaluate(arguments: argparse.Namespace) -> None:
    objective, vocabulary = load_objective(read_recipe(arguments.recipe), arguments.run_folder)
    found = perplexity(objective, index_text(read_lines(arguments.text), vocabulary))
    print(f"perplexity: forward {found.forward:.1f}, backward {found.backward:.1f}, mean {found.mean:.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilm-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train a biLM")
    run.add_argument("recipe", type=Path, help="TOML: seed, architecture, optimisation")
    run.add_argument("--train", type=Path, required=True, help="text, a sentence or paragraph a line, UTF-8")
    run.add_argument("--valid", type=Path, required=True, help="text to measure after each epoch")
    run.add_argument("--out", type=Path, required=True, help="folder for the model and its log")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    run.set_defaults(run=_run)

    evaluate = commands.add_parser("eval", help="perplexity of a trained biLM on a text")
    evaluate.add_argument("recipe", type=Path, help="the recipe it was trained by")
    evaluate.add_argument("run_folder", type=Path, help="what --out named")
    evaluate.add_argument("text", type=Path, help="text, as for training")
    evaluate.set_defaults(run=_evaluate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
