"""Blocks change hands in the order of their streams, never before work on other streams is over."""

from __future__ import annotations

import threading

import pytest
import torch

N = 5_000_192  # bytes; no other test uses this size
LONG = 100_000_000  # cycles: tens of milliseconds


def test_a_freed_block_comes_back_on_its_stream() -> None:
    first = torch.empty(N, dtype=torch.uint8, device="cuda")
    address = first.data_ptr()
    del first
    again = torch.empty(N, dtype=torch.uint8, device="cuda")
    assert again.data_ptr() == address


def test_reuse_on_a_stream_does_not_wait() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        block = torch.empty(N, dtype=torch.uint8, device="cuda")
        address = block.data_ptr()
        torch.cuda._sleep(LONG)
        block.fill_(1)
        del block
        again = torch.empty(N, dtype=torch.uint8, device="cuda")
        assert not stream.query()  # the work before is still to come
        assert again.data_ptr() == address
        again.fill_(2)
    stream.synchronize()
    assert bool((again == 2).all())


def test_another_stream_never_gets_a_block_in_use() -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(one):
            first = torch.empty(N, dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(LONG)
            first.fill_(1)
            del first
        with torch.cuda.stream(two):
            others = [torch.empty(N, dtype=torch.uint8, device="cuda").fill_(2) for _ in range(4)]
        torch.cuda.synchronize()
        assert all(bool((other == 2).all()) for other in others)


def test_record_stream_keeps_a_block_until_the_other_stream_is_done() -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(one):
            source = torch.full((N,), 3, dtype=torch.uint8, device="cuda")
        two.wait_stream(one)
        with torch.cuda.stream(two):
            torch.cuda._sleep(LONG)
            copy = source.clone()
        source.record_stream(two)
        del source
        with torch.cuda.stream(one):
            others = [torch.empty(N, dtype=torch.uint8, device="cuda").fill_(9) for _ in range(4)]
        torch.cuda.synchronize()
        assert bool((copy == 3).all())
        del others


def test_many_threads_allocate_on_streams_of_their_own() -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        stream = torch.cuda.Stream()
        kept: list[torch.Tensor] = []
        with torch.cuda.stream(stream):
            for step in range(200):
                size = int(torch.randint(1, 3_000_000, (1,), generator=generator))
                kept.append(torch.empty(size, dtype=torch.uint8, device="cuda").fill_(number))
                if len(kept) > 8:
                    block = kept.pop(step % 8)
                    if not bool((block == number).all()):
                        wrong.append(f"thread {number}, step {step}")
            stream.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.needs("statistics")
@pytest.mark.needs("release")
def test_what_other_streams_hold_is_active_until_they_are_done() -> None:
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        block = torch.empty(N, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_stats()
    with torch.cuda.stream(two):
        torch.cuda._sleep(LONG)
    block.record_stream(two)
    del block
    during = torch.cuda.memory_stats()
    assert during["allocated_bytes.all.current"] < before["allocated_bytes.all.current"]
    assert during["active_bytes.all.current"] == before["active_bytes.all.current"]
    torch.cuda.synchronize()
    torch.empty(N, dtype=torch.uint8, device="cuda")  # a chance to notice
    after = torch.cuda.memory_stats()
    assert after["active_bytes.all.current"] < before["active_bytes.all.current"]


def test_memory_that_another_stream_still_reads_is_not_unmapped_when_it_is_freed_untold() -> None:
    """Without record_stream, as many programs do: torch's own keeps what is freed mapped."""
    stream = torch.cuda.Stream()
    total = torch.zeros((), device="cuda", dtype=torch.int64)
    with torch.cuda.stream(stream):
        torch.zeros(1, device="cuda")  # the stream is known
    for _ in range(5):
        read = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            total += read.sum()  # one after the other on the stream
        del read
        torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert int(total) > 0
