"""Makes the Python code of the .proto files, or checks that the committed code is what it would make.

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
CONTRACT = "bilm_api/v1/embed.proto"
FOREIGN = "bilm_api/inference/open_inference.proto"
ERROR_DETAILS = "google/rpc/error_details.proto"  # which the contract's errors carry, packed
DESCRIPTOR_SET = "bilm_api/v1/embed.binpb"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
CODE = tuple(source.removesuffix(".proto") + suffix for source in (CONTRACT, FOREIGN) for suffix in SUFFIXES)
GENERATED = (*CODE, DESCRIPTOR_SET)

# A process may have a package once in protobuf's pool: a program with a foreign protocol's own client, too, imports us
SHARED_POOL, OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


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
            sources=(CONTRACT, FOREIGN),
        )
        _give_own_pool(made / FOREIGN.replace(".proto", "_pb2.py"))
        descriptors = made / DESCRIPTOR_SET
        _protoc("--include_imports", f"--descriptor_set_out={descriptors}", sources=(CONTRACT, ERROR_DETAILS))
        if arguments.image:
            _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={arguments.image}")
        if arguments.baseline:
            _protoc("--include_imports", f"--descriptor_set_out={arguments.baseline}")
        differing = [name for name in GENERATED if not _same(made, name)]
        if not arguments.check:
            for name in differing:
                (ROOT / name).write_bytes((made / name).read_bytes())
            return 0
    for name in differing:
        print(f"{ROOT / name}: not what its .proto file makes; run make proto", file=sys.stderr)
    return 1 if differing else 0


def _protoc(*outputs: str, sources: Sequence[str] = (CONTRACT,)) -> None:
    includes = [f"-I{ROOT}", f"-I{Path(status_pb2.__file__).parents[2]}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *includes, *outputs, *sources], check=True)  # noqa: S603


def _give_own_pool(module: Path) -> None:
    code = module.read_text(encoding="utf-8")
    if code.count(SHARED_POOL) != 1:
        raise SystemExit(f"{module.name}: expected {SHARED_POOL} once, found it {code.count(SHARED_POOL)} times")
    module.write_text(code.replace(SHARED_POOL, OWN_POOL), encoding="utf-8")


def _same(made: Path, name: str) -> bool:
    committed = ROOT / name
    return committed.exists() and committed.read_bytes() == (made / name).read_bytes()


if __name__ == "__main__":
    sys.exit(main())
