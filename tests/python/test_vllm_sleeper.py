"""`elastikv sleep` on an engine of vLLM: its scheduler and its cache are real, its core and its workers are not."""

from __future__ import annotations

import random
import threading
import uuid
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

import queue

from vllm_engine import HostEngine, cache_config, random_prompt  # isort: skip

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

import elastikv
from elastikv.vllm import patches
from test_vllm_scheduler import TOKENS, elastic
from vllm_scheduler import expected_tokens, request_of


class Executor:
    """vLLM's weights, as far as sleep goes."""

    def __init__(self) -> None:
        self.is_sleeping, self.fails = False, False

    def sleep(self, level):
        if self.fails:
            raise RuntimeError("no room for weights on the host")
        assert level == 1
        self.is_sleeping = True

    def wake_up(self):
        self.is_sleeping = False


class Core:
    """vLLM's EngineCore around a scheduler, with the patches that the plugin puts on it."""

    def __init__(self, engine, served, weights=False):
        self.scheduler, self.served, self.model_executor = served.scheduler, served, Executor()
        self.input_queue = queue.Queue()
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=weights))
        engine.started(self)
        self._elastikv = engine

    def plain_step(self):
        if self.scheduler.has_requests():
            self.served.step()

    def plain_resume(self):
        self.scheduler.set_pause_state(PauseState.UNPAUSED)

    step = patches.step(plain_step)
    resume_scheduler = patches.resume_scheduler(plain_resume)


def fresh_pool():
    return f"pytest-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["blocks", "layers"])
def running(request):
    """An engine with requests in all states, and one that shares its ledger."""
    limit = 60 * 4096
    engine, served = elastic(200, fresh_pool(), limit=limit, layout=request.param, ahead=8192)
    core = Core(engine, served)
    chance = random.Random(1)
    for number in range(12):
        served.add(number, random_prompt(chance))
    while not (core.scheduler.waiting and core.scheduler.running and served.got):
        core.step()
    yield engine, core, served
    engine.close()


def ledger(engine):
    return elastikv.Ledger(engine.memory.pool_name)


def finish(core):
    for _ in range(500):
        core.step()
        if not core.scheduler.has_unfinished_requests():
            return
    raise AssertionError("requests do not end")


def test_requests_wait_and_go_on_where_they_were(running):
    engine, core, served = running
    ledger(engine).sleep("chat")
    assert engine.sleeper.asleep and engine.memory.model.stats().physical_usage == 0
    assert engine.memory.model.quota().charged == 0
    served.add(100, list(range(50)))
    before = {number: list(tokens) for number, tokens in served.got.items()}
    for _ in range(5):
        core.step()
    assert served.got == before and not core.scheduler.has_unfinished_requests()  # vLLM's loop waits for input

    limit = 60 * 4096
    other = HostEngine(cache_config(200), engine.settings.pool, name="other", limit=limit)
    request = request_of(1000, list(range(16 * 190)))
    assert other.manager.allocate_slots(request, 16 * 190) is not None  # nearly all of the memory
    other.manager.free(request)
    other.close()

    ledger(engine).wake("chat")
    assert not core.input_queue.empty()
    finish(core)
    served.check()


def test_what_ends_while_it_sleeps_gives_its_blocks_back_at_the_end(running):
    engine, core, served = running
    running_now = [request.request_id for request in core.scheduler.running]
    ledger(engine).sleep("chat")
    core.scheduler.finish_requests(running_now[:1], RequestStatus.FINISHED_ABORTED)
    assert engine.pool.give_up(1 << 40) == 0
    core.step()
    ledger(engine).wake("chat")
    gone = served.prompts.pop(running_now[0])
    assert gone and served.got.pop(running_now[0], None) is not None
    finish(core)
    served.check()
    assert core.scheduler.reset_prefix_cache()
    engine.memory.model.drain()
    assert engine.memory.blocks.held == 1 + len(engine.pool.stock)


def test_vllms_own_pause_and_wake_go_with_it(running):
    engine, core, served = running
    ledger(engine).sleep("chat")
    before = {number: list(tokens) for number, tokens in served.got.items()}
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)  # which lets running requests go on
    core.step()
    assert served.got == before and core.scheduler.pause_state is PauseState.PAUSED_NEW
    ledger(engine).wake("chat")
    assert core.scheduler.pause_state is PauseState.PAUSED_NEW  # it is vLLM's
    ledger(engine).sleep("chat")
    core.resume_scheduler()  # as vLLM's wake_up does
    assert not engine.sleeper.asleep and core.scheduler.pause_state is PauseState.UNPAUSED
    finish(core)
    served.check()


def test_sleep_comes_between_steps_that_follow_each_other(running):
    engine, core, served = running
    stop = threading.Event()

    def loop():
        while not stop.is_set():
            core.step()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(10):
            ledger(engine).sleep("chat")
            assert engine.memory.model.stats().physical_usage == 0
            ledger(engine).wake("chat")
    finally:
        stop.set()
        thread.join()
    finish(core)
    served.check()


def test_an_idle_engine_and_weights_that_sleep_with_it():
    engine, served = elastic(100, fresh_pool(), limit=1 << 30)
    core = Core(engine, served, weights=True)
    try:
        served.add(0, list(range(100)))
        finish(core)
        for _ in range(2):
            ledger(engine).sleep("chat")
            assert core.model_executor.is_sleeping and engine.memory.model.stats().physical_usage == 0
            served.add(1, list(range(100)))  # wait for it
            core.step()
            ledger(engine).wake("chat")
            assert not core.model_executor.is_sleeping
            finish(core)
            served.check()
            served.got.pop("1")
        core.model_executor.fails = True
        with pytest.raises(elastikv.LedgerError, match="does not sleep: no room for weights on the host"):
            ledger(engine).sleep("chat")
        assert not engine.sleeper.asleep and not engine.memory.asleep
        served.prompts.clear(), served.got.clear()
        served.add(2, list(range(40)))
        finish(core)
        assert served.got == {"2": expected_tokens(list(range(40)), TOKENS)}
    finally:
        engine.close()


def test_who_finds_no_room_sleeps_on(monkeypatch):
    monkeypatch.setattr("elastikv.vllm.sleeper.ROOM_TIMEOUT", 0.05)
    limit = 30 * 4096
    engine, served = elastic(100, fresh_pool(), limit=limit)
    core = Core(engine, served)
    other = HostEngine(cache_config(200), engine.settings.pool, name="other", limit=limit)
    try:
        served.add(0, list(range(200)))
        while len(served.got.get("0", [])) < 3:
            core.step()
        ledger(engine).sleep("chat")
        request = request_of(1000, list(range(16 * 110)))
        assert other.manager.allocate_slots(request, 16 * 110) is not None
        with pytest.raises(elastikv.LedgerError, match="does not wake"):
            ledger(engine).wake("chat")
        assert engine.sleeper.asleep
        core.step()
        other.manager.free(request)
        other.pool.reset_prefix_cache()
        ledger(engine).wake("chat")
        finish(core)
        served.check()
        ledger(engine).sleep("chat")
    finally:
        other.close()
        engine.close()  # asleep


@pytest.mark.parametrize("failing", ["sleep", "wake"])
def test_weights_and_cache_sleep_on_together_where_others_took_the_room(monkeypatch, failing):
    monkeypatch.setattr("elastikv.vllm.sleeper.ROOM_TIMEOUT", 0.05)
    limit = 30 * 4096
    engine, served = elastic(100, fresh_pool(), limit=limit)
    core = Core(engine, served, weights=True)
    other = HostEngine(cache_config(200), engine.settings.pool, name="other", limit=limit)
    request = request_of(1000, list(range(16 * 110)))
    executor = core.model_executor
    sleep = executor.sleep

    def fill_and_fail(level):
        assert other.manager.allocate_slots(request, 16 * 110) is not None
        raise RuntimeError("no room for weights on the host")

    try:
        served.add(0, list(range(200)))
        while len(served.got.get("0", [])) < 3:
            core.step()
        if failing == "sleep":
            executor.sleep = fill_and_fail
            with pytest.raises(elastikv.LedgerError, match="does not sleep"):
                ledger(engine).sleep("chat")
            executor.sleep = sleep
            assert engine.sleeper.asleep and engine.memory.asleep
            assert core.scheduler.pause_state is PauseState.PAUSED_ALL
            ledger(engine).sleep("chat")  # now the weights do, too
        else:
            ledger(engine).sleep("chat")
            assert other.manager.allocate_slots(request, 16 * 110) is not None
            with pytest.raises(elastikv.LedgerError, match="does not wake"):
                ledger(engine).wake("chat")
        assert executor.is_sleeping and engine.sleeper.asleep
        other.manager.free(request)
        other.pool.reset_prefix_cache()
        ledger(engine).wake("chat")
        assert not executor.is_sleeping and not engine.memory.asleep
        finish(core)
        served.check()
    finally:
        other.close()
        engine.close()
