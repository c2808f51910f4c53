"""The prompt-prefix index: what is computed once is shared, kept while there is room, and given up under pressure."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import elastikv
from conftest import settled_usage

pytest.importorskip("transformers")

from elastikv.serving import run_until_idle
from serving_tools import PAGES, closed, expected, make_engine, make_pool, prompt, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


def test_prompts_with_a_common_front_are_computed_once(llama, device, shared):
    engine = make_engine(shared, llama, max_tokens=512, max_batch=8, chunk=64)
    front = prompt(5, 256)
    first = engine.submit([*front, 7, 8, 9], max_new_tokens=6)
    run_until_idle(engine)
    assert first.prefix_tokens == 0
    more = [engine.submit([*front, 10 + i, 9], max_new_tokens=6) for i in range(6)]
    run_until_idle(engine)
    assert [one.prefix_tokens for one in more] == [256] * 6
    assert engine.prefixes.counts.hits == 6 and engine.prefixes.counts.tokens_saved == 6 * 256
    assert engine.counts.prefilled_tokens == 259 + 6 * 2
    for index, one in enumerate(more):
        assert same(one.answer, expected(llama, [*front, 10 + index, 9], 6), device)
    # A turn later: prompt and answer are the prefix of the next prompt.
    next_turn = engine.submit([*first.tokens, 11, 12], max_new_tokens=4)
    run_until_idle(engine)
    assert next_turn.prefix_tokens == 259 + 5
    assert same(next_turn.answer, expected(llama, [*first.tokens, 11, 12], 4), device)
    closed(shared, engine)


def test_a_prefix_that_takes_all_memory_may_go_before_who_shares_it_starts(llama, device, page_size):
    """Not even the places in a decoder that nobody takes have memory then."""
    tokens = 3 * page_size // (3 * 2 * 2 * 16 * llama.dtype.itemsize)
    with make_pool(device, page_size, pages=4) as pool:
        engine = make_engine(pool, llama, max_tokens=2 * tokens, max_batch=2, chunk=tokens)
        first = engine.submit(prompt(5, tokens - 1), max_new_tokens=2)
        run_until_idle(engine)
        other = pool.register_model("other", virtual_capacity=1 << 40)
        rest = elastikv.SlotTensor(other, 1, 1, page_size // 2, torch.float16)
        rest.grow([0], [1])
        assert len(engine.prefixes) == 1 and pool.global_stats().physical_usage == 4 * page_size
        again = engine.submit([*first.asked.prompt[: tokens // 3], 3], max_new_tokens=2)
        run_until_idle(engine)
        assert same(again.answer, expected(llama, list(again.asked.prompt), 2), device)
        rest.shrink([0], [0])
        closed(pool, engine)


def test_who_lacked_memory_during_the_last_step_gets_it_after(llama, device, shared, page_size, monkeypatch):
    """A step in which prefixes can't go is followed by one in which they do, also where no request is left."""
    engine = make_engine(shared, llama)
    other = shared.register_model("other", virtual_capacity=1 << 40)
    rows = elastikv.SlotTensor(other, 1, PAGES, page_size // 2, torch.float16)
    refused = []
    run = engine._prompts.run

    def ask_meanwhile(requests):
        def ask():
            with pytest.raises(elastikv.OutOfPhysicalMemory):
                rows.grow([0], [PAGES], exact=True)
            refused.append(True)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return run(requests)

    monkeypatch.setattr(engine._prompts, "run", ask_meanwhile)
    engine.submit(prompt(1, 12), max_new_tokens=1)
    run_until_idle(engine)
    assert refused == [True] and len(engine.prefixes) == 0
    rows.grow([0], [PAGES], exact=True)
    rows.shrink([0], [0])
    closed(shared, engine)


def test_running_rows_are_shared_too(llama, device, shared):
    engine = make_engine(shared, llama, max_tokens=512, chunk=64)
    front = prompt(5, 64)
    first = engine.submit([*front, 7], max_new_tokens=30)
    for _ in range(4):
        engine.advance()
    second = engine.submit([*front, 8], max_new_tokens=30)
    run_until_idle(engine)
    assert second.prefix_tokens == 64
    for one, last in ((first, 7), (second, 8)):
        assert same(one.answer, expected(llama, [*front, last], 30), device)
    closed(shared, engine)


def test_the_least_recently_used_prefix_goes_first(llama, device, shared):
    engine = make_engine(shared, llama, prefix_entries=2)
    for seed in (1, 2, 1, 3):
        engine.submit(prompt(seed, 40), max_new_tokens=2).result()
    assert engine.prefixes.counts.evicted == 1
    assert engine.submit([*prompt(1, 40), 5], max_new_tokens=2).result() and engine.prefixes.counts.hits == 2
    assert engine.submit(prompt(2, 40), max_new_tokens=2).result() and engine.prefixes.counts.hits == 2
    closed(shared, engine)


def test_prefixes_are_given_up_where_memory_is_short(llama, device, page_size):
    """For the engine's own requests, for another model's tensors, and for `trim`."""
    with make_pool(device, page_size, pages=12) as pool:
        per_page = page_size // (3 * 2 * 2 * 16 * llama.dtype.itemsize)
        engine = make_engine(pool, llama, max_tokens=4 * per_page, chunk=4 * per_page)
        other = pool.register_model("other", virtual_capacity=1 << 30)
        for seed in range(6):
            engine.submit(prompt(seed, 3 * per_page - 2), max_new_tokens=2).result()
        assert len(engine.prefixes) <= 4 and engine.prefixes.counts.evicted >= 2
        held = len(engine.prefixes)
        tensor = elastikv.zeros((8 * page_size,), torch.uint8, other)
        assert len(engine.prefixes) < held
        del tensor
        gc.collect()
        engine.submit(prompt(1, per_page), max_new_tokens=2).result()
        assert len(engine.prefixes) >= 1
        pool.trim()
        assert len(engine.prefixes) == 0
        assert settled_usage(pool, engine.handle, other) == 0
        closed(pool, engine)
