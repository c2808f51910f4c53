"""The plain C entry points: without Python, without elastikv imported, and with torch's hooks.

What torch asks of any allocator is in tests/allocator; here is what is theirs alone. A pluggable allocator is the
process's, so each test is a program of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import elastikv
import elastikv.torch

MALLOC = "elastikv_malloc", "elastikv_free"

CTYPES = """
import ctypes
import elastikv

MiB = 1 << 20
library = ctypes.CDLL(elastikv.library_path())
malloc, free, base = library.elastikv_malloc, library.elastikv_free, library.elastikv_base_alloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
free.argtypes, free.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p], None
base.argtypes, base.restype = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)], ctypes.c_void_p
"""

PLAIN = """
import sys
import torch

torch.cuda.memory.change_current_allocator(
    torch.cuda.memory.CUDAPluggableAllocator(sys.argv[1], "elastikv_malloc", "elastikv_free")
)
"""


def run(body: str, preamble: str = "", **environment: str) -> str:
    script = preamble + textwrap.dedent(body)
    result = subprocess.run(
        [sys.executable, "-c", script, elastikv.library_path()],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_hook_is_exported():
    library = ctypes.CDLL(elastikv.library_path())
    for symbol in (*MALLOC, *elastikv.torch._process._HOOKS.values()):
        assert ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value


def test_the_library_loads_without_elastikv_and_touches_no_cuda():
    printed = run(
        """
        import ctypes, sys, torch
        library = ctypes.CDLL(sys.argv[1])
        library.elastikv_free(None, 0, 0, None)
        library.elastikv_malloc.restype = ctypes.c_void_p
        print(library.elastikv_malloc(0, 0, None), "elastikv" in sys.modules, torch.cuda.is_initialized())
        """
    )
    assert printed.split() == ["None", "False", "False"]


def test_importing_elastikv_torch_touches_no_cuda():
    printed = run("import elastikv.torch, torch; print(torch.cuda.is_initialized(), elastikv.torch is not torch)")
    assert printed.split() == ["False", "True"]


def test_every_hook_is_set_on_torchs_allocator(monkeypatch):
    asked: dict[str, int] = {}

    class Allocator:
        def __getattr__(self, setter):
            return lambda address: asked.__setitem__(setter, address)

    monkeypatch.setattr(torch._C, "_cuda_customAllocator", lambda malloc, free: Allocator(), raising=False)
    elastikv.torch.pluggable_allocator()
    assert set(asked) == set(elastikv.torch._process._HOOKS)
    assert len(set(asked.values())) == len(asked) and all(asked.values())


def test_a_pool_on_the_cpu_is_refused():
    with (
        elastikv.SharedMemoryPool(physical_limit=1 << 20, device="cpu") as pool,
        pytest.raises(elastikv.InvalidArgument, match="on cpu"),
    ):
        elastikv.torch.pluggable_allocator(pool)


def test_they_serve_from_the_pool_that_was_named():
    # The host's pool stands in for device 0's.
    run(
        """
        pool = elastikv.SharedMemoryPool(physical_limit=64 * MiB, device="cpu")
        elastikv._core.serve_entry_points(pool, "torch")
        assert pool.models() == ["torch"]
        first, second = malloc(3 * MiB, 0, None), malloc(1000, 0, None)
        ctypes.memset(first, 7, 3 * MiB)
        ctypes.memset(second, 9, 1000)
        assert ctypes.string_at(first, 3 * MiB) == bytes([7]) * (3 * MiB)
        size = ctypes.c_size_t()
        at = base(first + 0, ctypes.byref(size))
        assert at <= first and at + size.value >= first + 3 * MiB
        outside = ctypes.create_string_buffer(10)
        assert base(ctypes.addressof(outside), None) == ctypes.addressof(outside)

        stats = elastikv._core.entry_points_stats(0)
        assert stats["allocated_bytes.all.current"] == 3 * MiB + 1024
        free(ctypes.addressof(outside), 10, 0, None)
        free(first, 3 * MiB, 5, None)  # a device that it is not of
        free(first, 3 * MiB, 0, None)  # again
        free(second, 1000, 0, None)
        assert malloc(3 * MiB, 0, None) == first
        free(first, 3 * MiB, 0, None)
        assert elastikv._core.entry_points_stats(0)["allocation.all.current"] == 0
        library.elastikv_reset()
        assert pool.global_stats().physical_usage == 0
        try:
            elastikv._core.serve_entry_points(pool, "again")
        except elastikv.InvalidArgument as error:
            assert "already" in str(error)
        else:
            raise AssertionError
        kept = malloc(MiB, 0, None)  # and is alive at exit
        """,
        CTYPES,
    )


@pytest.mark.cuda
def test_the_two_names_are_enough():
    run(
        """
        tensor = torch.arange(1 << 22, device="cuda")
        assert tensor.sum().item() == (1 << 22) * ((1 << 22) - 1) // 2
        assert torch.empty(0, device="cuda").numel() == 0
        assert "elastikv" not in sys.modules
        kept = torch.ones(1000, device="cuda")  # freed at exit
        """,
        PLAIN,
    )


@pytest.mark.cuda
@pytest.mark.parametrize("limit", [str(256 << 20), "0.002"])
def test_the_limit_comes_from_the_environment_at_the_first_use(limit):
    run(
        f"""
        import os
        os.environ["ELASTIKV_PHYSICAL_LIMIT"] = "{limit}"
        kept = torch.ones(1 << 20, device="cuda")
        try:
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            assert "Tried to allocate 1024.00 MiB" in str(error), error
            assert "torch" in str(error), error
        else:
            raise AssertionError
        assert kept.sum().item() == 1 << 20
        assert torch.ones(1 << 22, device="cuda").sum().item() == 1 << 22
        """,
        PLAIN,
    )


@pytest.mark.cuda
def test_a_limit_that_is_no_number_is_refused_in_words():
    run(
        """
        try:
            torch.empty(10, device="cuda")
        except RuntimeError as error:
            assert "ELASTIKV_PHYSICAL_LIMIT is 'much'" in str(error), error
        else:
            raise AssertionError
        """,
        PLAIN,
        ELASTIKV_PHYSICAL_LIMIT="much",
    )


@pytest.mark.cuda
def test_with_hooks_on_a_pool():
    run(
        """
        import torch, elastikv, elastikv.torch
        pool = elastikv.SharedMemoryPool(physical_limit=1 << 30, device="cuda:0", park_limit=0)
        torch.cuda.memory.change_current_allocator(elastikv.torch.pluggable_allocator(pool))
        side = torch.cuda.Stream()

        # A block that another stream uses is not handed out while it may.
        tensor = torch.ones(1 << 22, device="cuda")
        address = tensor.data_ptr()
        tensor.sum().item()  # its kernel is loaded now, which takes longer than the sleep
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            total = tensor.sum()
        tensor.record_stream(side)
        del tensor
        again = torch.empty(1 << 22, device="cuda")
        assert not side.query()  # it may still use the block
        assert again.data_ptr() != address
        del again
        torch.cuda.synchronize()
        assert total.item() == 1 << 22

        # A graph with allocations inside, replayed after others have allocated.
        static = torch.ones(1 << 20, device="cuda")
        with torch.cuda.stream(side):
            (static * 2).sum()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = (static * 2 + 1).sum()
        others = [torch.full((1 << 20,), -1.0, device="cuda") for _ in range(20)]
        static.fill_(3)
        graph.replay()
        assert result.item() == 7 * (1 << 20)
        assert all(bool((other == -1).all()) for other in others)

        del graph, result, others, static, total
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        stats = elastikv._core.entry_points_stats(0)
        assert stats["allocated_bytes.all.current"] == 0, stats
        assert pool.global_stats().physical_usage == 0, pool.global_stats()
        """
    )
