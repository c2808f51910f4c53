"""Small random networks with attention 'elastikv', and what transformers answers with them."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig

from elastikv.hf.forward import cache_argument

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS = {
    "gqa": LlamaConfig(**SIZES),
    "mha": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "sliding": MistralConfig(**SIZES, sliding_window=7),
}


def make_network(name: str, device: str):
    """float32 on the CPU; float16 on the GPU, where the flash op computes in nothing wider."""
    torch.manual_seed(4)
    config = copy.deepcopy(CONFIGS[name])
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="elastikv")
    return network.to(device, torch.float32 if device == "cpu" else torch.float16).eval()


def prompts(device: str, batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(3, 128, (batch, length), generator=generator).to(device)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        mask[row, : (5 * row) % length] = 0
    return tokens * mask, mask


def reference(network, tokens, mask, new, **options):
    """What transformers answers, by the same attention over a DynamicCache."""
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
    cache = DynamicCache(config=network.config)
    return network.generate(tokens, attention_mask=mask, **{cache_argument(type(network)): cache}, **options)


def agree(ours: torch.Tensor, theirs: torch.Tensor, device: str) -> None:
    """The same tokens; in float16 two ways of adding up may part where two tokens are equally likely."""
    if device == "cpu":
        assert torch.equal(ours, theirs)
    else:
        width = min(ours.shape[1], theirs.shape[1])
        assert (ours[:, :width] == theirs[:, :width]).float().mean() > 0.5
