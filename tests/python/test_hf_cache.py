"""ElasticCache against transformers' DynamicCache: same tokens, same masks, and memory that follows."""

from __future__ import annotations

import copy

import pytest
import torch

import elastikv
from conftest import settled_usage

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig  # noqa: E402

from elastikv.hf import ElasticCache  # noqa: E402

WINDOW = 7
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,  # large, so that an answer depends on every token before it
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
}
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim, float32


@pytest.fixture(params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def network(config, device):
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()


@pytest.fixture
def make_cache(config, model):
    def make(**options) -> ElasticCache:
        return ElasticCache(config, **{"model": model, "max_tokens": 256, **options})

    return make


def prompt(device: str, batch: int = 1, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 128, (batch, length), generator=generator).to(device)


def generate(network, tokens, cache, new: int = 24, **options) -> torch.Tensor:
    """Greedy, exactly `new` tokens: no token ends it."""
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    return network.generate(
        tokens, attention_mask=mask, past_key_values=cache, min_new_tokens=new, max_new_tokens=new,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


def states(device: str, batch: int = 1, tokens: int = 1, heads: int = 2, dim: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, heads, tokens, dim, generator=generator).to(device)
    return pair[0], pair[1]


def step(cache, keys, values) -> None:
    for layer in range(2):
        cache.update(keys, values, layer)


# ---- the same tokens


def test_generates_what_dynamic_cache_does(network, make_cache, config, device, shared, model):
    tokens = prompt(device)
    cache = make_cache()
    assert torch.equal(generate(network, tokens, cache), generate(network, tokens, DynamicCache(config=config)))
    assert cache.get_seq_length() == 12 + 24 - 1
    assert cache.resident_bytes == 35 * TOKEN_BYTES
    cache.close()
    assert settled_usage(shared, model) == 0


def test_a_batch_with_left_padding(network, make_cache, config, device):
    tokens = prompt(device, batch=3)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[2, :9] = 0
    ours = generate(network, tokens, make_cache(max_batch=3), attention_mask=mask)
    assert torch.equal(ours, generate(network, tokens, DynamicCache(config=config), attention_mask=mask))


def test_beam_search(network, make_cache, config, device):
    tokens = prompt(device, batch=2)
    ours = generate(network, tokens, make_cache(max_batch=6), num_beams=3)
    assert torch.equal(ours, generate(network, tokens, DynamicCache(config=config), num_beams=3))


def test_goes_on_from_an_earlier_answer(network, make_cache, config, device):
    ours, theirs = make_cache(), DynamicCache(config=config)
    first = generate(network, prompt(device), ours, new=9)
    assert torch.equal(first, generate(network, prompt(device), theirs, new=9))
    longer = torch.cat([first, prompt(device, length=5)], dim=1)
    assert torch.equal(generate(network, longer, ours, new=9), generate(network, longer, theirs, new=9))


def test_every_view_and_mask_size_is_dynamic_caches(make_cache, config, device):
    ours, theirs = make_cache(max_batch=2), DynamicCache(config=config)
    for number, tokens in enumerate([3, 1, 1, 2, 1, 5, 1, 20, 1, 1, 8]):
        for layer in range(2):
            assert ours.get_mask_sizes(tokens, layer) == theirs.get_mask_sizes(tokens, layer)
        for layer in range(2):
            keys, values = states(device, batch=2, tokens=tokens, seed=10 * number + layer)
            for mine, reference in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer)):
                assert mine.shape == reference.shape and torch.equal(mine, reference)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.is_sliding == theirs.is_sliding
    assert len(ours) == len(theirs) == 2 and ours.batch_size == 2


def test_lengths_it_can_hold(make_cache, config):
    cache = make_cache(max_tokens=100)
    most = WINDOW if cache.is_sliding[0] else 100
    assert cache.get_max_length(0) == cache.get_max_length() == cache.get_max_cache_shape() == most
    assert not cache.is_compileable and cache.is_croppable and not cache.is_initialized
    assert cache.batch_size == -1 and cache.get_seq_length() == 0 and cache.resident_bytes == 0


# ---- memory


def test_nothing_is_copied_and_nothing_moves(make_cache, device):
    cache = make_cache(max_tokens=4096)
    step(cache, *states(device))
    base = cache.layers[0].keys.data_ptr()
    held, _ = cache.update(*states(device, seed=1), 0)
    assert held.untyped_storage().data_ptr() == base
    cache.update(*states(device, seed=1), 1)
    before = held.clone()
    for number in range(40):
        step(cache, *states(device, tokens=3, seed=number))
    assert cache.layers[0].keys.data_ptr() == base and torch.equal(held, before)


def test_memory_follows_the_tokens(make_cache, device, shared, model, page_size):
    per_page = page_size // TOKEN_BYTES
    cache = make_cache(max_tokens=per_page * 60, max_batch=50)  # rows that are not used cost nothing
    assert settled_usage(shared, model) == 0
    for pages in range(1, 9):
        step(cache, *states(device, tokens=per_page))
        used = shared.global_stats().physical_usage
        assert pages * page_size <= used <= (pages + 1) * page_size
    cache.crop(-7 * per_page)
    assert settled_usage(shared, model) == page_size and cache.get_seq_length() == per_page
    cache.reset()
    assert settled_usage(shared, model) == 0 and cache.get_seq_length() == 0
    step(cache, *states(device, batch=2))  # after a reset, another batch may come
    assert settled_usage(shared, model) == 2 * page_size
    del cache
    assert settled_usage(shared, model) == 0


def test_a_view_that_is_held_keeps_its_memory(make_cache, device, shared, model, page_size):
    per_page = page_size // TOKEN_BYTES
    cache = make_cache(max_tokens=per_page * 60)
    step(cache, *states(device, tokens=2 * per_page))
    held = cache.layers[1].values
    before = held.clone()
    cache.crop(-per_page)
    assert cache.get_seq_length() == per_page and torch.equal(held, before)
    assert settled_usage(shared, model) == 2 * page_size
    cache.reset()
    assert torch.equal(held, before) and settled_usage(shared, model) == 2 * page_size
    del held
    assert settled_usage(shared, model) == 0


# ---- changes between steps


def test_crop_and_write_again(network, make_cache, config, device):
    tokens = prompt(device, length=20)
    with torch.inference_mode():
        cache = make_cache()
        network(tokens, past_key_values=cache)
        cache.crop(-8)  # beyond the window: DynamicCache could not
        assert cache.get_seq_length() == 12
        again = network(tokens[:, 12:], past_key_values=cache).logits[:, -1]
        straight = DynamicCache(config=config)
        network(tokens[:, :12], past_key_values=straight)
        torch.testing.assert_close(again, network(tokens[:, 12:], past_key_values=straight).logits[:, -1])
        cache.crop(0)
        assert cache.get_seq_length() == 20
        cache.crop(-1000)
        assert cache.get_seq_length() == 0
    with pytest.raises(elastikv.InvalidArgument, match="minus the number"):
        cache.crop(5)


def test_rows_move_as_told(make_cache, device, shared, model):
    cache = make_cache(max_batch=4)
    keys, values = states(device, batch=3, tokens=5)
    step(cache, keys, values)

    def expect(rows: list[int]) -> None:
        for layer in cache.layers:
            assert torch.equal(layer.keys, keys[rows]) and torch.equal(layer.values, values[rows])

    cache.reorder_cache(torch.tensor([2, 0, 0], device=device))
    expect([2, 0, 0])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    expect([2, 0])
    cache.batch_repeat_interleave(2)
    expect([2, 2, 0, 0])
    with pytest.raises(elastikv.InvalidArgument, match="batch of 12"):
        cache.batch_repeat_interleave(3)
    with pytest.raises(elastikv.InvalidArgument, match="2 rows for a batch of 4"):
        cache.reorder_cache(torch.tensor([0, 1]))
    expect([2, 2, 0, 0])
    cache.batch_select_indices(torch.tensor([3]))
    expect([0])
    assert cache.batch_size == 1
    cache.close()
    assert settled_usage(shared, model) == 0


def test_rows_of_an_empty_cache(make_cache):
    cache = make_cache()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


# ---- what does not fit


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"batch": 3}, "batch of 3 does not fit a cache of max_batch=2"),
        ({"tokens": 257}, r"0 \+ 257 tokens do not fit a cache of max_tokens=256"),
        ({"heads": 3}, r"\[batch, 2, tokens, 16\]"),
        ({"dim": 8}, r"\[batch, 2, tokens, 16\]"),
    ],
)
def test_refuses_the_first_states(make_cache, device, shared, wrong, complaint):
    cache = make_cache(max_batch=2)
    with pytest.raises(elastikv.InvalidArgument, match=complaint):
        cache.update(*states(device, **wrong), 0)
    assert cache.get_seq_length() == 0 and cache.resident_bytes == 0 and shared.global_stats().physical_usage == 0
    step(cache, *states(device))
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"batch": 1}, "holds a batch of 2, but layer 0 brought 1"),
        ({"batch": 2, "tokens": 253}, r"4 \+ 253 tokens"),
        ({"batch": 2, "heads": 1}, r"keys \[2, 1, 1, 16\]"),
    ],
)
def test_refuses_later_states_and_stays_as_it_was(make_cache, device, wrong, complaint):
    cache = make_cache(max_batch=2)
    keys, values = states(device, batch=2, tokens=4)
    step(cache, keys, values)
    resident = cache.resident_bytes
    with pytest.raises(elastikv.InvalidArgument, match=complaint):
        cache.update(*states(device, **wrong), 0)
    assert cache.get_seq_length() == 4 and cache.resident_bytes == resident
    assert torch.equal(cache.layers[1].keys, keys) and torch.equal(cache.layers[1].values, values)
    step(cache, *states(device, batch=2))
    assert cache.get_seq_length() == 5


def test_refuses_other_dtypes_and_devices(make_cache, device):
    keys, values = states(device)
    cache = make_cache(dtype=torch.float32)
    with pytest.raises(elastikv.InvalidArgument, match=r"float32.*float16"):
        cache.update(keys.half(), values.half(), 0)
    with pytest.raises(elastikv.InvalidArgument, match=r"brought meta"):
        cache.update(keys.to("meta"), values.to("meta"), 0)
    step(make_cache(), keys.half(), values.half())  # without dtype=, the first states decide


def test_refuses_to_be_part_of_a_gradient(make_cache, device):
    keys, values = states(device)
    with pytest.raises(elastikv.InvalidArgument, match="inference_mode"):
        make_cache().update(keys.requires_grad_(), values, 0)


def test_inference_mode_and_ordinary_mode_take_turns(make_cache, device):
    cache = make_cache()
    with torch.inference_mode():
        step(cache, *states(device))
    step(cache, *states(device, seed=1))
    with torch.inference_mode():
        step(cache, *states(device, seed=2))
    assert cache.get_seq_length() == 3


def test_layers_of_another_model(make_cache, device):
    cache = make_cache()
    pair = states(device)
    with pytest.raises(elastikv.InvalidArgument, match="layer 1 came where 0 was due"):
        cache.update(*pair, 1)
    cache.update(*pair, 0)
    assert cache.get_seq_length() == 0  # a step counts when its last layer has written
    with pytest.raises(elastikv.InvalidArgument, match="layer 0 brought 1 tokens, layer 1 4"):
        cache.update(*states(device, tokens=4), 1)
    with pytest.raises(elastikv.InvalidArgument, match="there is no layer 2"):
        cache.update(*pair, 2)
    with pytest.raises(elastikv.InvalidArgument, match="1 of the cache's 2 layers"):
        cache.update(*pair, 0)
    cache.crop(0)  # forgets the step that was left unfinished
    step(cache, *pair)
    assert cache.get_seq_length() == 1


def test_models_it_does_not_serve(model):
    mamba = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128)
    with pytest.raises(elastikv.InvalidArgument, match="layers"):
        ElasticCache(mamba, model=model, max_tokens=16)
    for wrong in ({"max_tokens": 0}, {"max_tokens": 4, "max_batch": 0}):
        with pytest.raises(elastikv.InvalidArgument, match="at least 1"):
            ElasticCache(CONFIGS["llama"], model=model, **wrong)


def test_use_after_close(make_cache, device, shared, model):
    cache = make_cache()
    step(cache, *states(device))
    cache.close()
    cache.close()
    assert settled_usage(shared, model) == 0
    with pytest.raises(elastikv.InvalidArgument, match="closed"):
        cache.update(*states(device), 0)


# ---- a dry pool


def test_a_pool_that_runs_dry_leaves_the_cache_usable(network, make_cache, config, device, shared, model, page_size):
    per_page = page_size // TOKEN_BYTES
    tokens = prompt(device, length=per_page - 4)
    reference = generate(network, tokens, DynamicCache(config=config), new=20)

    ballast = elastikv.empty((0, page_size), (63, page_size), torch.uint8, model)
    elastikv.grow_(ballast, 63, exact=True)  # leaves one page
    cache = make_cache(max_tokens=4 * per_page)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        generate(network, tokens, cache, new=20)
    assert cache.get_seq_length() == per_page  # all that fit
    assert torch.equal(cache.layers[0].keys, cache.layers[0].keys.clone())

    del ballast
    settled_usage(shared, model)
    so_far = reference[:, : per_page + 1]
    assert torch.equal(generate(network, so_far, cache, new=reference.shape[1] - so_far.shape[1]), reference)


def test_a_first_step_without_memory(make_cache, device, shared, model, page_size):
    ballast = elastikv.empty((64, page_size), (64, page_size), torch.uint8, model)
    cache = make_cache()
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        cache.update(*states(device), 0)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    del ballast
    settled_usage(shared, model)
    step(cache, *states(device))
    assert cache.get_seq_length() == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_a_deep_copy_goes_its_own_way(network, make_cache, config, device, shared, model, batch):
    tokens = prompt(device, batch)
    prefix = make_cache(max_batch=2)
    with torch.inference_mode():
        network(tokens, past_key_values=prefix)
    longer = torch.cat([tokens, prompt(device, batch, 3)], dim=1)
    expected = generate(network, longer, DynamicCache(config=config))
    assert torch.equal(generate(network, longer, copy.deepcopy(prefix)), expected)
    assert prefix.get_seq_length() == tokens.shape[1]
    assert torch.equal(generate(network, longer, prefix), expected)
    del prefix
    assert settled_usage(shared, model) == 0
