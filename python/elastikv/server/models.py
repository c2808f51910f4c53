"""The model that a server serves: from a path, or of some size with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from elastikv.errors import InvalidArgument
from elastikv.hf.attention import NAME

#: Llamas with random weights, for machines without a network: what they say is noise, what they take is real.
RANDOM = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
    "small": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "large": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
PREFIX = "random:"


def load_model(source: str, *, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any | None]:
    """The model, ready to serve, and its tokenizer, None where there is none.

    source: a transformers checkpoint's folder or name; or `random:tiny`, `random:small`, `random:large`, or
    `random:FOLDER` for the config of that folder with random weights. Raises InvalidArgument, OSError.
    """
    if source.startswith(PREFIX):
        return _random(source.removeprefix(PREFIX), device, dtype), None
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=NAME)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    return model.eval().to(device), tokenizer


def _random(size: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    if size in RANDOM:
        sizes: dict[str, Any] = dict(RANDOM[size])
        config: Any = LlamaConfig(
            **sizes, max_position_embeddings=131_072, initializer_range=0.1 if size != "large" else 0.02
        )
    elif (Path(size) / "config.json").exists():
        config = AutoConfig.from_pretrained(size)
    else:
        raise InvalidArgument(f"there is no random model {size!r}: {', '.join(RANDOM)}, or a folder with a config.json")
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype)  # type: ignore[no-untyped-call]
        finally:
            torch.set_default_dtype(before)
    ready: PreTrainedModel = model.eval().to(device)
    return ready
