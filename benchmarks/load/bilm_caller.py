"""Calls bilm-serve, by the generated asyncio stub."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import grpc
import numpy as np
from bilm_api.v1 import embed_pb2 as pb
from bilm_api.v1 import embed_pb2_grpc
from numpy.typing import NDArray

from benchmarks.load.callers import CHANNEL_OPTIONS, CONNECTIONS, CallFailedError, Sentences

_LAYERS = {"all": pb.LAYERS_ALL, "top": pb.LAYERS_TOP, "average": pb.LAYERS_AVERAGE}
_POOLING = {"none": pb.POOLING_NONE, "mean": pb.POOLING_MEAN}
_DATA_TYPES = {"float32": pb.DATA_TYPE_FLOAT32, "float16": pb.DATA_TYPE_FLOAT16}
_PRIORITIES = {"interactive": pb.PRIORITY_UNSPECIFIED, "batch": pb.PRIORITY_BATCH}


def new_request(sentences: Sentences, layers: str, pool: str, dtype: str, content: str = "tokens") -> pb.EmbedRequest:
    """Return the request for some sentences, as tokens or as texts with white space between them."""
    options = pb.EmbedOptions(
        layers=_LAYERS[layers], pooling=_POOLING[pool], data_type=_DATA_TYPES[dtype], omit_tokens=True
    )
    if content == "texts":
        messages = [pb.Sentence(text=" ".join(tokens)) for tokens in sentences]
    else:
        messages = [pb.Sentence(tokens=pb.Tokens(tokens=tokens)) for tokens in sentences]
    return pb.EmbedRequest(options=options, sentences=messages)


class BilmCaller:
    """A `LoadCaller` of bilm-serve."""

    def __init__(
        self,
        target: str,
        layers: str,
        pool: str,
        dtype: str,
        content: str = "tokens",
        *,
        priority: str = "interactive",
        model: str = "",
    ) -> None:
        self._channels = [grpc.aio.insecure_channel(target, CHANNEL_OPTIONS) for _ in range(CONNECTIONS)]
        self._stubs: Iterator[Any] = cycle([embed_pb2_grpc.EmbedServiceStub(channel) for channel in self._channels])
        self._options, self._priority, self._model = (layers, pool, dtype, content), _PRIORITIES[priority], model
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def prepare(self, sentences: Sentences) -> pb.EmbedRequest:
        """See LoadCaller."""
        request = new_request(sentences, *self._options)
        request.priority, request.model = self._priority, self._model
        return request

    async def call(self, request: pb.EmbedRequest) -> NDArray[np.float32]:
        """See LoadCaller."""
        try:
            response: pb.EmbedResponse = await next(self._stubs).Embed(request, timeout=120.0, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise CallFailedError(f"{error.code().name}: {error.details()}") from error
        for result in response.results:
            if result.HasField("error"):
                raise CallFailedError(result.error.message)
        return np.frombuffer(response.results[0].embedding.tensor.data, self._dtype).astype(np.float32, copy=False)

    async def close(self) -> None:
        """See LoadCaller."""
        for channel in self._channels:
            await channel.close()
