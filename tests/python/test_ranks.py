"""Ranks that grow together: four processes of gloo on the CPU, started once, run all of ranks_worker.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elastikv
from conftest import settled_usage
from elastikv import _core
from elastikv.distributed import Ranks

RANKS = 4


def test_four_ranks_and_pairs_of_them_stay_in_step(tmp_path):
    worker = Path(__file__).with_name("ranks_worker.py")
    logs = [(tmp_path / f"log-{rank}").open("w+") for rank in range(RANKS)]
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(RANKS), str(tmp_path)], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = []
    for log in logs:
        log.seek(0)
        said.append(log.read())
        log.close()
    assert codes == [0] * (RANKS - 1) + [9], "\n".join(said)
    assert [(tmp_path / f"done-{rank}").exists() for rank in range(RANKS)] == [True] * (RANKS - 1) + [False]


def test_without_a_process_group():
    with pytest.raises(elastikv.InvalidArgument, match="init_process_group"):
        Ranks()


def tensor(model, page_size, pages=8):
    return elastikv.empty((0, page_size), (pages, page_size), torch.uint8, model)


def test_staged_growth_shows_at_commit(shared, model, page_size):
    first, second = tensor(model, page_size), tensor(model, page_size)
    staged = _core.StagedGrowth([(first, 3), (second, 2)])
    assert model.stats().used == 5 * page_size
    assert first.shape[0] == second.shape[0] == 0
    with pytest.raises(elastikv.InvalidArgument, match="under way"):
        elastikv.grow_(first, 1)
    with pytest.raises(elastikv.InvalidArgument, match="under way"):
        _core.StagedGrowth([(first, 1)])
    staged.commit()
    staged.drop()
    assert (first.shape[0], second.shape[0]) == (3, 2)
    assert not first.any() and first.untyped_storage().nbytes() == 3 * page_size
    elastikv.grow_(first, 4)


def test_staged_growth_goes_back_whole(shared, model, page_size):
    first, second = tensor(model, page_size), tensor(model, page_size)
    elastikv.grow_(first, 1, exact=True)
    first.fill_(9)
    view = first[:1]
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        _core.StagedGrowth([(first, 8), (second, 8), (tensor(model, page_size, 60), 60)])
    assert model.stats().used == page_size
    staged = _core.StagedGrowth([(first, 4)])
    del staged
    assert model.stats().used == page_size
    assert view.eq(9).all() and first.shape[0] == 1
    elastikv.grow_(first, 8)
    assert view.eq(9).all() and not first[1:].any()


def test_staged_growth_in_a_pool_that_closes(device, page_size):
    shared = elastikv.SharedMemoryPool(8 * page_size, device)
    model = shared.register_model("model", 64 * page_size)
    one = tensor(model, page_size)
    staged = _core.StagedGrowth([(one, 4)])
    shared.unregister_model("model")
    staged.drop()
    model.drain()
    assert model.stats().used == 0
    with pytest.raises(elastikv.ModelNotFound):
        _core.StagedGrowth([(one, 4)])
    assert one.shape[0] == 0


def test_rows_are_staged_and_kept_or_given_back(shared, model, page_size):
    slots = elastikv.SlotTensor(model, 3, 8, page_size // 4, torch.float32)  # a token a page
    slots.grow([0], [2], exact=True)
    staged = _core.StagedSlots(slots, [0, 2], [5, 3])
    assert [slots.resident(row) for row in range(3)] == [5, 0, 3]
    assert model.stats().used == 8 * page_size
    staged.drop()
    staged.drop()
    assert [slots.resident(row) for row in range(3)] == [2, 0, 0]
    assert model.stats().used == 2 * page_size
    staged = _core.StagedSlots(slots, [0, 2], [4, 3])
    staged.commit()
    del staged
    assert [slots.resident(row) for row in range(3)] == [4, 0, 3]
    hog = shared.allocate_for_model("model", 55 * page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        _core.StagedSlots(slots, [0, 1], [5, 8])  # two pages are left
    with pytest.raises(elastikv.InvalidArgument, match="9 tokens"):
        _core.StagedSlots(slots, [0], [9])
    assert [slots.resident(row) for row in range(3)] == [4, 0, 3]
    shared.deallocate_for_model("model", hog - model.base_address, 55 * page_size)
    # What a row grew to behind it goes too: a row has no holes.
    staged = _core.StagedSlots(slots, [0], [6])
    slots.grow([0], [8], exact=True)
    del staged
    assert slots.resident(0) == 4
    slots.grow([0], [7], exact=True)
    slots.shrink([0], [4])
    # What was shrunk meanwhile goes once.
    staged = _core.StagedSlots(slots, [0, 1], [8, 4])
    slots.shrink([0, 1], [6, 0])
    del staged
    assert [slots.resident(row) for row in range(3)] == [4, 0, 3]
    slots.shrink([0, 1, 2], [0, 0, 0])
    assert settled_usage(shared, model) == 0
