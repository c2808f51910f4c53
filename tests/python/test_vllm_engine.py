"""The plugin as a whole, without a GPU: what is patched and what is refused, settings, sleep, metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

import elastikv
from elastikv.vllm.engine import Engine, NotSupported
from elastikv.vllm.patches import blocks_named
from elastikv.vllm.scheduler_patches import blocks_to_allocate
from elastikv.vllm.settings import Settings
from elastikv.vllm.versions import PATCHES, Patch, version_of
from vllm_engine import BLOCK, HostEngine, allocate, cache_config, request_of


def config_of(**fields):
    parallel = SimpleNamespace(world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1)
    model = SimpleNamespace(served_model_name=None, model="/models/llama-8b/")
    config = {"parallel_config": parallel, "kv_transfer_config": None, "additional_config": {}, "model_config": model}
    return SimpleNamespace(**{**config, **fields})


FRESH = """
import os
import vllm_without_xgrammar
import elastikv.vllm, vllm, vllm.v1.core.block_pool as pool, vllm.v1.core.kv_cache_coordinator as coordinator
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_worker import Worker

def told():
    before = pool.BlockPool, coordinator.BlockPool, Scheduler.schedule
    try:
        elastikv.vllm.register()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "as it was" if before == (pool.BlockPool, coordinator.BlockPool, Scheduler.schedule) else "patched"

print("off:", told())
os.environ["ELASTIKV_VLLM"] = "yes"
print("bad:", told())
os.environ["ELASTIKV_VLLM"] = "1"
known = vllm.__version__
for other in ("0.19.1", "0.99.0", "1.0.0"):
    vllm.__version__ = other
    print(f"{other}:", told())
vllm.__version__ = known
sleep, get = Worker.sleep, pool.BlockPool.get_new_blocks
del Worker.sleep
pool.BlockPool.get_new_blocks = lambda self, how_many: None
print("changed:", told())
Worker.sleep, pool.BlockPool.get_new_blocks = sleep, get
print("on:", told())
print("again:", told())
"""


def test_when_vllm_is_patched():
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "ELASTIKV_VLLM": "0", "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True)
    told = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if ": " in line and "[" not in line)
    assert ran.returncode == 0, ran.stderr
    assert told["off"] == "as it was"
    assert told["bad"] == "ValueError: ELASTIKV_VLLM must be 0 or 1, not 'yes'"
    for other in ("0.19.1", "0.99.0", "1.0.0"):
        assert told[other].startswith("NotSupported") and f"this is {other}; nothing was patched" in told[other]
    assert "Worker.sleep is not there" in told["changed"]
    assert "BlockPool.get_new_blocks takes (self, how_many), not (self, num_blocks, ...)" in told["changed"]
    assert (told["on"], told["again"]) == ("patched", "as it was")


def test_versions():
    assert version_of("0.25.1") == (0, 25) and version_of("0.20.2+cu130") == (0, 20)
    for bad in ("dev", "", "0.x"):
        with pytest.raises(NotSupported, match="does not know"):
            version_of(bad)
    patch = Patch("vllm", "x", (), lambda f: f, since=(0, 22), before=(0, 24))
    assert [patch.applies_to((0, minor)) for minor in (21, 22, 23, 24)] == [False, True, True, False]
    assert len({(patch.module, patch.path) for patch in PATCHES}) == len(PATCHES)


def test_settings():
    assert Settings.read({}, {}) == Settings()
    environment = {"ELASTIKV_VLLM": "1", "ELASTIKV_VLLM_LIMIT": "60GiB", "ELASTIKV_VLLM_PRIORITY": "-2"}
    read = Settings.read({"elastikv": {"limit": 1 << 30, "prefix_cache": "0"}, "other": 3}, environment)
    assert (read.limit, read.priority, read.prefix_cache, read.pool) == (1 << 30, -2, 0, "vllm")
    for environment, config, told in (
        ({"ELASTIKV_VLLM_LIMITS": "3"}, {}, "no setting 'limits'"),
        ({"ELASTIKV_VLLM_LIMIT": "much"}, {}, "'limit' for vLLM can't be 'much'"),
        ({}, {"elastikv": {"pool": ""}}, "'pool'"),
        ({}, {"elastikv": {"priority": "high"}}, "'priority'"),
        ({}, {"elastikv": {"reserve": -1}}, "'reserve' for vLLM can't be -1: it must be at least 0"),
        ({"ELASTIKV_VLLM_PARK": "-1"}, {}, "'park' for vLLM can't be '-1'"),
        ({}, {"elastikv": {"extent": True}}, "'extent' for vLLM can't be True"),
        ({"ELASTIKV_VLLM_LAYOUT": "rows"}, {}, "'layout' for vLLM can't be 'rows': it must be one of blocks, layers"),
        ({}, {"elastikv": 3}, "must be a mapping"),
    ):
        with pytest.raises(ValueError, match=told):
            Settings.read(config, environment)


def test_what_is_refused():
    assert Engine.of(config_of(), in_process=True).name == "llama-8b"
    served = SimpleNamespace(served_model_name=["chat", "alias"], model="x")
    assert Engine.of(config_of(model_config=served), in_process=True).name == "chat"
    two = SimpleNamespace(world_size=2, tensor_parallel_size=2, pipeline_parallel_size=1)
    with pytest.raises(NotSupported, match="parallel size 1, not 2 and 1"):
        Engine.of(config_of(parallel_config=two), in_process=False)
    with pytest.raises(NotSupported, match="own process"):
        Engine.of(config_of(), in_process=False)
    ranks = SimpleNamespace(**{**vars(config_of().parallel_config), "data_parallel_size": 4})
    with pytest.raises(NotSupported, match="one data-parallel rank, not 4"):
        Engine.of(config_of(parallel_config=ranks), in_process=True)
    with pytest.raises(NotSupported, match="KV connectors"):
        Engine.of(config_of(kv_transfer_config=object()), in_process=True)
    experts = SimpleNamespace(served_model_name="chat", model="x", enable_return_routed_experts=True)
    assert Engine.of(config_of(model_config=experts), in_process=True).name == "chat"
    with pytest.raises(NotSupported, match="LAYOUT=blocks"):
        Engine.of(
            config_of(model_config=experts, additional_config={"elastikv": {"layout": "layers"}}), in_process=True
        )
    engine = Engine.of(config_of(), in_process=True)
    engine.memory = object()
    with pytest.raises(NotSupported, match="no block pool"):
        engine.started()


def test_what_counts_blocks_is_called_as_before():
    """Whatever its parameters are in this version, and blocks are secured for what it says."""
    asked = []
    pool = SimpleNamespace(secure=lambda n, at_once: asked.append((n, at_once)), stock=[])
    one = SimpleNamespace(block_pool=pool)

    def oldest(self, request, tokens, blocks=()):
        return tokens // 16

    def newest(self, request, tokens, *, apply_admission_cap=False, **rest):
        return tokens // 16 + len(rest)

    def any_number(self, *args, tokens):
        return len(args) + tokens

    for original, args, options, expected in (
        (oldest, ("a", 32), {}, (2, True)),
        (oldest, ("a",), {"tokens": 48, "blocks": (3,)}, (3, True)),
        (newest, ("a", 32), {"apply_admission_cap": True}, (2, False)),
        (newest, ("a", 32), {"other": 1}, (3, True)),
        (any_number, (1, 2), {"tokens": 4}, (6, True)),
    ):
        assert blocks_to_allocate(original)(one, *args, **options) == original(one, *args, **options)
        assert asked.pop() == expected
    assert blocks_to_allocate(oldest)(one, "a", 5) == 0 and not asked
    pool.stock = [7, 8]
    assert blocks_to_allocate(oldest)(one, "a", 32) == 2 and not asked  # what is in stock is secured
    assert blocks_to_allocate(oldest)(one, "a", 48) == 3 and asked.pop() == (3, True)
    with pytest.raises(TypeError):
        blocks_to_allocate(oldest)(one, "a")


def test_blocks_that_warm_up_names_have_memory_meanwhile():
    """vLLM's warm-up takes blocks 1, 2, 3, ... before there is a scheduler."""
    config = cache_config(100)
    engine = Engine(Settings(pool="test-warm", limit=1 << 20, park=0, extent=4096, ahead=0), "chat")
    engine.device_bytes = 1 << 20
    planned = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=([1, 2], [3, 4])), SimpleNamespace(block_ids=([5],))],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None, ([17, 18],)]),
    )
    try:
        with engine.starting(), engine.allocating():
            allocate(engine, config)
        named = list(blocks_named(planned))
        assert sorted(named) == [1, 2, 3, 4, 5, 17, 18]
        for _ in range(2):
            engine.warm_up(named)
            assert all(engine.memory.blocks.references(block) == 1 for block in range(19))
            engine.memory.raw[:19] = 1
        engine.warm_up([])
        engine.warmed_up()
        assert engine.memory.blocks.held == 1
        with pytest.raises(elastikv.OutOfVirtualMemory):
            engine.warm_up([100])
        engine.warmed_up()
        assert engine.memory.blocks.held == 1
    finally:
        engine.close()


def test_weights_count_and_sleep_gives_them_up():
    limit = 1 << 20
    engine = HostEngine(cache_config(100), "test-sleep", limit=limit, other=limit // 2)
    try:
        ledger = elastikv.Ledger(engine.memory.pool_name)
        assert {(one.model, one.reserve) for one in ledger.clients()} == {("chat", 0), ("chat (weights)", limit // 2)}
        request = request_of(1, list(range(BLOCK * 30 + 1)))
        hits, *_ = engine.manager.get_computed_blocks(request)
        assert engine.manager.allocate_slots(request, request.num_tokens, 0, hits) is not None
        engine.manager.free(request)
        assert ledger.stats().committed == limit // 2 + engine.settled()
        assert engine.manager.reset_prefix_cache()
        engine.engine.sleep()
        assert engine.settled() == ledger.stats().committed == engine.memory.blocks.extent_bytes
        engine.check()
        engine.engine.wake()
        assert ledger.stats().committed == limit // 2 + engine.settled()
        assert engine.manager.allocate_slots(request_of(2, list(range(50))), 50) is not None
        engine.check()
    finally:
        engine.close()


def test_two_that_do_not_fit():
    first = HostEngine(cache_config(100), "test-full", limit=1 << 20, other=1 << 19)
    try:
        with pytest.raises(NotSupported, match="'second' finds no place in its pool"):
            HostEngine(cache_config(100), "test-full", name="second", limit=1 << 20, other=(1 << 19) + 4096)
        assert len(elastikv.Ledger(first.memory.pool_name).clients()) == 2
    finally:
        first.close()


def test_a_pool_that_is_there_says_its_limit():
    first = HostEngine(cache_config(100), "test-limit", limit=1 << 20)
    second = HostEngine(cache_config(100), "test-limit", name="second", limit=None)
    try:
        assert elastikv.Ledger(first.memory.pool_name).stats().physical_limit == 1 << 20
        assert first.engine.taken_by_others(torch.device("cpu")) == first.settled() + second.settled()
        assert second.engine.has_company(torch.device("cpu"))
        assert second.engine.ceiling(wanted=100, free=60) == 60
    finally:
        second.close()
        first.close()


def test_metrics_of_ledgers():
    prometheus_client = pytest.importorskip("prometheus_client")
    from elastikv.metrics.ledgers import watch_ledgers

    registry = prometheus_client.CollectorRegistry()
    watch_ledgers("test-metrics.", registry)
    watch_ledgers("test-metrics.", registry)
    engine = HostEngine(cache_config(100), "test-metrics", limit=1 << 20)
    try:
        labels = {"pool": "test-metrics.cpu", "model": "chat", "pid": str(os.getpid())}
        assert registry.get_sample_value("elastikv_client_charged_bytes", labels) == engine.settled()
        assert (
            registry.get_sample_value("elastikv_ledger_physical_limit_bytes", {"pool": "test-metrics.cpu"}) == 1 << 20
        )
        assert registry.get_sample_value("elastikv_client_refusals_total", labels) == 0
    finally:
        engine.close()
