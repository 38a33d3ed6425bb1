"""Calls bilm-serve by the Open Inference Protocol, by the generated asyncio stub."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import grpc
import numpy as np
from bilm_api.inference import open_inference_pb2 as pb
from bilm_api.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from numpy.typing import NDArray

from benchmarks.load.callers import CHANNEL_OPTIONS, CONNECTIONS, CallFailedError, Sentences

_DATA_TYPES = {"float32": "FP32", "float16": "FP16"}


class KserveCaller:
    """A `LoadCaller` of bilm-serve."""

    def __init__(self, target: str, layers: str, pool: str, dtype: str) -> None:
        self._channels = [grpc.aio.insecure_channel(target, CHANNEL_OPTIONS) for _ in range(CONNECTIONS)]
        self._stubs: Iterator[Any] = cycle([GRPCInferenceServiceStub(channel) for channel in self._channels])
        self._parameters = {"layers": layers, "pooling": pool, "data_type": _DATA_TYPES[dtype]}
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def prepare(self, sentences: Sentences) -> pb.ModelInferRequest:
        """See LoadCaller."""
        tokens = [token.encode() for sentence in sentences for token in sentence]
        lengths = np.array(list(map(len, sentences)), "<i4")
        request = pb.ModelInferRequest()
        request.inputs.add(name="tokens", datatype="BYTES", shape=[len(tokens)])
        request.inputs.add(name="lengths", datatype="INT32", shape=[len(lengths)])
        request.raw_input_contents.append(b"".join([len(token).to_bytes(4, "little") + token for token in tokens]))
        request.raw_input_contents.append(lengths.tobytes())
        for name, value in self._parameters.items():
            request.parameters[name].string_param = value
        return request

    async def call(self, request: pb.ModelInferRequest) -> NDArray[np.float32]:
        """See LoadCaller."""
        try:
            response: pb.ModelInferResponse = await next(self._stubs).ModelInfer(
                request, timeout=120.0, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise CallFailedError(f"{error.code().name}: {error.details()}") from error
        vectors = np.frombuffer(response.raw_output_contents[0], self._dtype).reshape(tuple(response.outputs[0].shape))
        first = vectors[0] if len(response.outputs) == 1 else vectors[: _first_length(response)].swapaxes(0, -2)
        return first.astype(np.float32, copy=False).reshape(-1)

    async def close(self) -> None:
        """See LoadCaller."""
        for channel in self._channels:
            await channel.close()


def _first_length(response: pb.ModelInferResponse) -> int:
    return int(np.frombuffer(response.raw_output_contents[1], "<i4")[0])
