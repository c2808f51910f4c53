"""SlotTensor: rows of tokens, each with memory for a length of its own."""

from __future__ import annotations

import gc
import random

import pytest
import torch

import elastikv
from conftest import settled_usage

ELEMENTS = 2 * 3 * 8  # of one token: 192 bytes in float32, not a power of two


@pytest.fixture
def per_page(page_size) -> float:
    return page_size / (ELEMENTS * 4)


@pytest.fixture
def slots(model, page_size):
    return elastikv.SlotTensor(model, 4, 8 * page_size // 192, ELEMENTS, torch.float32)


def mapping_calls(model) -> int:
    calls = model.stats().driver_calls
    return sum(calls[name].count for name in ("create", "map", "set_access"))


def test_nothing_is_resident_at_first(slots, shared, page_size):
    assert slots.rows == 4 and slots.token_bytes == 192 and slots.claimed_bytes == 0
    assert slots.pitch >= slots.max_tokens and slots.pitch * 192 % page_size == 0
    assert [slots.resident(row) for row in range(4)] == [0, 0, 0, 0]
    assert shared.global_stats().physical_usage == 0


def test_rows_grow_and_shrink_each_for_itself(slots, shared, model, page_size, per_page):
    slots.grow([1, 3], [5, int(2.5 * per_page)], exact=True)
    assert slots.claimed_bytes == 4 * page_size == shared.global_stats().physical_usage
    assert slots.resident(0) == 0 and slots.resident(1) == int(per_page) and slots.resident(3) == int(3 * per_page)
    slots.grow([1, 3], [2, 3])  # they have as much already
    assert slots.claimed_bytes == 4 * page_size
    slots.shrink([3, 1], [int(per_page) + 1, 5])
    assert slots.claimed_bytes == 3 * page_size  # the third page of row 3 is stranded in its extent
    slots.shrink([0, 1, 2, 3], [0, 0, 0, 0])
    assert slots.claimed_bytes == 0 and settled_usage(shared, model) == 0


def test_what_is_written_stays_where_it_is(slots, device, per_page):
    head = slots.window(0, (3, 8))
    tail = slots.window(24, (24,))
    assert head.shape == (4 * slots.pitch, 3, 8) and tail.shape == (4 * slots.pitch, 24)
    assert head.device == torch.device(device) and slots.views == 0
    base = head.untyped_storage().data_ptr()
    slots.grow([0, 2], [3, 7])
    first = slots.pitch * 2
    head[first : first + 7] = torch.arange(7.0, device=device)[:, None, None]
    tail[first : first + 7] = -1
    slots.grow([2], [slots.max_tokens])
    assert head.untyped_storage().data_ptr() == base
    assert torch.equal(head[first : first + 7, 1, 5].cpu(), torch.arange(7.0))
    assert torch.equal(tail[first : first + 7].cpu(), torch.full((7, 24), -1.0))


def test_views_keep_their_memory(slots, shared, model):
    window = slots.window(0, (ELEMENTS,))
    slots.grow([0], [4])
    held = window[:4]
    held.fill_(3)
    assert slots.views == 1
    with pytest.raises(elastikv.InvalidArgument, match="1 views are held"):
        slots.shrink([0], [0])
    del slots, window
    gc.collect()
    assert torch.equal(held.cpu(), torch.full((4, ELEMENTS), 3.0))
    del held
    gc.collect()


def test_freed_with_the_last_reference(model, shared):
    slots = elastikv.SlotTensor(model, 2, 100, 8, torch.float16)
    slots.grow([0, 1], [10, 20])
    assert shared.global_stats().physical_usage > 0
    del slots
    assert settled_usage(shared, model) == 0


def test_all_rows_or_none(slots, shared, model, page_size):
    ballast = elastikv.empty((61, page_size), (61, page_size), torch.uint8, model)  # leaves 3 pages
    slots.grow([0], [1], exact=True)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        slots.grow([0, 1, 2, 3], [slots.resident(0) + 1, 1, 1, 1], exact=True)
    assert [slots.resident(row) > 0 for row in range(4)] == [True, False, False, False]
    assert slots.claimed_bytes == page_size and settled_usage(shared, model) == 62 * page_size
    slots.grow([1, 2], [1, 1], exact=True)
    assert shared.global_stats().physical_usage == 64 * page_size
    del ballast


def test_a_row_named_twice(slots, shared, model, page_size):
    slots.grow([1, 1], [1, slots.max_tokens], exact=True)
    assert slots.resident(1) == slots.max_tokens
    slots.shrink([1, 1], [slots.max_tokens, 1])
    assert slots.claimed_bytes == page_size and settled_usage(shared, model) == page_size
    ballast = elastikv.empty((61, page_size), (61, page_size), torch.uint8, model)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        slots.grow([2, 2], [1, slots.max_tokens], exact=True)
    assert slots.claimed_bytes == page_size and slots.resident(2) == 0
    del ballast


def test_prefetched_pages_need_no_driver_call(slots, model, page_size):
    slots.grow([0], [1], exact=True)
    slots.prefetch([0, 1], [slots.max_tokens, 1])
    model.drain()
    assert model.stats().parked > 0 and model.stats().prefetches_done == 2
    before = mapping_calls(model)
    slots.grow([0, 1], [slots.max_tokens, 1], exact=True)
    assert mapping_calls(model) == before
    assert model.stats().parked == 0


@pytest.mark.parametrize(
    ("rows", "tokens", "complaint"),
    [
        ([0, 1], [1], "2 rows and 1 numbers"),
        ([4], [1], "slot 4; there are slots 0 to 3"),
        ([-1], [1], "slot -1"),
        ([0], [-1], "-1 tokens, not between 0 and"),
        ([0], [1 << 40], "tokens, not between 0 and"),
    ],
)
def test_refuses_what_is_outside(slots, rows, tokens, complaint):
    for call in (slots.grow, slots.shrink, slots.prefetch):
        with pytest.raises(elastikv.InvalidArgument, match=complaint):
            call(rows, tokens)
    assert slots.claimed_bytes == 0


def test_refuses_windows_that_are_not_within_a_token(slots):
    for offset, shape in ((-1, (2,)), (0, (ELEMENTS + 1,)), (ELEMENTS - 1, (2,)), (0, (1 << 40, 1 << 40)), (0, (0,))):
        with pytest.raises(elastikv.InvalidArgument, match="not within a token"):
            slots.window(offset, shape)


def test_refuses_shapes_that_are_none(model):
    for rows, tokens, elements in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)):
        with pytest.raises(elastikv.InvalidArgument, match="at least 1"):
            elastikv.SlotTensor(model, rows, tokens, elements, torch.float32)
    with pytest.raises(elastikv.OutOfVirtualMemory):
        elastikv.SlotTensor(model, 1 << 40, 1 << 40, 8, torch.float32)
    with pytest.raises(TypeError, match="dtype"):
        elastikv.SlotTensor(model, 1, 1, 1, "float32")


def test_a_storage_with_gaps_refuses_to_be_read_whole(slots):
    with pytest.raises(elastikv.InvalidArgument, match="gaps"):
        slots.window(0, (1,)).untyped_storage().tolist()


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_against_a_plain_model(model, shared, device, page_size, seed):
    rng = random.Random(seed)
    slots = elastikv.SlotTensor(model, 5, 3 * page_size // 192, ELEMENTS, torch.float32)
    window = slots.window(0, (ELEMENTS,))
    plain: list[list[float]] = [[] for _ in range(5)]
    for number in range(120):
        row = rng.randrange(5)
        if rng.random() < 0.7:
            new = rng.randrange(0, slots.max_tokens - len(plain[row]) + 1) // rng.choice([1, 8])
            slots.grow([row], [len(plain[row]) + new], exact=rng.random() < 0.5)
            begin = row * slots.pitch + len(plain[row])
            window[begin : begin + new] = float(number)
            plain[row] += [float(number)] * new
        else:
            del plain[row][rng.randrange(len(plain[row]) + 1) :]
            slots.shrink([row], [len(plain[row])])
        assert slots.claimed_bytes == sum(-(-len(each) * 192 // page_size) * page_size for each in plain)
        for index, each in enumerate(plain):
            assert slots.resident(index) >= len(each)
            front = window[index * slots.pitch : index * slots.pitch + len(each)]
            assert front[:, 0].tolist() == each and front[:, -1].tolist() == each
            del front
    del slots, window
    assert settled_usage(shared, model) == 0
