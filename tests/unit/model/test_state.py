import numpy as np
import pytest
from bilm_model.config import SIZES, BilmConfig
from bilm_model.engine.state import LstmStateCodec
from bilm_model.errors import StateError

CODEC = LstmStateCodec(SIZES["tiny"], "0123456789abcdef")
H, C = np.full((2, 2, 8), 0.5, np.float32), np.full((2, 2, 32), -3.0, np.float32)


def test_round_trip() -> None:
    h, c = CODEC.decode(CODEC.encode((H, C)))
    assert np.array_equal(h, H)
    assert np.array_equal(c, C)


def test_original_size_takes_74_kilobytes() -> None:
    assert LstmStateCodec(SIZES["original"], "0" * 16).n_bytes == 73_740


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"something else", "wasn't written by this service"),
        (LstmStateCodec(SIZES["tiny"], "f" * 16).encode((H, C)), "another model version"),
        (CODEC.encode((H, C))[:-1], "651 bytes, expected 652"),
        (CODEC.encode((H, C)) + b"x", "653 bytes, expected 652"),
        (CODEC.encode((H * np.nan, C)), "not a number within ±3"),
        (CODEC.encode((H, C * np.inf)), "not a number within ±3"),
        (CODEC.encode((H * 6.1, C)), "not a number within ±3"),
        (CODEC.encode((H, C * 1.001)), "not a number within ±3"),
    ],
)
def test_what_this_model_did_not_write(state: bytes, message: str) -> None:
    with pytest.raises(StateError, match=message):
        CODEC.decode(state)


def test_without_projection_outputs_stay_below_one() -> None:
    codec = LstmStateCodec(BilmConfig(4, ((1, 8),), projection_dim=8, cell_dim=8), "0" * 16)
    h = np.full((2, 2, 8), 1.5, np.float32)
    with pytest.raises(StateError, match="±1"):
        codec.decode(codec.encode((h, h)))
