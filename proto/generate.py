"""Makes the Python code of the contract, or checks that the committed code is what it would make.

Run by `make proto` and `make check`, in an environment of its own: generated code loads on newer grpcio and protobuf
than it was made with, but not on older, so it is made with the oldest that the project supports.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.rpc import status_pb2

ROOT = Path(__file__).parent
SOURCE = "bilm_api/v1/embed.proto"
DESCRIPTOR_SET = "embed.binpb"
GENERATED = ("embed_pb2.py", "embed_pb2.pyi", "embed_pb2_grpc.py", "embed_pb2_grpc.pyi", DESCRIPTOR_SET)
ERROR_DETAILS = "google/rpc/error_details.proto"  # which the contract's errors carry, packed


def main() -> int:
    """Generates, or with --check compares; exit code 1 if that finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--image", type=Path, help="also write the contract as a descriptor set, for buf lint")
    parser.add_argument(
        "--baseline", type=Path, help="also write it without comments, for buf breaking to compare with"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        _protoc(
            f"--python_out={made}",
            f"--pyi_out={made}",
            f"--grpc_python_out={made}",
            f"--mypy_grpc_out=quiet:{made}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).with_name('protoc-gen-mypy_grpc')}",
        )
        descriptors = _in(made, DESCRIPTOR_SET)
        _protoc("--include_imports", f"--descriptor_set_out={descriptors}", sources=(SOURCE, ERROR_DETAILS))
        if arguments.image:
            _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={arguments.image}")
        if arguments.baseline:
            _protoc("--include_imports", f"--descriptor_set_out={arguments.baseline}")
        differing = [name for name in GENERATED if not _same(made, name)]
        if not arguments.check:
            for name in differing:
                _in(ROOT, name).write_bytes(_in(made, name).read_bytes())
            return 0
    for name in differing:
        print(f"{_in(ROOT, name)}: not what the contract makes; run make proto", file=sys.stderr)
    return 1 if differing else 0


def _protoc(*outputs: str, sources: Sequence[str] = (SOURCE,)) -> None:
    includes = [f"-I{ROOT}", f"-I{Path(status_pb2.__file__).parents[2]}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *includes, *outputs, *sources], check=True)  # noqa: S603


def _in(root: Path, name: str) -> Path:
    return root / Path(SOURCE).parent / name


def _same(made: Path, name: str) -> bool:
    committed = _in(ROOT, name)
    return committed.exists() and committed.read_bytes() == _in(made, name).read_bytes()


if __name__ == "__main__":
    sys.exit(main())
