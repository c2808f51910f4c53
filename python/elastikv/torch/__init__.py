"""Any torch allocation in the pool: three ways in.

| way | what goes there | take it when |
|---|---|---|
| `install(pool)` | all that the process allocates on that GPU | the process is yours |
| `use(model)`, or `model.use()` | what is allocated in the block | one part of a program goes to a model's share |
| `pluggable_allocator()` | all that the process allocates on GPUs | torch's own pluggable interface is wanted |

With `install` and `use` torch's statistics, snapshots, graphs and IPC work as ever; a pluggable allocator has no
statistics. Importing this touches no CUDA.
"""

from __future__ import annotations

from elastikv.torch._blocks import empty_cache, heap_stats, mem_pool, reset_peak_stats, use
from elastikv.torch._process import install, pluggable_allocator, uninstall
from elastikv.torch.allocation_log import log_allocations, start_allocation_log, stop_allocation_log

__all__ = [
    "empty_cache",
    "heap_stats",
    "install",
    "log_allocations",
    "mem_pool",
    "pluggable_allocator",
    "reset_peak_stats",
    "start_allocation_log",
    "stop_allocation_log",
    "uninstall",
    "use",
]
