"""One suite for every way in which torch's CUDA allocations reach the pool, and for torch's own allocator, which shows
that the suite asks for what torch does.

An allocator is the process's, so the suite runs once a way, in a process of its own: `pytest tests/allocator --way
installed`. tests/python/test_allocators.py does that for all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import elastikv
import elastikv.torch

WAYS = ("native", "installed", "pluggable", "mem_pool")
GIB = 1 << 30
LIMIT = 16 * GIB


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--way", choices=WAYS, default="native", help="how torch's allocations reach the pool")
    parser.addoption("--losses", type=Path, default=None, help="where the losses of training are written")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(what): only for ways that have it: statistics, checkpoints, fraction, release, pools"
    )


# What torch's pluggable allocators do not have, whoever writes them.
# Inside the block of a memory pool torch does not give its cached segments up, neither when asked nor when short, nor
# does it look whether other streams are done.
LACKS = {
    "pluggable": {"statistics", "checkpoints", "fraction", "pools"},
    "mem_pool": {"fraction", "release", "pools"},  # torch has no pools within pools but by name
}


@pytest.fixture(scope="session")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--way"))


@pytest.fixture(scope="session")
def pool(way: str) -> Iterator[elastikv.SharedMemoryPool | None]:
    """The shared pool behind the allocator; none for torch's own."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if way == "native":
        torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.get_device_properties(0).total_memory)
        yield None
        return
    made = elastikv.SharedMemoryPool(physical_limit=LIMIT, device="cuda:0")
    if way == "installed":
        elastikv.torch.install(made)
    elif way == "pluggable":
        torch.cuda.memory.change_current_allocator(elastikv.torch.pluggable_allocator(made))
    yield made


@pytest.fixture(scope="session")
def model(way: str, pool: elastikv.SharedMemoryPool | None) -> elastikv.Model | None:
    """The model whose share a MemPool draws on."""
    return pool.register_model("block", 4096 * GIB) if pool is not None and way == "mem_pool" else None


@pytest.fixture(autouse=True)
def in_the_way(
    request: pytest.FixtureRequest, way: str, pool: elastikv.SharedMemoryPool | None, model: elastikv.Model | None
) -> Iterator[None]:
    """Every test allocates in this way, and begins with nothing cached."""
    for marker in request.node.iter_markers("needs"):
        if marker.args[0] in LACKS.get(way, ()):
            pytest.skip(f"torch's allocators of the kind {way} have no {marker.args[0]}")
    gc.collect()  # a failed allocation's traceback holds what was allocated before it
    torch.cuda.synchronize()
    if way != "pluggable":
        torch.cuda.empty_cache()
    if model is not None:
        with model.use():
            yield
        elastikv.torch.empty_cache(model)
    else:
        yield
    torch.cuda.synchronize()


def held(pool: elastikv.SharedMemoryPool | None) -> int:
    """Physical bytes behind torch's allocations now."""
    return pool.global_stats().physical_usage if pool is not None else torch.cuda.memory_reserved()
