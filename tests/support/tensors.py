"""Messages of the Open Inference Protocol, made and read without a client of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from bilm_api.inference import open_inference_pb2 as pb

_TYPES = {"FP32": "<f4", "FP16": "<f2", "INT32": "<i4"}


def raw_bytes(*elements: str | bytes) -> bytes:
    """Return the elements of a tensor of BYTES, each behind its length."""
    encoded = [each.encode() if isinstance(each, str) else each for each in elements]
    return b"".join(len(each).to_bytes(4, "little") + each for each in encoded)


def raw_numbers(*numbers: int) -> bytes:
    """Return the elements of a tensor of INT32."""
    return np.array(numbers, "<i4").tobytes()


def tensor(name: str, datatype: str, *shape: int, **fields: Any) -> pb.ModelInferRequest.InferInputTensor:
    """Return an input."""
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, **fields)


def parameters(**values: bool | int | str | float) -> dict[str, pb.InferParameter]:
    """Return parameters in the fields that clients choose for Python's types."""
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    found = {name: pb.InferParameter() for name in values}
    for name, value in values.items():
        setattr(found[name], fields[type(value)], value)
    return found


def texts(*sentences: str, outputs: Sequence[str] = (), **fields: Any) -> pb.ModelInferRequest:
    """Return a request with texts as raw bytes; `fields`: of the request, others are parameters."""
    inputs = [tensor("text", "BYTES", len(sentences))]
    return _request(inputs, [raw_bytes(*sentences)], outputs, fields)


def tokens(*sentences: Sequence[str], outputs: Sequence[str] = (), **fields: Any) -> pb.ModelInferRequest:
    """Return a request with tokens as raw bytes; `fields`: of the request, others are parameters."""
    flat, lengths = [token for sentence in sentences for token in sentence], list(map(len, sentences))
    inputs = [tensor("tokens", "BYTES", len(flat)), tensor("lengths", "INT32", len(lengths))]
    return _request(inputs, [raw_bytes(*flat), raw_numbers(*lengths)], outputs, fields)


def _request(
    inputs: Sequence[pb.ModelInferRequest.InferInputTensor],
    raw: Sequence[bytes],
    outputs: Sequence[str],
    fields: dict[str, Any],
) -> pb.ModelInferRequest:
    own = {name: fields.pop(name) for name in ("model_name", "model_version", "id") if name in fields}
    requested = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    given = parameters(**fields)
    return pb.ModelInferRequest(inputs=inputs, raw_input_contents=raw, outputs=requested, parameters=given, **own)


def arrays(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Return a response's outputs: arrays, or a list of the elements of BYTES."""
    found: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = _elements(raw)
            assert list(output.shape) == [len(found[output.name])]
        else:
            found[output.name] = np.frombuffer(raw, _TYPES[output.datatype]).reshape(tuple(output.shape))
    return found


def _elements(raw: bytes) -> list[bytes]:
    found = []
    while raw:
        length = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return found
