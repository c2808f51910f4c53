"""Devices for the tests: everything that can run on both runs on both."""

from __future__ import annotations

import os

import pytest
import torch

import elastikv

REQUIRE_CUDA = os.environ.get("ELASTIKV_REQUIRE_CUDA") == "1"


def _cuda_missing() -> str:
    """Why CUDA tests can't run here; empty if they can."""
    rows = [row for row in elastikv.devices() if row["device"].startswith("cuda")]
    if not any(row["available"] for row in rows):
        return rows[0]["reason"]
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    missing = _cuda_missing()
    if missing and REQUIRE_CUDA:
        pytest.fail(f"ELASTIKV_REQUIRE_CUDA=1, but {missing}")
    if missing:
        pytest.skip(missing)


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def page_size(device: str) -> int:
    return 4096 if device == "cpu" else 2 << 20


@pytest.fixture
def pool_pages() -> int:
    """Of the shared pool. A module that needs more has a fixture of this name."""
    return 64


@pytest.fixture
def shared(device: str, page_size: int, pool_pages: int):
    """A shared pool, with nothing parked so that usage is what is in use."""
    with elastikv.SharedMemoryPool(physical_limit=pool_pages * page_size, device=device, park_limit=0) as pool:
        yield pool


@pytest.fixture
def model(shared):
    return shared.register_model("model", virtual_capacity=1 << 42)


@pytest.fixture
def llama(device: str):
    """A small Llama with attention 'elastikv', on the device."""
    from hf_networks import make_network

    return make_network("gqa", device)


def settled_usage(shared, *models) -> int:
    """Physical bytes once what was released has been given back."""
    if shared.device != "cpu":
        torch.cuda.synchronize(shared.device)
    for each in models:
        each.drain()
    return shared.global_stats().physical_usage


@pytest.fixture
def one_thread():
    """Threads that wait for each other cost tiny models more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
