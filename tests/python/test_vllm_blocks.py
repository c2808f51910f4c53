"""vLLM's KVCacheManager over elastic blocks: the same decisions, memory that follows, and pressure from others."""

from __future__ import annotations

import os
import random
import threading

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import elastikv
from elastikv.vllm.versions import version_of
from vllm_engine import BLOCK, HostEngine, cache_config, manager_of, random_prompt, request_of

MIXES = [(None,), (64,), (None, 64), (None, 32, 64)]


@pytest.fixture
def make(request):
    """Engines in a ledger of the test's own, all closed in the end."""
    made = []

    def build(num_blocks=64, windows=(None,), **options):
        engine = HostEngine(
            cache_config(num_blocks, windows), f"test-{os.getpid()}-{abs(hash(request.node.nodeid))}", **options
        )
        made.append(engine)
        return engine

    yield build
    for each in made:
        each.close()


def admit(manager, request):
    """As the scheduler does: look for a prefix, then ask for slots. The hits, or None where the request must wait."""
    blocks, hits, *_ = manager.get_computed_blocks(request)
    new = manager.allocate_slots(request, request.num_tokens - hits, hits, blocks)
    return None if new is None else hits


def test_only_the_null_block_has_memory_at_first(make):
    engine = make(num_blocks=1000)
    assert engine.memory.blocks.held == 1 and engine.settled() == engine.memory.blocks.extent_bytes
    assert engine.memory.raw[0].eq(0).all()
    assert engine.pool.get_num_free_blocks() == 999 and engine.pool.get_usage() == 0
    engine.check()


def test_memory_comes_with_a_request_and_goes_with_it(make):
    engine = make()
    request = request_of(1, list(range(BLOCK * 10 + 1)))
    coordinator = engine.manager.coordinator
    for each in (engine.manager, coordinator, *coordinator.single_type_managers):
        each.enable_caching = False
    assert admit(engine.manager, request) == 0
    engine.check()
    assert engine.pool.in_use() == 11
    engine.manager.free(request)
    engine.pool.end_step(idle=True)
    engine.check()
    assert engine.settled() == engine.memory.blocks.extent_bytes


def test_blocks_that_were_lost_since_are_not_zeroed(make):
    """vLLM names the new blocks of a step, and may preempt their request in the same step."""
    engine = make()
    kept, lost = engine.memory.try_allocate(2)
    engine.memory.raw[[kept, lost]] = 7
    engine.memory.free([lost])
    tables = [engine.memory.arrangement.table_id(block) for block in (kept, lost)]
    engine.memory.zero(tables)
    assert engine.memory.raw[kept].eq(0).all() and engine.memory.raw[lost].eq(7).all()  # on the same extent
    engine.memory.free([kept])


def test_a_prefix_keeps_its_memory_and_hits(make):
    engine = make()
    first = request_of(1, list(range(BLOCK * 10 + 1)))
    assert admit(engine.manager, first) == 0
    engine.manager.free(first)
    engine.pool.end_step(idle=True)
    engine.check()
    assert engine.pool.free_block_queue.num_free_blocks == 10
    again = request_of(2, list(range(BLOCK * 10 + 1)))
    assert admit(engine.manager, again) == BLOCK * 10
    engine.check()
    engine.manager.free(again)
    assert engine.manager.reset_prefix_cache()
    engine.pool.end_step(idle=True)
    engine.check()
    assert engine.settled() == engine.memory.blocks.extent_bytes


@pytest.mark.skipif(version_of(vllm.__version__) < (0, 25), reason="evicted cached blocks before free ones")
@pytest.mark.parametrize("windows", MIXES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_decisions_as_plain_vllm(make, windows, seed):
    """Where there is memory for all blocks, everything but the ids of blocks is as without the plugin."""
    config = cache_config(90, windows)
    engine, plain = make(90, windows), manager_of(config)
    assert plain.block_pool.memory is None
    chance = random.Random(seed)
    running: list[tuple] = []
    refused = hit = 0
    for number in range(250):
        tokens = random_prompt(chance)
        pair = request_of(number, tokens), request_of(number, tokens)
        answers = [admit(manager, each) for manager, each in zip((engine.manager, plain), pair)]
        assert answers[0] == answers[1], f"request {number}"
        engine.check()
        if answers[0] is None:
            refused += 1
        else:
            hit += answers[0] > 0
            running.append(pair)
            for each in pair:
                each.num_computed_tokens = each.num_tokens
        for pair in list(running):  # some tokens more, or the end
            if chance.random() < 0.5:
                new = []
                for manager, each in zip((engine.manager, plain), pair):
                    each.append_output_token_ids(7)
                    new.append(manager.allocate_slots(each, 1))
                assert (new[0] is None) == (new[1] is None)
                for each in pair:
                    each.num_computed_tokens += 1
            if chance.random() < (0.5 if answers[0] is None else 0.03):
                running.remove(pair)
                for manager, each in zip((engine.manager, plain), pair):
                    manager.free(each)
        engine.pool.end_step(idle=not running)
        assert engine.pool.get_num_free_blocks() == plain.block_pool.get_num_free_blocks()
        assert engine.pool.get_usage() == pytest.approx(plain.usage)
        engine.check()
    assert hit > 10 and refused > 0
    for pair in running:
        for manager, each in zip((engine.manager, plain), pair):
            manager.free(each)
    assert engine.manager.reset_prefix_cache() and plain.reset_prefix_cache()
    engine.pool.end_step(idle=True)
    assert engine.settled() == engine.memory.blocks.extent_bytes


def test_others_get_the_oldest_prefixes(make):
    limit = 64 * 4096
    engine, other = make(240, limit=limit), make(240, name="other", limit=limit)
    prompts = [[1000 * n + i for i in range(BLOCK * 40 + 1)] for n in range(5)]
    for n, tokens in enumerate(prompts):
        request = request_of(n, tokens)
        assert admit(engine.manager, request) == 0
        engine.manager.free(request)
        engine.pool.end_step(idle=True)
    assert engine.memory.physical_bytes > limit // 2
    big = request_of(10, list(range(10**6, 10**6 + BLOCK * 100)))
    assert admit(other.manager, big) == 0
    engine.check(), other.check()
    kept = [engine.manager.get_computed_blocks(request_of(20 + n, tokens))[1] for n, tokens in enumerate(prompts)]
    assert kept[0] <= 3 * BLOCK  # those beside the null block stay
    assert kept[-1] == BLOCK * 40 and kept[1:] == sorted(kept[1:])
    other.manager.free(big)


def test_a_request_waits_where_others_use_the_memory(make):
    limit = 32 * 4096
    engine, other = make(240, limit=limit), make(240, name="other", limit=limit)
    big = request_of(1, list(range(BLOCK * 4 * 20)))
    assert admit(other.manager, big) == 0
    mine = request_of(2, list(range(BLOCK * 4 * 15)))
    assert admit(engine.manager, mine) is None
    engine.check(), other.check()
    assert engine.pool.in_use() == 0
    other.manager.free(big)
    other.manager.reset_prefix_cache()
    other.pool.end_step(idle=True)
    engine.pool.end_step()
    engine.pool._ask_again = 0
    assert admit(engine.manager, mine) == 0
    engine.check()


def test_nothing_is_given_up_within_a_step(make):
    engine = make()
    request = request_of(1, list(range(BLOCK * 20)))
    admit(engine.manager, request)
    engine.manager.free(request)
    engine.pool.end_step(idle=True)
    answers = []
    with engine.pool.step_lock:
        answers.append(engine.pool.give_up(1 << 30))
        thread = threading.Thread(target=lambda: answers.append(engine.pool.give_up(1 << 30)))
        thread.start()
        thread.join()
    assert answers == [0, 0] and engine.pool.free_block_queue.num_free_blocks == 20
    assert engine.pool.give_up(1) == engine.memory.blocks.extent_bytes
    engine.check()


def test_who_asks_gets_an_eighth_of_what_is_cached_at_the_least(make):
    """The oldest, by whole extents: he will ask again, and each time wait for a step of ours."""
    engine = make(num_blocks=240)
    for number in range(5):
        request = request_of(number, [1000 * number + i for i in range(BLOCK * 40)])
        assert admit(engine.manager, request) == 0
        engine.manager.free(request)
    engine.pool.end_step(idle=True)
    extent = engine.memory.blocks.extent_bytes
    cached = engine.pool.free_block_queue.num_free_blocks * engine.memory.blocks.block_stride
    assert cached > 16 * extent
    given = engine.pool.give_up(1)
    assert cached // 8 <= given <= cached // 8 + 2 * extent
    newest = request_of(9, [4000 + i for i in range(BLOCK * 40)])
    assert admit(engine.manager, newest) == BLOCK * 39
    oldest = request_of(10, list(range(BLOCK * 40)))
    assert admit(engine.manager, oldest) < BLOCK * 39
    engine.check()


def test_no_more_prefixes_are_kept_than_wanted(make):
    engine = make(240, prefix_cache=10 * 4096)
    for n in range(5):
        request = request_of(n, [1000 * n + i for i in range(BLOCK * 30 + 1)])
        assert admit(engine.manager, request) == 0
        engine.manager.free(request)
        engine.pool.end_step(idle=True)
        engine.check()
        assert engine.pool.free_block_queue.num_free_blocks <= 40
    assert engine.settled() <= 12 * 4096


def test_what_ends_while_asleep_evicts_no_prefixes(make):
    engine = make(240, prefix_cache=10 * 4096)
    requests = [request_of(n, [1000 * n + i for i in range(BLOCK * 30 + 1)]) for n in range(2)]
    for request in requests:
        assert admit(engine.manager, request) == 0
    engine.memory.pause()
    for request in requests:
        engine.manager.free(request)
    assert engine.pool.free_block_queue.num_free_blocks == 60
    engine.memory.resume(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_two_engines_under_pressure(make, seed):
    """A limit far below what both would take: no block is handed out twice, memory follows, and nothing is left."""
    limit = 40 * 4096
    engines = [make(150, (None, 64), name=name, limit=limit) for name in ("a", "b")]
    chance = random.Random(seed)
    running: dict[int, list] = {0: [], 1: []}
    admitted = waited = preempted = 0
    for number in range(400):
        i = chance.randrange(2)
        engine, mine = engines[i], running[i]
        engine.pool._ask_again = 0
        with engine.pool.step_lock:
            request = request_of(number, random_prompt(chance))
            if admit(engine.manager, request) is None:
                waited += 1
            else:
                admitted += 1
                request.num_computed_tokens = request.num_tokens
                mine.append(request)
            for each in list(mine):
                if each not in mine:
                    continue  # preempted for one before it
                each.append_output_token_ids(7)
                while engine.manager.allocate_slots(each, 1) is None:
                    preempted += 1
                    last = mine.pop()
                    engine.manager.free(last)
                    if last is each:
                        break
                else:
                    each.num_computed_tokens += 1
            engine.pool.end_step()
        for each in list(mine):
            if chance.random() < 0.15:
                mine.remove(each)
                engine.manager.free(each)
        if not mine:
            engine.pool.end_step(idle=True)
        if chance.random() < 0.05:
            engine.manager.reset_prefix_cache()
        for each in engines:
            each.check()
        assert sum(each.settled() for each in engines) <= limit
    assert admitted > 50 and waited + preempted > 10
    for engine, mine in zip(engines, running.values()):
        for each in mine:
            engine.manager.free(each)
        assert engine.manager.reset_prefix_cache()
        engine.pool.end_step(idle=True)
        engine.check()
        assert engine.settled() == engine.memory.blocks.extent_bytes


def test_memory_of_an_engine_that_ends_is_the_others(make):
    engine, other = make(240, limit=64 * 4096), make(240, name="other", limit=64 * 4096)
    request = request_of(1, list(range(BLOCK * 200)))
    admit(engine.manager, request)
    ledger = elastikv.Ledger(engine.memory.pool_name)
    assert {client.model for client in ledger.clients()} == {"chat", "other"}
    engine.close()
    assert ledger.stats().charged == other.settled()
