"""Memory and device work: nothing is given back or handed on while work that was enqueued before may still touch it."""

from __future__ import annotations

import threading

import pytest
import torch

import elastikv
from conftest import settled_usage

pytestmark = pytest.mark.cuda

PAGE = 2 << 20
LONG = 400_000_000  # clock cycles of a kernel that does nothing: some tenths of a second


@pytest.fixture
def shared():
    with elastikv.SharedMemoryPool(physical_limit=8 * PAGE, device="cuda:0", park_limit=0) as pool:
        yield pool


@pytest.fixture
def model(shared):
    return shared.register_model("model", 256 * PAGE)


def full(model, pages: int, value: int) -> torch.Tensor:
    tensor = elastikv.empty((pages, PAGE), (64, PAGE), torch.uint8, model)
    tensor.fill_(value)
    torch.cuda.synchronize()
    return tensor


def read_late(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    """A copy of `tensor` that the device makes on `stream` only after a long kernel."""
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        result.copy_(tensor)
    return result


def test_invariant_3_memory_retires_until_the_current_stream_is_done(shared, model):
    tensor = full(model, 4, 7)
    result = read_late(tensor, torch.cuda.current_stream())
    del tensor
    stats = model.stats()
    assert stats.retiring == stats.physical_usage == 4 * PAGE
    assert stats.driver_calls["unmap"].count == 0
    assert settled_usage(shared, model) == 0
    assert result.eq(7).all()


def test_invariant_3_recorded_streams_count(shared, model):
    tensor, side = full(model, 4, 7), torch.cuda.Stream()
    result = read_late(tensor, side)
    elastikv.record_stream(tensor, side)
    del tensor
    assert model.stats().retiring == 4 * PAGE
    assert settled_usage(shared, model) == 0
    assert result.eq(7).all()


def test_invariant_3_the_stream_that_grew_it_counts(shared, model):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = full(model, 4, 7)
        result = read_late(tensor, side)
    del tensor  # on the default stream, which knows nothing of that work
    assert model.stats().retiring == 4 * PAGE
    assert settled_usage(shared, model) == 0
    assert result.eq(7).all()


def test_invariant_3_no_other_model_gets_it_early(shared, model):
    other = shared.register_model("other", 256 * PAGE)
    tensor = full(model, 8, 7)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        result = read_late(tensor, side)
        elastikv.shrink_(tensor, 0)
    taken = elastikv.empty((8, PAGE), (8, PAGE), torch.uint8, other)  # waits for the read, as there is nothing else
    taken.fill_(9)
    torch.cuda.synchronize()
    assert result.eq(7).all()
    assert taken.eq(9).all()
    assert model.stats().physical_usage == 0


def test_invariant_3_taken_up_again_on_another_stream(model):
    tensor = full(model, 4, 7)
    reader, writer = torch.cuda.Stream(), torch.cuda.Stream()
    result = read_late(tensor, reader)
    with torch.cuda.stream(reader):
        elastikv.shrink_(tensor, 0)
    with torch.cuda.stream(writer):
        elastikv.grow_(tensor, 4)
        assert model.stats().retiring == 0  # without waiting: the stream waits
        zero = tensor.clone()
        tensor.fill_(9)
    torch.cuda.synchronize()
    assert result.eq(7).all()
    assert zero.eq(0).all()
    assert tensor.eq(9).all()


def test_gate_waits_for_work_that_is_launched_later():
    with elastikv.VirtualMemoryPool(8 * PAGE, device="cuda:0", park_limit=0) as pool:
        gate = elastikv.ReleaseGate()
        pool.allocate(0, PAGE)
        pool.deallocate(0, PAGE, gate=gate)
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)  # launched after the release, before the gate opens
        gate.open()
        torch.cuda.synchronize()
        pool.drain()
        assert pool.physical_memory_usage == 0


def test_a_captured_graph_replays_over_memory_that_grew_later(model):
    tensor = full(model, 2, 0)
    view = tensor[:2]
    graph = torch.cuda.CUDAGraph()
    view.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        view.add_(1)
    address = tensor.data_ptr()
    elastikv.grow_(tensor, 4)
    graph.replay()
    torch.cuda.synchronize()
    assert tensor.data_ptr() == address
    assert tensor[:2].eq(2).all() and tensor[2:].eq(0).all()


def test_growing_and_prefetching_while_a_graph_is_captured(shared, model):
    tensor = full(model, 1, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # global mode: an unsafe call of any thread would spoil it
        elastikv.grow_(tensor, 2, exact=True)
        elastikv.prefetch(tensor, 4)
        model.drain()
        tensor.add_(3)
    tensor.fill_(1)  # scrubbing is not part of the graph: a replay keeps what is there
    graph.replay()
    elastikv.grow_(tensor, 4)
    torch.cuda.synchronize()
    assert tensor[:2].eq(4).all() and tensor[2:].eq(0).all()


def test_what_is_freed_in_a_capture_is_given_back_after_it(shared, model):
    tensor = full(model, 2, 1)
    graph = torch.cuda.CUDAGraph()
    other = torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        other.add_(1)
        del tensor
        assert model.stats().retiring == 2 * PAGE
    assert settled_usage(shared, model) == 0
    graph.replay()
    torch.cuda.synchronize()
    assert other.eq(1).all()


def test_calls_from_a_thread_without_a_context(shared, model):
    failures = []

    def run():
        try:
            tensor = elastikv.empty((1, PAGE), (4, PAGE), torch.uint8, model)
            elastikv.grow_(tensor, 3)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
    assert settled_usage(shared, model) == 0


def test_compaction_keeps_content_under_a_graph(model):
    tensor = full(model, 6, 5)
    graph = torch.cuda.CUDAGraph()
    target = torch.zeros(2, PAGE, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph):
        target.copy_(tensor[:2])
    elastikv.shrink_(tensor, 2)
    torch.cuda.synchronize()
    model.drain()
    assert model.stats().stranded == 4 * PAGE
    assert model.compact() == 4 * PAGE
    graph.replay()
    torch.cuda.synchronize()
    assert target.eq(5).all()
    assert model.stats().physical_usage == 2 * PAGE


def test_scrubbed_whatever_the_device_hands_out(shared, model):
    for value in (0x11, 0xEE):
        for _ in range(3):
            tensor = elastikv.empty((8, PAGE), (8, PAGE), torch.uint8, model)
            assert tensor.eq(0).all()
            tensor.fill_(value)
            del tensor
            assert settled_usage(shared, model) == 0
