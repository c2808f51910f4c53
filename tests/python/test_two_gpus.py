"""Two GPUs of one host; where there are none the same code runs on the host's memory, with gloo between the ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

import elastikv

MIB = 1 << 20


def two_gpus_missing() -> str:
    return "" if torch.cuda.device_count() >= 2 else "needs two GPUs"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def kind(request) -> str:
    """Where two ranks or devices are: both on the host, or two GPUs."""
    if request.param == "cuda" and two_gpus_missing():
        pytest.skip(two_gpus_missing())
    return request.param


@pytest.fixture
def peers() -> None:
    if two_gpus_missing() or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs two GPUs that reach each other's memory")


def run_python(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **(environment or {})}
    )


# ---- ranks


def test_a_split_llama_decodes_and_its_ranks_grow_in_step(kind, tmp_path):
    pytest.importorskip("transformers")
    worker = Path(__file__).with_name("two_gpus_worker.py")
    logs = [(tmp_path / f"log-{rank}").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, str(worker), str(rank), "2", str(tmp_path), kind], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=150) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["ran past 150 s"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = []
    for log in logs:
        log.seek(0)
        said.append(log.read())
        log.close()
    assert codes == [0, 0], "\n".join(said)
    assert [(tmp_path / f"done-{rank}").exists() for rank in range(2)] == [True, True]


@pytest.fixture
def lone_rank():
    """A process group of this process alone."""
    from elastikv.distributed import Ranks

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(timeout=30)
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_a_rank_by_itself_decodes_as_without_a_group(device, lone_rank):
    """On a GPU: graphs, what is told of rows that have ended, and growth that is asked for ahead, with one GPU."""
    pytest.importorskip("transformers")
    from elastikv.hf import ElasticCache, generate
    from hf_networks import make_network, prompts

    network = make_network("gqa", device)
    tokens, mask = prompts(device)
    page = 4096 if device == "cpu" else 2 * MIB
    with elastikv.SharedMemoryPool(256 * page, device) as pool:
        model = pool.register_model("chat", 1 << 40)
        caches = [
            ElasticCache(network.config, model=model, max_batch=3, max_tokens=512, ranks=ranks)
            for ranks in (None, lone_rank)
        ]
        for new, options in ((60, {"stop": []}), (200, {"stop": [9, 31, 77]}), (40, {"temperature": 1.0, "seed": 5})):
            for cache in caches:
                cache.reset()
            answers = [
                generate(network, tokens, cache, attention_mask=mask, max_new_tokens=new, pad=0, **options)
                for cache in caches
            ]
            assert torch.equal(*answers)
            assert caches[0].slots.lengths == caches[1].slots.lengths
        assert 0 < lone_rank.decisions < 60
        for cache in caches:
            cache.close()
        del cache


# ---- limits


def test_limits_hold_per_device(kind):
    """A process for each device and one more on the first, one ledger a device; a watcher looks all the while."""
    page, pages = (4096, 64) if kind == "cpu" else (2 * MIB, 64)
    devices = ["cpu", "cpu"] if kind == "cpu" else ["cuda:0", "cuda:1"]
    base = f"pytest-{uuid.uuid4().hex[:12]}"
    names = [f"{base}.0", f"{base}.1"]
    limits = [pages * page, pages * page // 2]
    steps = 600 if kind == "cpu" else 300
    script = Path(__file__).with_name("two_gpus_charger.py")
    runs = []
    try:
        for seed, index in enumerate((0, 1, 0), start=1):
            arguments = [devices[index], names[index], limits[index], page, steps, seed]
            command = [sys.executable, str(script), *(str(argument) for argument in arguments)]
            runs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for run in runs:
            assert run.stdout.readline() == "ready\n"
        ledgers = [elastikv.Ledger(name) for name in names]
        assert [ledger.device for ledger in ledgers] == devices
        for run in runs:
            run.stdin.write("go\n")
            run.stdin.flush()
        looks, seen, said = 0, [0, 0], ["", "", ""]
        for run in runs:
            os.set_blocking(run.stdout.fileno(), False)
        while not all(said):
            for index, run in enumerate(runs):
                said[index] = said[index] or run.stdout.readline()
                assert run.poll() is None, "a process ended early"
            for index, ledger in enumerate(ledgers):
                stats = ledger.stats()
                assert stats.charged <= limits[index] == stats.physical_limit
                assert sum(client.charged for client in ledger.clients(refresh=False)) <= limits[index]
                seen[index] = max(seen[index], stats.charged)
            looks += 1
        assert looks > 10
        for index, ledger in enumerate(ledgers):
            stats = ledger.stats()
            assert (stats.charged, stats.processes) == (0, [2, 1][index])
            assert limits[index] * 3 // 4 < stats.peak <= limits[index]
        assert all(line.startswith("done") for line in said), said
        counts = [[int(word) for word in line.split()[1:]] for line in said]
        assert all(grown > steps // 10 for grown, _ in counts) and sum(short for _, short in counts) > 10, counts
        outputs = [run.communicate("end\n", timeout=30) for run in runs]
        assert [run.returncode for run in runs] == [0, 0, 0], outputs
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert not set(names) & set(elastikv.ledgers())


@pytest.mark.cuda
def test_a_ledger_belongs_to_one_gpu_whatever_a_process_calls_it():
    """cuda:0 of a process that sees only the second GPU is not what the ledger of the first counts."""
    if two_gpus_missing():
        pytest.skip(two_gpus_missing())
    name = f"pytest-{uuid.uuid4().hex[:12]}"
    script = f"import elastikv; elastikv.SharedMemoryPool({64 * MIB}, 'cuda:0', name={name!r})"
    with elastikv.SharedMemoryPool(64 * MIB, "cuda:0", name=name):
        assert run_python("-c", script).returncode == 0
        hidden = run_python("-c", script, environment={"CUDA_VISIBLE_DEVICES": "1"})
        assert hidden.returncode != 0 and "it counts the memory of another device" in hidden.stderr


# ---- eyes


def test_commands_and_metrics_show_both_devices(kind):
    prometheus = pytest.importorskip("prometheus_client")
    typer_testing = pytest.importorskip("typer.testing")
    from elastikv import metrics
    from elastikv.cli import app

    page = 4096 if kind == "cpu" else 2 * MIB
    devices = ["cpu", "cpu"] if kind == "cpu" else ["cuda:0", "cuda:1"]
    base = f"pytest-{uuid.uuid4().hex[:12]}"
    names = [f"{base}.cpu"] * 2 if kind == "cpu" else [f"{base}.cuda0", f"{base}.cuda1"]
    with elastikv.DevicePools(dict.fromkeys(devices, 64 * page), name=base) as pools:
        models = pools.register_model("chat", 1 << 40)
        registry = prometheus.CollectorRegistry()
        for (device, pool), name in zip(pools.items(), dict.fromkeys(names)):
            metrics.watch(pool, name=name, registry=registry)
            pool.allocate_for_model("chat", (3 + list(pools).index(device)) * page)
        result = typer_testing.CliRunner().invoke(app, ["list", "--json"])
        rows = {row["pool"]: row for row in json.loads(result.stdout)["pools"]}
        top = typer_testing.CliRunner().invoke(app, ["top", "--once"]).stdout
        for index, (name, device) in enumerate(zip(dict.fromkeys(names), pools)):
            assert (rows[name]["device"], rows[name]["charged"]) == (device, (3 + index) * page)
            assert [each["model"] for each in rows[name]["models"]] == ["chat"]
            assert f"{name} ({device})" in top
            labels = {"pool": name, "device": device}
            assert registry.get_sample_value("elastikv_pool_physical_bytes", labels) == (3 + index) * page
            used = registry.get_sample_value("elastikv_model_used_bytes", {"pool": name, "model": "chat"})
            assert used == models[device].stats().used == (3 + index) * page


# ---- devices that are not there


@pytest.mark.cuda
def test_a_device_that_is_out_of_range_or_hidden():
    count = torch.cuda.device_count()
    with pytest.raises(elastikv.DeviceUnavailable, match=rf"cuda:{count + 5} is not there: this machine has {count}"):
        elastikv.SharedMemoryPool(64 * MIB, f"cuda:{count + 5}")
    present = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    with pytest.raises(elastikv.DeviceUnavailable, match=f"This machine has {present}"):
        elastikv.DevicePools({"cuda:0": 64 * MIB, f"cuda:{count}": 64 * MIB})
    with elastikv.SharedMemoryPool(64 * MIB, "cuda:0") as pool:
        with pytest.raises(elastikv.VmmError):
            pool.allow_peer(f"cuda:{count}")
        model = pool.register_model("chat", 1 << 30)
        assert elastikv.zeros((4,), torch.uint8, model).device == torch.device("cuda:0")  # it goes on
    last = count - 1
    script = f"""
import elastikv
for device in ("cuda:{last}", "cuda:0"):
    try:
        elastikv.DevicePools({{device: {64 * MIB}}})
    except elastikv.DeviceUnavailable as error:
        print(error)
    else:
        print(device, "is there")
"""
    seen = run_python("-c", script, environment={"CUDA_VISIBLE_DEVICES": str(last)}).stdout.splitlines()
    first = "cuda:0 is there" if last == 0 else f"cuda:{last} is not there: this machine has 1 CUDA device"
    assert seen[0].startswith(first) and seen[1] == "cuda:0 is there", seen
    none = run_python("-c", script, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert none.stdout.count("cuda:0") >= 1 and "is there" not in none.stdout and "This machine has cpu" in none.stdout


# ---- peers


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same memory under another device's name, so that a kernel of that device reads it where it is."""
    storage = torch._C._construct_storage_from_data_pointer(
        tensor.data_ptr(), torch.device(device), tensor.numel() * tensor.element_size()
    )
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(storage, 0, tensor.shape, tensor.stride())


@pytest.mark.cuda
@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize(("owner", "reader"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_kernels_and_copies_reach_mappings_made_before_and_after(owner, reader):
    page = 2 * MIB
    limits = {"cuda:0": 64 * page, "cuda:1": 64 * page}
    with elastikv.DevicePools(limits, park_limit=64 * page) as pools:
        model = pools.register_model("chat", 1 << 30)[owner]
        shape = (page // 4,)
        before = elastikv.empty((2, *shape), (16, *shape), torch.int32, model)
        pools.allow_peers()
        late = pools[owner].register_model("late", 1 << 30)
        after = elastikv.empty((2, *shape), (16, *shape), torch.int32, late)
        for kv in (before, after):
            for length in (3, 9):  # more extents, mapped later
                elastikv.grow_(kv, length)
            elastikv.prefetch(kv, 12)
            elastikv.grow_(kv, 12)
            kv.copy_(torch.arange(kv.numel(), dtype=torch.int32, device=owner).view_as(kv))
            torch.cuda.synchronize(owner)
            # Reads: a kernel, and a copy.
            seen = on_device(kv, reader)
            wanted = torch.arange(kv.numel(), dtype=torch.int32, device=reader).view_as(kv)
            assert torch.equal(seen + 1, wanted + 1)
            assert torch.equal(torch.empty_like(wanted).copy_(kv), wanted)
            # Writes: a kernel, and a copy back.
            seen.mul_(3)
            torch.cuda.synchronize(reader)
            assert torch.equal(kv.cpu(), wanted.cpu() * 3)
            kv.copy_(wanted)
            torch.cuda.synchronize(owner)
            assert torch.equal(kv.cpu(), wanted.cpu())
            # What was parked, and comes again with zeros.
            elastikv.shrink_(kv, 1)
            torch.cuda.synchronize(owner)
            elastikv.grow_(kv, 12)
            torch.cuda.synchronize(owner)
            assert torch.equal(on_device(kv, reader)[0] + 0, wanted[0])
            assert not (on_device(kv, reader)[1:] + 0).any()
