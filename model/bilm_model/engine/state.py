"""A sentence's state as opaque bytes, which callers keep and bring back.

Layout: 4 bytes magic, 8 bytes model version, then float32, little-endian: h (L, 2, P), c (L, 2, C), with L layers,
2 directions (forward, backward), P projection, C cells.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilm_model.config import BilmConfig
from bilm_model.errors import StateError

_MAGIC = b"bLS1"
_FLOAT = np.dtype("<f4")


LstmState = tuple[NDArray[np.float32], NDArray[np.float32]]
"""h (L, 2, P) and c (L, 2, C)."""


@dataclass(frozen=True)
class LstmStateCodec:
    """Encode and decode the states of one model (`StateCodec`).

    Attributes:
        config: the model's structure.
        version: the model's version, 16 hexadecimal digits.
    """

    config: BilmConfig
    version: str

    @property
    def n_bytes(self) -> int:
        """Length of a state."""
        return len(self._header) + _FLOAT.itemsize * (self._h_size + self._c_size)

    def encode(self, state: LstmState) -> bytes:
        """Return a state as bytes."""
        h, c = state
        return self._header + h.astype(_FLOAT).tobytes() + c.astype(_FLOAT).tobytes()

    def decode(self, data: bytes) -> LstmState:
        """Return the state that was encoded.

        Raises:
            StateError: If this model can't have written it.
        """
        if not data.startswith(_MAGIC):
            raise StateError("the state wasn't written by this service")
        if not data.startswith(self._header):
            raise StateError(f"the state belongs to another model version than {self.version}")
        if len(data) != self.n_bytes:
            raise StateError(f"the state has {len(data)} bytes, expected {self.n_bytes}")
        numbers = np.frombuffer(data, _FLOAT, offset=len(self._header))
        h, c = numbers[: self._h_size], numbers[self._h_size :]
        config = self.config
        # What isn't projected isn't clipped either; σ(o)·tanh(c) stays below 1
        _check_bound(h, config.proj_clip if config.has_lstm_projection else 1.0)
        _check_bound(c, config.cell_clip)
        shape = (config.n_layers, 2, -1)
        return h.reshape(shape), c.reshape(shape)

    @property
    def _header(self) -> bytes:
        return _MAGIC + bytes.fromhex(self.version)

    @property
    def _h_size(self) -> int:
        return 2 * self.config.n_layers * self.config.projection_dim

    @property
    def _c_size(self) -> int:
        return 2 * self.config.n_layers * self.config.cell_dim


def _check_bound(numbers: NDArray[np.float32], bound: float) -> None:
    # written so that NaN fails
    if not (np.abs(numbers) <= np.float32(bound)).all():
        raise StateError(f"the state holds a value that is not a number within ±{bound:g}")
