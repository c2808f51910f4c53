"""Logs of allocations and their replay: the format, its complaints, and peaks against a plain model."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch

import elastikv
from elastikv import _core
from elastikv.torch.allocation_log import (
    AllocationEvent,
    compact,
    log_allocations,
    read_log,
    start_allocation_log,
    stop_allocation_log,
    write_log,
)
from elastikv.torch.replay import ALLOCATE, FREE, RECORD_STREAM, Operations, operations_of
from elastikv.torch.synthetic import serving_log, training_log

HEADER = "time_ns,action,id,size,stream,pool,device\n"
MIB = 1 << 20
SHAPES = pytest.mark.parametrize("make", [training_log, serving_log])


def events_of(*lines: str) -> list[AllocationEvent]:
    """`alloc 0 512 1` is an event, its stream and device may be left out."""
    made = []
    for line in lines:
        action, block, size, *rest = line.split()
        stream, device = [*map(int, rest), 0, 0][:2]
        made.append(AllocationEvent(len(made), action, int(block), int(size), stream, 0, device))
    return made


def rows(operations: Operations) -> list[tuple[int, int, int, int]]:
    return list(zip(operations.actions, operations.blocks, operations.sizes, operations.streams))


def small(make) -> list[AllocationEvent]:
    return training_log(steps=3, layers=4, width=512) if make is training_log else serving_log(requests=12, layers=3)


# --- the format ---


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
@SHAPES
def test_what_is_written_is_read(tmp_path, name, make):
    events = small(make)
    events.append(AllocationEvent(7, "segment_alloc", None, 2 * MIB, 3, 1, -1))
    write_log(tmp_path / name, events)
    assert read_log(tmp_path / name) == events


def test_packed_files_are_the_same_byte_for_byte(tmp_path):
    for name in ("a.csv.gz", "b.csv.gz"):
        write_log(tmp_path / name, small(training_log))
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no column time_ns, action"),
        ("time_ns,action,id,size,stream,pool\n", "no column device"),
        (HEADER + "0,alloc,0,512,0,0,0\n1,alloc,1,many,0,0,0\n", "line 3: .*many"),
        (HEADER + "0,malloc,0,512,0,0,0\n", "line 2: action 'malloc' is none of alloc"),
        (HEADER + "0,alloc,,512,0,0,0\n", "line 2: alloc with no id"),
        (HEADER + "0,oom,4,512,0,0,0\n", "line 2: oom with an id"),
        (HEADER + "0,alloc,0,-512,0,0,0\n", "line 2: a negative"),
        (HEADER + "0,alloc,0\n", "line 2: 3 values"),
    ],
)
def test_complains_with_file_and_line(tmp_path, text, complaint):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(elastikv.InvalidArgument, match=complaint) as caught:
        read_log(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_packed_is_refused(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_text(HEADER)
    with pytest.raises(elastikv.InvalidArgument, match=r"log\.csv\.gz"):
        read_log(path)


# --- from a log to operations ---


def test_operations_are_dense_and_of_one_device():
    log = events_of(
        "alloc 7 512", "alloc 8 512 0 1", "alloc 9 1024 2", "free_requested 7 512", "free_completed 7 512",
        "free_requested 8 512 0 1", "alloc 10 1536",
    )  # fmt: skip
    assert rows(operations_of(log)) == [
        (ALLOCATE, 0, 512, 0), (ALLOCATE, 1, 1024, 2), (FREE, 0, 0, 0), (ALLOCATE, 2, 1536, 0),
    ]  # fmt: skip
    assert rows(operations_of(log, device=1)) == [(ALLOCATE, 0, 512, 0), (FREE, 0, 0, 0)]


def test_a_late_completion_means_another_stream():
    log = events_of("alloc 0 512 1", "free_requested 0 512 1", "alloc 1 512 1", "free_completed 0 512 1")
    assert rows(operations_of(log)) == [
        (ALLOCATE, 0, 512, 1), (RECORD_STREAM, 0, 0, 2), (FREE, 0, 0, 0), (ALLOCATE, 1, 512, 1),
    ]  # fmt: skip


@SHAPES
def test_compact_logs_replay_the_same(make):
    log = small(make)
    late = events_of("alloc 90000 512", "free_requested 90000 512", "alloc 90001 512", "free_completed 90000 512")
    log += late
    packed = compact([AllocationEvent(0, "segment_alloc", None, 2 * MIB), *log])
    assert len(packed) < len(log)
    assert rows(operations_of(packed)) == rows(operations_of(log))


def test_synthetic_logs_follow_their_seed():
    assert training_log(1, steps=2) == training_log(1, steps=2) != training_log(2, steps=2)
    assert serving_log(1, requests=8) == serving_log(1, requests=8) != serving_log(2, requests=8)


@pytest.mark.parametrize(
    ("operations", "complaint"),
    [
        ([(ALLOCATE, 0, 0, 0)], "operation 0, block 0: allocated with 0 bytes"),
        ([(ALLOCATE, 0, 1, 0), (ALLOCATE, 0, 1, 0)], "operation 1, block 0: allocated a second time"),
        ([(ALLOCATE, 0, 1, 0), (FREE, 0, 0, 0), (FREE, 0, 0, 0)], "operation 2, block 0: freed or used while"),
        ([(RECORD_STREAM, 0, 0, 1)], "operation 0, block 0: freed or used while"),
        ([(ALLOCATE, 9, 1, 0)], "block 9: blocks are numbered without gaps"),
        ([(ALLOCATE, 0, 1, 32)], "stream 32 of at most 32"),
        ([(5, 0, 1, 0)], "operation 0: action 5"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused(operations, complaint):
    made = Operations()
    for operation in operations:
        made.add(*operation)
    with pytest.raises(elastikv.InvalidArgument, match=complaint):
        made.replay()


def test_columns_of_a_replay_must_fit():
    with pytest.raises(elastikv.InvalidArgument, match="equally long"):
        _core.Replay(array("B", [0]), array("I"), array("Q"), array("H"))
    with pytest.raises(elastikv.InvalidArgument, match="sizes must be a dense buffer of 64-bit"):
        _core.Replay(array("B", [0]), array("I", [0]), array("I", [1]), array("H", [0]))


# --- replays on a heap ---


def plain_peak(events: list[AllocationEvent]) -> tuple[int, int]:
    """Most bytes live, rounded up to 512 each and as asked for, by adding up."""
    live: dict[int, int] = {}
    peaks = (0, 0)
    for event in events:
        if event.action == "alloc":
            live[event.id] = event.size
        elif event.action == "free_requested":
            del live[event.id]
        rounded = sum((size + 511) // 512 * 512 for size in live.values())
        peaks = max(peaks[0], rounded), max(peaks[1], sum(live.values()))
    return peaks


@SHAPES
def test_a_replay_has_the_peaks_of_a_plain_model(make):
    events = small(make)
    rounded, requested = plain_peak(events)
    operations = operations_of(events)
    result = operations.replay().run_on_host(capacity=1 << 40, repeats=2)
    assert operations.peak_allocated() == rounded
    assert (result["peak_allocated"], result["peak_requested"]) == (rounded, requested)
    assert result["peak_reserved"] >= rounded
    assert len(result["nanoseconds"]) == 2


@SHAPES
def test_the_log_of_a_replay_replays_the_same(tmp_path, make):
    operations = operations_of(small(make))
    path = tmp_path / "log.csv"
    operations.replay().run_on_host(capacity=1 << 40, log=str(path))
    again = read_log(path)
    assert rows(operations_of(again)) == rows(operations)
    assert {event.device for event in again} == {-1}
    blocks = [event.id for event in again if event.action == "alloc"]
    assert blocks == list(range(len(blocks)))
    # Whatever was drawn has been accounted for: reserved bytes never fall below those that are live.
    drawn = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    live = {"alloc": 1, "free_completed": -1}
    reserved = allocated = 0
    for event in again:
        reserved += drawn.get(event.action, 0) * event.size
        allocated += live.get(event.action, 0) * event.size
        assert reserved >= allocated


def test_a_replay_that_does_not_fit_says_so_and_frees_what_it_had():
    operations = Operations()
    for block in range(8):
        operations.add(ALLOCATE, block, 4 * MIB)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        operations.replay().run_on_host(capacity=1 << 30, limit=16 * MIB)


def test_other_streams_are_replayed():
    operations = Operations()
    operations.add(ALLOCATE, 0, 4 * MIB, 1)
    operations.add(RECORD_STREAM, 0, 0, 2)
    operations.add(FREE, 0)
    operations.add(ALLOCATE, 1, 4 * MIB, 1)
    result = operations.replay().run_on_host(capacity=1 << 30)
    assert result["peak_allocated"] == 4 * MIB


def test_a_log_needs_a_folder_to_lie_in(tmp_path):
    operations = Operations()
    operations.add(ALLOCATE, 0, 512)
    with pytest.raises(elastikv.InvalidArgument, match=r"can't write an allocation log to .*No such file"):
        operations.replay().run_on_host(capacity=1 << 30, log=str(tmp_path / "none" / "log.csv"))


def test_a_disk_that_is_full_is_no_secret():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(elastikv.VmmError, match="is not whole: No space left"):
        operations_of(small(serving_log)).replay().run_on_host(capacity=1 << 40, log="/dev/full")


def test_nothing_to_stop():
    with pytest.raises(elastikv.InvalidArgument, match="no allocations are being logged"):
        stop_allocation_log()


# --- CPU tensors of a model ---


def test_a_models_blocks_are_logged(tmp_path):
    path = tmp_path / "log.csv"
    with elastikv.SharedMemoryPool(64 * MIB, "cpu") as shared:
        model = shared.register_model("logged", 1 << 34)
        other = shared.register_model("other", 1 << 34)
        with model.use():
            early = torch.empty(4096, dtype=torch.uint8)
            with log_allocations(path, model):
                first = torch.empty(1000, dtype=torch.uint8)
                with other.use():
                    elsewhere = torch.empty(3 * MIB, dtype=torch.uint8)
                second = torch.empty(2 * MIB, dtype=torch.uint8)
                again = pytest.raises(elastikv.InvalidArgument, match="'logged' is being logged already")
                with again, log_allocations(tmp_path / "second.csv", model):
                    pass
                del first, early
            late = torch.empty(512, dtype=torch.uint8)
        events = [(e.action, e.id, e.size, e.device) for e in read_log(path) if e.id is not None]
        del elsewhere, second, late
    assert [event for event in events if event[0] == "alloc"] == [("alloc", 0, 1000, -1), ("alloc", 1, 2 * MIB, -1)]
    assert [event[:2] for event in events[2:]] == [("free_requested", 0), ("free_completed", 0)]


def test_a_model_is_logged_again(tmp_path):
    with elastikv.SharedMemoryPool(64 * MIB, "cpu") as shared:
        model = shared.register_model("logged", 1 << 34)
        for name, size in (("a.csv", 100), ("b.csv", 200)):
            with log_allocations(tmp_path / name, model), model.use():
                torch.empty(size, dtype=torch.uint8)
            assert [e.size for e in read_log(tmp_path / name) if e.action == "alloc"] == [size]


# --- on a GPU ---


@pytest.mark.cuda
def test_a_log_of_torchs_allocator_replays_with_its_peak(tmp_path):
    path = tmp_path / "log.csv"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with log_allocations(path):
        kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1000, 3 * MIB, 64 * MIB)]
        del kept[1]
        kept.append(torch.empty(5 * MIB, dtype=torch.uint8, device="cuda"))
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            kept.append(torch.empty(7 * MIB, dtype=torch.uint8, device="cuda"))
        kept.clear()
    peak = torch.cuda.max_memory_allocated() - before
    events = read_log(path)
    blocks = [event for event in events if event.action == "alloc"]
    assert [event.size for event in blocks] == [1000, 3 * MIB, 64 * MIB, 5 * MIB, 7 * MIB]
    assert [event.id for event in blocks] == [0, 1, 2, 3, 4]
    assert [event.stream for event in blocks] == [0, 0, 0, 0, 1]
    assert {event.device for event in events} == {0}

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    replay = operations_of(events).replay()
    assert replay.run_on_cuda(0) > 0
    assert torch.cuda.max_memory_allocated() - before == peak
    assert torch.cuda.memory_allocated() == before


@pytest.mark.cuda
def test_only_one_log_at_a_time_and_none_after_its_end(tmp_path):
    with log_allocations(tmp_path / "one.csv"):
        with pytest.raises(elastikv.InvalidArgument, match=r"already; stop that first"):
            start_allocation_log(tmp_path / "two.csv")
        first = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    second = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    with log_allocations(tmp_path / "two.csv"):
        third = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
        del first, second  # allocated before this log began
    del third
    sizes = [[e.size for e in read_log(tmp_path / name) if e.action == "alloc"] for name in ("one.csv", "two.csv")]
    assert sizes == [[MIB], [2 * MIB]]
    assert [e.action for e in read_log(tmp_path / "two.csv") if e.id is not None] == ["alloc"]


@pytest.mark.cuda
def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        start_allocation_log(tmp_path / "none" / "log.csv")
