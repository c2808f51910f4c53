"""vLLM's scheduler with a model of a few lines, whose every token depends on all that it reads from the KV cache."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_engine import BLOCK, cache_config, request_of  # isort: skip

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
WIDTH = 64  # int64 of a layer's part of a block, 4 a token


@functools.cache
def model_config() -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        return ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048)


def scheduler_of(num_blocks: int, tokens_a_step: int = 96, sequences: int = 8) -> Scheduler:
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = num_blocks
    config = VllmConfig(
        model_config=model_config(),
        device_config=DeviceConfig(device="cpu"),
        cache_config=cache,
        parallel_config=ParallelConfig(),
        scheduler_config=SchedulerConfig(
            max_num_seqs=sequences,
            max_num_batched_tokens=tokens_a_step,
            max_model_len=2048,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=cache_config(num_blocks),
        block_size=BLOCK,
        log_stats=False,
        structured_output_manager=StructuredOutputManager(config),
    )


def next_state(state: int, token: int) -> int:
    return (state * 31 + token + 1) % (2**31 - 1)


def expected_tokens(prompt: Sequence[int], n: int) -> list[int]:
    """What a request generates where nothing goes wrong."""
    state, tokens = 0, []
    for token in prompt:
        state = next_state(state, token)
    for _ in range(n):
        tokens.append(state % 1000)
        state = next_state(state, tokens[-1])
    return tokens


class Model:
    """Keeps the state after each token in the KV cache, and goes on from what it finds there."""

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv = kv  # int64 [num_blocks, WIDTH]

    def step(self, scheduler: Scheduler, planned: SchedulerOutput) -> ModelRunnerOutput:
        ids, sampled = [], []
        for number, n in planned.num_scheduled_tokens.items():
            request = scheduler.requests[number]
            blocks = scheduler.kv_cache_manager.get_block_ids(number)[0]
            end = request.num_computed_tokens  # it counts those of this step already
            state = 0
            for at in range(end - n, end):
                if at > 0:
                    state = int(self.kv[blocks[(at - 1) // BLOCK], (at - 1) % BLOCK * 4])
                self.kv[blocks[at // BLOCK], at % BLOCK * 4] = next_state(state, request.all_token_ids[at])
            ids.append(number)
            last = int(self.kv[blocks[(end - 1) // BLOCK], (end - 1) % BLOCK * 4])
            sampled.append([last % 1000] if end == request.num_tokens else [])
        return ModelRunnerOutput(ids, {number: i for i, number in enumerate(ids)}, sampled)


def run_step(scheduler: Scheduler, model: Model) -> dict[str, list[int]]:
    """New tokens by request."""
    planned = scheduler.schedule()
    outputs = scheduler.update_from_output(planned, model.step(scheduler, planned))
    return {one.request_id: list(one.new_token_ids) for each in outputs.values() for one in each.outputs}


__all__ = ["WIDTH", "Model", "expected_tokens", "request_of", "run_step", "scheduler_of"]
