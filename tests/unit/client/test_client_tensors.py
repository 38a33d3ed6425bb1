"""Tensors and row ranges."""

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.inputs import Input
from bilm_client._core.options import DTypeName, Options
from bilm_client._core.tensors import Rows, to_array
from bilm_client.errors import MalformedResponseError


def options(dtype: DTypeName = "float32") -> Options:
    return Options("top", "none", dtype, None, False, "raise")


def rows(first: int, count: int, total: int, *, last: bool, width: int = 2) -> pb.EmbeddingRows:
    values = np.zeros((count, width), "<f4")
    tensor = pb.Tensor(data=values.tobytes(), shape=values.shape, data_type=pb.DATA_TYPE_FLOAT32)
    return pb.EmbeddingRows(embedding=pb.Embedding(tensor=tensor), first_row=first, total_rows=total, last=last)


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    exact = np.array([[1.0, -2.5], [np.inf, 3.0e38]], np.float32)
    data = (exact.view(np.uint32) >> 16).astype("<u2").tobytes()
    array = to_array(pb.Tensor(data=data, shape=[2, 2], data_type=pb.DATA_TYPE_BFLOAT16), options("bfloat16"))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, (exact.view(np.uint32) & 0xFFFF0000).view(np.float32))


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(data=b"\0" * 15, shape=[2, 2], data_type=pb.DATA_TYPE_FLOAT32),
        pb.Tensor(data=b"\0" * 16, shape=[4], data_type=pb.DATA_TYPE_FLOAT32),
        pb.Tensor(data=b"\0" * 8, shape=[2, 2], data_type=pb.DATA_TYPE_FLOAT16),
        pb.Tensor(),
    ],
)
def test_a_tensor_that_is_not_as_asked_for(tensor: pb.Tensor) -> None:
    with pytest.raises(MalformedResponseError):
        to_array(tensor, options())


@pytest.mark.parametrize(
    "ranges",
    [
        [rows(1, 2, 3, last=True)],
        [rows(0, 2, 3, last=True)],
        [rows(0, 3, 3, last=False)],
        [rows(0, 0, 3, last=False)],
        [rows(0, 2, 4, last=False), rows(1, 2, 4, last=True)],
        [rows(0, 2, 4, last=False), rows(2, 2, 4, last=True, width=3)],
    ],
)
def test_ranges_that_do_not_join(ranges: list[pb.EmbeddingRows]) -> None:
    collected = Rows(Input(None, ("a",) * 4, 4), options())
    for one in ranges[:-1]:
        collected.add(one)
    with pytest.raises(MalformedResponseError):
        collected.add(ranges[-1])


def test_rows_and_tokens_must_agree() -> None:
    collected = Rows(Input(None, ("a",), 1), options())
    collected.add(rows(0, 2, 2, last=True))
    with pytest.raises(MalformedResponseError, match="expected 1 rows, one for each token, got 2"):
        collected.embedding("v")
