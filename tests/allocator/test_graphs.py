"""CUDA graphs: allocation while a stream captures, replay, pools that graphs share, release."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def capture(function, pool=None):  # type: ignore[no-untyped-def]
    """A graph of function(), warmed up outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()
    return graph, out


def test_capture_and_replay_with_allocation_inside() -> None:
    x = torch.zeros(1000, 300, device="cuda")
    weight = torch.randn(300, 700, device="cuda")

    def function() -> torch.Tensor:
        hidden = (x @ weight).relu()
        return (hidden * 2 + 1).sum(0)

    graph, out = capture(function)
    clutter = [torch.full((1000, 700), 5.0, device="cuda") for _ in range(10)]
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn(1000, 300))
        graph.replay()
        torch.testing.assert_close(out, function(), rtol=0, atol=0)
    assert all(bool((each == 5).all()) for each in clutter)


def test_graphs_that_share_a_pool_replay_in_order() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    first, y = capture(lambda: x * 2 + 1)
    second, z = capture(lambda: (y + 1).sqrt(), pool=first.pool())
    third, w = capture(lambda: z.sum() + y[0], pool=first.pool())
    for value in (0.0, 3.0, 12.0):
        x.fill_(value)
        for graph in (first, second, third):
            graph.replay()
        torch.cuda.synchronize()
        want = (torch.full((1 << 20,), value, device="cuda") * 2 + 2).sqrt()
        torch.testing.assert_close(z, want)
        torch.testing.assert_close(w, want.sum() + value * 2 + 1)


def test_blocks_that_other_streams_use_in_a_capture() -> None:
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")

    def function() -> torch.Tensor:
        y = x + 1
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = y * 3
        y.record_stream(side)
        del y
        torch.cuda.current_stream().wait_stream(side)
        filler = torch.full((1 << 20,), 100.0, device="cuda")
        return z + filler

    graph, out = capture(function)
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert bool((out == (value + 1) * 3 + 100).all())


@pytest.fixture
def reuse_in_captures() -> Iterator[None]:
    setting = "graph_capture_record_stream_reuse"
    try:
        torch.cuda.memory._set_allocator_settings(f"{setting}:True")
    except (RuntimeError, ValueError):
        pytest.skip("this torch does not have the setting")
    yield
    torch.cuda.memory._set_allocator_settings(f"{setting}:False")


@pytest.mark.needs("statistics")
@pytest.mark.usefixtures("reuse_in_captures")
def test_blocks_are_reused_within_a_capture_once_its_streams_have_joined() -> None:
    sides = [torch.cuda.Stream() for _ in range(2)]
    x = torch.zeros(1 << 20, device="cuda")
    seen: list[tuple[int, int, int, int]] = []

    def function() -> torch.Tensor:
        here, y = torch.cuda.current_stream(), x + 1
        address, parts = y.data_ptr(), []
        for side in sides:
            side.wait_stream(here)
            with torch.cuda.stream(side):
                parts.append(y * 3)
            y.record_stream(side)
        del y
        early = torch.full_like(x, 100.0)  # either may still read what y had
        here.wait_stream(sides[0])
        between = torch.full_like(x, 10.0)
        here.wait_stream(sides[1])
        late = torch.full_like(x, 1.0)
        seen.append((address, early.data_ptr(), between.data_ptr(), late.data_ptr()))
        return parts[0] + parts[1] + early + between + late

    graph, out = capture(function)
    address, early, between, late = seen[-1]
    assert address not in (early, between) and late == address
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert bool((out == (value + 1) * 6 + 111).all())


@pytest.mark.needs("statistics")
@pytest.mark.needs("release")
def test_a_graphs_memory_goes_back_once_it_is_gone() -> None:
    x = torch.zeros(8 << 20, device="cuda")
    before = torch.cuda.memory_reserved()
    graph, out = capture(lambda: (x + 1) * 2)
    graph.replay()
    assert torch.cuda.memory_reserved() >= before + x.nbytes
    graph.reset()
    del graph, out
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.needs("checkpoints")
def test_compile_with_cudagraph_trees() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    for step in range(6):
        torch.manual_seed(step)
        x = torch.randn(32, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x).square().mean()
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        want = model(x).square().mean()
        want.backward()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()])
        model.zero_grad()
