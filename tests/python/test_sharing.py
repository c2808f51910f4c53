"""Models that share a device: nobody reads another's bytes, nobody starves, and idle memory goes to who asks."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest
import torch

import elastikv
from conftest import settled_usage

HAND_OVERS = 10_000
STAMPS = {"one": 0xA1, "two": 0xB2, "three": 0xC3}


def streams(device: str) -> dict[str, contextlib.AbstractContextManager]:
    """Each model computes on a stream of its own."""
    if device == "cpu":
        return {name: contextlib.nullcontext() for name in STAMPS}
    return {name: torch.cuda.stream(torch.cuda.Stream(device)) for name in STAMPS}


@pytest.mark.parametrize("kind", ["tensor", "slots"])
def test_a_model_never_reads_anothers_bytes(device, page_size, kind):
    """10,000 pages change hands; what a model finds in them are zeros and its own bytes. Checked on the device."""
    pages, dice = 4, random.Random(3)
    with elastikv.SharedMemoryPool(pages * page_size, device, park_limit=pages * page_size) as pool:
        held, windows = {}, {}
        for name in STAMPS:
            model = pool.register_model(name, 64 * page_size)
            if kind == "tensor":  # not scrubbed for its own sake: what is zeroed is zeroed as it was another's
                held[name] = elastikv.empty((0, page_size), (pages, page_size), torch.uint8, model, scrub=False)
            else:
                held[name] = elastikv.SlotTensor(model, 1, pages, page_size, torch.uint8)
                windows[name] = held[name].window(0, (page_size,))
        on = streams(device)
        leaks = {name: torch.zeros((), dtype=torch.int64, device=device) for name in STAMPS}
        if device != "cpu":
            torch.cuda.synchronize(device)
        names, last, handed = list(STAMPS), "", 0
        while handed < HAND_OVERS:
            name = dice.choice([each for each in names if each != last])
            last, length = name, dice.randint(1, pages)
            with on[name]:
                if kind == "tensor":
                    elastikv.grow_(held[name], length)
                    view = held[name]
                else:
                    held[name].grow([0], [length])
                    view = windows[name][:length]
                leaks[name] += ((view != 0) & (view != STAMPS[name])).sum()
                view.fill_(STAMPS[name])
                del view
                if kind == "tensor":
                    elastikv.shrink_(held[name], 0)
                else:
                    held[name].shrink([0], [0])
            handed += length
        if device != "cpu":
            torch.cuda.synchronize(device)
        assert [each.item() for each in leaks.values()] == [0, 0, 0]
        assert pool.global_stats().physical_usage <= pages * page_size
        created = sum(pool.get_model_stats(name).created for name in names)
        assert created > handed * page_size // 4, (created, handed)  # they did change hands, often


def test_two_equal_models_under_overload_get_equal_shares(device, page_size):
    """Four threads each, that want more than there is: neither model gets less than 45 % of the grants."""
    wanted = 2000 if device == "cpu" else 600
    with elastikv.SharedMemoryPool(2 * page_size, device, park_limit=0) as pool:
        models = {name: pool.register_model(name, 64 * page_size) for name in ("one", "two")}
        got = dict.fromkeys(models, 0)
        lock, enough, errors = threading.Lock(), threading.Event(), []
        start = threading.Barrier(8)

        def run(name: str) -> None:
            try:
                start.wait(60)
                while not enough.is_set():
                    address = pool.allocate_for_model(name, page_size, timeout=60)
                    with lock:
                        got[name] += 1
                        if sum(got.values()) >= wanted:
                            enough.set()
                    while not enough.is_set() and sum(model.quota().waiters for model in models.values()) < 4:
                        time.sleep(0)  # held until the others have come to wait
                    pool.deallocate_for_model(name, address - models[name].base_address, page_size)
            except Exception as error:
                errors.append(error)
                enough.set()

        threads = [threading.Thread(target=run, args=(name,)) for name in models for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors and not any(thread.is_alive() for thread in threads), errors
        assert min(got.values()) >= 0.45 * sum(got.values()), got
        grants = {name: model.quota().grants for name, model in models.items()}
        assert sum(grants.values()) > wanted * 0.9  # it was an overload
        assert min(grants.values()) >= 0.45 * sum(grants.values()), grants
        assert settled_usage(pool, *models.values()) == 0


def test_a_reserves_holder_never_waits_for_others(device, page_size):
    """Others wait in line for more than there is, at a higher priority: the holder does not stand in it."""
    rounds = 400 if device == "cpu" else 150
    with elastikv.SharedMemoryPool(8 * page_size, device, park_limit=8 * page_size) as pool:
        holder = pool.register_model("holder", 64 * page_size, reserve=4 * page_size)
        crowd = pool.register_model("crowd", 64 * page_size, priority=9)
        done, errors, turns = threading.Event(), [], [0]

        def run() -> None:
            try:
                while not done.is_set():
                    try:
                        address = pool.allocate_for_model("crowd", 2 * page_size, timeout=0.05)
                    except elastikv.OutOfPhysicalMemory:
                        continue
                    turns[0] += 1
                    pool.deallocate_for_model("crowd", address - crowd.base_address, 2 * page_size)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            dice = random.Random(1)
            for number in range(rounds):
                while number % 50 == 0 and crowd.quota().waiters == 0 and not errors:
                    threading.Event().wait(0.001)  # somebody is in line now
                size = dice.randint(1, 4) * page_size
                address = pool.allocate_for_model("holder", size)  # no timeout: an error if it had to wait
                pool.deallocate_for_model("holder", address - holder.base_address, size)
        finally:
            done.set()
            for thread in threads:
                thread.join(60)
        assert not errors and turns[0] > 0
        quota = holder.quota()
        assert (quota.grants, quota.refusals, quota.waiters) == (0, 0, 0)
        assert crowd.quota().grants > 0


@pytest.mark.parametrize("reserve", [0, 16])
def test_idle_memory_beyond_the_reserve_goes_to_who_asks(device, page_size, reserve):
    """A is idle at its peak, B starts: it gets all but A's reserve at once, and A's next growth works as before."""
    pages = 64
    with elastikv.SharedMemoryPool(pages * page_size, device, park_limit=pages * page_size) as pool:
        first = pool.register_model("first", 1 << 40, reserve=reserve * page_size)
        second = pool.register_model("second", 1 << 40)
        ours = elastikv.empty((0, page_size), (pages, page_size), torch.uint8, first)
        for length in range(1, pages + 1):  # in extents as they come with growth
            elastikv.grow_(ours, length)
        ours.fill_(7)
        extents = first.stats().extents
        elastikv.shrink_(ours, 0)
        first.drain()
        assert first.stats().parked == pages * page_size and extents < pages // 2
        theirs = elastikv.empty((0, page_size), (pages + 1, page_size), torch.uint8, second)
        elastikv.grow_(theirs, pages - reserve)
        assert second.quota().grants == second.quota().refusals == 0
        assert not theirs.any()
        assert first.stats().physical_usage <= reserve * page_size
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            elastikv.grow_(theirs, pages - reserve + 1)
        theirs.fill_(9)
        if reserve:
            elastikv.grow_(ours, reserve)
            assert not ours.any()
            ours.fill_(7)
            assert ours.eq(7).all() and theirs.eq(9).all()
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            elastikv.grow_(ours, reserve + 1)
        elastikv.shrink_(theirs, 0)
        for length in range(reserve + 1, pages + 1):
            elastikv.grow_(ours, length)
        assert ours[:reserve].eq(7).all() and not ours[reserve:].any()
        assert first.stats().used == pages * page_size
