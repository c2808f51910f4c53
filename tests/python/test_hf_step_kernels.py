"""The kernels of a decode step's beginning and end, against the operators that they stand for."""

from __future__ import annotations

import pytest
import torch

from elastikv import DeviceUnavailable, InvalidArgument, _core

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig

import elastikv
from elastikv.hf import ElasticCache, generate, kernels

CAPACITY = 6


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_they_compile(capability):
    try:
        code = _core.compiled_step_kernels(*capability)
    except DeviceUnavailable as problem:
        pytest.skip(str(problem))
    assert b"plan" in code and b"take" in code


def test_what_they_do_not_serve_is_said():
    numbers = torch.zeros(1, dtype=torch.int64)
    assert "CUDA" in _core.why_no_step_kernels(numbers)
    assert not kernels.steps(numbers)
    with pytest.raises((InvalidArgument, DeviceUnavailable)):
        _core.fused_plan(numbers.int(), numbers, numbers)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_where_tokens_go(rows):
    generator = torch.Generator().manual_seed(rows)
    all_lengths = torch.randint(0, 1000, (rows + 1,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(rows + 1, generator=generator)[:rows]
    starts = slots * 1000
    lengths, positions, places, first, seen = _core.fused_plan(all_lengths.cuda(), slots.cuda(), starts.cuda())
    wanted = all_lengths[slots]
    assert torch.equal(lengths.cpu(), wanted)
    assert torch.equal(positions.cpu(), wanted.long().unsqueeze(1))
    assert torch.equal(places.cpu(), starts + wanted)
    assert torch.equal(first[:rows].cpu(), starts.int())
    assert torch.equal(seen.cpu(), wanted + 1)
    assert {lengths.dtype, first.dtype, seen.dtype} == {torch.int32} and first.shape == (rows + 1,)


def answers_of(rows, generator, device):
    """As a decoder has them, in the middle of its work."""
    count = torch.randint(0, CAPACITY + 2, (rows,), generator=generator)
    state = {
        "tokens": torch.randint(0, 50, (rows, 1), generator=generator),
        "count": count,
        "history": torch.randint(0, 50, (rows, CAPACITY), generator=generator),
        "ended": torch.rand(rows, generator=generator) < 0.3,
        "limits": count + torch.randint(1, 3, (rows,), generator=generator),
        "stops": torch.tensor([7, -1, 8, -1]),
        "pad": torch.tensor(49),
    }
    state = {name: each.to(device) for name, each in state.items()}
    return {**state, "ended_here": torch.zeros(rows, dtype=torch.bool, pin_memory=True)}


def taken(chosen, state, all_lengths, slots, lengths):
    """What is to come of it, row by row."""
    state = {name: each.cpu().clone() for name, each in state.items()}
    all_lengths = all_lengths.clone()
    for row, token in enumerate(chosen.tolist()):
        alive = not state["ended"][row]
        all_lengths[slots[row]] = lengths[row] + alive
        if alive:
            state["history"][row, min(int(state["count"][row]), CAPACITY - 1)] = token
            state["count"][row] += 1
        token = token if alive else 49
        state["tokens"][row] = token
        state["ended"][row] |= token in (7, 8) or bool(state["count"][row] >= state["limits"][row])
    state["ended_here"] = state["ended"]
    return state, all_lengths


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_what_becomes_of_tokens(rows):
    generator = torch.Generator().manual_seed(rows)
    state = answers_of(rows, generator, "cuda")
    slots = torch.randperm(rows + 1, generator=generator)[:rows]
    all_lengths = torch.randint(0, 1000, (rows + 1,), generator=generator, dtype=torch.int32)
    for stored in (True, False, True):
        chosen = torch.randint(0, 12, (rows,), generator=generator)
        lengths = all_lengths[slots]
        wanted, grown = taken(chosen, state, all_lengths, slots, lengths)
        on_device = all_lengths.cuda()
        _core.fused_take(chosen.cuda(), **state, stored=(on_device, slots.cuda(), lengths.cuda()) if stored else None)
        torch.cuda.synchronize()
        for name, each in state.items():
            assert torch.equal(each.cpu(), wanted[name]), name
        assert torch.equal(on_device.cpu(), grown if stored else all_lengths)
        all_lengths = on_device.cpu()


@pytest.mark.cuda
def test_what_does_not_fit_is_refused():
    state = answers_of(3, torch.Generator().manual_seed(1), "cuda")
    before = {name: each.clone() for name, each in state.items()}
    chosen = torch.ones(3, dtype=torch.int64, device="cuda")
    for change in (
        {"ended_here": torch.zeros(3, dtype=torch.bool)},
        {"history": state["history"][:2]},
        {"history": state["history"][:, ::2]},
        {"ended": state["ended"].long()},
        {"limits": state["limits"].cpu()},
        {"stored": (chosen, chosen, chosen)},
    ):
        with pytest.raises(InvalidArgument, match="do not fit"):
            _core.fused_take(chosen, **{**state, "stored": None, **change})
    assert all(torch.equal(each, before[name]) for name, each in state.items())
    with pytest.raises(InvalidArgument, match="do not fit"):
        _core.fused_plan(chosen, chosen, chosen)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_the_operators(monkeypatch, temperature, dtype):
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=128, hidden_size=128, intermediate_size=96, num_hidden_layers=2, pad_token_id=0,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to("cuda")
    model.set_attn_implementation("elastikv")
    prompts = torch.randint(1, 128, (3, 9), device="cuda")
    answers = []
    with elastikv.SharedMemoryPool(1 << 28, "cuda:0") as pool:
        for served in (True, False):
            if not served:
                monkeypatch.setattr(kernels, "steps", lambda like: False)
            handle = pool.register_model(f"m{served}", virtual_capacity=1 << 32)
            cache = ElasticCache(config, model=handle, max_batch=3, max_tokens=64)
            answers.append(
                generate(model, prompts, cache, max_new_tokens=20, temperature=temperature, seed=5, stop=[9, 17])
            )
            cache.close()
    assert torch.equal(*answers)
