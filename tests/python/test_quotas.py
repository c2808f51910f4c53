"""Quotas of models, as Python sees them; the ladder itself is tested in C++."""

from __future__ import annotations

import threading

import pytest
import torch

import elastikv


def test_a_reserve_is_kept_from_others(shared, model, page_size):
    holder = shared.register_model("holder", 4096 * page_size, reserve=24 * page_size, priority=3)
    shared.allocate_for_model("model", 40 * page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory, match="reserve"):
        shared.allocate_for_model("model", page_size)
    quota = holder.quota()
    assert (quota.reserve, quota.limit, quota.priority, quota.charged) == (24 * page_size, 64 * page_size, 3, 0)
    assert shared.quotas()["model"].refusals == 1
    assert shared.global_stats().reserved == 24 * page_size
    assert shared.global_stats().committed == 64 * page_size
    tensor = elastikv.empty((24 * page_size,), (24 * page_size,), torch.uint8, holder)
    assert tensor.sum().item() == 0
    assert holder.quota().charged == 24 * page_size


def test_a_limit_holds_and_may_change_while_running(shared, model, page_size):
    model.set_quota(limit=8 * page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        shared.allocate_for_model("model", 9 * page_size)
    offset = shared.allocate_for_model("model", 8 * page_size) - model.base_address
    model.set_quota(limit=4 * page_size, priority=-2)
    assert model.quota().overage == 4 * page_size
    assert model.quota().priority == -2
    shared.deallocate_for_model("model", offset, 8 * page_size)
    model.drain()
    assert model.quota().overage == 0
    model.set_quota(limit=64 * page_size)
    shared.allocate_for_model("model", 64 * page_size)


@pytest.mark.parametrize(
    ("quota", "error", "match"),
    [
        ({"limit": 0}, elastikv.InvalidArgument, "between 1 byte"),
        ({"limit": 1 << 60}, elastikv.InvalidArgument, "above the physical limit"),
        ({"reserve": 1 << 60}, elastikv.InvalidArgument, "above its limit"),
        ({"reserve": -1}, elastikv.InvalidSize, "reserve must be between 0"),
        ({"limit": 1 << 64}, elastikv.InvalidSize, "limit must be between 0"),
        ({"priority": 1 << 31}, elastikv.InvalidArgument, "32 bits"),
        ({"priority": 1.5}, TypeError, "priority must be an integer, not float"),
        ({"limit": "8GiB"}, TypeError, "limit must be an integer, not str"),
        ({"reserve": True}, TypeError, "reserve must be an integer, not bool"),
    ],
)
def test_bad_quotas_change_nothing(shared, model, quota, error, match):
    before = repr(model.quota())
    with pytest.raises(error, match=match):
        model.set_quota(**quota)
    with pytest.raises(error, match=match):
        shared.register_model("another", 1 << 30, **quota)
    assert repr(model.quota()) == before
    assert shared.models() == ["model"]


def test_reserves_beyond_the_limit_are_refused_with_the_arithmetic(shared, model, page_size):
    model.set_quota(reserve=40 * page_size)
    with pytest.raises(elastikv.InvalidArgument, match="at most") as caught:
        shared.register_model("another", 1 << 30, reserve=30 * page_size)
    assert str(70 * page_size) in str(caught.value) and str(24 * page_size) in str(caught.value)


def test_an_unregistered_model_has_no_reserve(shared, model, page_size):
    model.set_quota(reserve=40 * page_size)
    shared.unregister_model("model")
    assert shared.global_stats().reserved == 0
    assert "model" not in shared.quotas()
    with pytest.raises(elastikv.ModelNotFound):
        model.set_quota(reserve=page_size)


def test_what_is_kept_without_need_goes_before_anyone_is_pressed(shared, model, page_size):
    """Whatever the priorities; one that raises, or returns no number, gave nothing."""
    other = shared.register_model("other", 4096 * page_size)
    kept = [elastikv.zeros((10 * page_size,), torch.uint8, model) for _ in range(5)]
    asked: list[int] = []

    def give(wanted: int) -> int:
        asked.append(wanted)
        freed = 0
        while kept and freed < wanted:
            freed += len(kept.pop())
        return freed

    pressed = model.on_pressure(lambda wanted, seconds: asked.append(-1))
    handle = model.on_reclaim(give)
    model.set_quota(priority=5)
    tensor = elastikv.zeros((30 * page_size,), torch.uint8, other)
    assert asked == [16 * page_size] and len(kept) == 3
    handle.remove()
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.zeros((30 * page_size,), torch.uint8, other)
    assert asked == [16 * page_size] and len(kept) == 3
    with pytest.raises(TypeError, match="callable"):
        model.on_reclaim(3)
    del tensor
    pressed.remove()


@pytest.mark.parametrize("answer", [None, "much", -1])
def test_a_reclaim_callback_that_fails_gave_nothing(shared, model, page_size, answer, monkeypatch):
    complaints: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)

    def callback(wanted: int):
        if answer is None:
            raise ValueError("broken")
        return answer

    handle = model.on_reclaim(callback)
    kept = elastikv.zeros((60 * page_size,), torch.uint8, model)
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.zeros((10 * page_size,), torch.uint8, model)
    assert complaints and kept.numel()
    handle.remove()


def test_a_reclaim_callback_that_wants_memory_is_not_asked_again_within_itself(shared, model, page_size):
    depth = deepest = calls = 0

    def callback(wanted: int) -> int:
        nonlocal depth, deepest, calls
        calls += 1
        depth += 1
        deepest = max(deepest, depth)
        if depth < 5:
            with pytest.raises(torch.OutOfMemoryError):
                elastikv.zeros((10 * page_size,), torch.uint8, model)
        depth -= 1
        return 0

    handles = [model.on_reclaim(callback), model.on_reclaim(callback, order=2)]
    kept = elastikv.zeros((60 * page_size,), torch.uint8, model)
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.zeros((10 * page_size,), torch.uint8, model)
    assert deepest == 1 and calls >= 2 and kept.numel()
    for handle in handles:
        handle.remove()


def in_a_thread_of_its_own(work) -> None:
    """Where `work` hangs, the test fails and the run goes on."""
    errors: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


def test_who_is_asked_for_memory_may_use_the_slots_that_want_it(shared, model, page_size):
    slots = elastikv.SlotTensor(model, 4, 64 * page_size, 1, torch.uint8)
    slots.grow([0, 1], [20 * page_size, 40 * page_size], exact=True)
    seen: list[int] = []

    def give(wanted: int) -> int:
        seen.append(slots.resident(1))
        slots.shrink([1], [0])
        return seen[-1]

    handle = model.on_reclaim(give)
    in_a_thread_of_its_own(lambda: slots.grow([2, 0], [10 * page_size, 24 * page_size], exact=True))
    assert seen == [40 * page_size]
    assert [slots.resident(row) for row in range(4)] == [24 * page_size, 0, 10 * page_size, 0]
    # A fork copies what it does not share, and a row that was forked is copied before it is written.
    for change in (lambda: slots.fork(3, 0, 20 * page_size + 1), lambda: slots.make_writable(3, 0, 1)):
        free = shared.global_stats().available
        slots.grow([1], [free], exact=True)
        in_a_thread_of_its_own(change)
        assert seen.pop() == free and slots.resident(1) == 0
        if slots.resident(2):
            slots.shrink([2], [0])
        model.drain()
    handle.remove()


def test_who_is_asked_for_memory_may_look_at_the_tensor_that_wants_it(shared, model, page_size):
    cache = [elastikv.zeros((20 * page_size,), torch.uint8, model) for _ in range(2)]
    tensor = elastikv.empty((2, page_size), (2, 64 * page_size), torch.uint8, model, dim=1)
    seen: list[int] = []

    def give(wanted: int) -> int:
        seen.append(elastikv.resident_bytes(tensor))
        return len(cache.pop()) if cache else 0

    handle = model.on_reclaim(give)
    in_a_thread_of_its_own(lambda: elastikv.grow_(tensor, 30 * page_size))
    assert seen == [2 * page_size] * 2 and tensor.shape == (2, 30 * page_size)
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.grow_(tensor, 40 * page_size)
    assert tensor.shape == (2, 30 * page_size) and elastikv.resident_bytes(tensor) == 60 * page_size
    handle.remove()


def test_threads_on_quotas(shared, model, page_size):
    other = shared.register_model("other", 4096 * page_size)
    errors: list[Exception] = []

    def work(index: int) -> None:
        try:
            for i in range(50):
                (model if index % 2 else other).set_quota(reserve=(i % 8) * page_size, priority=i)
                shared.quotas()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert shared.global_stats().reserved == model.quota().reserve + other.quota().reserve


def test_a_lowered_limit_holds_for_what_is_freed_and_wanted_again(device, page_size):
    """Memory that parks is reused without a charge; above the limit it must not park."""
    with elastikv.SharedMemoryPool(64 * page_size, device, park_limit=64 * page_size) as shared:
        model = shared.register_model("model", 4096 * page_size)
        tensor = elastikv.empty((32 * page_size,), (32 * page_size,), torch.uint8, model)
        model.set_quota(limit=8 * page_size)
        assert model.quota().overage == 24 * page_size
        elastikv.shrink_(tensor, 0)
        model.drain()
        assert model.quota().overage == 0
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            elastikv.grow_(tensor, 32 * page_size)
        elastikv.grow_(tensor, 8 * page_size)
        assert model.quota().charged == 8 * page_size
        del tensor


def test_names_of_models(shared):
    name = "\u00fc" * 63  # 126 bytes
    shared.register_model(name, 1 << 30)
    assert name in shared.quotas()
    for bad in ("", "x" * 128, name + "xx", "a\0b", "a\nb"):
        with pytest.raises(elastikv.InvalidArgument, match="a model's id is 1 to 127 bytes"):
            shared.register_model(bad, 1 << 30)
