"""Our own kernels of a decode step, against torch's operators."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import elastikv
from elastikv import DeviceUnavailable, InvalidArgument, _core

pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

DTYPES = [torch.bfloat16, torch.float16]
on_gpu = pytest.mark.cuda


def noise(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


# ---- without a GPU


def compiled(call, *arguments):
    try:
        return call(*arguments)
    except DeviceUnavailable as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_compile(dtype, capability):
    names = (b"rms_norm", b"rotate", b"store", b"gate", b"angles", b"likeliest")
    assert all(name in compiled(_core.compiled_decode_kernels, dtype, *capability) for name in names)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 8])
def test_attention_compiles(dim, group, dtype, capability):
    code = compiled(_core.compiled_decode_attention, dtype, dim, group, *capability)
    assert b"attend" in code and b"combine" in code


def test_what_they_do_not_serve_is_said():
    like = torch.zeros(1)
    assert "CUDA" in _core.why_no_decode_kernels(like)
    assert "CUDA" in _core.why_no_decode_attention(like, 64, 1)
    for dim, group in ((80, 1), (256, 1), (64, 9), (64, 0)):
        with pytest.raises((InvalidArgument, DeviceUnavailable)):
            _core.compiled_decode_attention(torch.float16, dim, group, 9, 0)
    one = torch.ones(1, dtype=torch.int32)
    for call in (
        lambda: _core.fused_rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6),
        lambda: _core.fused_gate(torch.zeros(2, 8), torch.zeros(2, 8)),
        lambda: _core.fused_argmax(torch.zeros(2, 8)),
        lambda: _core.fused_angles(one.long().view(1, 1), torch.ones(8), 1.0, torch.float16),
        lambda: _core.fused_rotate(*[torch.zeros(1, 1, 1, 8)] * 2, *[torch.zeros(1, 1, 8)] * 2),
        lambda: _core.fused_store(*[torch.zeros(4, 1, 8)] * 2, one.long(), *[torch.zeros(1, 1, 8)] * 2),
        lambda: _core.fused_attend(torch.zeros(1, 1, 64), *[torch.zeros(4, 1, 64)] * 2, one, one, 1, None),
    ):  # fmt: skip
        with pytest.raises((InvalidArgument, DeviceUnavailable)):
            call()


# ---- what they compute


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 1, 4096), (3, 2, 24), (2, 1, 16384), (0, 1, 64)])
def test_norms(shape, dtype):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to("cuda", dtype)
    norm.weight.data = noise(shape[-1], dtype=dtype, seed=1)
    states = noise(*shape, dtype=dtype) * 3
    with torch.inference_mode():
        found, wanted = _core.fused_rms_norm(states, norm.weight, 1e-5), norm(states)
    assert found.shape == wanted.shape and found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)
    every_other = noise(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    with torch.inference_mode():
        found, wanted = _core.fused_rms_norm(every_other, norm.weight, 1e-5), norm(every_other)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (2, 2, 6), (4, 1, 256)])
@pytest.mark.parametrize("rows", [1, 7])
def test_rotary_embeddings_to_the_bit(rows, heads, kv_heads, dim, dtype):
    # As models have them: parts of one projection, with heads transposed.
    joined = noise(rows, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    query = joined[..., : heads * dim].view(rows, 1, heads, dim).transpose(1, 2)
    key = joined[..., heads * dim : (heads + kv_heads) * dim].view(rows, 1, kv_heads, dim).transpose(1, 2)
    for angles in (rows, 1):
        cosines, sines = noise(angles, 1, dim, dtype=dtype, seed=1), noise(angles, 1, dim, dtype=dtype, seed=2)
        for found, wanted in zip(
            _core.fused_rotate(query, key, cosines, sines), apply_rotary_pos_emb(query, key, cosines, sines)
        ):
            assert torch.equal(found, wanted)  # fmt: skip


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 1, 8192), (70000, 1, 16)])
def test_gates(shape, dtype):
    joined = noise(*shape[:-1], 2 * shape[-1], dtype=dtype) * 4
    gates, factors = joined.split(shape[-1], -1)
    wanted = torch.nn.functional.silu(gates) * factors
    torch.testing.assert_close(_core.fused_gate(gates, factors), wanted, rtol=2**-7, atol=2**-12)
    odd = noise(shape[0] * shape[1] * shape[2] + 1, dtype=dtype)[1:].view(shape)  # not on 16 bytes
    torch.testing.assert_close(_core.fused_gate(odd, odd), torch.nn.functional.silu(odd) * odd, rtol=2**-7, atol=2**-12)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 264), (5, 128256), (0, 16)])
def test_the_likeliest(shape, dtype):
    logits = noise(*shape, dtype=dtype)
    assert torch.equal(_core.fused_argmax(logits), logits.argmax(-1))
    logits = noise(shape[0], shape[1] + 8, dtype=dtype).mul(2).round()[:, 8:]  # many are alike; rows have a stride
    assert torch.equal(_core.fused_argmax(logits), logits.argmax(-1))
    odd = noise(shape[0] * shape[1] + 1, dtype=dtype)[1:].view(shape)
    assert torch.equal(_core.fused_argmax(odd), odd.argmax(-1))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_likeliest_of_what_is_not_finite(dtype):
    inf, nan = math.inf, math.nan
    rows = [
        [-inf] * 8, [-1, -inf, inf, 3, inf, 0, 0, 0], [nan, inf, 1, 2, 3, 4, 5, 6], [1, 2, -nan, nan, inf, 0, 0, 0],
        [-0.0, 0.0, -1, -1, -1, -1, -1, -1], [-1, 0.0, -0.0, -1, -1, -1, -1, -1], [-3, -2, -4, -2, -5, -6, -7, -8],
    ]  # fmt: skip
    found = _core.fused_argmax(torch.tensor(rows, device="cuda", dtype=dtype))
    assert found.tolist() == [0, 2, 0, 2, 0, 1, 1]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_angles_of_rotary_embeddings(kind, dtype):
    rope = {"rope_type": kind, "rope_theta": 500000.0}
    if kind == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=rope)
    module, like = LlamaRotaryEmbedding(config).to("cuda"), noise(1, dtype=dtype)
    positions = torch.randint(0, 1 << 20, (5, 3), generator=torch.Generator().manual_seed(1)).to("cuda")
    for shaped in (positions, positions.t(), positions[:1], positions[:0]):
        found = _core.fused_angles(shaped, module.inv_freq, module.attention_scaling, dtype)
        for ours, theirs in zip(found, module(like, shaped)):
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@on_gpu
def test_storing_touches_nothing_else():
    window = torch.zeros(50, 2, 3, 72, device="cuda", dtype=torch.float16)
    keys, values = window[:, 0], window[:, 1, :, :40]
    places = torch.tensor([7, 49, 0], device="cuda")
    new_keys = noise(3, 1, 3, 72, dtype=torch.float16).transpose(1, 2).squeeze(2)
    new_values = noise(3, 3, 40, dtype=torch.float16, seed=1)
    expected = window.clone()
    expected[:, 0].index_copy_(0, places, new_keys)
    expected[:, 1, :, :40].index_copy_(0, places, new_values)
    _core.fused_store(keys, values, places, new_keys, new_values)
    assert torch.equal(window, expected)
    with pytest.raises(InvalidArgument, match="no gradient"):
        _core.fused_store(keys, values, places, new_keys.clone().requires_grad_(), new_values)
    assert torch.equal(window, expected)


def reference(query, keys, values, starts, lengths, scale):
    output, group = torch.empty_like(query), query.shape[1] // keys.shape[1]
    for row, (start, length) in enumerate(zip(starts, lengths)):
        k, v = (
            part[start : start + length].transpose(0, 1).repeat_interleave(group, 0).float() for part in (keys, values)
        )
        scores = (query[row].unsqueeze(1).float() @ k.transpose(1, 2)) * scale
        output[row] = (scores.softmax(-1) @ v).squeeze(1).to(query.dtype)
    return output


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_attention(group, dim, dtype):
    kv_heads, tokens = 2, 3000
    window = torch.full((tokens, 2, kv_heads, dim), torch.nan, device="cuda", dtype=dtype)
    keys, values = window[:, 0], window[:, 1]
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 700, 1500]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).add(torch.arange(len(lengths)) * 3).tolist()  # with gaps
    for number, (start, length) in enumerate(zip(starts, lengths)):
        keys[start : start + length] = noise(length, kv_heads, dim, dtype=dtype, seed=2 * number)
        values[start : start + length] = noise(length, kv_heads, dim, dtype=dtype, seed=2 * number + 1)
    query = noise(len(lengths), 1, group * kv_heads, dim, dtype=dtype, seed=99).transpose(1, 2).squeeze(2)
    on_device = [torch.tensor(each, dtype=torch.int32, device="cuda") for each in (starts, lengths)]
    for scale in (None, 0.3):
        wanted = reference(query, keys, values, starts, lengths, scale or 1 / math.sqrt(dim))
        for longest in (1500, 6000, 64):  # a bound that is too low costs time alone
            found = _core.fused_attend(query, keys, values, *on_device, longest, scale)
            torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-7 if dtype == torch.bfloat16 else 2**-9)


@on_gpu
def test_attention_of_large_scores():
    """Whatever the scores, no part that saw nothing spoils the rest."""
    keys, values = noise(900, 1, 64) * 200, noise(900, 1, 64, seed=1)
    query, lengths = noise(2, 4, 64, seed=2) * 200, [900, 65]
    starts, ends = (
        torch.zeros(2, dtype=torch.int32, device="cuda"),
        torch.tensor(lengths, dtype=torch.int32, device="cuda"),
    )
    found = _core.fused_attend(query, keys, values, starts, ends, 900, None)
    torch.testing.assert_close(found, reference(query, keys, values, [0, 0], lengths, 0.125), rtol=2**-6, atol=2**-6)


@on_gpu
def test_rows_beyond_32_bits():
    """Windows may reach further than 2^31 elements, with memory for a few rows only."""
    with elastikv.SharedMemoryPool(1 << 28, "cuda:0") as pool:
        handle = pool.register_model("far", virtual_capacity=1 << 40)
        slots = elastikv.SlotTensor(handle, 3, 1 << 24, 2 * 2 * 64, torch.bfloat16)
        window = slots.window(0, (2, 2, 64))
        slots.grow([2], [5], exact=True)
        keys, values = window[:, 0], window[:, 1]
        start = 2 * slots.pitch
        assert start * window.stride(0) > 1 << 31
        new_keys, new_values = noise(5, 2, 64), noise(5, 2, 64, seed=1)
        _core.fused_store(keys, values, torch.arange(start, start + 5, device="cuda"), new_keys, new_values)
        assert torch.equal(keys[start : start + 5], new_keys) and torch.equal(values[start : start + 5], new_values)
        query = noise(1, 4, 64, seed=2)
        where = [torch.tensor([number], dtype=torch.int32, device="cuda") for number in (start, 5)]
        found = _core.fused_attend(query, keys, values, *where, 5, None)
        torch.testing.assert_close(found, reference(query, keys, values, [start], [5], 0.125), rtol=2**-6, atol=2**-7)
        del slots, window, keys, values


@on_gpu
def test_a_place_of_several_rows():
    """As idle rows have one: each element there is one of theirs, and nothing else is written."""
    window = torch.zeros(4, 2, 1, 64, device="cuda", dtype=torch.float16)
    new = noise(9, 1, 64, dtype=torch.float16)
    _core.fused_store(window[:, 0], window[:, 1], torch.full((9,), 2, device="cuda"), new, new)
    assert all((window[2, side] == new).any(dim=0).all() for side in (0, 1))
    assert not window[[0, 1, 3]].any()


@on_gpu
def test_a_thread_that_has_made_no_call():
    answers = []
    for call in (
        lambda like: _core.why_no_decode_kernels(like),
        lambda like: _core.why_no_decode_attention(like, 64, 2),
        lambda like: _core.fused_gate(like, like).shape,
    ):
        thread = threading.Thread(
            target=lambda call=call: answers.append(call(torch.zeros(8, 8, device="cuda").half()))
        )
        thread.start()
        thread.join()
    assert answers == ["", "", (8, 8)]


@on_gpu
def test_gradients_are_refused():
    states = noise(2, 64).requires_grad_()
    numbers = torch.ones(2, dtype=torch.int32, device="cuda")
    window, query = noise(9, 1, 64), noise(2, 1, 64).requires_grad_()
    for call in (
        lambda: _core.fused_rms_norm(states, noise(64), 1e-6),
        lambda: _core.fused_gate(states, states),
        lambda: _core.fused_attend(query, window, window, numbers, numbers, 1, None),
    ):
        with pytest.raises(InvalidArgument, match="no gradient"):
            call()
        with torch.no_grad():
            call()


@on_gpu
def test_a_graph_replays_at_other_lengths():
    keys, values = noise(4000, 2, 128), noise(4000, 2, 128, seed=1)
    query = noise(2, 8, 128, seed=2)
    starts, lengths = (torch.tensor(each, dtype=torch.int32, device="cuda") for each in ([0, 2000], [5, 9]))
    _core.fused_attend(query, keys, values, starts, lengths, 2000, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = _core.fused_attend(query, keys, values, starts, lengths, 2000, None)
    for now in ([5, 9], [700, 1], [2000, 1999]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        wanted = reference(query, keys, values, [0, 2000], now, 128**-0.5)
        torch.testing.assert_close(output, wanted, rtol=2**-6, atol=2**-7)


@on_gpu
def test_what_does_not_fit_is_refused():
    window, numbers = noise(9, 2, 64), torch.ones(3, dtype=torch.int32, device="cuda")
    query = noise(3, 4, 64)
    for bad in (
        (query[:, :3], window, window, numbers, numbers),
        (query, window, window, numbers.long(), numbers),
        (query, window, window, numbers, numbers[:2]),
        (query, window, window.half(), numbers, numbers),
        (query, window, window[..., ::2], numbers, numbers),
        (noise(3, 18, 64), window, window, numbers, numbers),
        (query, window, window, numbers.cpu(), numbers),
    ):
        with pytest.raises(InvalidArgument, match="do not fit"):
            _core.fused_attend(*bad, 9, None)
    with pytest.raises(InvalidArgument, match="do not fit"):
        _core.fused_rms_norm(noise(2, 12), noise(12), 1e-6)
    for call in (
        lambda: _core.fused_gate(noise(2, 8), noise(2, 16)),
        lambda: _core.fused_argmax(noise(2, 12)),
        lambda: _core.fused_argmax(noise(2, 8, dtype=torch.float32)),
        lambda: _core.fused_angles(numbers.view(1, 3), torch.ones(8, device="cuda"), 1.0, torch.float16),
        lambda: _core.fused_angles(numbers.view(1, 3).long(), torch.ones(8), 1.0, torch.float16),
    ):
        with pytest.raises(InvalidArgument, match="do not fit"):
            call()
