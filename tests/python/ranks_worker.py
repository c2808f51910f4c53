"""One rank of test_ranks.py, run as `ranks_worker.py RANK RANKS FOLDER`. What goes wrong ends it with a traceback."""

# ruff: noqa: PT017 (what a rank must see depends on the dice)

from __future__ import annotations

import datetime
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import elastikv
from elastikv.distributed import Ranks

PAGE = 4096
POOL_PAGES = 512
STEPS = 1000


class Books:
    """Three tensors of this rank, and what their lengths should be."""

    def __init__(self) -> None:
        self.shared = elastikv.SharedMemoryPool(POOL_PAGES * PAGE, "cpu", park_limit=0)
        self.model = self.shared.register_model("model", 1 << 30)
        self.ballast = self.shared.register_model("ballast", 1 << 30)
        u8 = torch.uint8
        self.tensors = [
            elastikv.empty((0, PAGE // 2), (256, PAGE // 2), u8, self.model),
            elastikv.empty((0, 3 * PAGE), (64, 3 * PAGE), u8, self.model),
            elastikv.empty((2, 0, PAGE), (2, 64, PAGE), u8, self.model, dim=1),
        ]
        self.lengths = [0, 0, 0]

    def length(self, index: int) -> int:
        return self.tensors[index].shape[1 if index == 2 else 0]

    def state(self) -> tuple[int, ...]:
        stats = self.model.stats()
        return (stats.used, stats.live, stats.physical_usage, stats.retiring, *(self.length(i) for i in range(3)))

    def wanted(self, choice: dict[int, int]) -> list[tuple[torch.Tensor, int]]:
        return [(self.tensors[index], length) for index, length in choice.items()]


def agree(books: Books, group: dist.ProcessGroup | None) -> None:
    """No rank holds a page that the others lack, and lengths are those of the plain model."""
    state = torch.tensor(books.state())
    ends = torch.cat((state, -state))
    dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=group)  # the least of each number, and of its negative
    assert torch.equal(ends, torch.cat((state, -state))), (state, ends)
    assert books.lengths == [books.length(i) for i in range(3)], (books.lengths, state)


def random_steps(group: dist.ProcessGroup | None, seed: int) -> None:
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = dist.get_rank()
    ranks = Ranks(group, timeout=60)
    books = Books()
    dice = random.Random(seed)  # all ranks throw the same
    seen = {"grown": 0, "shrunk": 0, "short": 0, "refused": 0}
    while seen["grown"] + seen["short"] + seen["refused"] < STEPS:
        victim = dice.choice(members)
        fault = dice.choices(["none", "limit", "error"], [6, 2, 1])[0]
        most = [256, 64, 64]
        chosen = dice.sample(range(3), dice.randint(1, 3))
        if dice.random() < 0.3:
            choice = {index: dice.randint(0, books.lengths[index]) for index in chosen}
            hold = books.tensors[chosen[-1]][:0] if fault == "error" and me == victim else None
            shrinks = choice[chosen[-1]] < books.lengths[chosen[-1]]
            try:
                ranks.shrink(books.wanted(choice))
                assert fault != "error" or not shrinks
                books.lengths = [choice.get(i, length) for i, length in enumerate(books.lengths)]
                seen["shrunk"] += 1
            except elastikv.RankFailed as error:
                assert fault == "error" and me != victim and error.rank == victim
            except elastikv.InvalidArgument:
                assert fault == "error" and me == victim
            del hold
            agree(books, group)
            continue
        choice = {i: min(most[i], books.lengths[i] + dice.randint(0, most[i] // 6)) for i in chosen}
        wanted = books.wanted(choice)
        if fault == "error" and me == victim:
            wanted[-1] = (torch.empty(4), wanted[-1][1])  # no elastic tensor
        if fault == "limit" and me == victim:
            free = books.shared.global_stats().available
            hog = books.shared.allocate_for_model("ballast", free) if free else None
        try:
            ranks.grow(wanted)
            assert fault != "error"
            books.lengths = [choice.get(i, length) for i, length in enumerate(books.lengths)]
            seen["grown"] += 1
        except elastikv.OutOfPhysicalMemory as error:
            assert fault != "error"
            if fault == "limit" and me != victim and error.requested == 0:
                assert f"rank {victim} has no memory" in str(error)
            seen["short"] += 1
        except elastikv.RankFailed as error:
            assert fault == "error" and me != victim and error.rank == victim
            seen["refused"] += 1
        except elastikv.InvalidArgument:
            assert fault == "error" and me == victim
            seen["refused"] += 1
        if fault == "limit" and me == victim and hog is not None:
            books.shared.deallocate_for_model("ballast", hog - books.ballast.base_address, free)
        agree(books, group)
    assert min(seen.values()) > STEPS // 20, seen
    books.tensors.clear()
    wanted.clear()
    assert books.model.stats().physical_usage == 0


def different_calls() -> None:
    """Ranks that call with different lengths, or one grow and one shrink: an error on all, nothing changed."""
    ranks, books, me = Ranks(timeout=60), Books(), dist.get_rank()
    with pytest.raises(elastikv.RankFailed, match="different lengths"):
        ranks.grow([(books.tensors[0], 3 + me)])
    with pytest.raises(elastikv.RankFailed, match="made another call"):
        (ranks.grow if me == 0 else ranks.shrink)([(books.tensors[0], 0)])
    with pytest.raises(elastikv.InvalidArgument, match="under way"):
        ranks.grow([(books.tensors[0], 3), (books.tensors[0], 4)])
    with pytest.raises(elastikv.InvalidArgument, match="twice"):
        ranks.shrink([(books.tensors[0], 0), (books.tensors[0], 0)])
    agree(books, None)
    ranks.grow([(books.tensors[0], 3)])
    books.tensors[0].fill_(7)
    books.lengths[0] = 3
    agree(books, None)
    for timeout in (0, -1, float("nan"), 1e9):
        with pytest.raises(elastikv.InvalidArgument, match="timeout"):
            Ranks(timeout=timeout)
    dist.barrier()


def silent_rank() -> None:
    """One rank stays away for longer than the timeout: the others say so, roll back, and refuse to go on."""
    ranks, books = Ranks(timeout=1), Books()
    if dist.get_rank() != 0:
        begun = time.monotonic()
        with pytest.raises(elastikv.RankFailed, match="did not answer within 1 s"):
            ranks.grow([(books.tensors[0], 9)])
        assert time.monotonic() - begun < 20
        assert books.state()[:3] == (0, 0, 0)
        with pytest.raises(elastikv.RankFailed, match="earlier call broke"):
            ranks.grow([(books.tensors[0], 9)])
    dist.barrier()


def dying_rank(last: int) -> None:
    """The last rank is gone in the midst of a call: the others get a clear error and keep what they had."""
    ranks, books = Ranks(timeout=20), Books()
    ranks.grow([(books.tensors[1], 2)])
    if dist.get_rank() == last:
        os._exit(9)
    with pytest.raises(elastikv.RankFailed, match="is gone"):
        ranks.grow([(books.tensors[1], 5)])
    assert books.length(1) == 2 and books.model.stats().used == 6 * PAGE


def main() -> None:
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    pairs = [dist.new_group([i, i + 1]) for i in range(0, count, 2)]
    random_steps(None, seed=11)
    random_steps(pairs[rank // 2], seed=12 + rank // 2)
    different_calls()
    silent_rank()
    dying_rank(count - 1)
    (folder / f"done-{rank}").touch()
    os._exit(0)  # the group is broken: torch would wait for it


main()
