"""elastikv.logs: events through Python's logging, and none where nobody listens."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import elastikv
from elastikv import _core, logs


@pytest.fixture(autouse=True)
def stopped():
    yield
    logs.stop()


def test_events_carry_their_numbers(shared, model, page_size, caplog):
    caplog.set_level(logging.DEBUG, "elastikv")
    logs.start()
    address = shared.allocate_for_model("model", 3 * page_size)
    shared.deallocate_for_model("model", address - model.base_address, 3 * page_size)
    model.drain()
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        shared.allocate_for_model("model", 65 * page_size)
    logs.stop()
    records = caplog.records
    assert [record.name for record in records] == ["elastikv.growth", "elastikv.reclaim", "elastikv.out_of_memory"]
    assert [record.levelname for record in records] == ["DEBUG", "DEBUG", "WARNING"]
    assert {record.pool for record in records} == {"model"}
    assert [record.size for record in records] == [3 * page_size, 3 * page_size, 65 * page_size]
    assert [record.physical for record in records] == [3 * page_size, 0, 0]
    assert all(record.seconds >= 0 for record in records)
    times = [record.created for record in records]
    assert times == sorted(times)
    assert records[0].getMessage().startswith("model grew by ")


def test_levels_decide_what_is_recorded(shared, model, page_size, caplog):
    caplog.set_level(logging.INFO, "elastikv")
    logs.start()
    shared.allocate_for_model("model", page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        shared.allocate_for_model("model", 65 * page_size)
    logs.stop()
    records = caplog.records
    assert [record.name for record in records] == ["elastikv.out_of_memory"]


def test_nothing_before_start_and_after_stop(shared, model, page_size, caplog):
    caplog.set_level(logging.DEBUG, "elastikv")
    shared.allocate_for_model("model", page_size)
    logs.start()
    logs.stop()
    logs.stop()
    shared.allocate_for_model("model", page_size)
    assert _core.take_events(0) == ([], 0)
    assert caplog.records == []


def test_unknown_kinds():
    with pytest.raises(elastikv.InvalidArgument, match="'nothing'"):
        _core.want_events(["nothing"])


def test_a_process_that_ends_logs_what_is_left():
    script = """
import logging, elastikv, elastikv.logs
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(message)s")
elastikv.logs.start()
pool = elastikv.SharedMemoryPool(1 << 20)
pool.register_model("chat", 1 << 20)
pool.allocate_for_model("chat", 8192)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert "elastikv.growth chat grew by 8 KiB to 8 KiB" in done.stderr
