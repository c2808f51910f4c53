"""Rows of an ElasticCache that become what others were: what is copied, what is shared, and that both are right."""

from __future__ import annotations

import pytest
import torch

import elastikv
from conftest import settled_usage

pytest.importorskip("transformers")

from elastikv.hf import ElasticCache
from elastikv.hf.geometry import KVGeometry, LayerShape
from elastikv.hf.rearranging import Lineage

LAYERS = 2
SHAPE = LayerShape(2, 16, 2, 16)


@pytest.fixture
def shared(device, page_size):
    with elastikv.SharedMemoryPool(256 * page_size, device, park_limit=0) as pool:
        yield pool


@pytest.fixture
def model(shared):
    return shared.register_model("model", virtual_capacity=1 << 40)


@pytest.fixture
def cache(model):
    geometry = KVGeometry((None,) * LAYERS, (SHAPE,) * LAYERS)
    with torch.inference_mode():
        yield ElasticCache(geometry, model=model, max_batch=4, max_tokens=40_000)


def states(device: str, batch: int, tokens: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, tokens, 16, generator=generator).to(device) for _ in "kv"]


def step(cache: ElasticCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    for layer in range(LAYERS):
        cache.update(keys + layer, values + layer, layer)


def require(cache: ElasticCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    for layer, held in enumerate(cache.layers):
        assert torch.equal(held.keys, keys + layer) and torch.equal(held.values, values + layer)


def test_beams_go_on_from_one_another(cache, device):
    kept = states(device, batch=4, tokens=20)
    step(cache, *kept)
    generator = torch.Generator().manual_seed(3)
    for number in range(16):
        order = torch.randint(4, (4,), generator=generator).to(device)
        cache.reorder_cache(order)
        new = states(device, batch=4, seed=number + 7)
        step(cache, *new)
        kept = [torch.cat([side[order], more], 2) for side, more in zip(kept, new)]
        if number % 5 == 4:
            cache.crop(-number)
            kept = [side[:, :, :-number] for side in kept]
        require(cache, *kept)


def test_a_lineage_knows_what_rows_have_in_common():
    lineage = Lineage()
    assert lineage.common(0, 3) == 0
    lineage.rearranged([0, 0, 2], [10, 10, 10])
    assert [lineage.common(0, 1), lineage.common(1, 2), lineage.common(2, 2)] == [10, 0, 10]
    lineage.rearranged([1, 2, 0], [14, 14, 14])
    assert [lineage.common(0, 2), lineage.common(0, 1), lineage.common(1, 2)] == [10, 0, 0]
    lineage.cropped(4)
    assert [lineage.common(0, 2), lineage.common(1, 1)] == [4, 4]


def test_beams_that_come_from_one_another_copy_only_what_is_new(cache, device, monkeypatch):
    step(cache, *states(device, batch=3, tokens=40))
    copied = []
    plain = cache.slots.batch_view
    monkeypatch.setattr(cache.slots, "batch_view", lambda *place: copied.append(place[3:]) or plain(*place))
    for order, places in (([0, 0, 0], (0, 40)), ([2, 2, 1], (40, 41)), ([0, 1, 2], None), ([1, 0, 2], (41, 43))):
        copied.clear()
        cache.reorder_cache(torch.tensor(order))
        assert copied == ([] if places is None else [places] * LAYERS)
        step(cache, *states(device, batch=3))


@pytest.mark.parametrize("tokens", [8, 64, 61])  # a page on the host has 8
@pytest.mark.parametrize("crop", [0, 3, 37])
def test_rows_of_one_prompt_share_its_memory(cache, device, shared, model, page_size, tokens, crop):
    tokens *= page_size // 4096
    crop = min(crop, tokens // 2) * (page_size // 4096)
    prompt = states(device, batch=1, tokens=tokens)
    step(cache, *prompt)
    cache.batch_repeat_interleave(4)
    assert model.stats().aliased >= 3 * (tokens // (8 * page_size // 4096) - 1) * page_size
    require(cache, *(side.expand(4, -1, -1, -1) for side in prompt))
    cache.crop(-crop)
    new = states(device, batch=4, seed=5)
    step(cache, *new)  # below what they shared, if cropped
    kept = [torch.cat([side[:, :, : tokens - crop].expand(4, -1, -1, -1), more], 2) for side, more in zip(prompt, new)]
    require(cache, *kept)
    order = [3, 1, 0, 0]
    cache.reorder_cache(torch.tensor(order, device=device))
    require(cache, *(side[order] for side in kept))
    cache.batch_select_indices(torch.tensor([2]))
    require(cache, *(side[:1] for side in kept))
    cache.close()
    assert settled_usage(shared, model) == 0


def test_forks_that_do_not_fit_leave_one_row(cache, device, shared, model, page_size):
    tokens = 60 * (page_size // 4096)  # ends within a page, which each fork copies
    prompt = states(device, batch=1, tokens=tokens)
    step(cache, *prompt)
    free = 256 - settled_usage(shared, model) // page_size
    ballast = elastikv.empty((free - 1, page_size), (free - 1, page_size), torch.uint8, model)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        cache.batch_repeat_interleave(4)
    settled_usage(shared, model)  # shares of rows that were made for nothing go behind the work on them
    assert cache.batch_size == 1 and model.stats().aliased == 0
    require(cache, *prompt)
    del ballast
    cache.batch_repeat_interleave(4)
    require(cache, *(side.expand(4, -1, -1, -1) for side in prompt))
