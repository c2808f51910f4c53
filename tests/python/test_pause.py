"""Models that sleep and wake, and memory that is spilled: addresses, content, charges, and what is refused."""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
import time

import pytest
import torch

import elastikv
from conftest import settled_usage


def kv(model, tokens, fill, tag="kv"):
    """A token is a quarter of a page."""
    tensor = elastikv.empty(
        (tokens, model.page_size // 8), (1024, model.page_size // 8), torch.bfloat16, model, tag=tag
    )
    return tensor.fill_(fill)


def test_a_paused_model_has_no_memory_and_wakes_with_its_content(shared, model, page_size):
    cache = kv(model, 41, 3.0)
    weights = elastikv.zeros((page_size,), torch.uint8, model, tag="weights").fill_(7)
    addresses = cache.data_ptr(), weights.data_ptr()
    held = settled_usage(shared, model)
    assert model.pause() == held
    stats = model.stats()
    assert model.paused and stats.physical_usage == 0 and stats.paused == stats.backup == held
    assert shared.global_stats().physical_usage == 0 and shared.global_stats().backup == held
    assert model.pause() == 0  # it sleeps already
    assert model.resume() == held
    assert not model.paused and model.resume() == 0
    assert (cache.data_ptr(), weights.data_ptr()) == addresses
    assert (cache == 3).all() and (weights == 7).all()
    assert settled_usage(shared, model) == held and shared.global_stats().backup == 0
    elastikv.grow_(cache, 100)
    assert (cache[:41] == 3).all() and (cache[41:] == 0).all()


def test_without_a_backup_the_content_is_gone_and_no_other_models_shows(shared, model, page_size):
    cache = kv(model, 160, 3.0)
    assert model.pause("none") == 40 * page_size
    assert model.stats().backup == 0 and model.stats().paused == 40 * page_size
    other = shared.register_model("other", 4096 * page_size)
    theirs = kv(other, 240, 5.0)  # 60 of the 64 pages
    del theirs
    gc.collect()
    settled_usage(shared, other)
    assert model.resume() == 40 * page_size
    assert cache.shape[0] == 160 and not (cache == 5).any()


def test_another_model_uses_the_memory_meanwhile(shared, model, page_size):
    cache = kv(model, 160, 3.0)
    model.pause()
    other = shared.register_model("other", 4096 * page_size)
    theirs = kv(other, 240, 5.0)
    with pytest.raises(elastikv.OutOfPhysicalMemory) as refused:
        model.resume()
    assert "other" in str(refused.value)
    assert model.paused and model.stats().backup == 40 * page_size
    with pytest.raises(torch.OutOfMemoryError):
        model.resume(timeout=0.0)
    woken = threading.Event()

    def wake():
        model.resume(timeout=60.0)
        woken.set()

    waiter = threading.Thread(target=wake)
    waiter.start()
    while shared.quotas()["model"].waiters == 0:
        assert waiter.is_alive()
    assert other.pause() == 60 * page_size
    waiter.join()
    assert woken.is_set() and (cache == 3).all()
    del cache
    gc.collect()
    settled_usage(shared, model)
    other.resume()
    assert (theirs == 5).all()


def test_a_wait_for_a_resume_is_called_off(shared, model, page_size):
    cache = kv(model, 160, 3.0)
    model.pause()
    theirs = kv(shared.register_model("other", 4096 * page_size), 240, 5.0)
    cancel = elastikv.Cancellation()
    cancel.cancel()
    with pytest.raises(elastikv.WaitCancelled):
        model.resume(timeout=math.inf, cancel=cancel)
    assert model.paused
    del theirs
    gc.collect()
    model.resume(timeout=60.0)
    assert (cache == 3).all()


def test_kinds_sleep_and_wake_by_their_tags(shared, model, page_size):
    cache = kv(model, 40, 3.0)
    weights = elastikv.zeros((2 * page_size,), torch.uint8, model, tag="weights").fill_(7)
    assert model.pause("none", tags=["kv"]) == 10 * page_size
    assert (weights == 7).all()
    assert model.pause("host", tags=["weights", "kv"]) == 2 * page_size
    assert model.stats().backup == 2 * page_size and model.stats().paused == 12 * page_size
    assert model.resume(tags=["weights"]) == 2 * page_size
    assert (weights == 7).all() and model.paused
    extra = elastikv.zeros((page_size,), torch.uint8, model)  # what was not there does not sleep
    with pytest.raises(elastikv.ModelPaused):
        elastikv.grow_(cache, 41)
    assert model.resume() == 10 * page_size
    elastikv.grow_(cache, 41)
    with pytest.raises(elastikv.InvalidArgument, match=r"'weight'.*'kv', 'weights'"):
        model.pause(tags=["weight"])
    for wrong in ({"backup": "disk"}, {"tags": []}):
        with pytest.raises(elastikv.InvalidArgument):
            model.pause(**wrong)
    assert not model.paused and (extra == 0).all()


def test_what_uses_a_paused_model_is_refused(shared, model, page_size):
    cache = kv(model, 40, 3.0)
    slots = elastikv.SlotTensor(model, 4, 64, page_size // 8, torch.bfloat16, tag="kv")
    slots.grow([0], [20])
    blocks = elastikv.BlockPool(model, 64, (page_size // 8,), 1, torch.bfloat16, tag="kv")
    ids = blocks.allocate(8)
    offset = shared.allocate_for_model("model", page_size) - model.base_address
    model.pause()
    refused = [
        lambda: elastikv.grow_(cache, 41),
        lambda: elastikv.shrink_(cache, 1),
        lambda: elastikv.prefetch(cache, 80),
        lambda: elastikv.spill(cache),
        lambda: elastikv.unspill(cache),
        lambda: slots.grow([0], [10]),
        lambda: slots.grow([1], [10]),
        lambda: slots.shrink([0], [0]),
        lambda: slots.fork(1, 0, 10),
        lambda: slots.make_writable(0, 0, 10),
        lambda: slots.prefetch([1], [10]),
        lambda: slots.spill([0]),
        lambda: slots.window(0, (8,)),
        lambda: blocks.allocate(1),
        lambda: blocks.free(ids),
        lambda: blocks.touch(ids),
        lambda: kv(model, 1, 0.0),
        lambda: elastikv.zeros((1,), torch.uint8, model),
        lambda: shared.allocate_for_model("model", 1),
        lambda: model.export(offset, page_size),
        model.spill,
        model.unspill,
    ]
    for use in refused:
        with pytest.raises(elastikv.ModelPaused, match="resume"):
            use()
    assert cache.shape[0] == 40 and slots.resident(0) == 20 and blocks.held == 8
    shared.deallocate_for_model("model", offset, page_size)  # needs no memory
    model.resume()
    assert (cache == 3).all()
    elastikv.grow_(cache, 41)
    slots.shrink([0], [0])
    blocks.free(ids)


def test_slots_share_again_what_they_shared(shared, model, page_size):
    slots = elastikv.SlotTensor(model, 4, 256, page_size // 8, torch.bfloat16, largest_extent=2 * page_size, tag="kv")
    window = slots.window(0, (page_size // 8,))
    slots.grow([0], [64])
    window[:64].copy_(
        torch.arange(64, dtype=torch.bfloat16, device=model.device).view(-1, 1).expand(-1, page_size // 8)
    )
    slots.fork(1, 0, 64)
    slots.fork(2, 0, 30)
    settled_usage(shared, model)
    before = model.stats()
    assert before.aliased > 0
    assert model.pause() == before.physical_usage
    assert model.stats().backup == before.physical_usage
    model.resume()
    after = model.stats()
    assert (after.physical_usage, after.aliased) == (before.physical_usage, before.aliased)
    for row, tokens in ((0, 64), (1, 64), (2, 30)):
        part = window[row * slots.pitch : row * slots.pitch + tokens]
        assert part[:, 0].tolist() == list(range(tokens)) and part.eq(part[:, :1]).all()
    slots.make_writable(1, 0, 1)
    window[slots.pitch : slots.pitch + 1].fill_(99)
    assert window[0, 0] == 0
    del part
    slots.shrink([0, 1, 2], [0, 0, 0])
    assert settled_usage(shared, model) == 0


def test_blocks_keep_their_content_and_extents(shared, model, page_size):
    blocks = elastikv.BlockPool(model, 64, (page_size // 8,), 1, torch.bfloat16, extent_bytes=page_size)
    ids = blocks.allocate(32)
    layer = blocks.layer(0)
    device_ids = ids.to(model.device)
    layer[device_ids] = device_ids.to(torch.bfloat16).view(-1, 1)
    held = settled_usage(shared, model)
    assert model.pause() == held
    model.resume()
    assert layer[device_ids][:, 5].tolist() == ids.tolist()
    blocks.free(ids[4:])
    assert settled_usage(shared, model) == page_size  # extents go back one by one as before


def test_a_tensor_may_die_and_a_pool_close_asleep(shared, model, page_size):
    first, second = kv(model, 40, 1.0), kv(model, 20, 2.0, tag="other")
    model.pause()
    del first
    gc.collect()
    assert model.stats().backup == 5 * page_size
    shared.unregister_model("model")
    assert model.stats().backup == 5 * page_size  # a tensor lives
    del second
    gc.collect()
    assert model.stats().backup == 0 and shared.global_stats().physical_usage == 0


def test_allocations_of_torch_sleep_too(shared, page_size):
    model = shared.register_model("heap", virtual_capacity=1 << 36)
    with model.use():
        weights = torch.full((8 * page_size,), 9, dtype=torch.uint8, device=model.device)
    address = weights.data_ptr()
    assert model.pause(tags=["use"]) > 0 and model.stats().physical_usage == 0
    if model.device == "cpu":  # on a GPU torch hands out what it has cached, and never asks
        with model.use(), pytest.raises(RuntimeError, match="is paused"):
            torch.empty(100)
    model.resume()
    assert weights.data_ptr() == address and (weights == 9).all()
    with model.use():
        assert (torch.zeros(1000, device=model.device) == 0).all()


def test_pinned_memory_is_kept_as_told(shared, model):
    assert shared.global_stats().pinned == 0
    shared.keep_pinned(100 << 20)
    assert shared.global_stats().pinned == 128 << 20
    cache = kv(model, 40, 3.0)
    model.pause()
    assert shared.global_stats().pinned == 128 << 20
    shared.keep_pinned(0)
    assert shared.global_stats().pinned == 64 << 20  # in use
    model.resume()
    shared.keep_pinned(0)
    assert shared.global_stats().pinned == 0 and (cache == 3).all()


def test_spilled_memory_is_read_where_it_was_and_costs_nothing(shared, model, page_size):
    cache, hot = kv(model, 80, 3.0), kv(model, 40, 4.0)
    address = cache.data_ptr()
    assert elastikv.spill(cache) == 20 * page_size
    stats = model.stats()
    assert stats.spilled == 20 * page_size and stats.physical_usage == 10 * page_size
    assert shared.global_stats().physical_usage == 10 * page_size
    assert cache.data_ptr() == address and (cache == 3).all() and (hot == 4).all()
    cache[:40].fill_(5)
    assert elastikv.spill(cache) == 0
    elastikv.grow_(cache, 84)  # on the device
    assert elastikv.unspill(cache) == 20 * page_size
    assert model.stats().spilled == 0 and model.unspill() == 0
    assert (cache[:40] == 5).all() and (cache[40:80] == 3).all() and (cache[80:] == 0).all()
    assert model.spill(10 * page_size, tags=["kv"]) >= 10 * page_size
    other = shared.register_model("other", 4096 * page_size)
    theirs = kv(other, (64 * page_size - shared.global_stats().physical_usage) * 4 // page_size, 1.0)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        model.unspill()
    assert (cache[:40] == 5).all() and (hot == 4).all() and (theirs == 1).all()
    del cache, hot
    gc.collect()
    assert settled_usage(shared, model, other) == theirs.shape[0] * page_size // 4
    assert model.stats().spilled == 0


def test_spilled_memory_sleeps_where_it_is(shared, model, page_size):
    cache, hot = kv(model, 40, 3.0), kv(model, 40, 4.0)
    elastikv.spill(cache)
    assert model.pause() == 10 * page_size
    assert model.stats().spilled == 10 * page_size and (cache == 3).all()
    assert model.resume() == 10 * page_size
    assert model.stats().spilled == 10 * page_size and (cache == 3).all() and (hot == 4).all()


def test_rows_of_slots_are_spilled_by_themselves(shared, model, page_size):
    slots = elastikv.SlotTensor(model, 4, 64, page_size // 8, torch.bfloat16)
    slots.grow([0, 2], [16, 16], exact=True)
    window = slots.window(0, (page_size // 8,))
    window[:16].fill_(1)
    window[2 * slots.pitch : 2 * slots.pitch + 16].fill_(2)
    assert slots.spill([2, 1]) == 4 * page_size
    assert settled_usage(shared, model) == 4 * page_size
    assert (window[2 * slots.pitch : 2 * slots.pitch + 16] == 2).all()
    slots.fork(3, 2, 16)  # copied, as host memory is not shared
    assert (window[3 * slots.pitch : 3 * slots.pitch + 16] == 2).all() and model.stats().aliased == 0
    assert slots.unspill([0, 1, 2, 3]) == 4 * page_size
    with pytest.raises(elastikv.InvalidArgument):
        slots.spill([4])


def test_a_tensor_that_dies_amid_the_copy_of_a_pause_holds_up_no_other_thread(device):
    """No thread is made to give way here, so that others run only where it lets go of the interpreter by itself."""
    interval = sys.getswitchinterval()
    others = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            others[0] += 1
            time.sleep(0)

    size = 64 << 20
    counting = threading.Thread(target=count)
    counting.start()
    sys.setswitchinterval(1000)
    try:
        with elastikv.SharedMemoryPool(size, device, park_limit=0) as pool:
            model = pool.register_model("model", 1 << 32)
            for _ in range(50):  # the copy may be faster
                tensor = elastikv.empty((size,), (size,), torch.uint8, model).fill_(1)
                pausing = threading.Thread(target=model.pause)
                pausing.start()
                while not model.paused:
                    time.sleep(0)
                before = others[0]
                del tensor
                ran = others[0] - before
                pausing.join()
                model.resume()
                if ran:
                    break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        counting.join()
    assert ran


def test_a_pressure_callback_may_pause(shared, model, page_size):
    idle = kv(model, 200, 3.0)
    model.on_pressure(lambda wanted, seconds: model.pause())
    urgent = shared.register_model("urgent", 4096 * page_size, priority=1)
    theirs = kv(urgent, 200, 5.0)
    assert model.paused and (theirs == 5).all()
    del theirs
    gc.collect()
    settled_usage(shared, urgent)
    model.resume()
    assert (idle == 3).all()


@pytest.mark.cuda
def test_a_graph_captured_before_a_pause_replays_after_it():
    with elastikv.SharedMemoryPool(256 << 20, "cuda:0") as shared:
        model = shared.register_model("model", 1 << 36)
        cache = elastikv.empty((8 << 20, 4), (16 << 20, 4), torch.bfloat16, model, tag="kv").fill_(1)
        out = elastikv.zeros((4,), torch.float32, model)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            cache.sum(0, dtype=torch.float32)  # warm
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            cache.mul_(2)
            torch.sum(cache, 0, dtype=torch.float32, out=out)
        graph.replay()
        for power in range(2, 5):
            model.pause()
            other = shared.register_model(f"other{power}", 1 << 36)
            theirs = elastikv.zeros((200 << 20,), torch.uint8, other).fill_(255)
            del theirs
            shared.unregister_model(other.name)
            model.resume()
            graph.replay()  # at once
            assert out.tolist() == [float(2**power * (8 << 20))] * 4


def test_a_ledger_shows_what_sleeps():
    name = f"test-pause-{os.getpid()}"
    with elastikv.SharedMemoryPool(1 << 20, name=name) as shared:
        model = shared.register_model("sleeper", 1 << 30)
        cache = kv(model, 40, 3.0)
        elastikv.spill(kept := kv(model, 8, 1.0))
        model.pause()
        ledger = elastikv.Ledger(name)
        for _ in range(1000):  # a busy machine answers late
            (client,) = ledger.clients()
            if client.paused:
                break
        assert (client.charged, client.paused, client.backup, client.spilled) == (0, 40960, 40960, 8192)
        model.resume()
        assert (cache == 3).all() and (kept == 1).all()
