import torch

import elastikv

shared = elastikv.SharedMemoryPool(physical_limit=1 << 30, device="cpu")  # or "cuda:0"
chat = shared.register_model("chat", virtual_capacity=1 << 36)  # addresses: they cost nothing
code = shared.register_model("code", virtual_capacity=1 << 36)

# [token, layer, K/V, head, dim]: addresses for 131,072 tokens, memory for none yet.
kv = elastikv.empty((0, 16, 2, 8, 128), max_shape=(131072, 16, 2, 8, 128), dtype=torch.bfloat16, model=chat)

elastikv.grow_(kv, 512)  # 512 tokens are resident, and zero
view, address = kv[:256], kv.data_ptr()
elastikv.grow_(kv, 8192)  # more are; nothing moved
assert kv.data_ptr() == address and view.shape[0] == 256
print(shared.global_stats().physical_usage >> 20, "MiB in use for", kv.shape[0], "tokens")

del view, kv  # the memory goes back to the pool, and may now serve the other model
print(shared.global_stats().physical_usage >> 20, "MiB in use;", code.name, "may have it all")
