"""bench_vllm without engines: the load, the engine's loop over it, and what is reported of results that are made up."""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from types import SimpleNamespace

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "python"))


@pytest.mark.parametrize("engines", [2, 3])
def test_peaks_follow_each_other(engines):
    import bench_vllm

    for which in range(engines):
        came = [at for seed in range(20) for at, _, _ in bench_vllm.arrivals(15.0, which, engines, seed)]
        parts = [sum(int(at / bench_vllm.SPAN * engines) == part for at in came) for part in range(engines)]
        peak = 20 * 15.0 * bench_vllm.SPAN / engines
        assert parts[which] == pytest.approx(peak, rel=0.1)
        for part in set(range(engines)) - {which}:
            assert parts[part] == pytest.approx(peak / 10, rel=0.3)
    one = bench_vllm.arrivals(15.0, 0, engines, 1)
    assert one == bench_vllm.arrivals(15.0, 0, engines, 1) != bench_vllm.arrivals(15.0, 0, engines, 2)
    assert [at for at, _, _ in one] == sorted(at for at, _, _ in one)


def test_loads_go_up_and_all_sections_fit_the_time_of_a_run():
    import bench_vllm

    seconds = 0.0
    for group, loads in bench_vllm.LOADS.items():
        assert list(loads) == sorted(loads) and len(bench_vllm.ENGINES[group]) == {"pair": 2, "trio": 3}[group]
        seconds += 2 * (20 + len(loads) * (bench_vllm.SPAN + bench_vllm.REST))
    assert seconds <= 540 - 180, "single and kill take three minutes of nine"


class Instant:
    """An engine that gives every request a token a step."""

    def __init__(self, tokens):
        self.tokens, self.running = tokens, {}

    def add_request(self, number, prompt, sampling):
        assert len(prompt["prompt_token_ids"]) == 8
        self.running[number] = []

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        for ids in self.running.values():
            ids.append(1)
        outputs = [
            SimpleNamespace(request_id=number, outputs=[SimpleNamespace(token_ids=list(ids))])
            for number, ids in self.running.items()
        ]
        self.running = {number: ids for number, ids in self.running.items() if len(ids) < self.tokens}
        return outputs

    def abort_request(self, numbers):
        for number in numbers:
            self.running.pop(number, None)


@pytest.mark.parametrize("until", [30.0, 0.0])
def test_the_loop_serves_what_comes_and_says_who_got_nothing(until):
    import time

    import vllm_worker

    worker = object.__new__(vllm_worker.Worker)
    worker.engine, worker.number, worker.kv_bytes, worker.ledger = Instant(3), 0, lambda: 7, None
    worker.sampling = lambda n: n
    due = [(0.001 * i, 8, 3) for i in range(20)]
    found = worker.trace(begin=time.time(), arrivals=due, until=until, seed=0)
    if until:
        assert found["arrived"] == [at for at, _, _ in due]
        assert all(first >= 0 for first in found["first"])
    else:
        assert all(first is None for first in found["first"])
    assert not worker.engine.running


def core(engine):
    """As much of vLLM's core as the loop looks at, around an engine that is not vLLM's."""
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(block_pool=object()),
        schedule=lambda: SimpleNamespace(total_num_scheduled_tokens=len(engine.running)),
    )
    return SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))


def test_steady_rounds_and_a_look_at_the_longest_steps():
    import vllm_worker

    worker = object.__new__(vllm_worker.Worker)
    worker.engine, worker.number = Instant(20), 0
    worker.engine.engine_core = core(worker.engine)
    scheduler, step = worker.engine.engine_core.engine_core.scheduler, worker.engine.step
    schedule = scheduler.schedule

    def scheduled_step():
        scheduler.schedule()
        return step()

    worker.engine.step = scheduled_step
    worker.sampling = lambda n: n
    worker.kv_bytes = lambda: 1 << 30
    found = worker.steady(requests=5, prompt=8, n=20, seed=3)
    assert found["tokens_per_second"] > 0 and len(found["gaps_ms"]) == 19 and found["kv_bytes"] == 1 << 30
    looks = worker.look(requests=5, prompt=8, n=20, rounds=2)
    assert len(looks) == 2
    for look in looks:
        assert len(look["all run"]) == 8
        assert [each["ms"] for each in look["all run"]] == sorted(
            (each["ms"] for each in look["all run"]), reverse=True
        )
        assert {each["tokens"] for each in look["all run"]} == {5} and len(look["filling"]) == 1
    assert scheduler.schedule is schedule


def test_a_sleep_amid_requests():
    import vllm_worker

    orders = []

    def order(name, kind):
        orders.append((kind, name, sorted(len(ids) for ids in worker.engine.running.values())))

    worker = object.__new__(vllm_worker.Worker)
    worker.engine, worker.number, worker.name = Instant(8), 0, "one"
    worker.kv_bytes, worker.sampling = (lambda: 7), (lambda n: n)
    worker.ledger = SimpleNamespace(
        sleep=lambda name, pid: order(name, "sleep"), wake=lambda name, pid: order(name, "wake")
    )
    found = worker.sleep(requests=3, prompt=8, n=8)
    assert (found["requests"], found["equal"], found["held"], found["left"]) == (3, 3, 7, 7)
    assert orders == [("sleep", "one", [2, 2, 2]), ("wake", "one", [2, 2, 2])]


def trace(waits):
    """A request each 100 ms."""
    return {
        "arrived": [0.1 * i for i in range(len(waits))],
        "first": waits,
        "held": [[0, 1]],
        "driver_calls": {"create": [3, 10.0]},
    }


def write_sharing(folder, group, engines, loads):
    """On one ledger each waits 0.1 s at any load; on static shares some wait longer, the more the higher the load, and
    the last one gets nothing."""
    quick = [0.1] * 50
    late = [[0.1] * (50 - 10 * i) + [2.0] * (10 * i) for i in range(loads)]
    late[-1][-1] = None
    static = {name: {"trace": [trace(waits) for waits in late]} for name in engines}
    (folder / f"{group}-static.json").write_text(json.dumps(static))
    elastic = {name: {"trace": [trace(quick)] * loads} for name in engines}
    (folder / f"{group}-elastic.json").write_text(json.dumps(elastic))


def test_report_of_parts(tmp_path, capsys):
    import bench_vllm

    import vllm_report

    assert set(bench_vllm.collected(tmp_path)) == {"benchmark", "slo"}
    for group, engines in bench_vllm.ENGINES.items():
        write_sharing(tmp_path, group, engines, len(bench_vllm.LOADS[group]))
    (tmp_path / "kill.json").write_text(
        json.dumps({"victim_held": 1 << 30, "seconds": 0.1, "other_served": 9, "other_asked": 9, "other_peak": 1 << 31})
    )
    one = {
        "startup": 6.0, "idle_at_start": 1 << 30, "outputs": [{"tokens": [[1], [2]]}] * 2,
        "steady": [{"tokens_per_second": 100.0, "gaps_ms": [5.0, 9.0]}] * 3,
        "look": [[{"all run": [{"ms": 9.0, "tokens": 128, "step": 3}]}]],
        "idle": [{"after_burst": 1 << 30, "without_prefixes": 48 << 20, "seconds": 0.1}],
    }  # fmt: skip
    idle = {"plain": 1 << 30, "elastic": 48 << 20}
    both = {name: {**one, "idle_at_start": size} for name, size in idle.items()}
    (tmp_path / "single.json").write_text(json.dumps(both))

    slept = {"requests": 64, "equal": 64, "held": 1 << 31, "left": 0, "sleep_s": 1.0, "wake_s": 0.1}
    (tmp_path / "sleep.json").write_text(json.dumps({"one": {"sleep": [slept]}}))

    result = json.loads(json.dumps(bench_vllm.collected(tmp_path)))
    until = bench_vllm.SPAN + bench_vllm.REST
    for group, engines in bench_vllm.ENGINES.items():
        points = result[group]
        assert [point["load"] for point in points] == list(bench_vllm.LOADS[group])
        for i, point in enumerate(points):
            assert point["elastic"] == {"requests": 50 * len(engines), "p50": 0.1, "p99": 0.1, "within_slo": 1.0}
            assert point["static"]["within_slo"] == pytest.approx(1 - 0.2 * i)
        # Who had no token at the end has waited since it came, and no longer.
        assert points[-1]["static"]["p99"] == pytest.approx(until - 4.9)
        assert vllm_report.load_in_time(points, "static") == bench_vllm.LOADS[group][0]
        assert vllm_report.load_in_time(points, "elastic") == bench_vllm.LOADS[group][-1]

    vllm_report.print_tables(result)
    printed = capsys.readouterr().out
    assert "sleep amid 64 requests: 2048 MiB -> 0 MiB in 1.00 s" in printed
    assert "three engines: 99% within 0.5 s up to 5 requests/s with thirds, 20" in printed
    table = vllm_report.markdown(result)
    assert "within 0.5 s, static halves" in table and "static thirds" in table and "40.0%" in table
    assert all(len({line.count("|") for line in part.splitlines()}) == 1 for part in tables(table))
    assert all(met for _, _, _, met in vllm_report.bars(result))
    assert sum("engines: " in what for what, *_ in vllm_report.bars(result)) == 4


def tables(text):
    """Runs of lines that are rows of a table."""
    lines = text.splitlines()
    return ["\n".join(rows) for row, rows in itertools.groupby(lines, lambda line: line.startswith("|")) if row]


def test_rounds_in_which_memory_grows_stand_apart():
    import vllm_report

    held = [10 << 30, 20 << 30, 20 << 30, 20 << 30, 10 << 30, 20 << 30, (20 << 30) + 4096]  # of two engines
    rates = [90.0, 80.0, 100.0, 101.0, 91.0, 81.0, 102.0]
    ways = [
        {"steady": [{"tokens_per_second": rate, "gaps_ms": [1.0], "kv_bytes": size} for rate, size in zip(each, sizes)]}
        for each, sizes in (([100.0] * 7, [1 << 40] * 7), (rates, held))
    ]
    found = vllm_report.rounds(*ways)
    assert found["growing_tokens_per_second"] == [100.0, 85.5] and found["filled_tokens_per_second"] == [100.0, 101.0]
    for one in ways[1]["steady"]:
        del one["kv_bytes"]  # as it was measured before
    assert not any("growing" in name or "filled" in name for name in vllm_report.rounds(*ways))


@pytest.mark.parametrize("groups", [("pair",), ("pair", "trio")])
def test_picture(tmp_path, groups):
    pytest.importorskip("matplotlib")
    import bench_vllm

    import vllm_report

    for group in groups:
        write_sharing(tmp_path, group, bench_vllm.ENGINES[group], len(bench_vllm.LOADS[group]))
    path = tmp_path / "vllm.png"
    vllm_report.picture(bench_vllm.collected(tmp_path), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_section_that_is_not_there_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    import bench_vllm

    monkeypatch.setattr(bench_vllm.Bench, "kill", lambda self: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["bench_vllm", "--sections", "kill,quartet", "--work", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_vllm.main()
    assert "there is no section 'quartet'" in capsys.readouterr().err


WORKER = """
import json, pathlib, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
order = json.loads((folder / f"{name}.order.json").read_text())
(folder / f"{name}.ready").write_text("")
found = []
for number, task in enumerate(order["tasks"]):
    assert task["do"] == "trace" and task["wait"]
    while not (folder / f"{name}.task{number}.go").exists():
        time.sleep(0.01)
    arrived = [at for at, _, _ in task["arrivals"]]
    wait = 0.1 if order["elastic"] else 0.1 * (number + 1) * order["options"]["kv_cache_memory_bytes"] / (4 << 30)
    found.append({"arrived": arrived, "first": [wait] * len(arrived), "held": []})
    (folder / f"{name}.done{number}").write_text("")
(folder / f"{name}.result.json").write_text(json.dumps({"trace": found}))
"""


def test_parts_run_by_themselves_and_join(monkeypatch, tmp_path, capsys):
    """The whole of it, with engines that only say that they served."""
    import bench_vllm

    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "vllm_worker.py").write_text(WORKER)
    monkeypatch.setattr(bench_vllm, "HERE", scripts)
    monkeypatch.setattr(bench_vllm, "version", lambda package: f"{package} 1")
    work, results = tmp_path / "work", tmp_path / "results.json"
    for sections in ("pair-static,pair-elastic", "trio-static", "trio-elastic", ""):
        arguments = ["bench_vllm", "--sections", sections, "--work", str(work), "--json", str(results)]
        monkeypatch.setattr(sys, "argv", arguments)
        bench_vllm.main()
    result = json.loads(results.read_text())
    assert result["vllm"] == "vllm 1" and "single" not in result
    for group, share in (("pair", 2), ("trio", 3)):
        for i, point in enumerate(result[group]):
            assert point["static"]["p99"] == pytest.approx(0.1 * (i + 1) / share)
            assert point["elastic"]["p99"] == 0.1 and point["elastic"]["requests"] == point["static"]["requests"] > 0
    assert "three engines: 99% within 0.5 s up to 20 requests/s with thirds, 20" in capsys.readouterr().out


def test_one_engine_waits_while_the_other_runs(monkeypatch, tmp_path):
    import bench_vllm

    turns = """
import json, pathlib, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(folder / f"{name}.ready").write_text("")
found = {}
for number, task in enumerate(json.loads((folder / f"{name}.order.json").read_text())["tasks"]):
    while not (folder / f"{name}.task{number}.go").exists():
        time.sleep(0.001)
    begin = time.monotonic()
    time.sleep(0.01)
    found.setdefault(task["do"], []).append([begin, time.monotonic()])
    (folder / f"{name}.done{number}").write_text("")
(folder / f"{name}.result.json").write_text(json.dumps(found))
"""
    (tmp_path / "vllm_worker.py").write_text(turns)
    monkeypatch.setattr(bench_vllm, "HERE", tmp_path)
    (tmp_path / "warm.json").write_text("")
    bench_vllm.Bench(tmp_path).single()
    found = json.loads((tmp_path / "single.json").read_text())
    made = {name: {task: len(spans) for task, spans in one.items()} for name, one in found.items()}
    rounds = bench_vllm.STARTS["single"] * bench_vllm.ROUNDS["single"]
    assert made["plain"] == made["elastic"] == {"outputs": 2, "steady": rounds, "look": 1, "idle": 1}
    spans = sorted(
        (begin, end, name, task)
        for name, one in found.items()
        for task, each in one.items()
        for begin, end in each
    )  # fmt: skip
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    first_pair = spans[: 2 * (2 + bench_vllm.ROUNDS["single"] + 2)]
    assert {task for *_, task in first_pair} == set(made["plain"])
    firsts = [name for *_, name, _ in first_pair[::2]]
    assert firsts[::2] == ["plain"] * len(firsts[::2]) and firsts[1::2] == ["elastic"] * len(firsts[1::2])
