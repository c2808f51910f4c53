"""One decision for all ranks: each makes the memory, a small collective says whether all could, all keep or drop it."""

from __future__ import annotations

import datetime
import hashlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from elastikv import _core
from elastikv.errors import InvalidArgument, OutOfPhysicalMemory, RankFailed

Wanted = Sequence[tuple[torch.Tensor, int]]

# What a rank says of its part; the least counts for all.
FAILED, OUT_OF_MEMORY, DONE = 0, 1, 2


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
    What a rank keeps parked is its own matter.

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
        with self._lock:
            self._require_whole()
            staged: _core.StagedGrowth | None = None
            failure: Exception | None = None
            try:
                wanted = list(wanted)
                staged = _core.StagedGrowth(wanted)
            except Exception as error:
                failure = error
            try:
                self._decide("grow", wanted, failure)
                assert staged is not None
                staged.commit()
            finally:
                if staged is not None:
                    staged.drop()  # nothing, after commit
                del failure  # its traceback holds this frame, and with it the tensors

    def shrink(self, wanted: Wanted) -> None:
        """Shrinks each tensor in place to its length on every rank, or none of them on any rank.

        Refused on all where it is on one, as by shrink_ for views that are alive. Raises as `grow` does.
        """
        with self._lock:
            self._require_whole()
            failure: Exception | None = None
            try:
                wanted = list(wanted)
                _require_distinct(tensor for tensor, _ in wanted)
                for tensor, length in wanted:
                    _core.require_shrinkable(tensor, length)
            except Exception as error:
                failure = error
            try:
                self._decide("shrink", wanted, failure)
            finally:
                del failure
            try:
                for tensor, length in wanted:
                    _core.shrink_(tensor, length)
            except Exception as error:  # a view taken meanwhile, or a driver that records no fence
                raise self._break(f"this rank could not shrink what all had agreed to: {error}") from error

    # ---- inside

    def _decide(self, what: str, wanted: Wanted, failure: Exception | None) -> None:
        """Returns where every rank has done its part; raises on all where one has not."""
        rank = dist.get_rank()
        said = DONE if failure is None else OUT_OF_MEMORY if isinstance(failure, OutOfPhysicalMemory) else FAILED
        digest = _digest(what, wanted) if said != FAILED else None
        # The least over the ranks: what was said; the first rank that failed, and that was out of memory; the digest
        # from below and from above, from those that have one.
        nobody = 1 << 31
        largest = (1 << 62) - 1
        words = torch.tensor(
            [
                said,
                rank if said == FAILED else nobody,
                rank if said == OUT_OF_MEMORY else nobody,
                largest if digest is None else digest,
                largest if digest is None else -digest,
            ],
            dtype=torch.int64,
        )
        try:
            dist.all_reduce(words, op=dist.ReduceOp.MIN, group=self._group)
        except Exception as error:
            raise self._break(
                f"a rank of {list(self.members)} did not answer within {self.timeout:g} s, or is gone: {error}"
            ) from error
        least, failed, out_of_memory, low, high = words.tolist()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        if low != -high and low != largest:
            raise RankFailed(
                f"the ranks of {list(self.members)} called {what} with different lengths, or one made another call"
            )
        if least == FAILED:
            raise RankFailed(f"rank {failed} refused to {what}, so nobody did; its own error says why", rank=failed)
        if least == OUT_OF_MEMORY:
            raise OutOfPhysicalMemory(
                f"rank {out_of_memory} has no memory for its part, so nobody grew; its own error says who holds what"
            )

    def _break(self, why: str) -> RankFailed:
        self._broken = RankFailed(
            f"{why}. Nothing more can be decided together: make a new Ranks of those that are left"
        )
        return self._broken

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise RankFailed(f"an earlier call broke this group: {self._broken}")


def _require_distinct(tensors: Iterable[torch.Tensor]) -> None:
    seen = [id(tensor) for tensor in tensors]
    if len(set(seen)) < len(seen):
        raise InvalidArgument("a tensor is there twice")


def _digest(what: str, wanted: Wanted) -> int:
    """A number that equal calls share, above 0 and below 2**61."""
    lengths = [int(length) for _, length in wanted]
    data = what.encode() + struct.pack(f"<{len(lengths)}q", *lengths)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 3
