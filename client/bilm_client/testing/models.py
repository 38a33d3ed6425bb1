"""Models of the fakes: vectors from hashes. Shapes: L layers, T tokens, D width."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from bilm_api.constants import Feature
from bilm_api.v1 import embed_pb2 as pb
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

MAX_TOKEN_BYTES = 48
_NAME = "fake"
_DIGEST_BYTES = 16
STATE_BYTES = 2 * _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model that a fake client or server serves.

    Layer 0 depends on the token alone; the others on the token, its neighbours and the state that came with the
    sentence. Numbers are uniform in [-1, 1), the same on every machine and release, and others for each name.

    Attributes:
        name: Its name, as a client's `model` gives it.
        layer_count: Layers, the token layer included.
        width: Components of a vector.
        version: Its version; "": the name with "-1" behind it.
        features: What its server can do that earlier ones can't; without "selection" it ignores chosen rows and spans.

    Raises:
        ValueError: There is no layer or no component.
    """

    name: str = _NAME
    layer_count: int = 3
    width: int = 16
    version: str = ""
    features: tuple[str, ...] = tuple(Feature)

    def __post_init__(self) -> None:
        if self.layer_count < 1 or self.width < 1:
            raise ValueError(
                f"layer_count and width must be at least 1, got {self.layer_count} and {self.width} (model {self.name})"
            )
        object.__setattr__(self, "version", self.version or f"{self.name}-1")

    def description(self) -> pb.GetModelResponse:
        """Return what a server says about it."""
        return pb.GetModelResponse(
            name=self.name,
            version=self.version,
            layer_count=self.layer_count,
            width=self.width,
            cell_size=self.width,
            parameter_count=0,
            precision="float32",
            backend="fake",
            tokenizer="whitespace",
            max_token_bytes=MAX_TOKEN_BYTES,
            state_bytes=STATE_BYTES,
            limits=pb.Limits(
                max_sentences_per_request=1024,
                max_tokens_per_request=16384,
                max_tokens_per_sentence=16384,
                max_request_bytes=4 * 1024 * 1024,
                max_response_bytes=16 * 1024 * 1024,
                max_stream_items_in_flight=64,
            ),
            server_version="fake",
            features=self.features,
        )

    def accepts_state(self, state: bytes) -> bool:
        """Return whether a sentence may bring a state: none, or one of this model."""
        return not state or (state.startswith(self._state_magic) and len(state) == STATE_BYTES)

    def state_after(self, tokens: Sequence[str], state: bytes) -> bytes:
        """Return the state after a sentence that brought one."""
        left = state.removeprefix(self._state_magic)
        return self._state_magic + (_digest(tokens[-1]) if tokens else left.ljust(_DIGEST_BYTES, b"\0"))

    def layers(self, tokens: Sequence[str], state: bytes) -> FloatArray:
        """Return the vectors of a sentence that brought a state, (L, T, D)."""
        digests = [state.removeprefix(self._state_magic), *map(_digest, tokens), b""]
        found = np.zeros((self.layer_count, len(tokens), self.width), np.float32)
        for layer in range(self.layer_count):
            for position, (before, (token, after)) in enumerate(zip(digests, pairwise(digests[1:]), strict=False)):
                key = token if layer == 0 else b"|".join((str(layer).encode(), before, token, after))
                found[layer, position] = _uniform(self._salt + key, self.width)
        return found

    @property
    def _salt(self) -> bytes:
        return b"" if self.name == _NAME else _digest(self.name)

    @property
    def _state_magic(self) -> bytes:
        return self._salt or b"bilm-fake-state:"


def _digest(token: str) -> bytes:
    return hashlib.blake2b(token.encode(), digest_size=_DIGEST_BYTES).digest()


def _uniform(key: bytes, width: int) -> FloatArray:
    """(D,) of uniform numbers: no generator of numpy's, whose streams may change from release to release."""
    numbers = np.frombuffer(hashlib.shake_256(key).digest(2 * width), "<i2")
    return numbers.astype(np.float32) / np.float32(32768)
