"""Prometheus metrics of shared pools: `pip install 'elastikv[metrics]'`.

>>> import prometheus_client, elastikv.metrics
>>> elastikv.metrics.watch(shared, name="gpu0")
>>> prometheus_client.start_http_server(9400)

`dashboard_path()` is a Grafana dashboard of them, ready to import. docs/operating.md lists the metrics.
"""

from __future__ import annotations

from pathlib import Path

from elastikv.metrics.collector import PoolCollector, watch

__all__ = ["PoolCollector", "dashboard_path", "watch"]


def dashboard_path() -> Path:
    """The Grafana dashboard, a JSON file; its one input is the Prometheus data source."""
    return Path(__file__).with_name("dashboard.json")
