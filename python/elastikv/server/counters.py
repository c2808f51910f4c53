"""An engine's counts for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elastikv.serving.engine import Engine

COUNTERS = (
    ("submitted", "requests", "Requests that were accepted."),
    ("admitted", "starts", "Requests that got a row, again after a restart."),
    ("pauses", "pauses", "Times that a request made way with its pages kept."),
    ("restarts", "restarts", "Times that a request made way with its pages given back."),
    ("steps", "decode_steps", "Decode steps."),
    ("decoded_tokens", "decoded_tokens", "Tokens of answers, without the first of each."),
    ("prefilled_tokens", "prefilled_tokens", "Tokens of prompts that were computed."),
    ("stalled_steps", "stalled_steps", "Steps in which nobody could move for want of memory."),
)
PREFIXES = (
    ("lookups", "prefix_lookups", "Prompts that were looked up."),
    ("hits", "prefix_hits", "Prompts that shared a prefix."),
    ("tokens_saved", "prefix_tokens_saved", "Tokens of prompts that were not computed again."),
    ("evicted", "prefix_evictions", "Prefixes that were given up."),
)


class EngineCollector(Collector):
    """The metrics of one engine, with the label `model`. Thread safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        for counts, fields in ((engine.counts, COUNTERS), (engine.prefixes.counts, PREFIXES)):
            for field, name, about in fields:
                counter = CounterMetricFamily(f"elastikv_engine_{name}", about, labels=("model",))
                counter.add_metric((engine.name,), getattr(counts, field))
                yield counter
        finished = CounterMetricFamily("elastikv_engine_finished", "Requests that ended.", labels=("model", "how"))
        for how, count in sorted(engine.counts.finished.items()):
            finished.add_metric((engine.name, how), count)
        yield finished
        for name, about, value in (
            ("running", "Requests that hold rows.", len(engine.running)),
            ("waiting", "Requests that have none.", engine.waiting),
            ("prefix_bytes", "Bytes of prefixes that are kept.", engine.prefixes.bytes),
        ):
            gauge = GaugeMetricFamily(f"elastikv_engine_{name}", about, labels=("model",))
            gauge.add_metric((engine.name,), value)
            yield gauge
