import torch
from bilm_model.contexts.packing import Packing
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(0, 9), max_size=8))
def test_each_row_is_packed_once_and_read_in_its_direction(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    assert sorted(packing.forward.tolist()) == sorted(packing.backward.tolist()) == list(range(sum(lengths)))
    steps = torch.split(packing.forward, list(packing.step_sizes)) if lengths else []
    backward_steps = torch.split(packing.backward, list(packing.step_sizes)) if lengths else []
    for t, (rows, backward_rows) in enumerate(zip(steps, backward_steps, strict=True)):
        running = [b for b in packing.order.tolist() if lengths[b] > t]
        assert rows.tolist() == [starts[b] + t for b in running]
        assert backward_rows.tolist() == [starts[b] + lengths[b] - 1 - t for b in running]
    assert packing.order[packing.inverse_order].tolist() == list(range(len(lengths)))
