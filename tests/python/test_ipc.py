"""Tensors of an installed pool in other processes, through torch.multiprocessing.

Installing is process-wide, so each test is a program of its own, run to its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

PREAMBLE = """
import torch
import torch.multiprocessing as mp
import elastikv
import elastikv.torch

MiB = 1 << 20


def install():
    pool = elastikv.SharedMemoryPool(physical_limit=512 * MiB, device="cuda:0", park_limit=0)
    elastikv.torch.install(pool)
    return pool


def settled(pool):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
    return pool.global_stats().physical_usage


"""


def run_program(folder: Path, body: str) -> None:
    """Runs PREAMBLE and `body` as a script: spawned children import it by its path."""
    script = folder / "program.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=os.environ)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_child_adds_to_a_tensor_and_the_parent_sees_the_sum(tmp_path: Path) -> None:
    run_program(
        tmp_path,
        """
        def child(received, sent):
            tensor = received.get()
            tensor += 5
            torch.cuda.synchronize()
            sent.put((tuple(tensor.shape), tensor.sum().item()))
            del tensor


        if __name__ == "__main__":
            pool = install()
            context = mp.get_context("spawn")
            to_child, from_child = context.SimpleQueue(), context.SimpleQueue()
            process = context.Process(target=child, args=(to_child, from_child))
            process.start()
            tensor = torch.arange(3 * MiB, dtype=torch.float32, device="cuda")
            expected = tensor + 5
            used = pool.global_stats().physical_usage
            assert used >= 24 * MiB, used
            to_child.put(tensor)
            shape, total = from_child.get()
            process.join()
            assert process.exitcode == 0, process.exitcode
            assert shape == (3 * MiB,), shape
            assert total == expected.sum().item(), total
            assert torch.equal(tensor, expected)
            del tensor, expected
            assert settled(pool) == 0, pool.global_stats()
        """,
    )


def test_tensors_of_one_block_and_of_several_keep_apart(tmp_path: Path) -> None:
    run_program(
        tmp_path,
        """
        def child(received, sent):
            tensors = received.get()
            for i, tensor in enumerate(tensors):
                assert (tensor == i).all(), i
                tensor.mul_(10)
            # Views of one storage are one memory in the child too.
            assert tensors[0].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()
            torch.cuda.synchronize()
            sent.put("done")
            del tensors, tensor


        if __name__ == "__main__":
            pool = install()
            context = mp.get_context("spawn")
            to_child, from_child = context.SimpleQueue(), context.SimpleQueue()
            process = context.Process(target=child, args=(to_child, from_child))
            process.start()
            both = torch.zeros(2048, device="cuda")
            tensors = [both[:1024], both[1024:]]
            tensors += [torch.empty(size, device="cuda") for size in (16, 1000, 5 * MiB // 4, 30 * MiB // 4)]
            for i, tensor in enumerate(tensors):
                tensor.fill_(i)
            untouched = torch.full((1000,), 7.0, device="cuda")
            torch.cuda.synchronize()
            to_child.put(tensors)
            assert from_child.get() == "done"
            process.join()
            assert process.exitcode == 0, process.exitcode
            for i, tensor in enumerate(tensors):
                assert (tensor == 10 * i).all(), i
            assert (untouched == 7).all()
            del tensors, tensor, both, untouched
            assert settled(pool) == 0, pool.global_stats()
        """,
    )


def test_a_tensor_sent_again_and_memory_reused_for_another_show_the_right_bytes(tmp_path: Path) -> None:
    run_program(
        tmp_path,
        """
        def child(received, sent):
            while (tensor := received.get()) is not None:
                sent.put(tensor.sum().item())
                del tensor
                torch.cuda.ipc_collect()


        if __name__ == "__main__":
            pool = install()
            context = mp.get_context("spawn")
            to_child, from_child = context.SimpleQueue(), context.SimpleQueue()
            process = context.Process(target=child, args=(to_child, from_child))
            process.start()
            for value in range(1, 6):
                tensor = torch.full((4 * MiB,), float(value), device="cuda")
                torch.cuda.synchronize()
                for _ in range(2):
                    to_child.put(tensor)
                    assert from_child.get() == value * 4 * MiB, value
                del tensor
                settled(pool)  # the next one lies on new memory, maybe at the same addresses
            to_child.put(None)
            process.join()
            assert process.exitcode == 0, process.exitcode
            assert settled(pool) == 0, pool.global_stats()
        """,
    )


def test_a_child_that_installs_a_pool_too_takes_both_kinds_of_tensors(tmp_path: Path) -> None:
    run_program(
        tmp_path,
        """
        def child(received, sent):
            pool = install()
            ours, theirs = received.get()
            ours += 1
            theirs += 2
            torch.cuda.synchronize()
            sent.put(pool.global_stats().physical_limit)
            del ours, theirs


        if __name__ == "__main__":
            theirs = torch.zeros(1000, device="cuda")  # of torch's own allocator
            pool = install()
            ours = torch.zeros(1000, device="cuda")
            context = mp.get_context("spawn")
            to_child, from_child = context.SimpleQueue(), context.SimpleQueue()
            process = context.Process(target=child, args=(to_child, from_child))
            process.start()
            torch.cuda.synchronize()
            to_child.put((ours, theirs))
            assert from_child.get() == 512 * MiB
            process.join()
            assert process.exitcode == 0, process.exitcode
            assert (ours == 1).all()
            assert (theirs == 2).all()
        """,
    )
