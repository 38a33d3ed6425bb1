"""Calls bilm-serve over HTTP/1.1, by asyncio's streams: what a client must do, and nothing besides."""

import asyncio
import base64
import contextlib
from collections.abc import Callable

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.load.callers import CallFailedError, Sentences

ENCODINGS = ("base64", "float", "octets")
"""/v1/embeddings with either `encoding_format`, and /v1/embed with raw tensors."""

_END = b"\r\n\r\n"
_HEAD = (
    "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\naccept: {accept}\r\n"
    "content-length: {length}\r\n\r\n"
)


class HttpCaller:
    """A `LoadCaller` of bilm-serve; as many connections as there are calls at a time.

    Args:
        address: HOST:PORT.
        encoding: one of `ENCODINGS`. The first two send texts, as /v1/embeddings takes nothing else, and get float32.
        layers: of the result.
        pool: of the result.
        dtype: of raw tensors.
    """

    def __init__(self, address: str, encoding: str, layers: str, pool: str, dtype: str) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._encoding = (host, int(port)), encoding
        self._layers, self._pool, self._dtype = layers, pool, dtype
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        first: dict[str, Callable[[bytes], NDArray[np.float32]]] = {
            "base64": _first_of_base64, "float": _first_of_numbers, "octets": self._first_of_tensors
        }  # fmt: skip
        self._first = first[encoding]

    def prepare(self, sentences: Sentences) -> bytes:
        """See LoadCaller."""
        if self._encoding == "octets":
            options = {"layers": self._layers, "pooling": self._pool, "data_type": self._dtype, "omit_tokens": True}
            asked = {"options": options, "sentences": [{"tokens": tokens} for tokens in sentences]}
            path, accept = "/v1/embed", "application/octet-stream"
        else:
            path, accept = "/v1/embeddings", "*/*"
            asked = {"input": [" ".join(tokens) for tokens in sentences], "encoding_format": self._encoding}
            asked |= {"layers": self._layers, "pooling": self._pool}
        body = orjson.dumps(asked)
        return _HEAD.format(path=path, accept=accept, length=len(body)).encode() + body

    async def call(self, request: bytes) -> NDArray[np.float32]:
        """See LoadCaller."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(request)
        head = (await reader.readuntil(_END)).split(b"\r\n")
        length = next(int(line[15:]) for line in head if line.lower().startswith(b"content-length:"))
        body = await reader.readexactly(length)
        self._idle.append((reader, writer))
        if not head[0].startswith(b"HTTP/1.1 200"):
            raise CallFailedError(body.decode(errors="replace"))
        return self._first(body)

    async def close(self) -> None:
        """See LoadCaller."""
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _first_of_tensors(self, body: bytes) -> NDArray[np.float32]:
        begin = 4 + int.from_bytes(body[:4], "little")
        result = orjson.loads(body[4:begin])["results"][0]
        if "error" in result:
            raise CallFailedError(result["error"]["message"])
        tensor = result["embedding"]["tensor"]
        data = memoryview(body)[begin + tensor["offset"] :][: tensor["length"]]
        return np.frombuffer(data, np.dtype(self._dtype).newbyteorder("<")).astype(np.float32, copy=False)


def _first_of_base64(body: bytes) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(orjson.loads(body)["data"][0]["embedding"]), "<f4")


def _first_of_numbers(body: bytes) -> NDArray[np.float32]:
    return np.array(orjson.loads(body)["data"][0]["embedding"], np.float32)
