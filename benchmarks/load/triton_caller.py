"""Calls NVIDIA Triton, by its own asyncio client, on which pytriton's rests."""

from collections.abc import Iterator
from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.callers import CHANNEL_OPTIONS, CONNECTIONS, CallFailedError, Sentences

MODEL = "bilm"
INPUT = "sentence"
OUTPUT = "vectors"


class TritonCaller:
    """A `LoadCaller` of Triton; one sentence a call."""

    def __init__(self, target: str) -> None:
        self._library: Any = import_module("tritonclient.grpc.aio")
        self._error: Any = import_module("tritonclient.utils").InferenceServerException
        client = self._library.InferenceServerClient
        self._clients = [client(target, channel_args=CHANNEL_OPTIONS) for _ in range(CONNECTIONS)]
        self._turn: Iterator[Any] = cycle(self._clients)

    def prepare(self, sentences: Sentences) -> Any:
        """See LoadCaller."""
        (tokens,) = sentences
        tensor = self._library.InferInput(INPUT, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[" ".join(tokens).encode()]], dtype=object))
        return [tensor]

    async def call(self, request: Any) -> NDArray[np.float32]:
        """See LoadCaller."""
        try:
            response = await next(self._turn).infer(MODEL, request)
        except self._error as error:
            raise CallFailedError(str(error)) from error
        vectors: NDArray[np.float32] = response.as_numpy(OUTPUT).reshape(-1)
        return vectors

    async def close(self) -> None:
        """See LoadCaller."""
        for client in self._clients:
            await client.close()
