"""The flash path: on the GPU, and on the CPU with the op replaced by its definition."""

from __future__ import annotations

import pytest
import torch

import elastikv

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig  # noqa: E402

from elastikv import _core  # noqa: E402
from elastikv.hf import Decoder, ElasticCache, Slots, flash, generate, kernels  # noqa: E402
from elastikv.hf.generation import prefill  # noqa: E402
from elastikv.hf.geometry import KVGeometry, LayerShape, kv_geometry  # noqa: E402
from elastikv.hf.step import DecodeStep, EvenStep, RaggedStep  # noqa: E402

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": None,
}


def flash_by_definition(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    """What aten::_flash_attention_forward computes, with its checks."""
    rows = len(cum_seq_q) - 1
    assert dropout_p == 0 and not return_debug_mask and alibi_slopes is None
    for starts in (cum_seq_q, cum_seq_k):
        assert starts.dtype == torch.int32 and starts.shape == (rows + 1,) and starts.is_contiguous()
    assert seqused_k.dtype == torch.int32 and seqused_k.shape == (rows,) and seqused_k.is_contiguous()
    assert query.ndim == key.ndim == value.ndim == 3 and key.stride(-1) == value.stride(-1) == query.stride(-1) == 1
    output = torch.full_like(query, torch.nan)
    groups = query.shape[1] // key.shape[1]
    for row in range(rows):
        first, last = int(cum_seq_q[row]), int(cum_seq_q[row + 1])
        begin, length = int(cum_seq_k[row]), int(seqused_k[row])
        assert last - first <= max_q and length <= max_k
        q = query[first:last].transpose(0, 1)
        k, v = (side[begin : begin + length].transpose(0, 1).repeat_interleave(groups, 0) for side in (key, value))
        distance = torch.arange(length - q.shape[1], length)[:, None] - torch.arange(length)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if is_causal or window_size_right is not None:
            seen &= distance >= 0
        if window_size_left is not None and window_size_left >= 0:
            seen &= distance <= window_size_left
        scores = (q @ k.transpose(1, 2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        output[first:last] = (scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v).transpose(0, 1)
    return output, None, None, None, None


@pytest.fixture
def flash_everywhere(device, monkeypatch):
    """On the CPU the op's definition in its place, for any head and dtype."""
    if device == "cpu":
        monkeypatch.setattr(flash, "why_not", lambda *args: "")
        monkeypatch.setattr(flash, "_op", lambda: flash_by_definition)


@pytest.fixture
def model(device, page_size):
    with elastikv.SharedMemoryPool(physical_limit=512 * page_size, device=device) as shared:
        yield shared.register_model("model", virtual_capacity=1 << 42)


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16


def states(heads: int, rows: int, tokens: int, dim: int, device: str, dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, tokens, dim, generator=generator).to(device, dtype)


def attention_by_hand(query, keys, values, window):
    """float64; the last query belongs to the last key."""
    groups = query.shape[0] // keys.shape[0]
    query, keys, values = query.double(), keys.double().repeat_interleave(groups, 0), values.double()
    values = values.repeat_interleave(groups, 0)
    queries, length = query.shape[1], keys.shape[1]
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length + 1))
    scores = query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen.to(query.device), -torch.inf).softmax(-1) @ values


def of_every_kind(test):
    """Dtypes, windows and heads that a path of attention must serve."""
    heads = [(8, 2, 64), (4, 4, 64), (4, 1, 128), (4, 2, 256), (6, 2, 40)]
    for names, values in (
        (("heads", "kv_heads", "dim"), heads),
        ("window", [None, 5]),
        ("dtype", [torch.float32, torch.float16, torch.bfloat16]),
    ):
        test = pytest.mark.parametrize(names, values)(test)
    return test


def tolerance_of(dtype: torch.dtype, device: str) -> float:
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("the same on the CPU in any dtype")
    return {torch.float32: 1e-4 if device == "cpu" else 2e-3, torch.float16: 0.02, torch.bfloat16: 0.05}[dtype]


def geometry_of(kv_heads: int, dim: int, window: int | None, page_size: int) -> tuple[KVGeometry, int]:
    """One layer, and tokens for some pages."""
    shape = LayerShape(kv_heads, dim, kv_heads, dim)
    return KVGeometry((window,), (shape,)), 8 * page_size // (shape.elements * 2)


@of_every_kind
@pytest.mark.parametrize("ours", [True, False])
def test_attention_beside_unmapped_pages(
    flash_everywhere, device, model, page_size, heads, kv_heads, dim, window, dtype, ours, monkeypatch
):
    """Ragged rows that end on a page's edge, with nothing mapped behind: right values, and no fault. With our kernel
    for single tokens, where there is one for such heads, and without."""
    tolerance = tolerance_of(dtype, device)
    geometry, most = geometry_of(kv_heads, dim, window, page_size)
    slots = Slots(geometry, model=model, rows=5, max_tokens=most, dtype=dtype)
    if not ours:
        monkeypatch.setattr(kernels, "attend", lambda *args: False)
    elif not kernels.attend(slots.keys[0], slots.values[0], heads // kv_heads):
        pytest.skip("there is no kernel of ours for these")
    per_page = page_size // slots.token_bytes
    rows, lengths = [3, 0, 4], [max(per_page, 1), 3, 2 * max(per_page, 1)]
    lengths = [min(length, 300) if device == "cpu" else length for length in lengths]
    kept = {}
    for index, (row, length) in enumerate(zip(rows, lengths)):
        keys, values = (states(kv_heads, 1, length, dim, device, dtype, 10 * index + side) for side in range(2))
        query = states(heads, 1, length, dim, device, dtype, 10 * index + 5)
        step = RaggedStep(slots, [row], [length])
        output = step.attend(0, query, keys, values, None, window)
        step.commit()
        kept[row] = (keys[0], values[0])
        if length <= 2048:
            wanted = attention_by_hand(query[0], keys[0], values[0], window).transpose(0, 1)
            assert (output[0].double() - wanted).abs().max() < tolerance
    if per_page and device != "cpu":
        assert slots.tensor.resident(3) == lengths[0] and slots.tensor.claimed_bytes == 4 * page_size
    for tokens in (1, 3, 1):
        query = states(heads, 3, tokens, dim, device, dtype, 100 + tokens)
        keys, values = (states(kv_heads, 3, tokens, dim, device, dtype, 200 + tokens + side) for side in range(2))
        if tokens == 1:
            slots.reserve(rows, [1] * 3)
            step = DecodeStep(slots, rows, max_key=max(slots.lengths) + 1)
            step.begin()
        else:
            step = RaggedStep(slots, rows, [3, 1, 2])
        output = step.attend(0, query, keys, values, None, window)
        for index, row in enumerate(rows):
            count = 1 if tokens == 1 else step.counts[index]
            kept[row] = tuple(
                torch.cat([old, new[index, :, -count:]], 1) for old, new in zip(kept[row], (keys, values))
            )
            wanted = attention_by_hand(query[index, :, -count:], *kept[row], window).transpose(0, 1)
            assert (output[index, -count:].double() - wanted).abs().max() < tolerance
            assert torch.equal(output[index, :-count], torch.zeros_like(output[index, :-count]))
        step.commit()
        assert slots.device_lengths.tolist() == slots.lengths


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16),
        LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=64),
        LlamaConfig(**SIZES, num_key_value_heads=4),
        MistralConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6),
    ],
)
def test_whole_models_through_the_op(flash_everywhere, device, model, config):
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="elastikv").eval()
    network = network.to(device, dtype_of(device))
    tokens = torch.randint(3, 128, (3, 14), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    cache = ElasticCache(config, model=model, max_batch=3, max_tokens=64)
    ours = generate(network, tokens * mask, cache, attention_mask=mask, max_new_tokens=20, stop=())
    network.set_attn_implementation("eager")
    theirs = network.generate(
        tokens * mask, attention_mask=mask, do_sample=False, min_new_tokens=20, max_new_tokens=20, pad_token_id=0
    )
    if device == "cpu":
        assert torch.equal(ours, theirs)
    else:
        assert (ours == theirs).float().mean() > 0.6


@of_every_kind
def test_even_rows_beside_unmapped_pages(
    flash_everywhere, device, model, page_size, heads, kv_heads, dim, window, dtype
):
    """Decoding until a page is full to its edge, with nothing mapped behind."""
    tolerance = tolerance_of(dtype, device)
    geometry, most = geometry_of(kv_heads, dim, window, page_size)
    slots = Slots(geometry, model=model, rows=3, max_tokens=most, dtype=dtype)
    edge = max(page_size // slots.token_bytes, 6)
    length = edge - 3
    kept = [states(kv_heads, 2, length, dim, device, dtype, side) for side in range(2)]
    slots.reserve([0, 1], [length] * 2)
    for side, windows in zip(kept, (slots.keys, slots.values)):
        for row in range(2):
            windows[0][row * slots.pitch : row * slots.pitch + length] = side[row].transpose(0, 1)
    slots.set_lengths([0, 1], [length] * 2)
    for number in range(3):
        query, *new = (
            states(count, 2, 1, dim, device, dtype, 9 * number + count) for count in (heads, kv_heads, kv_heads)
        )
        step = EvenStep(slots, 2)
        output = step.attend(0, query, *new, None, window)
        step.commit()
        kept = [torch.cat(pair, 2) for pair in zip(kept, new)]
        for row in range(2):
            wanted = attention_by_hand(query[row], kept[0][row], kept[1][row], window).transpose(0, 1)
            assert (output[row].double() - wanted).abs().max() < tolerance
    assert slots.lengths == [edge, edge, 0] and slots.device_lengths.tolist() == slots.lengths
    for side, windows in zip(kept, (slots.keys, slots.values)):
        assert torch.equal(windows[0][slots.pitch : slots.pitch + edge].transpose(0, 1), side[1])


def test_the_op_takes_what_we_give():
    """torch's own shape function of the op, with our arguments."""
    assert flash.takes_lengths()
    query, side = torch.empty(3, 4, 64, device="meta"), torch.empty(900, 4, 64, device="meta")
    starts, lengths = (torch.empty(number, dtype=torch.int32, device="meta") for number in (4, 3))
    output = flash.attend(
        query, side, side, query_starts=starts, key_starts=starts, lengths=lengths, max_query=1, max_key=64,
        scaling=0.125, window=None,
    )  # fmt: skip
    assert output.shape == (3, 4, 64)
    window, new = torch.empty(400, 2, 64, device="meta"), torch.empty(3, 2, 1, 64, device="meta")
    for seen in (None, 30, 100):
        output = _core.attend_even(window, window, query.view(3, 4, 1, 64), new, new, 3, 100, 76, seen, 0.125)
        assert output.shape == (3, 1, 4, 64)


def test_why_not():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "not on cpu" in flash.why_not(cpu, torch.float16, 64, 64)
    assert "float32" in flash.why_not(cuda, torch.float32, 64, 64)
    assert "differ in size" in flash.why_not(cuda, torch.float16, 64, 32)
    assert "multiple of 8" in flash.why_not(cuda, torch.float16, 36, 36)
    assert "up to 256" in flash.why_not(cuda, torch.float16, 264, 264)


@pytest.mark.cuda
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_graph_at_every_length(dtype, kv_heads):
    """Replays against eager steps over the same rows, while memory is mapped in between."""
    device = "cuda:0"
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=kv_heads, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(5)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="elastikv").to(device).eval()
    with elastikv.SharedMemoryPool(physical_limit=2 << 30, device=device) as shared:
        handle = shared.register_model("graphs", virtual_capacity=1 << 42)
        answers = []
        for graphed in (True, False):
            slots = Slots(kv_geometry(config), model=handle, rows=6, max_tokens=8192, dtype=dtype)
            tokens = torch.randint(3, 512, (3, 700), generator=torch.Generator().manual_seed(6)).to(device)
            real = torch.ones(3, 700, dtype=torch.bool)
            real[1, :500] = False
            with torch.inference_mode():
                logits = prefill(network, slots, [5, 0, 3], tokens, real)
            decoder = Decoder(network, slots, [5, 0, 3], capacity=1500)
            decoder._graphed = graphed
            decoder.start(logits, limits=[1500, 1500, 900])
            while not decoder.all_ended:
                decoder.step()
            assert decoder.finish() == [1500, 1500, 900]
            assert decoder.captures == (4 if graphed else 0)  # up to 1024, 1536, 2048 and 3072 tokens
            assert [slots.lengths[row] for row in (5, 0, 3)] == [700 + 1499, 200 + 1499, 700 + 899]
            answers.append(decoder.history.clone())
        same = (answers[0] == answers[1]).float().mean()
        assert same > 0.5 and torch.equal(answers[0][:, :20], answers[1][:, :20])
        del decoder, slots


@pytest.mark.cuda
def test_steady_replays_allocate_nothing():
    """Neither from torch's allocator nor from the driver, on the calling thread."""
    device = "cuda:0"
    config = LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation="elastikv").to(device)
    network.eval()
    with elastikv.SharedMemoryPool(physical_limit=1 << 30, device=device) as shared:
        handle = shared.register_model("steady", virtual_capacity=1 << 40)
        slots = Slots(kv_geometry(config), model=handle, rows=2, max_tokens=4096, dtype=torch.float16)
        tokens = torch.full((2, 5), 9, device=device)
        with torch.inference_mode():
            logits = prefill(network, slots, range(2), tokens, torch.ones(2, 5, dtype=torch.bool))
        decoder = Decoder(network, slots, range(2), capacity=900)
        decoder.start(logits, limits=[900] * 2)
        for _ in range(20):
            decoder.step()
        handle.drain()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"], handle.stats().total_driver_calls
        for _ in range(500):
            decoder.step()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats(device)["allocation.all.allocated"], handle.stats().total_driver_calls
        assert after == before and decoder.captures == 1
        del decoder, slots


@pytest.mark.cuda
def test_sampled_graphs_draw_anew():
    device = "cuda:0"
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="elastikv").to(device)
    network.eval()
    with elastikv.SharedMemoryPool(physical_limit=1 << 30, device=device) as shared:
        handle = shared.register_model("sampled", virtual_capacity=1 << 40)
        cache = ElasticCache(config, model=handle, max_tokens=256)
        answers = []
        for seed in (1, 1, 2):
            prompt = torch.full((1, 4), 7, device=device)
            answers.append(
                generate(network, prompt, cache, max_new_tokens=64, temperature=2.0, top_p=0.95, stop=(), seed=seed)
            )
            cache.reset()
        assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
        assert len(set(answers[0][0, 4:].tolist())) > 20  # a graph that drew the same numbers each time would repeat
        cache.close()


@pytest.mark.cuda
def test_models_that_no_graph_can_hold_run_eagerly(caplog):
    device = "cuda:0"
    config = transformers.Gemma2Config(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=16, query_pre_attn_scalar=64,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="elastikv").to(device)
    network.eval()
    with elastikv.SharedMemoryPool(physical_limit=1 << 30, device=device) as shared:
        handle = shared.register_model("capped", virtual_capacity=1 << 40)
        cache = ElasticCache(config, model=handle, max_tokens=256)
        generate(network, torch.full((1, 4), 7, device=device), cache, max_new_tokens=40, stop=())
        assert cache.slots.lengths == [43]
        assert next(iter(cache._decoders.values())).captures == 0
        cache.close()
