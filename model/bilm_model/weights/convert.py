"""`bilm-convert`: from the published files to our single file, and back."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from bilm_system.files import message, replaced
from bilm_system.terminal import run_command
from torch import Tensor

from bilm_model.config import BilmConfig, to_options
from bilm_model.errors import ModelError
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.finding import HDF5_SUFFIXES
from bilm_model.weights.loading import LoadedModel, load


def main(argv: list[str] | None = None) -> int:
    """Convert a model; the form of OUTPUT says which way. Return 0, or 1 with the reason on standard error."""
    return run_command("bilm-convert", partial(_main, argv))


def _main(argv: list[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        model = load(arguments.input, arguments.options)
        version = convert(model, arguments.output, arguments.dtype, overwrite=arguments.overwrite)
    except (ModelError, OSError) as error:
        print(f"bilm-convert: {message(error)}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {model.bilm.parameter_count:,} parameters, version {version}")
    if version != model.version:
        print(f"rounded to {arguments.dtype}: the version was {model.version}")
    return 0


def convert(model: LoadedModel, output: Path, dtype: str, *, overwrite: bool = False) -> str:
    """Write a model, as one safetensors file or as a folder of published files; return the version written.

    A model with the residual "input_to_input" becomes no published files: the published options can't say it, and
    other tools would compute something else from them without a word.

    Raises:
        ModelError: if the output exists already and may not be overwritten, a value doesn't fit `dtype`, or the
            published format can't hold the model.
    """
    if output.exists() and not overwrite:
        raise ModelError(f"{output}: exists already (--overwrite replaces it)")
    config, tensors = model.bilm.config, model.bilm.state_dict()
    if is_single_file(output):
        with replaced(output) as draft:
            return single_file.write(draft, config, tensors, dtype)
    if output.suffix.lower() in HDF5_SUFFIXES:
        raise ModelError(f"{output}: expected a name that ends in .safetensors, or a folder for published files")
    if dtype != "float32":
        raise ModelError(f"{output}: the published format is float32 only")
    if config.residual == "input_to_input":
        raise ModelError(
            f"{output}: residual: expected 'published' or 'none', found {config.residual!r}: the published format has "
            "no word for it, and other tools would read another model; write a .safetensors file"
        )
    _write_published(output, config, tensors)
    return model.version


def is_single_file(output: Path) -> bool:
    """Return whether an output's name says our single file; otherwise it is a folder of published files."""
    return output.suffix.lower() == ".safetensors"


def _write_published(folder: Path, config: BilmConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files before either appears: weights beside another model's options would be a third model."""
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replaced(folder / "weights.hdf5") as weights, replaced(folder / "options.json") as options:
            hdf5.write(weights, config, tensors)
            options.write_text(json.dumps(to_options(config), indent=1) + "\n", encoding="utf-8")
    except BaseException:
        if missing:
            folder.rmdir()
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilm-convert", description=__doc__)
    parser.add_argument(
        "input", help="a .safetensors file, a folder with options.json and weights.hdf5, or a .hdf5 with --options"
    )
    parser.add_argument("output", type=Path, help="a file that ends in .safetensors, or a folder for published files")
    parser.add_argument("--options", type=Path, help="the options.json that goes with a .hdf5 file")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the .safetensors file (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
