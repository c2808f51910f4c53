"""elastikv inside vLLM: a KV cache that holds memory for blocks in use only, and engines that share a GPU.

vLLM loads this through its entry point `vllm.general_plugins`, and nothing is patched unless ELASTIKV_VLLM=1 is set:

    ELASTIKV_VLLM=1 vllm serve MODEL
    elastikv vllm serve MODEL

docs/vllm.md says how to set it up. `settings` has what can be set, `versions` what of vLLM is patched and `patches` by
what, `layout` how KV tensors lie in blocks, `memory` the blocks of an engine, `block_pool` vLLM's block pool over them,
`sleeper` what `elastikv sleep` does, and `engine` what holds these together.
"""

from __future__ import annotations

import os


def register() -> None:
    """The plugin, as vLLM calls it in each of its processes; may be called again.

    Raises NotSupported for a vLLM that is not known, before anything is patched.
    """
    wanted = os.environ.get("ELASTIKV_VLLM", "0")
    if wanted not in ("0", "1", ""):
        raise ValueError(f"ELASTIKV_VLLM must be 0 or 1, not {wanted!r}")
    if wanted != "1":
        return
    from elastikv.vllm.settings import Settings
    from elastikv.vllm.versions import patch_all

    pool = Settings.read().pool
    patch_all()
    try:
        from elastikv.metrics.ledgers import watch_ledgers
    except ImportError:
        return  # vLLM without prometheus_client has no metrics either
    watch_ledgers(f"{pool}.")
