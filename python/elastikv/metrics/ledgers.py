"""Metrics of ledgers, from any process of the user: what each client holds, as the ledger has it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastikv._core import Ledger, ledgers
from elastikv.errors import LedgerError

# Field of the statistics, name without elastikv_ledger_ or elastikv_client_, and what it says.
LEDGER_GAUGES = (
    ("physical_limit", "physical_limit_bytes", "Bytes that all clients may hold."),
    ("charged", "charged_bytes", "Bytes that all clients hold."),
    ("committed", "committed_bytes", "Sum over clients of what is held or reserved, whichever is more."),
    ("processes", "processes", "Processes that draw on the ledger."),
    ("waiters", "waiting_requests", "Requests that wait for memory."),
)
CLIENT_GAUGES = (
    ("charged", "charged_bytes", "Bytes that the client holds."),
    ("used", "used_bytes", "Bytes of pages with a live byte."),
    ("parked", "parked_bytes", "Bytes mapped and idle."),
    ("retiring", "retiring_bytes", "Bytes released that device work may still touch."),
    ("reserve", "reserve_bytes", "Bytes promised to the client."),
    ("limit", "limit_bytes", "Bytes that the client may hold at most."),
    ("priority", "priority", "Higher ones are served first."),
)
CLIENT_COUNTERS = (("refusals", "refusals", "Requests that failed for want of physical memory."),)


class LedgerCollector(Collector):
    """The metrics of all ledgers whose names begin with `prefix`, as they are at a scrape. Thread safe."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        found = {}
        for name in ledgers():
            if name.startswith(self.prefix):
                try:
                    ledger = Ledger(name)
                    found[name] = (ledger.stats(), ledger.clients())
                except LedgerError:
                    continue  # its last process has just ended
        for field, name, about in LEDGER_GAUGES:
            family = GaugeMetricFamily(f"elastikv_ledger_{name}", about, labels=("pool",))
            for pool, (stats, _) in found.items():
                family.add_metric((pool,), getattr(stats, field))
            yield family
        for family_type, fields in ((GaugeMetricFamily, CLIENT_GAUGES), (CounterMetricFamily, CLIENT_COUNTERS)):
            for field, name, about in fields:
                each = family_type(f"elastikv_client_{name}", about, labels=("pool", "model", "pid"))
                for pool, (_, clients) in found.items():
                    for client in clients:
                        each.add_metric((pool, client.model, str(client.pid)), getattr(client, field))
                yield each


_lock = threading.Lock()
_watched: weakref.WeakKeyDictionary[CollectorRegistry, set[str]] = weakref.WeakKeyDictionary()


def watch_ledgers(prefix: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Every scrape of the registry has the metrics of ledgers with that prefix from now on; asked twice, it is once."""
    with _lock:
        prefixes = _watched.setdefault(registry, set())
        if prefix in prefixes:
            return
        prefixes.add(prefix)
    registry.register(LedgerCollector(prefix))
