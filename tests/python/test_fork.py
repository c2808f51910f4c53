"""Rows of slots that share a prefix: charged once, written apart, gone with the last of them."""

from __future__ import annotations

import gc

import pytest
import torch

import elastikv
from conftest import settled_usage


def make(model, rows=8, max_tokens=256, **options):
    """A token is 1/4 page, and extents have 2 pages, so 8 tokens."""
    options.setdefault("largest_extent", 2 * model.page_size)
    return elastikv.SlotTensor(model, rows, max_tokens, model.page_size // 8, torch.bfloat16, **options)


def row(slots, index, begin, end):
    window = slots.window(0, (slots.token_bytes // 2,))
    return window[index * slots.pitch + begin : index * slots.pitch + end]


def fill(slots, index, begin, end):
    tokens = torch.arange(begin, end, dtype=torch.bfloat16, device=slots.model.device)
    row(slots, index, begin, end).copy_(tokens.view(-1, 1).expand(-1, slots.token_bytes // 2))


def content(slots, index, begin, end):
    part = row(slots, index, begin, end)
    assert part.eq(part[:, :1]).all()
    return part[:, 0].tolist()


def test_a_fork_holds_the_prefix_once(shared, model, page_size):
    slots = make(model)
    slots.grow([0], [100])
    fill(slots, 0, 0, 100)
    one = settled_usage(shared, model)
    for other in range(1, 8):
        slots.fork(other, 0, 86)
        assert content(slots, other, 0, 86) == list(range(86))
        assert slots.resident(other) == 88
    # 10 extents of 8 tokens are shared; 6 tokens, 2 pages, are copied for each.
    assert settled_usage(shared, model) == one + 7 * 2 * page_size
    assert model.stats().aliased == 7 * 20 * page_size
    with torch.inference_mode():
        for other in range(8):
            slots.grow([other], [96])
            row(slots, other, 86, 96).fill_(200 + other)
        for other in range(8):
            assert content(slots, other, 0, 96) == list(range(86)) + [200 + other] * 10


@pytest.mark.parametrize("tokens", [2048, 2043, 2000])
def test_forks_of_a_long_prompt_map_few_extents_and_copy_little(device, tokens, page_size):
    # 512 pages: on a GPU 1 GiB, 16k tokens of 64 KiB. What a fork costs there is its driver calls, 25 us a handle.
    with elastikv.SharedMemoryPool(physical_limit=1024 * page_size, device=device, park_limit=0) as shared:
        model = shared.register_model("prompts", virtual_capacity=1 << 40)
        slots = make(model, rows=9, max_tokens=4096, largest_extent=64 * page_size)
        slots.grow([0], [2048], exact=True)
        fill(slots, 0, 0, 2048)
        one = settled_usage(shared, model)
        for other in range(1, 9):
            before = {name: each.count for name, each in model.stats().driver_calls.items()}
            slots.fork(other, 0, tokens)
            made = {name: each.count - before.get(name, 0) for name, each in model.stats().driver_calls.items()}
            assert made["map"] <= 24 and made["set_access"] <= 24 and made["create"] <= 4
        assert settled_usage(shared, model) <= 1.15 * one
        slots.grow(list(range(1, 9)), [tokens + 1] * 8)  # what they share gives no right to map an eighth of it ahead
        assert settled_usage(shared, model) <= 1.15 * one
        assert [slots.forked(other) for other in range(9)] == [0] + [-(-tokens // 4) * 4] * 8
        for other in range(1, 9):
            assert content(slots, other, 0, tokens) == content(slots, 0, 0, tokens)
        slots.shrink([3], [100])
        assert slots.forked(3) == 100 and slots.forked(4) >= tokens
        del slots
        gc.collect()
        assert settled_usage(shared, model) == 0


@pytest.mark.parametrize("first", [0, 1])
def test_the_prefix_lives_until_the_last_row_goes(shared, model, first, page_size):
    slots = make(model)
    slots.grow([0], [64])
    fill(slots, 0, 0, 64)
    slots.fork(1, 0, 64)
    assert settled_usage(shared, model) == 16 * page_size
    slots.shrink([first], [0])
    assert settled_usage(shared, model) == 16 * page_size and model.stats().aliased == 0
    assert content(slots, 1 - first, 0, 64) == list(range(64))
    slots.fork(first, 1 - first, 30)  # back again
    assert content(slots, first, 0, 30) == list(range(30))
    slots.shrink([0, 1], [0, 0])
    assert settled_usage(shared, model) == 0


def test_a_write_below_the_fork_is_preceded_by_a_copy(shared, model, page_size):
    slots = make(model)
    slots.grow([0], [64])
    fill(slots, 0, 0, 64)
    slots.fork(1, 0, 64)
    slots.make_writable(1, 12, 20)  # within 2 extents
    assert settled_usage(shared, model) == 20 * page_size
    row(slots, 1, 12, 20).fill_(250)
    assert content(slots, 0, 0, 64) == list(range(64))
    assert content(slots, 1, 0, 64) == [*range(12), *[250] * 8, *range(20, 64)]
    slots.make_writable(0, 0, 64)
    assert model.stats().aliased == 0


def test_a_row_cropped_into_its_prefix_goes_on_by_itself(model):
    slots = make(model)
    slots.grow([0], [64])
    fill(slots, 0, 0, 64)
    slots.fork(1, 0, 64)
    slots.shrink([1], [20])
    slots.make_writable(1, 20, 21)
    slots.grow([1], [64])
    row(slots, 1, 20, 64).fill_(7)
    assert content(slots, 0, 0, 64) == list(range(64))
    assert content(slots, 1, 0, 64) == list(range(20)) + [7] * 44


def test_what_can_be_no_fork(shared, model):
    slots = make(model)
    slots.grow([0, 1], [40, 4])
    usage = shared.global_stats().physical_usage
    for to, source, tokens in ((2, 0, 41), (0, 0, 4), (1, 0, 4), (8, 0, 4), (2, -1, 4), (2, 0, -1), (2, 0, 257)):
        with pytest.raises(elastikv.InvalidArgument):
            slots.fork(to, source, tokens)
    with pytest.raises(elastikv.InvalidArgument):
        slots.make_writable(8, 0, 1)
    slots.fork(2, 0, 0)
    assert slots.resident(2) == 0 and shared.global_stats().physical_usage == usage


def test_a_fork_that_does_not_fit_changes_nothing(device, page_size):
    with elastikv.SharedMemoryPool(physical_limit=16 * page_size, device=device, park_limit=0) as shared:
        model = shared.register_model("slots", 1 << 40)
        slots = make(model)
        slots.grow([0], [64])
        fill(slots, 0, 0, 64)
        with pytest.raises(torch.OutOfMemoryError):
            slots.fork(1, 0, 63)  # a page to be copied
        assert slots.resident(1) == 0
        slots.fork(1, 0, 64)
        with pytest.raises(torch.OutOfMemoryError):
            slots.make_writable(1, 0, 64)
        assert content(slots, 1, 0, 64) == list(range(64))
        del slots
        gc.collect()
        assert settled_usage(shared, model) == 0


def test_a_pool_aliases_ranges(device, page_size):
    with elastikv.VirtualMemoryPool(64 * page_size, device=device, park_limit=0) as pool:
        pool.allocate(0, 4 * page_size)
        pool.alias(8 * page_size, 0, 4 * page_size)
        assert pool.physical_memory_usage == 4 * page_size and pool.stats().aliased == 4 * page_size
        with pytest.raises(elastikv.AlreadyMapped):
            pool.alias(8 * page_size, 0, page_size)
        with pytest.raises(elastikv.NotMapped):
            pool.alias(16 * page_size, 4 * page_size, page_size)
        with pytest.raises(elastikv.InvalidAlignment):
            pool.alias(16 * page_size + 1, 0, page_size)
        pool.alias(16 * page_size, 0, 4 * page_size, shared=0)  # copied
        assert pool.physical_memory_usage == 8 * page_size
        pool.make_writable(8 * page_size, 1)
        assert pool.physical_memory_usage == 12 * page_size and pool.stats().aliased == 0


@pytest.mark.cuda
def test_forks_follow_the_stream_that_wrote_the_prefix():
    with elastikv.SharedMemoryPool(physical_limit=256 << 20, device="cuda", park_limit=0) as shared:
        model = shared.register_model("slots", 1 << 40)
        slots = make(model)
        slots.grow([0], [64])
        torch.cuda._sleep(200_000_000)
        fill(slots, 0, 0, 64)
        slots.fork(1, 0, 63)  # its copy waits for the device, the caller does not
        slots.shrink([0], [0])
        assert content(slots, 1, 0, 63) == list(range(63))
