"""One decision for all ranks: each makes the memory, a small collective says whether all could, all keep or drop it."""

from __future__ import annotations

import datetime
import hashlib
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from elastikv import _core
from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, RankFailed

Wanted = Sequence[tuple[torch.Tensor, int]]

# What a rank says of its part; the least counts for all.
FAILED, OUT_OF_MEMORY, DONE = 0, 1, 2
LARGEST = (1 << 62) - 1


class Ranks:
    """The ranks of a process group, whose elastic tensors keep the same lengths.

    group: a torch.distributed process group that this rank is in, of any backend; None: all ranks. Only its members
    take part, and all of them must make this object at the same time. What they say to each other goes through a gloo
    group of its own on the CPU: 40 bytes a call, no device work.
    timeout: seconds after which a rank that does not answer is given up.

    Each call of `grow` and `shrink` must be made by every rank, in the same order, with the same lengths; tensors,
    their other dimensions, dtypes and devices may differ. It costs one collective, however many tensors it has: so grow
    all layers and slots of a step in one call, and some tokens ahead, as a tensor can be sliced.

    Memory is taken exactly, never ahead, so a rank's tensors lie on the same pages as the others' after every call.
    What a rank keeps parked is its own matter. `decisions` counts the collectives.

    After a RankFailed that says so the object is broken and refuses every call: where a rank dies in the midst of one,
    some ranks may have learned the outcome and others not. Make a new one of the ranks that are left. Thread safe.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float = 30.0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidArgument("there is no process group: call torch.distributed.init_process_group first")
        if not 0 < timeout <= 86_400:
            raise InvalidArgument(f"timeout must be above 0 and at most 86400 seconds, not {timeout}")
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if dist.get_rank() not in members:
            raise InvalidArgument(f"rank {dist.get_rank()} is not in the group of ranks {members}")
        self.members = tuple(members)
        self.timeout = timeout
        self.decisions = 0
        self._broken: RankFailed | None = None
        self._lock = threading.Lock()
        # Only the members take part in making it. Never destroyed by us: torch names such a group after its members,
        # and would find the addresses of a dead one for the next.
        self._group: Any = dist.new_group(
            list(members), timeout=datetime.timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
        )

    def grow(self, wanted: Wanted) -> None:
        """Grows each tensor in place to its length on every rank, or none of them on any rank.

        Raises on every rank alike, with all tensors as they were: OutOfPhysicalMemory where a rank has no memory for
        its part (the rank's own error has its numbers), RankFailed for any other error of a rank, and where the ranks
        called with different lengths. A rank's own error is raised there as it is.
        """
        wanted = list(wanted)
        self.propose("grow", (length for _, length in wanted), lambda: _core.StagedGrowth(wanted)).finish()

    def shrink(self, wanted: Wanted) -> None:
        """Shrinks each tensor in place to its length on every rank, or none of them on any rank.

        Refused on all where it is on one, as by shrink_ for views that are alive. Raises as `grow` does.
        """
        wanted = list(wanted)
        self.propose("shrink", (length for _, length in wanted), lambda: _Shrinking(wanted)).finish()

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers, on all of them. Raises RankFailed as `grow` does."""
        return -self._ask([-number])[0]

    def propose(self, what: str, numbers: Iterable[int], stage: Callable[[], Staged]) -> Proposal:
        """Does this rank's part of a change and asks the others, without waiting for them.

        stage: makes the part, so that it can be kept (`commit`) or undone (`drop`), or raises. numbers: what must be
        the same on all ranks. Every rank must call in the same order, and call `finish` of what it gets. Raises
        RankFailed only where the group is broken.
        """
        staged: Staged | None = None
        failure: Exception | None = None
        with self._lock:
            self._require_whole()
            try:
                said, staged = DONE, stage()
                digest = _digest(what, numbers)
            except OutOfPhysicalMemory as error:
                said, failure = OUT_OF_MEMORY, error
                digest = _digest(what, numbers)
            except Exception as error:
                said, failure, digest = FAILED, error, None
            try:
                return Proposal(self, what, staged, failure, self._start(_words(said, digest)))
            except BaseException:
                if staged is not None:
                    staged.drop()
                raise
            finally:
                del failure  # its traceback holds this frame, and with it the tensors

    # ---- inside

    def _start(self, words: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """The least of each word over the ranks, and what to wait for until it is that."""
        least = torch.tensor(words, dtype=torch.int64)
        try:
            work = dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
        except Exception as error:
            raise self._silent(error) from error
        self.decisions += 1
        return least, work

    def _answer(self, asked: tuple[torch.Tensor, Any]) -> list[int]:
        least, work = asked
        try:
            work.wait()
        except Exception as error:
            raise self._silent(error) from error
        return [int(word) for word in least.tolist()]

    def _ask(self, words: Sequence[int]) -> list[int]:
        with self._lock:
            self._require_whole()
            return self._answer(self._start(words))

    def _silent(self, error: Exception) -> RankFailed:
        return self._break(
            f"a rank of {list(self.members)} did not answer within {self.timeout:g} s, or is gone: {error}"
        )

    def _break(self, why: str) -> RankFailed:
        self._broken = RankFailed(
            f"{why}. Nothing more can be decided together: make a new Ranks of those that are left"
        )
        return self._broken

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise RankFailed(f"an earlier call broke this group: {self._broken}")


class Staged(Protocol):
    """A rank's part of a change: done, but not shown."""

    def commit(self) -> None: ...
    def drop(self) -> None: ...


class Proposal:
    """A change that this rank has staged, and that the others are asked about. Not thread-safe."""

    def __init__(
        self,
        ranks: Ranks,
        what: str,
        staged: Staged | None,
        failure: Exception | None,
        asked: tuple[torch.Tensor, Any],
    ) -> None:
        self._ranks, self._what, self._staged, self._failure, self._asked = ranks, what, staged, failure, asked

    def finish(self) -> None:
        """Waits for the others, and keeps the change where every rank has done its part; raises on all where one has
        not, as `Ranks.grow` does."""
        staged, failure, self._staged, self._failure = self._staged, self._failure, None, None
        try:
            least, failed, out_of_memory, low, high = self._ranks._answer(self._asked)
            if failure is not None:
                raise failure
            self._require_all(least, failed, out_of_memory, low, high)
            assert staged is not None
            try:
                staged.commit()
            except Exception as error:  # a view taken meanwhile, or a driver that records no fence
                raise self._ranks._break(f"this rank could not {self._what} what all had agreed to: {error}") from error
        finally:
            if staged is not None:
                staged.drop()  # nothing, after commit
            del failure  # its traceback holds this frame

    def _require_all(self, least: int, failed: int, out_of_memory: int, low: int, high: int) -> None:
        members, what = list(self._ranks.members), self._what
        if low != -high and low != LARGEST:
            raise RankFailed(f"the ranks of {members} called {what} with different lengths, or one made another call")
        if least == FAILED:
            raise RankFailed(f"rank {failed} refused to {what}, so nobody did; its own error says why", rank=failed)
        if least == OUT_OF_MEMORY:
            raise OutOfPhysicalMemory(
                f"rank {out_of_memory} has no memory for its part, so nobody grew; its own error says who holds what"
            )


class _Shrinking:
    """Nothing is done before all agree, as a shrink can't be undone."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        _require_distinct(tensor for tensor, _ in wanted)
        for tensor, length in wanted:
            _core.require_shrinkable(tensor, length)

    def commit(self) -> None:
        for tensor, length in self._wanted:
            _core.shrink_(tensor, length)

    def drop(self) -> None:
        pass


def _require_distinct(tensors: Iterable[torch.Tensor]) -> None:
    seen = [id(tensor) for tensor in tensors]
    if len(set(seen)) < len(seen):
        raise InvalidArgument("a tensor is there twice")


def _words(said: int, digest: int | None) -> list[int]:
    """Of which the least over the ranks counts: what was said; the first rank that failed, and that was out of memory;
    the digest from below and from above, from those that have one."""
    rank, nobody = dist.get_rank(), 1 << 31
    return [
        said,
        rank if said == FAILED else nobody,
        rank if said == OUT_OF_MEMORY else nobody,
        LARGEST if digest is None else digest,
        LARGEST if digest is None else -digest,
    ]


def _digest(what: str, numbers: Iterable[int]) -> int:
    """A number that equal calls share, above 0 and below 2**61."""
    values = [int(number) for number in numbers]
    data = what.encode() + struct.pack(f"<{len(values)}q", *values)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 3
