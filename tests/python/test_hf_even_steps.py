"""Steps of one token for rows that hold as many: what they store, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import elastikv

pytest.importorskip("transformers")

from elastikv.hf import Slots
from elastikv.hf.geometry import KVGeometry, LayerShape
from elastikv.hf.step import EvenStep
from test_hf_flash import states


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_even_steps_store_states_however_they_lie(device, model, apart, dtype):
    """On CUDA by one kernel in this dtype, else contiguous states take one launch and parts of one projection two."""
    slots = Slots(
        KVGeometry((None,) * 2, (LayerShape(2, 8, 2, 8),) * 2), model=model, rows=3, max_tokens=8, dtype=dtype
    )
    slots.reserve([0, 1, 2], [3] * 3)
    slots.set_lengths([0, 1, 2], [3] * 3)
    step = EvenStep(slots, 3)
    query = states(2, 3, 1, 8, device, dtype, 0)
    joined = torch.cat([states(2, 3, 1, 8, device, dtype, number) for number in (1, 2)], 1)
    keys, values = (part if apart else part.contiguous() for part in joined.split(2, 1))
    assert keys.is_contiguous() != apart
    step.compute(1, query, keys, values, None, None)
    for side, windows in ((keys, slots.keys), (values, slots.values)):
        for row in range(3):
            assert torch.equal(windows[1][row * slots.pitch + 3], side[row, :, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_even_steps_store_rows_that_lie_far_apart(device, shared, dtype):
    """Further than 32-bit offsets reach, from row to row: all rows get their token, and no other."""
    heads = 32 // dtype.itemsize
    shape = LayerShape(heads, 128, heads, 128)
    far = 2**30 // (2 * heads * 128)  # tokens: two rows reach as far as 32 bits, five don't
    handle = shared.register_model("far", virtual_capacity=1 << 36)
    slots = Slots(KVGeometry((None,), (shape,)), model=handle, rows=5, max_tokens=far, dtype=dtype)
    slots.reserve(range(5), [3] * 5)
    slots.set_lengths(range(5), [3] * 5)
    step = EvenStep(slots, 5)
    query, keys, values = (states(heads, 5, 1, 128, device, dtype, number) for number in range(3))
    step.compute(0, query, keys, values, None, None)
    for side, windows in ((keys, slots.keys), (values, slots.values)):
        for row in range(5):
            held = windows[0][row * slots.pitch : row * slots.pitch + 4]
            assert torch.equal(held[3], side[row, :, 0])
            assert not held[:3].any()
    slots.drop()


def test_even_steps_refuse_what_is_wrong(device, model):
    slots = Slots(
        KVGeometry((None,), (LayerShape(2, 8, 2, 8),)), model=model, rows=2, max_tokens=8, dtype=torch.float32
    )
    slots.reserve([0], [3])
    slots.set_lengths([0], [3])
    with pytest.raises(elastikv.InvalidArgument, match=r"rows of \[3, 0\] tokens"):
        EvenStep(slots, 2)
    step = EvenStep(slots, 1)
    query = states(4, 1, 1, 8, device, torch.float32, 0)
    for shape in ((3, 1, 1, 8), (2, 1, 1, 9), (2, 1, 6 + slots.pitch, 8), (2, 9, 1, 8)):
        wrong = states(*shape[:3], shape[3], device, torch.float32, 1)
        with pytest.raises(elastikv.InvalidArgument, match="do not fit behind 3 tokens"):
            step.compute(0, query, wrong, wrong, None, None)
    good, other = (states(2, 1, 1, 8, device, torch.float32, 1) for _ in range(2))
    for wrong in (other.double(), other.to("meta")):
        for pair in ((good, wrong), (wrong, good)):
            with pytest.raises(elastikv.InvalidArgument, match="do not fit behind 3 tokens"):
                step.compute(0, query, *pair, None, None)
            with pytest.raises(elastikv.InvalidArgument, match=r"brought|holds"):
                step.attend(0, query, *pair, None, None)
    with pytest.raises(elastikv.InvalidArgument, match="inference_mode"):
        step.compute(0, query, good, other.requires_grad_(), None, None)
    assert slots.lengths == [3, 0]
