"""A cache of transformers whose model sleeps in the middle of a conversation."""

from __future__ import annotations

import pytest
import torch

import elastikv

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from elastikv.hf import ElasticCache  # noqa: E402
from hf_networks import SIZES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def answer(network, tokens, cache):
    return network.generate(
        tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, min_new_tokens=9, max_new_tokens=9,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "elastikv"])
def test_a_conversation_goes_on_after_a_sleep(device, shared, model, attention):
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    network = network.to(device, torch.float32 if device == "cpu" else torch.float16).eval()
    tokens = torch.randint(3, 128, (2, 12), device=device)
    awake = shared.register_model("awake", virtual_capacity=model.virtual_capacity)
    theirs = ElasticCache(config, model=awake, max_batch=2, max_tokens=64)
    first = answer(network, tokens, theirs)
    longer = torch.cat([first, tokens[:, :5]], dim=1)
    expected = answer(network, longer, theirs)

    ours = ElasticCache(config, model=model, max_batch=2, max_tokens=64)
    assert torch.equal(answer(network, tokens, ours), first)
    assert model.pause(tags=["kv"]) > 0 and model.stats().physical_usage == 0
    with pytest.raises(elastikv.ModelPaused):
        answer(network, longer, ours)
    model.resume()
    assert torch.equal(answer(network, longer, ours), expected)
