"""A call's input tensors: texts, or tokens with the number that each sentence has. Nothing behind this file sees bytes.

A tensor's shape is checked before its elements are read, so that no request takes longer than its limits allow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from struct import Struct
from struct import error as StructError
from typing import Any, Final

import numpy as np
from bilm_api.constants import Reason
from bilm_api.inference import open_inference_pb2 as pb

from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.errors import RefusalError
from bilm_server.protocols.kserve.parameters import check_names, shown

TEXT, TOKENS, LENGTHS = "text", "tokens", "lengths"
_DATATYPES: Final = {TEXT: "BYTES", TOKENS: "BYTES", LENGTHS: "INT32"}
_CONTENTS: Final = {"BYTES": "bytes_contents", "INT32": "int_contents"}
_EXPECTED: Final = f"expected {TEXT}, or {TOKENS} and {LENGTHS}"
_LENGTH: Final = Struct("<I")  # int.from_bytes takes half as long again


@dataclass(frozen=True)
class _Input:
    """A tensor.

    Attributes:
        name: known.
        size: number of its elements, as its shape has it.
        contents: elements in a field of their type; None where `raw` has them.
        raw: elements as bytes.
    """

    name: str
    size: int
    contents: pb.InferTensorContents | None
    raw: bytes = b""


def metadata() -> list[pb.ModelMetadataResponse.TensorMetadata]:
    """Return what inputs there are."""
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=[-1])
        for name, datatype in _DATATYPES.items()
    ]


def parse_inputs(request: pb.ModelInferRequest, limits: RequestLimits) -> list[str] | list[list[str]]:
    """Return a request's sentences, as texts or as tokens.

    Raises:
        RefusalError: of the whole call, naming what was expected and found.
    """
    tensors = _tensors(request)
    if tensors.keys() == {TEXT}:
        limits.check_count(tensors[TEXT].size)
        return _strings(tensors[TEXT])
    if tensors.keys() != {TOKENS, LENGTHS}:
        raise _malformed("inputs", f"{_EXPECTED}; found {', '.join(sorted(tensors)) or 'none'}")
    limits.check_count(tensors[LENGTHS].size)
    n_tokens = tensors[TOKENS].size
    if n_tokens > limits.tokens:
        raise RefusalError(Reason.TOO_MANY_TOKENS, f"{n_tokens} tokens are more than {limits.tokens}")
    return _cut(_strings(tensors[TOKENS]), _numbers(tensors[LENGTHS]))


def _tensors(request: pb.ModelInferRequest) -> Mapping[str, _Input]:
    n_inputs, n_raw = len(request.inputs), len(request.raw_input_contents)
    if n_inputs > 2:
        raise _malformed("inputs", f"{_EXPECTED}; found {n_inputs} inputs")
    if n_raw not in (0, n_inputs):
        raise _malformed("raw_input_contents", f"expected none, or one for each of {n_inputs} inputs; found {n_raw}")
    found: dict[str, _Input] = {}
    for index, tensor in enumerate(request.inputs):
        size = _checked_size(tensor)
        if tensor.name in found:
            raise _malformed("inputs", f"{tensor.name} is there twice")
        if n_raw and tensor.contents.ListFields():
            raise _malformed(tensor.name, "expected raw_input_contents or contents, found both")
        if n_raw:
            found[tensor.name] = _Input(tensor.name, size, None, request.raw_input_contents[index])
        else:
            found[tensor.name] = _Input(tensor.name, size, tensor.contents)
    return found


def _checked_size(tensor: pb.ModelInferRequest.InferInputTensor) -> int:
    """Return the elements that a tensor's shape promises; name, data type, shape and parameters are checked."""
    name = tensor.name
    expected = _DATATYPES.get(name)
    if expected is None:
        raise _malformed("inputs", f"unknown name {shown(name)} ({_EXPECTED})")
    if tensor.datatype != expected:
        raise _malformed(name, f"expected datatype {expected}, found {shown(tensor.datatype)}")
    if len(tensor.shape) != 1:
        raise _malformed(name, f"expected a shape of 1 axis, found {len(tensor.shape)}")
    (size,) = tensor.shape
    if size < 0:
        raise _malformed(name, f"expected a shape from [0], found [{size}]")
    # Of the protocol's extension for binary data in HTTP; KServe's client sends it over gRPC, too
    check_names(f"{name}: parameters", tensor.parameters, ("binary_data_size",))
    return size


def _strings(tensor: _Input) -> list[str]:
    """Return the elements of a tensor of BYTES."""
    found: list[str] = []
    try:
        if tensor.contents is not None:
            for data in _typed(tensor, tensor.contents):
                found.append(data.decode())
        else:
            _split(tensor, found)
    except UnicodeDecodeError:
        raise _malformed(tensor.name, f"element {len(found)} isn't UTF-8") from None
    return found


def _split(tensor: _Input, found: list[str]) -> None:
    """Append the elements of raw bytes, each of which stands behind its length."""
    data, end = tensor.raw, 0
    try:
        for _ in range(tensor.size):
            begin = end + _LENGTH.size
            end = begin + _LENGTH.unpack_from(data, end)[0]
            found.append(data[begin:end].decode())
        is_whole = end == len(data)
    except StructError:  # the bytes end before a length
        is_whole = False
    if not is_whole:
        expected = f"expected {tensor.size} elements behind their lengths"
        raise _malformed(tensor.name, f"{expected}, which end with the last of {len(data)} raw bytes")


def _numbers(tensor: _Input) -> list[int]:
    """Return the elements of a tensor of INT32."""
    if tensor.contents is not None:
        return list(_typed(tensor, tensor.contents))
    expected = tensor.size * np.dtype("<i4").itemsize
    if len(tensor.raw) != expected:
        raise _malformed(tensor.name, f"expected {expected} raw bytes, found {len(tensor.raw)}")
    numbers: list[int] = np.frombuffer(tensor.raw, "<i4").tolist()
    return numbers


def _typed(tensor: _Input, contents: pb.InferTensorContents) -> Any:
    """Return the elements in the field of a tensor's type."""
    expected = _CONTENTS[_DATATYPES[tensor.name]]
    for field, _ in contents.ListFields():
        if field.name != expected:
            raise _malformed(tensor.name, f"expected {expected}, found {field.name}")
    elements: Sequence[Any] = getattr(contents, expected)
    if len(elements) != tensor.size:
        raise _malformed(tensor.name, f"expected the {tensor.size} elements of its shape, found {len(elements)}")
    return elements


def _cut(tokens: list[str], lengths: Sequence[int]) -> list[list[str]]:
    """Return the tokens of each sentence."""
    if min(lengths) < 0:
        raise _malformed(LENGTHS, f"expected numbers from 0, found {min(lengths)}")
    if sum(lengths) != len(tokens):
        raise _malformed(LENGTHS, f"expected a sum of {len(tokens)}, the elements of {TOKENS}; found {sum(lengths)}")
    return [tokens[first:end] for first, end in pairwise(accumulate(lengths, initial=0))]


def _malformed(name: str, message: str) -> RefusalError:
    return RefusalError(Reason.MALFORMED_REQUEST, f"{name}: {message}")
