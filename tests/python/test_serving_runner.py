"""Who steps, who delivers, and how a request ends that never gets its memory."""

from __future__ import annotations

import logging
import threading
import time

import pytest

import elastikv

pytest.importorskip("transformers")

from elastikv.serving import Finish, Runner, State, run_until_idle
from hf_networks import make_network
from serving_tools import closed, expected, make_engine, make_pool, prompt, same

PAGE = 4096

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


class Listener:
    """Writes down what it hears of requests by name, and does something else at the first token of one."""

    def __init__(self, act=lambda: None, at: str = "") -> None:
        self.heard: list[tuple[str, object]] = []
        self._act, self._at = act, at

    def submit(self, engine, name: str, seed: int, new: int = 4):
        return engine.submit(
            prompt(seed, 12), max_new_tokens=new, on_token=lambda _, token: self._token(name, token),
            on_end=lambda request: self.heard.append((name, request.finish)),
        )  # fmt: skip

    def _token(self, name: str, token: int) -> None:
        self.heard.append((name, token))
        if name == self._at and len(self.of(name)) == 1:
            self._act()

    def of(self, name: str) -> list[object]:
        return [what for whose, what in self.heard if whose == name]


# ---- what is handed out


def test_an_end_from_another_thread_does_not_overtake_a_token(llama, device, shared):
    """While the step's thread is held up in one listener, another closes the engine: all hear in order, from one."""
    engine = make_engine(shared, llama, chunk=64)

    def close() -> None:
        other = threading.Thread(target=engine.close)
        other.start()
        other.join()

    listener = Listener(close, at="first")
    requests = {name: listener.submit(engine, name, seed) for seed, name in enumerate(("first", "second"))}
    while not listener.heard:
        engine.advance()
    for name, request in requests.items():
        assert listener.of(name) == [*request.answer, Finish.CANCELLED]
        assert list(request) == request.answer and len(request.answer) >= 1
    closed(shared, engine)


def test_a_listener_that_closes_the_engine_hears_of_all_that_came(llama, device, shared):
    engine = make_engine(shared, llama, chunk=64)
    listener = Listener(engine.close, at="first")
    requests = {name: listener.submit(engine, name, seed) for seed, name in enumerate(("first", "second"))}
    while not listener.heard:
        engine.advance()
    for name, request in requests.items():
        assert listener.of(name) == [*request.answer, Finish.CANCELLED]
    closed(shared, engine)


def test_a_listener_may_step_the_engine_for_another_request(llama, device, shared):
    engine = make_engine(shared, llama, chunk=64)
    answers = []
    listener = Listener(lambda: answers.append(inner.result()), at="outer")
    inner, outer = engine.submit(prompt(5, 12), max_new_tokens=6), listener.submit(engine, "outer", 6, new=8)
    assert outer.result() and same(answers[0], expected(llama, prompt(5, 12), 6), device)
    assert listener.of("outer") == [*outer.answer, Finish.LENGTH]
    closed(shared, engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_in_a_listener_goes_on_and_loses_nobodys_tokens(llama, device, shared, error):
    def interrupt() -> None:
        raise error

    engine = make_engine(shared, llama, chunk=64)
    listener = Listener(interrupt, at="first")
    first, second = listener.submit(engine, "first", 1), listener.submit(engine, "second", 2)
    with pytest.raises(error):
        run_until_idle(engine)
    assert first.finish is Finish.ERROR and isinstance(first.error, error)
    run_until_idle(engine)
    assert listener.of("first") == [*first.answer, Finish.ERROR]
    assert listener.of("second") == [*second.answer, Finish.LENGTH]
    assert same(second.answer, expected(llama, prompt(2, 12), 4), device)
    with pytest.raises(error):
        first.result()
    closed(shared, engine)


# ---- who never gets its memory


class Hog:
    """Another model, which takes whatever is left of a pool."""

    def __init__(self, pool) -> None:
        self._model = pool.register_model("hog", 1 << 40)
        self._pool = pool
        self._held: list[int] = []

    def take(self) -> None:
        while True:
            try:
                self._held.append(self._pool.allocate_for_model("hog", PAGE))
            except elastikv.OutOfPhysicalMemory:
                return

    def give(self, pages: int | None = None) -> None:
        for address in self._held[:pages]:
            self._pool.deallocate_for_model("hog", address - self._model.base_address, PAGE)
        del self._held[:pages]
        self._model.drain()
        self._model.trim()


def starve(engine, hog, request) -> None:
    """Once the request decodes, others take all that is free, until it can't go on and has given its pages back too."""
    while request.state is not State.DECODE:
        assert engine.advance()
    hog.take()
    engine.clock.now += 1.0
    while request.state is State.DECODE:
        if not engine.advance():
            engine.clock.now += 1.0
    engine.handle.drain()
    hog.take()
    assert request.state is State.WAITING and not engine.running and request.tries == 1


def test_one_that_others_starve_ends_and_says_who_holds_what():
    llama = make_network("gqa", "cpu")
    with make_pool("cpu", PAGE, pages=30) as pool:
        hog = Hog(pool)
        engine = make_engine(pool, llama, promise=1, prefix_entries=0, tries=4, patience=1.0, chunk=64)
        request, behind = (engine.submit(prompt(seed, 12), max_new_tokens=100) for seed in (3, 4))
        engine.give_way(behind)
        starve(engine, hog, request)
        for tries in (1, 2, 3):
            assert not request.done and request.tries == tries
            engine.clock.now += 0.6
            engine.advance()
            engine.clock.now += 0.6
            engine.advance()
        assert request.finish is Finish.ERROR and request.restarts == 1
        with pytest.raises(elastikv.OutOfPhysicalMemory, match=r"alone and.* 4 tries, 1.0 s each.*hog") as raised:
            request.result()
        assert f"a request of {request.known} tokens so far" in str(raised.value)
        assert request.answer == expected(llama, prompt(3, 12), 100)[: len(request.answer)]
        hog.give()
        assert behind.result() == expected(llama, prompt(4, 12), 100)
        closed(pool, engine)


def test_one_that_never_started_waits_in_line():
    llama = make_network("gqa", "cpu")
    with make_pool("cpu", PAGE, pages=30) as pool:
        hog = Hog(pool)
        engine = make_engine(pool, llama, promise=1, prefix_entries=0, tries=1, patience=1.0, chunk=64)
        hog.take()
        request = engine.submit(prompt(3, 12), max_new_tokens=5)
        for _ in range(20):
            engine.clock.now += 5.0
            assert not engine.advance()
        hog.give()
        assert request.result() == expected(llama, prompt(3, 12), 5)
        closed(pool, engine)


def test_one_that_gets_a_token_now_and_then_goes_on():
    """Each time others hold the memory for a while; it gets further in between, so that it is not given up."""
    llama = make_network("gqa", "cpu")
    with make_pool("cpu", PAGE, pages=30) as pool:
        hog = Hog(pool)
        engine = make_engine(pool, llama, promise=1, prefix_entries=0, tries=2, patience=1.0, chunk=64)
        request = engine.submit(prompt(3, 12), max_new_tokens=90)
        for _ in range(4):
            starve(engine, hog, request)
            hog.give(request.known * engine.slots.token_bytes // PAGE + 3)  # for these and a few more
        hog.give()
        assert request.result() == expected(llama, prompt(3, 12), 90) and request.restarts == 4
        closed(pool, engine)


# ---- threads


def test_one_thread_steps_an_engine(llama, device, shared):
    engine = make_engine(shared, llama)
    with Runner(engine) as runner:
        with pytest.raises(elastikv.InvalidArgument, match="'model' has a thread"):
            Runner(engine)
        assert same(engine.submit(prompt(1, 12), max_new_tokens=4).result(), expected(llama, prompt(1, 12), 4), device)
        runner.stop()
        runner.stop()
        assert not runner.alive and runner.error is None
        with Runner(engine):
            assert len(engine.submit(prompt(1, 12), max_new_tokens=4).result()) == 4
    closed(shared, engine)
    with pytest.raises(elastikv.PoolClosed, match="'model' was closed"):
        Runner(engine)


def test_a_listener_may_stop_the_thread_that_calls_it(llama, device, shared):
    engine = make_engine(shared, llama, chunk=64)
    runner = Runner(engine)
    listener = Listener(runner.stop, at="it")
    request = listener.submit(engine, "it", 7, new=6)
    runner._thread.join()
    assert runner.error is None and request.error is None and 1 <= len(request.answer) < 6
    assert same(request.result(), expected(llama, prompt(7, 12), 6), device)  # by the steps of who asks
    assert listener.of("it") == [*request.answer, Finish.LENGTH]
    closed(shared, engine)


def test_who_waits_while_the_thread_stops_takes_the_steps(llama, device, shared):
    """The thread is held up in a listener until another waits for a request that has no token yet; then it stops."""
    engine = make_engine(shared, llama, max_batch=1, chunk=64)
    waiting, stopping = threading.Event(), threading.Event()
    listener = Listener(lambda: (stopping.set(), waiting.wait()), at="first")
    runner = Runner(engine)
    first = listener.submit(engine, "first", 1, new=6)
    second = engine.submit(prompt(2, 12), max_new_tokens=5)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(second.result()))
    asker.start()
    stopping.wait()
    stopper = threading.Thread(target=runner.stop)
    stopper.start()
    while not runner._stopping:
        time.sleep(0.001)
    waiting.set()
    for thread in (stopper, asker):
        thread.join()
    assert same(answers[0], expected(llama, prompt(2, 12), 5), device) and first.result() == first.answer
    closed(shared, engine)


def test_an_idle_thread_stops_and_ends_with_its_engine(llama, device, shared):
    engine = make_engine(shared, llama)
    runner = Runner(engine)
    runner.stop()
    assert not runner.alive
    runner = Runner(engine)
    engine.close()
    runner._thread.join()
    assert runner.error is None and not engine.threaded
    closed(shared, engine)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_step_ends_the_thread_and_all_requests(llama, device, shared, caplog, monkeypatch, error):
    engine = make_engine(shared, llama)

    def fail(*_):
        raise error("of the step")

    monkeypatch.setattr(engine._scheduler, "step", fail)
    with caplog.at_level(logging.ERROR, "elastikv.serving"), Runner(engine) as runner:
        request = engine.submit(prompt(1, 12), max_new_tokens=4)
        assert request.result() == [] and request.finish is Finish.CANCELLED
        runner._thread.join()
        assert not runner.alive and isinstance(runner.error, error)
        with pytest.raises(elastikv.PoolClosed):
            engine.submit(prompt(1, 12))
    assert "'model' ends" in caplog.text and "of the step" in caplog.text
    closed(shared, engine)


# ---- a model that sleeps


def test_an_engine_sleeps_and_wakes_amid_its_requests(llama, device, shared):
    engine = make_engine(shared, llama, chunk=64)
    requests = [engine.submit(prompt(seed, 20), max_new_tokens=12) for seed in range(3)]
    kept = engine.submit(prompt(9, 20), max_new_tokens=2)
    while not kept.done or len(requests[0].answer) < 4:
        engine.advance()
    assert engine.pause_model() > 0 and engine.handle.paused
    engine.handle.drain()
    assert engine.handle.stats().physical_usage == 0
    late = engine.submit(prompt(9, 20), max_new_tokens=5)
    before = [list(request.answer) for request in requests]
    assert not engine.advance() and not engine.give_way() and not engine.idle
    engine.pause(requests[0])
    assert [request.answer for request in requests] == before and late.state is State.WAITING
    assert engine.resume_model() > 0
    for seed, request in enumerate(requests):
        assert same(request.result(), expected(llama, prompt(seed, 20), 12), device)
    assert same(late.result(), expected(llama, prompt(9, 20), 5), device)
    assert sum(request.restarts for request in requests) == 0 and late.prefix_tokens > 0
    closed(shared, engine)


def test_a_thread_waits_while_its_model_sleeps(llama, device, shared):
    engine = make_engine(shared, llama)
    with Runner(engine) as runner:
        first = engine.submit(prompt(1, 12), max_new_tokens=4)
        assert first.result() == first.answer
        engine.pause_model()
        request = engine.submit(prompt(1, 12), max_new_tokens=4)
        asker = threading.Thread(target=request.result)
        asker.start()
        asker.join(0.05)
        assert asker.is_alive() and runner.alive and request.answer == []
        engine.resume_model()
        asker.join()
        assert request.answer == first.answer
    closed(shared, engine)


def test_an_engine_that_is_closed_asleep_leaves_nothing(llama, device, shared):
    engine = make_engine(shared, llama, chunk=64)
    done = engine.submit(prompt(1, 20), max_new_tokens=4).result()
    request = engine.submit(prompt(2, 20), max_new_tokens=12)
    while len(request.answer) < 3:
        engine.advance()
    engine.pause_model()
    assert engine.handle.stats().backup > 0 and len(done) == 4
    closed(shared, engine)
    assert request.finish is Finish.CANCELLED and engine.handle.stats().backup == 0
    with pytest.raises(elastikv.PoolClosed):
        engine.pause_model()
    with pytest.raises(elastikv.PoolClosed):
        engine.resume_model()
