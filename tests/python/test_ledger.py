"""One limit for several processes, waiting in line, and pressure, as Python sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
import torch

import elastikv


@pytest.fixture
def name() -> Iterator[str]:
    yield f"pytest-{uuid.uuid4().hex[:12]}"
    elastikv.ledgers()  # removes what killed processes have left


class Other:
    """Another process, which runs `code` with the pool's arguments at hand and then says what it was told to."""

    def __init__(self, name: str, device: str, limit: int, code: str) -> None:
        head = f"""
            import sys, torch, elastikv
            page = {4096 if device == "cpu" else 2 << 20}
            pool = elastikv.SharedMemoryPool({limit}, {device!r}, park_limit={limit}, name={name!r})
            def turn():
                print("ready", flush=True)
                sys.stdin.readline()
        """
        script = textwrap.dedent(head) + textwrap.dedent(code) + "\nturn()\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.await_turn()

    def await_turn(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.await_turn()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def await_waiter(model: elastikv.Model) -> None:
    while model.quota().waiters == 0:
        time.sleep(0.001)


def test_two_processes_share_a_limit_and_death_frees_it(device, page_size, name):
    limit = 16 * page_size
    code = """
        model = pool.register_model("other", 1 << 30, reserve=4 * page, priority=1)
        for _ in range(12): last = pool.allocate_for_model("other", page)
        pool.deallocate_for_model("other", last - model.base_address, page)
        model.drain()
    """
    other = Other(name, device, limit, code)
    try:
        with elastikv.SharedMemoryPool(limit, device, park_limit=0, name=name) as pool:
            assert pool.name == name and name in elastikv.ledgers()
            pool.register_model("mine", 1 << 30)
            assert pool.global_stats().physical_usage == 12 * page_size
            ledger = elastikv.Ledger(name)
            (client,) = [each for each in ledger.clients() if each.model == "other"]
            assert client.pid == other.process.pid
            assert (client.charged, client.used, client.parked) == (12 * page_size, 11 * page_size, page_size)
            assert (client.reserve, client.priority, client.overage) == (4 * page_size, 1, 0)
            assert 0 <= client.age < 60 and client.driver_calls > 0
            assert ledger.device == device
            pool.allocate_for_model("mine", 5 * page_size)  # one of them was parked over there
            with pytest.raises(elastikv.OutOfPhysicalMemory, match=f"process {other.process.pid}"):
                pool.allocate_for_model("mine", page_size)
            ledger.set_quota("other", limit=8 * page_size)
            (client,) = [each for each in ledger.clients() if each.model == "other"]
            assert client.overage == 3 * page_size
            assert ledger.stats().processes == 2 and ledger.stats().charged == limit
            other.kill()
            pool.allocate_for_model("mine", 11 * page_size)
            assert ledger.stats().processes == 1 and ledger.stats().reserved == 0
    finally:
        other.kill()
    del pool
    assert name not in elastikv.ledgers()


def test_who_waits_is_served_by_another_process(device, page_size, name):
    limit = 8 * page_size
    code = """
        model = pool.register_model("other", 1 << 30)
        tensor = elastikv.zeros((8 * page,), torch.uint8, model)
        turn()
        del tensor
    """
    other = Other(name, device, limit, code)
    try:
        with elastikv.SharedMemoryPool(limit, device, name=name) as pool:
            model = pool.register_model("mine", 1 << 30)
            tensor = elastikv.empty((0,), (8 * page_size,), torch.uint8, model)

            def free() -> None:
                await_waiter(model)
                other.turn()

            freeing = threading.Thread(target=free)
            freeing.start()
            elastikv.grow_(tensor, 4 * page_size, timeout=60)
            freeing.join()
            assert tensor.sum().item() == 0
            assert model.quota().grants == 1
    finally:
        other.kill()


def test_pressure_reaches_python_in_another_process(device, page_size, name):
    limit = 8 * page_size
    code = """
        model = pool.register_model("low", 1 << 30)
        tensors = [elastikv.zeros((page,), torch.uint8, model) for _ in range(8)]
        def give(wanted, seconds):
            assert wanted % page == 0 and seconds >= 0
            del tensors[: wanted // page]
        handle = model.on_pressure(give)
        turn()
    """
    other = Other(name, device, limit, code)
    try:
        with elastikv.SharedMemoryPool(limit, device, name=name) as pool:
            equal = pool.register_model("equal", 1 << 30)
            with pytest.raises(torch.OutOfMemoryError):
                elastikv.zeros((page_size,), torch.uint8, equal)
            high = pool.register_model("high", 1 << 30, priority=1)
            tensor = elastikv.zeros((3 * page_size,), torch.uint8, high)
            assert tensor.sum().item() == 0
            other.turn()  # it lives
    finally:
        other.kill()


def test_pressure_callbacks_in_this_process(shared, model, page_size):
    asked: list[int] = []
    tensors = [elastikv.zeros((page_size,), torch.uint8, model) for _ in range(64)]

    def give(wanted: int, seconds: float) -> None:
        asked.append(wanted)
        shared.global_stats()  # no lock is held
        del tensors[: wanted // page_size]

    handle = model.on_pressure(give)
    high = shared.register_model("high", 1 << 30, priority=1)
    kept = elastikv.zeros((2 * page_size,), torch.uint8, high)
    assert asked == [2 * page_size]
    handle.remove()
    handle.remove()
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.zeros((2 * page_size,), torch.uint8, high)
    assert asked == [2 * page_size]
    with pytest.raises(TypeError, match="callable"):
        model.on_pressure(3)
    del kept


def test_a_wait_ends_by_timeout_by_cancel_and_by_a_signal(shared, model, page_size):
    shared.allocate_for_model("model", 64 * page_size)
    other = shared.register_model("other", 1 << 30)
    for timeout in (0, 0.01):
        with pytest.raises(elastikv.OutOfPhysicalMemory):
            shared.allocate_for_model("other", page_size, timeout=timeout)

    cancel = elastikv.Cancellation()

    def call_off() -> None:
        await_waiter(other)
        cancel.cancel()

    thread = threading.Thread(target=call_off)
    thread.start()
    with pytest.raises(elastikv.WaitCancelled, match="'other'"):
        shared.allocate_for_model("other", page_size, timeout=float("inf"), cancel=cancel)
    thread.join()
    assert cancel.cancelled

    def interrupt() -> None:
        await_waiter(other)
        os.kill(os.getpid(), signal.SIGINT)

    # Where the tests were started in a shell's background, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            shared.allocate_for_model("other", page_size, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert other.quota().waiters == 0 and other.quota().charged == 0


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_bad_timeouts(shared, model, page_size, timeout):
    with pytest.raises(elastikv.InvalidArgument, match="timeout"):
        shared.allocate_for_model("model", page_size, timeout=timeout)
    with pytest.raises(TypeError):
        shared.allocate_for_model("model", page_size, timeout="soon")
    with pytest.raises(elastikv.InvalidArgument, match="give it a timeout"):
        shared.allocate_for_model("model", page_size, cancel=elastikv.Cancellation())


@pytest.mark.parametrize("bad", ["", "a/b", "x" * 64, "sp ace"])
def test_bad_names(device, bad):
    with pytest.raises(elastikv.InvalidArgument, match="name"):
        elastikv.SharedMemoryPool(1 << 30, device, name=bad)
    with pytest.raises(elastikv.InvalidArgument, match="name"):
        elastikv.Ledger(bad)


def test_unknown_ledgers_and_models(device, name):
    with pytest.raises(elastikv.LedgerError, match="there is none of that name"):
        elastikv.Ledger(name)
    with elastikv.SharedMemoryPool(1 << 30, device, name=name) as pool:
        pool.register_model("chat", 1 << 30)
        ledger = elastikv.Ledger(name)
        with pytest.raises(elastikv.ModelNotFound, match="'chat' of process"):
            ledger.set_quota("chad", limit=1 << 20)
        with pytest.raises(elastikv.InvalidArgument, match="above the physical limit"):
            ledger.set_quota("chat", limit=1 << 40)
        with pytest.raises(elastikv.InvalidArgument, match="does not go with it"):
            elastikv.SharedMemoryPool(1 << 29, device, name=name)
        ledger.set_limit(1 << 29)
        assert pool.global_stats().physical_limit == 1 << 29
        assert ledger.trim() == 0
