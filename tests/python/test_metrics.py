"""elastikv.metrics: what is scraped is what the statistics say, and the dashboard asks for nothing else."""

from __future__ import annotations

import gc
import json
import re
import urllib.request

import pytest

import elastikv

prometheus = pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from elastikv import metrics  # noqa: E402
from elastikv.metrics import collector  # noqa: E402


def scrape(registry) -> dict[tuple[str, frozenset], float]:
    """Every sample, by its name and labels, from the text that Prometheus would get."""
    text = prometheus.generate_latest(registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture
def registry():
    return prometheus.CollectorRegistry()


def test_scraped_numbers_are_those_of_stats(shared, model, page_size, registry):
    other = shared.register_model("other", 64 * page_size, reserve=2 * page_size, limit=9 * page_size, priority=-3)
    metrics.watch(shared, name="gpu0", registry=registry)
    shared.allocate_for_model("model", 3 * page_size + 1)
    address = shared.allocate_for_model("other", 5 * page_size)
    shared.deallocate_for_model("other", address - other.base_address, 2 * page_size)
    other.drain()
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        shared.allocate_for_model("other", 9 * page_size)
    made_before = {each.name: each.stats().driver_calls for each in (model, other)}
    found = scrape(registry)
    total = shared.global_stats()
    for field, name, _ in collector.POOL_GAUGES:
        key = (f"elastikv_pool_{name}", frozenset({"pool": "gpu0", "device": shared.device}.items()))
        assert found.pop(key) == getattr(total, field), name
    for each in (model, other):
        labels = {"pool": "gpu0", "model": each.name}
        stats, quota = each.stats(), each.quota()
        for source, fields, suffix in (
            (stats, collector.MODEL_GAUGES, ""),
            (stats, collector.MODEL_COUNTERS, "_total"),
            (quota, collector.QUOTA_GAUGES, ""),
            (quota, collector.QUOTA_COUNTERS, "_total"),
        ):
            for field, name, _ in fields:
                key = (f"elastikv_model_{name}{suffix}", frozenset(labels.items()))
                assert found.pop(key) == getattr(source, field), name
        for call, made in stats.driver_calls.items():
            before = made_before[each.name][call]  # a GPU's worker goes on making calls meanwhile
            of_call = frozenset({**labels, "call": call}.items())
            calls = found.pop(("elastikv_model_driver_calls_total", of_call))
            assert before.count <= calls <= made.count
            failures = found.pop(("elastikv_model_driver_call_failures_total", of_call))
            assert before.failures <= failures <= made.failures
            seconds = found.pop(("elastikv_model_driver_call_seconds_total", of_call))
            assert before.nanoseconds / 1e9 <= seconds <= made.nanoseconds / 1e9
    assert not found
    assert other.quota().refusals == 1 and other.stats().created >= 5 * page_size


def test_several_pools_on_one_registry(device, page_size, registry):
    pools = [elastikv.SharedMemoryPool(8 * page_size, device) for _ in range(2)]
    for index, pool in enumerate(pools):
        pool.register_model("same", 64 * page_size)
        metrics.watch(pool, name=f"gpu{index}", registry=registry)
        pool.allocate_for_model("same", (index + 1) * page_size)
    with pytest.raises(elastikv.InvalidArgument, match="'gpu1' already"):
        metrics.watch(pools[0], name="gpu1", registry=registry)
    with pytest.raises(elastikv.InvalidArgument, match="empty"):
        metrics.watch(pools[0], name="", registry=registry)

    def used(name: str) -> float | None:
        return scrape(registry).get(
            ("elastikv_model_used_bytes", frozenset({"pool": name, "model": "same"}.items())), None
        )

    assert [used("gpu0"), used("gpu1")] == [page_size, 2 * page_size]
    del pool, pools[1]
    gc.collect()
    assert [used("gpu0"), used("gpu1")] == [page_size, None]
    metrics.watch(pools[0], name="gpu1", registry=registry)
    pools[0].unregister_model("same")
    assert used("gpu0") is None
    pools[0].close()
    scrape(registry)


def test_over_http(shared, model, page_size, registry):
    metrics.watch(shared, name="gpu0", registry=registry)
    server, thread = prometheus.start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        shared.allocate_for_model("model", page_size)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        thread.join()
    (line,) = [line for line in text.splitlines() if line.startswith('elastikv_model_used_bytes{model="model"')]
    assert 'pool="gpu0"' in line and float(line.split()[-1]) == page_size


def test_names_have_units():
    for _, name, about in (*collector.POOL_GAUGES, *collector.MODEL_GAUGES, *collector.QUOTA_GAUGES):
        assert not ("ytes" in about and "bytes" not in name), name


def test_dashboard_asks_for_what_is_there(shared, model, registry):
    metrics.watch(shared, name="gpu0", registry=registry)
    known = {name for name, _ in scrape(registry)}
    board = json.loads(metrics.dashboard_path().read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"elastikv_\w+", query)}
    assert len(asked) >= 12 and asked <= known, asked - known
    names = [panel["title"] for panel in board["panels"]]
    assert len(set(names)) == len(names)
    assert {variable["name"] for variable in board["templating"]["list"]} == {"pool", "model"}
