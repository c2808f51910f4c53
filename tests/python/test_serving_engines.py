"""Engines among others: several on one pool, in threads, dropped and closed, and their addresses and graphs."""

from __future__ import annotations

import gc
import threading
import time
import uuid

import pytest

import elastikv
from conftest import settled_usage

pytest.importorskip("transformers")

from elastikv.serving import Engine, Runner, run_until_idle
from hf_networks import make_network
from serving_tools import closed, expected, make_engine, make_pool, prompt, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


def test_engines_share_one_pool(device, page_size):
    networks = [make_network("gqa", device), make_network("sliding", device)]
    with make_pool(device, page_size, pages=18) as pool:
        engines = [make_engine(pool, network, f"m{i}", prefix_entries=2) for i, network in enumerate(networks)]
        requests = [
            (network, engine.submit(prompt(i, 30 + i), max_new_tokens=40))
            for i in range(5)
            for network, engine in zip(networks, engines)
        ]
        run_until_idle(*engines)
        for network, request in requests:
            assert same(request.answer, expected(network, list(request.asked.prompt), 40), device)
        assert pool.global_stats().peak_physical <= 18 * page_size
        closed(pool, *engines)


def test_engines_in_threads_stream_their_tokens(device, page_size):
    networks = [make_network("gqa", device), make_network("mha", device)]
    with make_pool(device, page_size, pages=30) as pool:
        engines = [
            make_engine(pool, network, f"m{i}", patience=0.05, clock=time.monotonic)
            for i, network in enumerate(networks)
        ]
        answers: dict[tuple[int, int], list[int]] = {}

        def client(which: int, index: int) -> None:
            request = engines[which].submit(prompt(index, 20 + index), max_new_tokens=30)
            answers[which, index] = list(request)

        with Runner(engines[0]), Runner(engines[1]):
            threads = [threading.Thread(target=client, args=(i, j)) for i in range(2) for j in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for (which, index), answer in answers.items():
            assert same(answer, expected(networks[which], prompt(index, 20 + index), 30), device)
        closed(pool, *engines)


def test_an_engine_obeys_orders_to_sleep_and_wake(device, page_size):
    network = make_network("gqa", device)
    name = f"pytest-{uuid.uuid4().hex[:12]}"
    with elastikv.SharedMemoryPool(1024 * page_size, device, park_limit=0, name=name) as pool:
        engine, ledger = make_engine(pool, network, "chat"), elastikv.Ledger(name)
        first = engine.submit(prompt(0, 30), max_new_tokens=40)
        for _ in range(10):
            engine.advance()
        ledger.sleep("chat")
        assert engine.handle.paused and engine.handle.quota().charged == 0
        second = engine.submit(prompt(1, 30), max_new_tokens=10)
        assert not engine.advance() and not second.answer
        ledger.wake("chat")
        run_until_idle(engine)
        for request, n in ((first, 40), (second, 10)):
            assert same(request.answer, expected(network, list(request.asked.prompt), n), device)
        closed(pool, engine)
        with pytest.raises(elastikv.InvalidArgument, match="takes no orders"):
            ledger.sleep("chat")


def test_an_engine_that_is_dropped_gives_its_memory_back(llama, device, shared):
    engine = make_engine(shared, llama)
    engine.submit(prompt(1, 40), max_new_tokens=5).result()
    engine.submit(prompt(2, 40), max_new_tokens=50)
    engine.advance()
    handle = engine.handle
    assert handle.stats().used > 0
    del engine
    gc.collect()
    assert settled_usage(shared, handle) == handle.stats().parked


def test_an_engine_fits_the_addresses_that_it_asks_for(llama, device, shared):
    for tokens in (1, 63, 4096, 100_001):
        sizes = {"max_batch": 3, "max_tokens": tokens, "prefix_entries": 2}
        addresses = Engine.addresses(llama.config, llama.dtype, **sizes)
        assert addresses % shared.page_size == 0
        engine = Engine(llama, shared.register_model(f"of-{tokens}", addresses), **sizes)
        assert len(engine.submit([5], max_new_tokens=1).result()) == 1
        engine.close()


def test_a_model_with_other_attention_is_refused(llama, device, shared):
    plain = make_network("gqa", device)
    plain.set_attn_implementation("sdpa")
    with pytest.raises(elastikv.InvalidArgument, match="elastikv"):
        make_engine(shared, plain)


@pytest.mark.cuda
def test_graphs_are_captured_once_for_each_batch_size():
    network = make_network("gqa", "cuda:0")
    with make_pool("cuda:0", 2 << 20) as pool:
        engine = make_engine(pool, network, max_batch=8, prefix_entries=0)
        for _ in range(2):
            requests = [engine.submit(prompt(i, 10 + i), max_new_tokens=20) for i in range(8)]
            run_until_idle(engine)
            assert all(len(one.answer) == 20 for one in requests)
            captures = engine.graphs
        assert 1 <= captures <= 8
        closed(pool, engine)
