"""`bilm-convert`: from the published files to our single file, and back."""

import argparse
import json
import sys
from pathlib import Path

from bilm_model.config import to_options
from bilm_model.errors import ModelError, message
from bilm_model.weights import hdf5, single_file
from bilm_model.weights.loading import LoadedModel, load


def main(argv: list[str] | None = None) -> int:
    """Converts a model; the form of OUTPUT says which way. Exit code 0, or 1 with the reason on standard error."""
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
    """Writes a model, as one safetensors file or as a folder of published files; returns the version written.

    A model with the residual "input_to_input" becomes no published files: the published options can't say it, and
    other tools would compute something else from them without a word.

    Raises:
        ModelError: if the output exists already and may not be overwritten, a value doesn't fit `dtype`, or the
            published format can't hold the model.
    """
    if output.exists() and not overwrite:
        raise ModelError(f"{output}: exists already (--overwrite replaces it)")
    config, tensors = model.bilm.config, model.bilm.state_dict()
    if output.suffix == ".safetensors":
        # A conversion that breaks off must not leave half a model under the name of a whole one
        draft = output.with_name(output.name + ".part")
        version = single_file.write(draft, config, tensors, dtype)
        draft.replace(output)
        return version
    if dtype != "float32":
        raise ModelError(f"{output}: the published format is float32 only")
    if config.residual == "input_to_input":
        raise ModelError(
            f"{output}: residual: expected 'published' or 'none', found {config.residual!r}: the published format has "
            "no word for it, and other tools would read another model; write a .safetensors file"
        )
    output.mkdir(parents=True, exist_ok=True)
    draft = output / "weights.hdf5.part"
    hdf5.write(draft, config, tensors)
    draft.replace(output / "weights.hdf5")
    (output / "options.json").write_text(json.dumps(to_options(config), indent=1) + "\n", encoding="utf-8")
    return model.version


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
