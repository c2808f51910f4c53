"""`elastikv sleep` and `elastikv wake`: orders that reach a model's own process, and what it does with them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid

import pytest

import elastikv

typer_testing = pytest.importorskip("typer.testing")

from elastikv.cli import app  # noqa: E402

PAGE = 4096
LIMIT = 64 * PAGE

SCRIPT = """
import sys, elastikv
pool = elastikv.SharedMemoryPool({limit}, "cpu", park_limit=0, name={name!r})
chat = pool.register_model("chat", 1 << 30)
tensor = elastikv.empty([4096], [4096], __import__("torch").int32, chat).fill_(7)
pool.register_model("bare", 1 << 30)
rude = pool.register_model("rude", 1 << 30)
def refuse():
    raise RuntimeError("not while I work")
elastikv.obey(chat, sleep=chat.pause, wake=chat.resume)
elastikv.obey(rude, sleep=refuse, wake=refuse)
print("ready", flush=True)
sys.stdin.readline()
assert tensor.eq(7).all()
print("content is there", flush=True)
"""


def invoke(*arguments: object):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


class Other:
    def __init__(self) -> None:
        self.pool = f"pytest-{uuid.uuid4().hex[:12]}"
        script = SCRIPT.format(limit=LIMIT, name=self.pool)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def charged(self) -> int:
        return next(one.charged for one in elastikv.Ledger(self.pool).clients() if one.model == "chat")

    def ends_well(self) -> str:
        return self.process.communicate("\n", timeout=60)[0]


@pytest.fixture
def other():
    other = Other()
    yield other
    other.process.kill()
    other.process.communicate()


def test_sleep_and_wake_reach_the_process(other):
    assert other.charged() == 4 * PAGE
    for _ in range(2):  # again does nothing
        result = invoke("sleep", "chat", "--pool", other.pool)
        assert result.exit_code == 0, result.stderr
        assert f"chat (process {other.process.pid}, pool {other.pool}): sleeps, " in result.stdout
        assert other.charged() == 0
    result = invoke("wake", "chat", "--pool", other.pool)
    assert result.exit_code == 0, result.stderr
    assert "is awake, 0 B held -> 16.0 KiB" in result.stdout
    assert other.charged() == 4 * PAGE
    assert other.ends_well() == "content is there\n"


@pytest.mark.parametrize(
    ("command", "model", "words"),
    [
        ("sleep", "bare", "takes no orders to sleep or wake: its program has nothing that would obey them"),
        ("wake", "bare", "takes no orders"),
        ("sleep", "rude", "does not sleep: not while I work"),
        ("wake", "rude", "does not wake: not while I work"),
        ("sleep", "nobody", "no model 'nobody'"),
    ],
)
def test_refusals_say_why(other, command, model, words):
    result = invoke(command, model, "--pool", other.pool)
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.stderr
    assert other.charged() == 4 * PAGE


def test_a_process_that_is_killed_meanwhile_obeys_nothing(other):
    script = f"""
import os, signal, elastikv
pool = elastikv.SharedMemoryPool({LIMIT}, "cpu", name={other.pool!r})
doomed = pool.register_model("doomed", 1 << 30)
elastikv.obey(doomed, sleep=lambda: os.kill(os.getpid(), signal.SIGKILL), wake=print)
print("ready", flush=True)
__import__("sys").stdin.read()
"""
    doomed = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert doomed.stdout is not None and doomed.stdout.readline() == "ready\n"
    with pytest.raises(elastikv.LedgerError, match="does not sleep: it has ended"):
        elastikv.Ledger(other.pool).sleep("doomed")
    doomed.communicate()
    elastikv.Ledger(other.pool).sleep("chat")


@pytest.fixture
def own():
    pool = elastikv.SharedMemoryPool(LIMIT, "cpu", name=f"pytest-{uuid.uuid4().hex[:12]}")
    yield pool
    pool.close()


def test_orders_are_obeyed_one_after_the_other(own):
    model = own.register_model("chat", 1 << 30)
    began, go, done = threading.Event(), threading.Event(), []

    def sleep():
        began.set()
        assert go.wait(60)
        done.append("sleep")

    elastikv.obey(model, sleep=sleep, wake=lambda: done.append("wake"))
    ledger = elastikv.Ledger(own.name)
    with pytest.raises(elastikv.LedgerError, match=r"was told to sleep and has not within 0\.00?0? s; it may yet"):
        ledger.sleep("chat", timeout=0)
    assert began.wait(60)
    person = threading.Thread(target=ledger.wake, args=("chat",))
    person.start()
    go.set()
    person.join(60)
    assert not person.is_alive() and done == ["sleep", "wake"]
    with pytest.raises(elastikv.InvalidArgument, match="timeout"):
        ledger.sleep("chat", timeout=-1)


def test_who_obeys_is_held_weakly_and_may_be_taken_away(own):
    model = own.register_model("chat", 1 << 30)

    class Owner:
        def act(self):
            return model

    owner = Owner()
    elastikv.obey(model, sleep=owner.act, wake=owner.act)
    ledger = elastikv.Ledger(own.name)
    ledger.sleep("chat", pid=os.getpid())
    del owner
    with pytest.raises(elastikv.LedgerError, match="what would have obeyed is gone"):
        ledger.wake("chat")
    model.on_order(None)
    with pytest.raises(elastikv.InvalidArgument, match="takes no orders"):
        ledger.sleep("chat")
    with pytest.raises(TypeError, match="callable or None, not int"):
        model.on_order(1)


def test_an_order_that_nobody_answers_is_refused(own):
    model = own.register_model("chat", 1 << 30)
    kinds = []
    model.on_order(lambda order: kinds.append((order.kind, repr(order))))
    with pytest.raises(elastikv.LedgerError, match="let the order go"):
        elastikv.Ledger(own.name).sleep("chat")
    assert kinds == [("sleep", "<elastikv.Order to sleep>")]


def test_what_exits_is_told_and_later_orders_are_obeyed(own):
    model = own.register_model("chat", 1 << 30)
    elastikv.obey(model, sleep=lambda: sys.exit("enough"), wake=lambda: None)
    ledger = elastikv.Ledger(own.name)
    for _ in range(2):
        with pytest.raises(elastikv.LedgerError, match="does not sleep: enough"):
            ledger.sleep("chat", timeout=30)
        ledger.wake("chat", timeout=30)
