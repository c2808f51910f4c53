"""What a scrape reads: the statistics as they are then. Between scrapes nothing runs."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from elastikv.errors import InvalidArgument

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError("metrics need prometheus_client: pip install 'elastikv[metrics]'") from missing

if TYPE_CHECKING:
    from elastikv._core import MemoryStats, SharedMemoryPool

# Field of the statistics, name without elastikv_pool_ or elastikv_model_, and what it says.
POOL_GAUGES = (
    ("physical_limit", "physical_limit_bytes", "Physical bytes that the pool may hold."),
    ("physical_usage", "physical_bytes", "Physical bytes held, of all models."),
    ("available", "available_bytes", "Bytes below the limit; parked memory comes on top of it."),
    ("parked", "parked_bytes", "Bytes mapped and idle: reused without a driver call, given back under pressure."),
    ("retiring", "retiring_bytes", "Bytes released that device work may still touch."),
    ("spilled", "spilled_bytes", "Bytes that lie in host memory beneath device addresses."),
    ("paused", "paused_bytes", "Bytes that it takes to resume what is paused."),
    ("backup", "backup_bytes", "Bytes of what is paused that pinned host memory holds."),
    ("pinned", "pinned_bytes", "Host memory pinned for backups, in use or not."),
    ("peak_physical", "peak_physical_bytes", "The most physical bytes held at once."),
    ("reserved", "reserved_bytes", "Sum of the models' reserves."),
    ("committed", "committed_bytes", "Sum over models of what is held or reserved, whichever is more."),
    ("num_models", "models", "Registered models."),
)
MODEL_GAUGES = (
    ("virtual_capacity", "virtual_capacity_bytes", "Addresses reserved for the model; they cost nothing."),
    ("physical_usage", "physical_bytes", "Physical bytes held: used + retiring + parked + stranded."),
    ("live", "live_bytes", "Bytes asked for and not freed."),
    ("used", "used_bytes", "Bytes of pages with a live byte."),
    ("retiring", "retiring_bytes", "Bytes released that device work may still touch."),
    ("parked", "parked_bytes", "Bytes mapped and idle."),
    ("stranded", "stranded_bytes", "Idle bytes of extents that are partly in use."),
    ("spilled", "spilled_bytes", "Bytes that lie in host memory beneath device addresses."),
    ("paused", "paused_bytes", "Bytes that it takes to resume what is paused."),
    ("backup", "backup_bytes", "Bytes of what is paused that pinned host memory holds."),
    ("extents", "extents", "Physical allocations, one driver handle each."),
    ("peak_physical", "peak_physical_bytes", "The most physical bytes held at once."),
    ("abandoned", "abandoned_bytes", "Bytes lost as the driver refused to take them back."),
)
QUOTA_GAUGES = (
    ("reserve", "reserve_bytes", "Bytes promised to the model."),
    ("limit", "limit_bytes", "Bytes that the model may hold at most."),
    ("priority", "priority", "Higher ones are served first."),
    ("charged", "charged_bytes", "Bytes charged to the model in the pool's ledger."),
    ("overage", "overage_bytes", "Bytes held above a limit that was lowered."),
    ("waiting", "waiting_bytes", "Bytes that waiting requests ask for."),
    ("waiters", "waiting_requests", "Requests that wait for memory."),
)
QUOTA_COUNTERS = (
    ("grants", "grants", "Waiting requests that were served."),
    ("refusals", "refusals", "Requests that failed for want of physical memory."),
)
MODEL_COUNTERS = (
    ("created", "grown_bytes", "Bytes ever taken from the device, or from other models."),
    ("released", "reclaimed_bytes", "Bytes ever given back to the device, or to other models."),
    ("received", "received_bytes", "Of the bytes grown, those that other models handed over."),
    ("prefetches_done", "prefetches", "Ranges mapped ahead in the background."),
    ("prefetches_dropped", "prefetches_dropped", "Mappings ahead that were dropped, for want of memory."),
    ("reclaims_refused", "reclaims_refused", "Times the driver refused to take an extent back."),
)


class PoolCollector(Collector):
    """The metrics of one shared pool, with the labels `pool` and, for a model's, `model`.

    Holds the pool weakly: once it is gone, a scrape has nothing of it. Thread safe.
    """

    def __init__(self, pool: SharedMemoryPool, name: str) -> None:
        self.name = name
        self._pool = weakref.ref(pool)

    def describe(self) -> Iterable[Metric]:
        return []  # nothing to collect at registration

    def collect(self) -> Iterator[Metric]:
        pool = self._pool()
        if pool is None:
            return
        device = pool.device
        total = pool.global_stats()
        for field, name, about in POOL_GAUGES:
            family = GaugeMetricFamily(f"elastikv_pool_{name}", about, labels=("pool", "device"))
            family.add_metric((self.name, device), getattr(total, field))
            yield family
        quotas = pool.quotas()
        models = {}
        for model in quotas:
            stats = pool.get_model_stats(model)
            if stats is not None:  # unregistered meanwhile
                models[model] = stats
        yield from self._families(GaugeMetricFamily, MODEL_GAUGES, models)
        yield from self._families(CounterMetricFamily, MODEL_COUNTERS, models)
        yield from self._families(GaugeMetricFamily, QUOTA_GAUGES, quotas)
        yield from self._families(CounterMetricFamily, QUOTA_COUNTERS, quotas)
        yield from self._driver_calls(models)

    def _families(
        self,
        family_type: type[GaugeMetricFamily] | type[CounterMetricFamily],
        fields: Iterable[tuple[str, str, str]],
        models: Mapping[str, object],
    ) -> Iterator[Metric]:
        for field, name, about in fields:
            family = family_type(f"elastikv_model_{name}", about, labels=("pool", "model"))
            for model, stats in models.items():
                family.add_metric((self.name, model), getattr(stats, field))
            yield family

    def _driver_calls(self, models: Mapping[str, MemoryStats]) -> Iterator[Metric]:
        labels = ("pool", "model")
        calls = CounterMetricFamily("elastikv_model_driver_calls", "Driver calls.", labels=(*labels, "call"))
        failures = CounterMetricFamily(
            "elastikv_model_driver_call_failures", "Driver calls that failed.", labels=(*labels, "call")
        )
        seconds = CounterMetricFamily(
            "elastikv_model_driver_call_seconds", "Time in driver calls.", labels=(*labels, "call")
        )
        for model, stats in models.items():
            for call, made in stats.driver_calls.items():
                calls.add_metric((self.name, model, call), made.count)
                failures.add_metric((self.name, model, call), made.failures)
                seconds.add_metric((self.name, model, call), made.nanoseconds / 1e9)
        yield from (calls, failures, seconds)


_lock = threading.Lock()
_watched: weakref.WeakKeyDictionary[CollectorRegistry, _Pools] = weakref.WeakKeyDictionary()


class _Pools(Collector):
    """All pools of a registry: a metric may be there once in a scrape, with the labels of each pool."""

    def __init__(self) -> None:
        self.collectors: list[PoolCollector] = []

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        with _lock:
            self.collectors = [each for each in self.collectors if each._pool() is not None]
            collectors = list(self.collectors)
        families: dict[str, Metric] = {}
        for family in itertools.chain.from_iterable(each.collect() for each in collectors):
            if family.name in families:
                families[family.name].samples.extend(family.samples)
            else:
                families[family.name] = family
        yield from families.values()


def watch(pool: SharedMemoryPool, *, name: str, registry: CollectorRegistry = REGISTRY) -> None:
    """Every scrape of the registry has the pool's metrics from now on, until the pool is gone.

    name: the label `pool`; one that another living pool of the registry has raises InvalidArgument, as does "".
    """
    if not name:
        raise InvalidArgument("a pool's name in metrics must not be empty")
    with _lock:
        fresh = registry not in _watched
        pools = _watched.setdefault(registry, _Pools())
        if any(each.name == name and each._pool() is not None for each in pools.collectors):
            raise InvalidArgument(f"a pool is watched under the name '{name}' already")
        pools.collectors.append(PoolCollector(pool, name))
    if fresh:
        registry.register(pools)
