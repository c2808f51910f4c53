"""vLLM's scheduler over elastic blocks: what is generated is right, whoever presses; requests wait or are preempted."""

from __future__ import annotations

import random
from types import SimpleNamespace
from unittest import mock

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from elastikv.vllm import patches
from elastikv.vllm.engine import Engine
from elastikv.vllm.scheduler_patches import elastic_pool, ends_requests, launched
from elastikv.vllm.settings import Settings
from elastikv.vllm.versions import version_of
from vllm_engine import HostEngine, allocate, cache_config, random_prompt
from vllm_scheduler import WIDTH, Model, expected_tokens, request_of, run_step, scheduler_of

TOKENS = 17  # of each request


class Launched(Model):
    """Its steps are launched as the worker's are, which `patches.execute` sees."""

    def step(self, scheduler, planned):
        output = super().step(scheduler, planned)
        launched(scheduler)
        return output


class Served:
    """A scheduler, its model, and the requests that it was given."""

    def __init__(self, scheduler, kv):
        self.scheduler, self.model = scheduler, Launched(kv)
        self.prompts: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}
        self.preemptions = 0

    def add(self, number, prompt):
        self.prompts[str(number)] = prompt
        self.scheduler.add_request(request_of(number, prompt))

    def step(self):
        before = {number: request.num_preemptions for number, request in self.scheduler.requests.items()}
        for number, tokens in run_step(self.scheduler, self.model).items():
            self.got.setdefault(number, []).extend(tokens)
        for number, request in self.scheduler.requests.items():
            self.preemptions += request.num_preemptions - before.get(number, 0)

    def check(self):
        assert self.got == {number: expected_tokens(prompt, TOKENS) for number, prompt in self.prompts.items()}


def elastic(num_blocks, pool, **settings):
    tokens_a_step = settings.pop("tokens_a_step", 96)
    engine = Engine(Settings(pool=pool, park=0, extent=4096, ahead=settings.pop("ahead", 0), **settings), "chat")
    engine.device_bytes = 1 << 30
    with engine.starting(), engine.allocating():
        allocate(engine, cache_config(num_blocks))
        scheduler = scheduler_of(num_blocks, tokens_a_step)
    engine.started()
    blocks, part = engine.memory.arrangement.blocks_of("0.0")
    served = Served(scheduler, blocks[:, part.offset : part.offset + part.size].view(torch.int64))
    return engine, served


@pytest.mark.skipif(version_of(vllm.__version__) < (0, 25), reason="evicted cached blocks before free ones")
@pytest.mark.parametrize(("layout", "ahead"), [("blocks", 0), ("layers", 8192)])
def test_as_plain_vllm(layout, ahead):
    """The same steps, with the same requests in each, on fewer blocks than all would like."""
    engine, ours = elastic(60, "test-plain", limit=1 << 30, layout=layout, ahead=ahead)
    plain = Served(scheduler_of(60), torch.zeros(60, WIDTH, dtype=torch.int64))
    chance = random.Random(1)
    try:
        for number in range(40):
            prompt = random_prompt(chance)
            for each in (ours, plain):
                each.add(number, prompt)
            for _ in range(chance.randrange(3)):
                for each in (ours, plain):
                    each.step()
                assert ours.got == plain.got
                assert [r.request_id for r in ours.scheduler.running] == [r.request_id for r in plain.scheduler.running]
        while plain.scheduler.has_unfinished_requests():
            for each in (ours, plain):
                each.step()
            assert ours.got == plain.got
        ours.check(), plain.check()
        assert ours.preemptions == plain.preemptions > 0
        assert not ours.scheduler.has_unfinished_requests() and not engine.pool.stock
        assert ours.scheduler.reset_prefix_cache()
        engine.memory.model.drain()
        assert engine.memory.model.stats().physical_usage == engine.memory.blocks.extent_bytes
    finally:
        engine.close()


@pytest.mark.parametrize(("seed", "ahead"), [(0, 0), (1, 0), (2, 8192)])
def test_others_press_between_and_in_steps(seed, ahead):
    """Another engine takes and frees as it likes, under a limit that is too small for both."""
    limit = 22 * 4096
    engine, ours = elastic(120, "test-press", limit=limit, ahead=ahead)
    other = HostEngine(cache_config(120), "test-press", name="other", limit=limit)
    chance = random.Random(seed)
    held = []
    waited = 0
    try:
        for number in range(40):
            ours.add(number, random_prompt(chance))
            for _ in range(chance.randrange(4)):
                engine.pool._ask_again = other.pool._ask_again = 0
                if held and chance.random() < 0.3:
                    other.manager.free(held.pop(0))
                    other.pool.end_step(idle=True)
                elif len(held) < 3:
                    request = request_of(1000 + number, [chance.randrange(10**6) for _ in range(300)])
                    if other.manager.allocate_slots(request, 300) is None:
                        waited += 1
                    else:
                        held.append(request)
                ours.step()
                other.check()
        while ours.scheduler.has_unfinished_requests():
            engine.pool._ask_again = 0
            if held:
                other.manager.free(held.pop())
                other.pool.end_step(idle=True)
            ours.step()
        ours.check()
        assert ours.preemptions > 0 or waited > 0
    finally:
        other.close()
        engine.close()


@pytest.mark.parametrize("prompts", [[512] * 6, [1536, 1536]])
def test_who_steps_maps_nothing(prompts):
    """Prompts that come together, or a step's worth at a time, are mapped while the step before them runs, and those of
    the first step as they come."""
    engine, ours = elastic(300, "test-demand", limit=1 << 30, ahead=2 * 4096, tokens_a_step=512)
    blocks, model = engine.memory.blocks, engine.memory.model
    try:
        for turn in range(2):  # at the engine's start, and once it has been idle
            for number, length in enumerate(prompts, 10 * turn):
                ours.add(number, [number * 10000 + i for i in range(length)])
            while ours.scheduler.has_unfinished_requests():
                model.drain()  # the worker has had the time of a step on the device
                before = blocks.mapped_on_demand
                ours.step()
                assert blocks.mapped_on_demand == before
            ours.check()
            assert ours.scheduler.reset_prefix_cache()
            model.drain()
            assert model.stats().physical_usage == blocks.extent_bytes
    finally:
        engine.close()


def calls_of(monkeypatch, owner, *names):
    """What is called of an object from now on, by name."""
    called = []
    for name in names:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, m=method, **o: (called.append(n), m(*a, **o))[1])
    return called


def test_no_step_of_answers_asks_for_memory(monkeypatch):
    """What a step takes was fetched behind the launch of the one before, also where all requests take a block at once;
    where none does, nothing is fetched or given back."""
    monkeypatch.setattr("elastikv.vllm.block_pool.STOCK", 2)
    engine, ours = elastic(200, "test-calls", limit=1 << 30, ahead=8 * 4096, tokens_a_step=512)
    scheduler, blocks = ours.scheduler, engine.memory.blocks
    try:
        for number in range(8):
            ours.add(number, [number * 1000 + i for i in range(16 * 4 - 5)])  # five tokens more are in the last block
        ours.step()
        called = calls_of(monkeypatch, engine.memory, "try_allocate", "free")
        grown = []
        while len(scheduler.running) == 8:
            used = engine.pool.in_use()
            planned = scheduler.schedule()
            assert not called
            grown.append(engine.pool.in_use() - used)
            output = ours.model.step(scheduler, planned)
            following = sum(request.num_computed_tokens % 16 == 0 for request in scheduler.running)
            assert called == (["try_allocate"] if following else []) and len(engine.pool.stock) == following
            assert blocks.held == 1 + engine.pool.in_use() + following
            called.clear()
            scheduler.update_from_output(planned, output)
        assert grown.count(8) == 1 and sum(grown) == 8
        assert not engine.pool.stock and engine.pool.in_use() == 0
    finally:
        engine.close()


def test_a_worker_makes_the_next_step_ready_once_this_one_is_launched(monkeypatch):
    monkeypatch.setattr("elastikv.vllm.block_pool.STOCK", 2)
    engine, ours = elastic(200, "test-launch", limit=1 << 30)
    seen = []
    execute = patches.execute(lambda worker, planned: seen.append(len(engine.pool.stock)) or "launched")
    worker = SimpleNamespace(_elastikv=engine)
    try:
        engine.started(SimpleNamespace(scheduler=ours.scheduler))
        for number in range(8):
            ours.add(number, [number * 1000 + i for i in range(12)])
        for length in (12, 13, 14, 15, 16):
            planned = ours.scheduler.schedule()
            assert {request.num_computed_tokens for request in ours.scheduler.running} == {length}
            engine.pool._return_stock()  # as who lacks memory has it
            assert execute(worker, planned) == "launched"
            assert len(engine.pool.stock) == (8 if length == 16 else 0)  # all eight blocks are full then
            ours.scheduler.update_from_output(planned, Model.step(ours.model, ours.scheduler, planned))
        assert seen == [0] * 5
    finally:
        engine.close()


def test_only_pools_of_ours_are_taken_for_such():
    stranger = mock.MagicMock()
    assert elastic_pool(stranger) is None and elastic_pool(SimpleNamespace()) is None
    assert ends_requests(lambda scheduler: "plain")(stranger) == "plain"


def test_nobody_takes_cached_blocks_while_outputs_come_in():
    """With drafts, blocks come into the prefix cache then."""
    engine, ours = elastic(200, "test-outputs", limit=1 << 30)
    try:
        update = ends_requests(lambda scheduler: engine.pool.step_lock._is_owned())
        assert update(ours.scheduler) and not engine.pool.step_lock._is_owned()
    finally:
        engine.close()


@pytest.mark.parametrize("ahead", [0, 8192])
def test_a_growth_that_fails_in_a_step_preempts(monkeypatch, ahead):
    """Two requests fit at first, and then another engine has the rest: one of the two makes way for the other."""
    monkeypatch.setattr("elastikv.vllm.block_pool.STOCK", 1)
    limit = 24 * 4096
    engine, ours = elastic(120, "test-preempt", limit=limit, ahead=ahead)
    other = HostEngine(cache_config(120), "test-preempt", name="other", limit=limit)
    try:
        # With the null block 63 of the 64 blocks of 16 extents, and each needs one more after four tokens: who comes
        # first has it by the time that the other has computed its prompt.
        for number in range(2):
            ours.add(number, [number * 1000 + i for i in range(16 * 31 - 4)])
        while any(len(ours.got.get(str(number), [])) < 2 for number in range(2)):
            ours.step()
        taken = []
        while not taken or taken[-1] is not None:
            other.pool._ask_again = 0  # others give what they have mapped ahead when they are asked
            request = request_of(10 + len(taken), [1000 * len(taken) + i for i in range(10**6, 10**6 + 64)])
            taken.append(request if other.manager.allocate_slots(request, 64) is not None else None)
        assert len(taken) > 1 and ours.preemptions == 0
        assert engine.memory.available() + len(engine.pool.stock) == 0
        steps = 0
        while ours.scheduler.has_unfinished_requests():
            ours.step()
            steps += 1
            assert steps < 200
        assert ours.preemptions > 0
        ours.check()
        for request in taken[:-1]:
            other.manager.free(request)
    finally:
        other.close()
        engine.close()


@pytest.mark.skipif(version_of(vllm.__version__) < (0, 26), reason="copied no blocks")
@pytest.mark.parametrize("end", ["step", "idle", "reset"])
def test_what_is_copied_is_held_until_the_copy_is_enqueued(end):
    """vLLM frees source and target while it plans the step that copies."""
    engine, ours = elastic(60, "test-copies", limit=1 << 30, prefix_cache=0)
    pool = engine.pool
    try:
        pair = pool.get_new_blocks(2)
        numbers = [engine.memory.arrangement.block_of(block.block_id) for block in pair]
        ours.scheduler._free_cow_retained_blocks(pair, 1)
        pool.end_step()
        assert pool.in_use() == 2 and all(engine.memory.blocks.references(each) == 1 for each in numbers)
        if end == "step":
            ours.add(1, list(range(40)))
            ours.step()
        elif end == "idle":
            pool.end_step(idle=True)
        else:
            assert ours.scheduler.reset_prefix_cache()
        assert all(block.ref_cnt == 0 or end == "step" for block in pair) and not pool._copied
        while ours.scheduler.has_unfinished_requests():
            ours.step()
        assert pool.in_use() == 0
    finally:
        engine.close()


def test_a_request_that_never_fits_a_step_is_no_refusal():
    """vLLM's managers of states say so by more blocks than there are."""
    engine, _ = elastic(60, "test-sentinel", limit=1 << 30)
    try:
        engine.pool.secure(61)
        assert not engine.pool._refused and engine.pool._ask_again == 0 and not engine.pool.end_step()
    finally:
        engine.close()
