"""NVTX ranges, as a profiler sees them: one is built here, as the library that NVTX loads when it is attached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

PROFILER = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { callbacks_table = 1, core_module = 1, range_push = 9, range_pop = 11 }; /* as nvtxTypes.h numbers them */
typedef struct {
    size_t size;
    int (*module_table)(int module, void**** table, unsigned* size);
} Callbacks;

static int push(const char* name) { return printf("begin %s\n", name), fflush(stdout), 0; }
static int pop(void) { return printf("end\n"), fflush(stdout), 0; }

int InitializeInjectionNvtx2(const void* (*get_table)(uint32_t)) {
    const Callbacks* callbacks = get_table(callbacks_table);
    void*** table = NULL;
    unsigned size = 0;
    if (!callbacks || !callbacks->module_table(core_module, &table, &size) || size <= range_pop) return 0;
    *table[range_push] = (void*)push;
    *table[range_pop] = (void*)pop;
    return 1;
}
"""

SCRIPT = """
import elastikv
pool = elastikv.SharedMemoryPool(1 << 20)
chat = pool.register_model("chat", 1 << 20)
address = pool.allocate_for_model("chat", 8192)
print("grown", flush=True)
pool.deallocate_for_model("chat", address - chat.base_address, 8192)
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA, and so without NVTX")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_growth_and_reclaim_are_ranges(tmp_path):
    (tmp_path / "profiler.c").write_text(PROFILER)
    library = tmp_path / "profiler.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "profiler.c")], check=True)

    def run(**environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True,
            check=True, timeout=300,
        )  # fmt: skip
        return done.stdout.splitlines()

    attached = run(NVTX_INJECTION64_PATH=str(library))
    assert attached == ["begin elastikv growth", "end", "grown", "begin elastikv reclaim", "end"]
    assert run() == ["grown"]
