"""`elastikv list`, `limit`, `reserve`, `trim`, `watch` and `top`, on a pool of this process and one more."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest

import elastikv

typer_testing = pytest.importorskip("typer.testing")

from elastikv.cli import app, look  # noqa: E402
from elastikv.cli.top import Rates  # noqa: E402

PAGE = 4096
LIMIT = 64 * PAGE


def invoke(*arguments: object):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result) -> str:
    """Everything a failed command wrote, without line breaks or boxes."""
    return " ".join((result.output + result.stderr).replace("│", " ").split())


class Running:
    """A pool of this process, with a model 'chat', and one of another on the same ledger, with 'code' and 'chat'."""

    def __init__(self) -> None:
        self.name = f"pytest-{uuid.uuid4().hex[:12]}"
        self.pool = elastikv.SharedMemoryPool(LIMIT, "cpu", park_limit=LIMIT, name=self.name)
        self.pool.register_model("chat", 1 << 30, reserve=2 * PAGE)
        self.pool.allocate_for_model("chat", 5 * PAGE)
        script = f"""
import sys, elastikv
pool = elastikv.SharedMemoryPool({LIMIT}, "cpu", park_limit={LIMIT}, name={self.name!r})
code = pool.register_model("code", 1 << 30)
pool.register_model("chat", 1 << 30)
kept = pool.allocate_for_model("code", {4 * PAGE})
freed = pool.allocate_for_model("code", {3 * PAGE})
pool.deallocate_for_model("code", freed - code.base_address, {3 * PAGE})
print("ready", flush=True)
sys.stdin.read()
"""
        self.other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.other.stdout is not None
        assert self.other.stdout.readline() == "ready\n"

    def client(self, model: str, pid: int) -> elastikv.LedgerClient:
        clients = elastikv.Ledger(self.name).clients()
        return next(client for client in clients if (client.model, client.pid) == (model, pid))

    def end(self) -> None:
        self.other.kill()
        self.other.communicate()
        self.pool.close()


@pytest.fixture(scope="module")
def running():
    """For tests that change nothing."""
    running = Running()
    yield running
    running.end()


@pytest.fixture
def own():
    running = Running()
    yield running
    running.end()


def test_list_says_what_the_processes_hold(running):
    name = running.name
    (row,) = json.loads(invoke("list", "--json", "--pool", name).stdout)["pools"]
    assert (row["pool"], row["physical_limit"], row["charged"], row["processes"]) == (name, LIMIT, 12 * PAGE, 2)
    models = {(model["model"], model["pid"]): model for model in row["models"]}
    assert set(models) == {("chat", os.getpid()), ("code", running.other.pid), ("chat", running.other.pid)}
    code = models["code", running.other.pid]
    assert (code["charged"], code["used"], code["parked"]) == (7 * PAGE, 4 * PAGE, 3 * PAGE)
    assert code["driver_calls"] > 0 and code["age"] is not None
    assert models["chat", os.getpid()]["reserve"] == 2 * PAGE
    assert set(code) == set(look.CLIENT_FIELDS)
    text = invoke("list").stdout
    assert name in text and f"code (process {running.other.pid}): 28.0 KiB held, 16.0 KiB used, 12.0 KiB parked" in text


def test_limit_reserve_and_trim_reach_the_process(own):
    name, pid = own.name, own.other.pid
    result = invoke("trim", "code", "--pool", name)
    assert result.exit_code == 0 and "12.0 KiB given back" in result.stdout, said(result)
    assert elastikv.Ledger(name).stats().charged == 9 * PAGE
    assert "0 B given back" in invoke("trim", "--pool", name).stdout
    result = invoke("limit", "code", "8KiB", "--pool", name)
    assert result.exit_code == 0, said(result)
    assert "limit 256 KiB -> 8.0 KiB" in result.stdout and "8.0 KiB more than that" in result.stdout
    assert (own.client("code", pid).limit, own.client("code", pid).overage) == (2 * PAGE, 2 * PAGE)
    assert invoke("limit", "code", "none", "-p", name).exit_code == 0
    assert (own.client("code", pid).limit, own.client("code", pid).overage) == (LIMIT, 0)
    assert invoke("reserve", "chat", "40KiB", "-p", name, "--pid", os.getpid()).exit_code == 0
    assert own.pool.quotas()["chat"].reserve == 10 * PAGE
    assert invoke("reserve", "chat", 0, "-p", name, "--pid", os.getpid()).exit_code == 0
    assert own.pool.quotas()["chat"].reserve == 0
    own.other.kill()
    own.other.wait()
    text = invoke("top", "--once", "--pool", name).stdout
    assert "code" not in text and "20.0 KiB of 256 KiB held" in text and "1 process\n" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("limit", "nobody", "1MiB", "-p", "NAME"), "no model 'nobody' in pool 'NAME'; there are 'chat', 'code'"),
        (("reserve", "chat", "1MiB", "-p", "NAME"), "model 'chat' is there 2 times"),
        (("limit", "chat", "1MiB", "-p", "NAME", "--pid", "1"), "no model 'chat' of process 1"),
        (("limit", "code", "1GiB", "-p", "NAME"), "physical limit"),
        (("reserve", "code", "1GiB", "-p", "NAME"), "reserve"),
        (("limit", "code", "much", "-p", "NAME"), "'much' is not a size"),
        (("limit", "code", "0", "-p", "NAME"), "is not a size"),
        (("trim", "--pid", "1", "-p", "NAME"), "--pid needs a model"),
        (("list", "-p", "no-such-pool"), "no-such-pool"),
        (("top", "-p", "no/such"), "no/such"),
        (("watch", "-p", "no-such-pool", "--count", "1"), "no-such-pool"),
        (("watch", "-p", "NAME", "--csv", "/no/such/folder/x.csv"), "can't write /no/such/folder/x.csv"),
    ],
)
def test_clear_errors(running, arguments, words):
    name = running.name
    before = [(one.model, one.reserve, one.limit) for one in elastikv.Ledger(name).clients()]
    result = invoke(*(name if argument == "NAME" else argument for argument in arguments))
    assert result.exit_code == 2
    assert words.replace("NAME", name) in said(result)
    assert "Traceback" not in said(result)
    assert [(one.model, one.reserve, one.limit) for one in elastikv.Ledger(name).clients()] == before


def test_watch_writes_a_line_a_model_and_reading(running, tmp_path):
    name = running.name
    file = tmp_path / "run.csv"
    assert invoke("watch", "-p", name, "--csv", file, "--count", 2, "--interval", 0.05).exit_code == 0
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert len(rows) == 6
    assert {row["pool"] for row in rows} == {name}
    assert {(row["model"], row["charged"]) for row in rows} == {
        ("chat", str(5 * PAGE)),
        ("code", str(7 * PAGE)),
        ("chat", "0"),
    }
    assert invoke("watch", "-p", name, "--count", 1).stdout.count("\n") == 4


def test_watch_goes_on_where_a_reading_takes_longer_than_the_interval(running, tmp_path, monkeypatch):
    moments = itertools.count(0.0, 3.0)  # each look at the clock finds it three seconds on
    waits = []
    clock = SimpleNamespace(time=lambda: 0.0, monotonic=lambda: next(moments), sleep=waits.append)
    monkeypatch.setattr(look, "time", clock)
    file = tmp_path / "run.csv"
    result = invoke("watch", "-p", running.name, "--csv", file, "--count", 4, "--interval", 0.5)
    assert result.exit_code == 0 and waits == [0.0, 0.0, 0.0]
    assert len(file.read_text().splitlines()) == 1 + 4 * 3


def test_top_shows_every_model(running):
    name = running.name
    result = invoke("top", "--once", "--pool", name)
    assert result.exit_code == 0, said(result)
    lines = result.stdout.splitlines()
    assert any(name in line and "48.0 KiB of 256 KiB held" in line and "2 processes" in line for line in lines)
    (code,) = [line.split() for line in lines if line.lstrip().startswith("code ")]
    assert code[1] == str(running.other.pid) and code[2:4] == ["28.0", "KiB"]
    assert {"model", "used", "parked", "retiring", "limit", "reserve", "growth/s", "calls", "waiting"} <= set(
        " ".join(lines).split()
    )


def test_rates_of_growth():
    rates = Rates()
    assert rates.of(100, 10.0, "a") == 0
    assert rates.of(300, 12.0, "a") == 100
    assert rates.of(50, 12.0, "b") == 0
    assert rates.of(200, 14.0, "a") == -50


def test_shell_completion_knows_pools_and_models(running):
    name = running.name
    environment = {
        **os.environ, "_ELASTIKV_COMPLETE": "complete_bash", "COMP_WORDS": "elastikv limit ch", "COMP_CWORD": "2",
    }  # fmt: skip
    script = "import sys; sys.argv[0] = 'elastikv'; from elastikv.cli import app; app(prog_name='elastikv')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert "chat" in done.stdout.split()
    environment.update(COMP_WORDS=f"elastikv top --pool {name[:9]}", COMP_CWORD="3")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert name in done.stdout.split()
