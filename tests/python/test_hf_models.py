"""ElasticCache in models of many kinds, under every attention: what DynamicCache gives."""

from __future__ import annotations

import copy

import pytest
import torch

import elastikv

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache  # noqa: E402

from elastikv.hf import ElasticCache  # noqa: E402
from elastikv.hf.forward import cache_argument  # noqa: E402

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(device, page_size):
    with elastikv.SharedMemoryPool(physical_limit=2048 * page_size, device=device, park_limit=0) as shared:
        yield shared.register_model("model", virtual_capacity=1 << 40)


def configs() -> dict[str, object]:
    """One of each kind; the names say what is special."""
    t = transformers
    experts = {"num_experts_per_tok": 2}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return {
        "llama": t.LlamaConfig(**SIZES),
        "mha": t.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
        "mqa": t.LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
        "odd-heads": t.LlamaConfig(**SIZES, head_dim=12),
        "sliding": t.MistralConfig(**SIZES, sliding_window=7),
        "head-norms": t.Qwen3Config(**SIZES, head_dim=32),
        "soft-cap-alternating": t.Gemma2Config(**SIZES, head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
        "alternating": t.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
        "sinks": t.GptOssConfig(**SIZES, head_dim=16, sliding_window=6, num_local_experts=4, **experts),
        "mla": t.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, **latent, n_routed_experts=4, n_group=2, topk_group=1,
            moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1, **experts,
        ),
        "chunked": t.Llama4TextConfig(
            **SIZES, head_dim=16, attention_chunk_size=6, num_local_experts=2, intermediate_size_mlp=64,
            num_experts_per_tok=1,
        ),
        "learned-positions": t.GPT2Config(
            vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=1,
            eos_token_id=2,
        ),
    }  # fmt: skip


CONFIGS = configs()
_networks: dict[tuple, object] = {}


def network_of(name: str, attention: str, device: str):
    key = (name, attention, device)
    if key not in _networks:
        torch.manual_seed(11)
        config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        _networks[key] = network.to(device).eval()
    return _networks[key]


def generate(network, tokens, cache, new: int = 16, **options) -> torch.Tensor:
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return network.generate(tokens, **{cache_argument(type(network)): cache}, **options)


def prompt(device: str, batch: int = 2, length: int = 11, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, length), generator=generator).to(device)


def padded(device: str, batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = prompt(device, batch, length)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[2, :8] = 0
    return tokens * mask, mask


@pytest.mark.parametrize("attention", ["eager", "elastikv", "sdpa"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_kind_of_model(name, attention, device, model):
    if name == "soft-cap-alternating" and attention == "sdpa":
        pytest.skip("transformers' sdpa has no soft caps")
    if name == "sinks" and attention == "sdpa":
        pytest.skip("transformers' sdpa has no sinks")
    network = network_of(name, attention, device)
    reference = network_of(name, "eager", device)
    tokens, mask = padded(device)
    for options in ({"attention_mask": mask}, {"attention_mask": mask, "num_beams": 2}):
        expected = generate(reference, tokens, DynamicCache(config=reference.config), **options)
        cache = ElasticCache(network.config, model=model, max_batch=6, max_tokens=64)
        assert torch.equal(generate(network, tokens, cache, **options), expected)
        cache.close()


@pytest.mark.parametrize("name", ["llama", "sliding", "soft-cap-alternating"])
def test_attention_elastikv_without_an_elastic_cache(name, device):
    network, reference = network_of(name, "elastikv", device), network_of(name, "eager", device)
    tokens, mask = padded(device)
    ours = generate(network, tokens, DynamicCache(config=network.config), attention_mask=mask)
    expected = generate(reference, tokens, DynamicCache(config=reference.config), attention_mask=mask)
    assert torch.equal(ours, expected)
    with torch.inference_mode():
        plain = network(tokens, attention_mask=mask, use_cache=False).logits
        wanted = reference(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(plain[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "elastikv", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_chunked_prefill_sampling_and_assistance(name, attention, device, model):
    network = network_of(name, attention, device)
    reference = network_of(name, "eager", device)
    tokens = prompt(device, batch=1, length=23)
    for options in (
        {"prefill_chunk_size": 5},
        {"do_sample": True, "top_k": 20, "temperature": 1.3},
        {"prompt_lookup_num_tokens": 3},
    ):
        torch.manual_seed(5)
        expected = generate(reference, tokens, DynamicCache(config=reference.config), **options)
        torch.manual_seed(5)
        cache = ElasticCache(network.config, model=model, max_tokens=80)
        assert torch.equal(generate(network, tokens, cache, **options), expected)
    draft = network_of("mha", attention, device)
    cache = ElasticCache(network.config, model=model, max_tokens=80)
    expected = generate(reference, tokens, DynamicCache(config=reference.config))
    assert torch.equal(generate(network, tokens, cache, assistant_model=draft), expected)


def test_padding_is_not_stored(device, model):
    network = network_of("llama", "elastikv", device)
    tokens, mask = padded(device)
    cache = ElasticCache(network.config, model=model, max_batch=3, max_tokens=64)
    generate(network, tokens, cache, attention_mask=mask)
    assert cache.get_seq_length() == 11 + 15
    assert cache.slots.lengths[:3] == [26 - 4, 26, 26 - 8]
    assert cache.slots.device_lengths.tolist() == cache.slots.lengths
    assert cache.resident_bytes == (22 + 26 + 18) * cache.slots.token_bytes
    cache.crop(-17)
    assert cache.get_seq_length() == 9 and cache.slots.lengths[:3] == [5, 9, 1]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.slots.lengths == [1, 5, 0]
    with pytest.raises(elastikv.InvalidArgument, match="without their padding"):
        assert cache.layers[0].keys


def test_a_second_turn_with_new_padding(device, model):
    network, reference = network_of("llama", "elastikv", device), network_of("llama", "eager", device)
    tokens, mask = padded(device)
    more, more_mask = padded(device, length=9)
    ours = ElasticCache(network.config, model=model, max_batch=3, max_tokens=64)
    theirs = DynamicCache(config=reference.config)
    answers = []
    for each, cache in ((network, ours), (reference, theirs)):
        first = generate(each, tokens, cache, attention_mask=mask, new=6)
        both = torch.cat([first, more], 1)
        seen = torch.cat([mask, mask.new_ones(3, 6), more_mask], 1)
        answers.append(generate(each, both, cache, attention_mask=seen, new=6))
    assert torch.equal(*answers)
    assert ours.slots.lengths == [length - lost for length, lost in zip([31] * 3, [8, 0, 16])]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_decoder(device, model, attention):
    torch.manual_seed(2)
    sizes = {"vocab_size": 128, "decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for config in (
        transformers.T5Config(
            **sizes, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4,
            initializer_factor=4.0,
        ),
        transformers.BartConfig(
            **sizes, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.2, bos_token_id=1,
            forced_eos_token_id=None,
        ),
    ):  # fmt: skip
        network = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        network = network.to(device).eval()
        tokens, mask = padded(device)
        for beams in (1, 2):
            caches = [ElasticCache(config, model=model, max_batch=6, max_tokens=32) for _ in range(2)]
            plain = [DynamicCache() for _ in range(2)]
            options = {"attention_mask": mask, "num_beams": beams}
            expected = generate(network, tokens, EncoderDecoderCache(*plain), **options)
            assert torch.equal(generate(network, tokens, EncoderDecoderCache(*caches), **options), expected)
            assert len(caches[0]) == 3 and caches[1].get_seq_length() == 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "elastikv", "sdpa"])
def test_half_precision(device, model, dtype, attention):
    exact = copy.deepcopy(network_of("llama", "eager", device)).to(dtype)
    network = copy.deepcopy(network_of("llama", attention, device)).to(dtype)
    tokens, mask = padded(device)
    cache = ElasticCache(network.config, model=model, max_batch=3, max_tokens=64)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    name = cache_argument(type(network))
    with torch.inference_mode():
        for part in (slice(0, 8), slice(8, 10), slice(10, 11)):
            ours = network(
                tokens[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part], **{name: cache}
            ).logits[:, -1]
        wanted = exact.float()(tokens, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert cache.slots.dtype == dtype
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.01
    assert (ours.float() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_several_caches_on_one_model(device, model):
    network = network_of("llama", "elastikv", device)
    prompts = [prompt(device, 1, 5 + index, seed=index) for index in range(3)]
    expected = [generate(network, tokens, DynamicCache(config=network.config)) for tokens in prompts]
    caches = [ElasticCache(network.config, model=model, max_tokens=64) for _ in prompts]
    answers = [tokens.clone() for tokens in prompts]
    name = cache_argument(type(network))
    with torch.inference_mode():
        for step in range(16):
            for index, cache in enumerate(caches):
                new = answers[index] if step == 0 else answers[index][:, -1:]
                token = network(new, **{name: cache}).logits[:, -1:].argmax(-1)
                answers[index] = torch.cat([answers[index], token], 1)
    for answer, wanted in zip(answers, expected):
        assert torch.equal(answer, wanted)


def test_a_cache_for_another_model(device, model):
    network = network_of("llama", "elastikv", device)
    for name, complaint in (("mha", r"\[batch, 4, tokens, 16\]"), ("learned-positions", "batch, 4, tokens")):
        cache = ElasticCache(CONFIGS[name], model=model, max_tokens=64)
        with pytest.raises(elastikv.InvalidArgument, match=complaint):
            generate(network, prompt(device, 1), cache)
        assert cache.get_seq_length() == 0


def test_every_method_of_the_interface_is_there(device, model):
    """What transformers calls on a cache or a layer does what it says, or says why not."""
    cache = ElasticCache(CONFIGS["sliding"], model=model, max_batch=2, max_tokens=64)
    keys = torch.randn(2, 2, 9, 16, device=device)
    for layer in range(4):
        cache.update(keys, keys, layer)
    base = transformers.cache_utils.CacheLayerMixin
    for name in [name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))]:
        assert callable(getattr(cache.layers[0], name)), name
    for index, layer in enumerate(cache.layers):
        cache.offload(index)
        cache.prefetch(index)
        layer.offload()
        layer.prefetch()
        layer.lazy_initialization(keys, keys)
        assert torch.equal(layer.keys, keys) and layer.get_seq_length() == 9
        for refused in (layer.crop, layer.reorder_cache, layer.batch_select_indices, layer.batch_repeat_interleave):
            with pytest.raises(elastikv.InvalidArgument, match="move together"):
                refused(1)
    cache.activate_past_recording()
    cache.early_initialization(2, 2, 16, keys.dtype, keys.device)
    assert cache.is_initialized is False or cache.get_seq_length() == 9
    assert cache.is_croppable and not cache.is_compileable and cache.is_sliding == [True] * 4
    cache.layers[2].reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].keys is None


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_flex_attention(name):
    """On the GPU only: on a CPU it compiles for minutes."""
    shared = elastikv.SharedMemoryPool(1 << 28, device="cuda:0")
    handle = shared.register_model("flex", 1 << 34)
    network = network_of(name, "flex_attention", "cuda:0")
    tokens = prompt("cuda:0")
    expected = generate(network, tokens, DynamicCache(config=network.config))
    cache = ElasticCache(network.config, model=handle, max_batch=2, max_tokens=64)
    assert torch.equal(generate(network, tokens, cache), expected)
