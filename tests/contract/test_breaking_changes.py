"""`buf breaking`, as `make check` runs it, lets additions pass and nothing that would break a released client."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bilm_api.v1 import embed_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

PROTO = Path(__file__).parents[2] / "proto"
(BASELINE,) = (PROTO / "baseline").glob("*.binpb")
BUF = Path(sys.executable).with_name("buf")
VIOLATION = 100  # exit code of buf; others are for what it can't read

pytestmark = pytest.mark.skipif(not BUF.exists(), reason="needs buf, of the extra `dev`")


def message(contract: FileDescriptorProto, name: str) -> DescriptorProto:
    return next(found for found in contract.message_type if found.name == name)


def delete_a_field(contract: FileDescriptorProto) -> None:
    del message(contract, "Sentence").field[0]


def renumber_a_field(contract: FileDescriptorProto) -> None:
    message(contract, "EmbedRequest").field[0].number = 99


def rename_a_field(contract: FileDescriptorProto) -> None:
    message(contract, "EmbedRequest").field[0].name = "another"


def retype_a_field(contract: FileDescriptorProto) -> None:
    field = next(field for field in message(contract, "Usage").field if field.name == "tokens")
    field.type = FieldDescriptorProto.TYPE_STRING


def delete_a_method(contract: FileDescriptorProto) -> None:
    contract.service[0].method.pop(next(i for i, m in enumerate(contract.service[0].method) if m.name == "GetModel"))


def delete_an_enum_value(contract: FileDescriptorProto) -> None:
    del contract.enum_type[0].value[-1]


def with_imports(file: FileDescriptor) -> list[FileDescriptor]:
    """A file after what it imports."""
    found = [each for dependency in file.dependencies for each in with_imports(dependency)]
    return [*dict.fromkeys(found), file]


def name_as_json(kind: DescriptorProto) -> None:
    for field in kind.field:
        first, *rest = field.name.split("_")
        field.json_name = first + "".join(part.capitalize() for part in rest)
    for nested in kind.nested_type:
        name_as_json(nested)


def found_by_buf(change: Callable[[FileDescriptorProto], object], folder: Path) -> tuple[int, str]:
    """Exit code and output of buf for the contract with a change."""
    files = FileDescriptorSet()
    for file in with_imports(embed_pb2.DESCRIPTOR):
        file.CopyToProto(files.file.add())
    for kind in files.file[-1].message_type:
        name_as_json(kind)  # which protoc does, and what it made into a module has lost
    change(files.file[-1])
    (folder / "changed.binpb").write_bytes(files.SerializeToString())
    flags = ["--config", str(PROTO / "buf.yaml"), "--against", str(BASELINE)]
    command = [str(BUF), "breaking", str(folder / "changed.binpb"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_contract_breaks_no_released_client(tmp_path: Path) -> None:
    assert found_by_buf(lambda _: None, tmp_path) == (0, "")


def test_an_addition_passes(tmp_path: Path) -> None:
    def add(contract: FileDescriptorProto) -> None:
        kind = FieldDescriptorProto.TYPE_UINT32
        message(contract, "EmbedRequest").field.add(name="more", number=1000, type=kind, label=1, json_name="more")
        contract.message_type.add(name="More")

    assert found_by_buf(add, tmp_path) == (0, "")


@pytest.mark.parametrize(
    "change",
    [delete_a_field, renumber_a_field, rename_a_field, retype_a_field, delete_a_method, delete_an_enum_value],
    ids=lambda change: change.__name__,
)
def test_a_change_that_breaks_is_found(change: Callable[[FileDescriptorProto], None], tmp_path: Path) -> None:
    code, output = found_by_buf(change, tmp_path)
    assert code == VIOLATION, output


def test_the_baseline_holds_no_comments() -> None:
    files = FileDescriptorSet.FromString(BASELINE.read_bytes())
    assert not any(file.HasField("source_code_info") for file in files.file)
