"""Steps over slots, and sampling: the parts that the decoder is made of."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import elastikv

pytest.importorskip("transformers")

from transformers.models.llama import modeling_llama

from elastikv.hf import Decoder, ElasticCache, Sampling, Slots, generate
from elastikv.hf.forward import run_step
from elastikv.hf.generation import prefill
from elastikv.hf.geometry import kv_geometry
from elastikv.hf.lean import Lean, Rotary
from elastikv.hf.sampling import Sampler
from elastikv.hf.step import DecodeStep, RaggedStep
from hf_networks import agree, prompts, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


# ---- known to transformers


def test_any_import_makes_the_attention_known():
    code = (
        "from elastikv.hf import Slots; from transformers import AttentionInterface, AttentionMaskInterface; "
        "assert 'elastikv' in AttentionInterface() and 'elastikv' in AttentionMaskInterface()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- fewer kernels


def test_lean_norms_give_the_same(llama, device):
    lean = Lean(llama)
    assert len(lean) == 3 * 2 + 1 + 1 + (4 if device != "cpu" else 0)  # norms, the rotary function; gates, angles
    tokens, _ = prompts(device)
    with torch.inference_mode():
        wanted = llama(tokens, use_cache=False).logits
        with lean:
            found = llama(tokens, use_cache=False).logits
        again = llama(tokens, use_cache=False).logits
    assert torch.equal(again, wanted) and not any("forward" in module.__dict__ for module in llama.modules())
    assert not isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05 if device != "cpu" else 1e-4)


def test_norms_of_other_kinds_stay(device):
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, states):
            return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    assert len(Lean(torch.nn.Sequential(OddRMSNorm(), torch.nn.LayerNorm(8)).to(device))) == 0


def test_a_lean_decoder(llama, device, model):
    slots = Slots(kv_geometry(llama.config), model=model, rows=3, max_tokens=64, dtype=llama.dtype)
    tokens, mask = prompts(device)
    with torch.inference_mode():
        logits = prefill(llama, slots, range(3), tokens, mask.bool().cpu())
    decoder = Decoder(llama, slots, range(3), capacity=12, lean=True)
    decoder.start(logits, limits=[12] * 3)
    while not decoder.all_ended:
        decoder.step()
    decoder.finish()
    agree(decoder.history[:, :12], reference(llama, tokens, mask, 12, min_new_tokens=12)[:, 12:], device)


# ---- sampling


def test_the_same_seed_gives_the_same_answer(llama, device, model):
    tokens, mask = prompts(device)
    options = {"attention_mask": mask, "max_new_tokens": 16, "temperature": 1.5, "stop": ()}
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=64)
    answers = []
    for seed in (1, 1, 2):
        answers.append(generate(llama, tokens, cache, seed=seed, **options))
        cache.reset()
    torch.manual_seed(3)
    answers.append(generate(llama, tokens, cache, **options))
    cache.reset()
    torch.manual_seed(3)
    answers.append(generate(llama, tokens, cache, **options))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    assert torch.equal(answers[3], answers[4])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=3),
        Sampling(1.3, top_p=0.6),
        Sampling(0.9, top_k=4, top_p=0.8),
        Sampling(1.0, top_k=99),
    ],
)
def test_draws_follow_the_shares(device, sampling):
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5, 1.7, -3.0], device=device)
    scores = logits / sampling.temperature
    if sampling.top_k is not None:
        least = scores.sort(descending=True).values[min(sampling.top_k, 6) - 1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = scores.softmax(-1)
    if sampling.top_p is not None:
        order = shares.argsort(descending=True)
        before = shares[order].cumsum(-1) - shares[order]
        shares[order] = shares[order].masked_fill(before >= sampling.top_p, 0)
        shares /= shares.sum()
    sampler = Sampler(sampling, torch.device(device))
    sampler.set(sampling, seed=12)
    draws = sampler(logits.expand(20000, 6))
    found = torch.bincount(draws, minlength=6) / 20000
    assert torch.equal(found == 0, shares == 0) or (found[shares == 0] == 0).all()
    assert (found - shares).abs().max() < 0.02


def test_greedy_takes_the_likeliest(device):
    sampler = Sampler(Sampling(), torch.device(device))
    assert sampler(torch.tensor([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]], device=device)).tolist() == [1, 0]
    with pytest.raises(elastikv.InvalidArgument, match="was made for"):
        sampler.set(Sampling(1.0))


# ---- steps


@pytest.mark.parametrize("left", [True, False])
def test_ragged_steps_store_what_is_real(llama, device, model, left):
    slots = Slots(kv_geometry(llama.config), model=model, rows=4, max_tokens=64, dtype=llama.dtype)
    tokens = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(1)).to(device)
    counts = [6, 2, 0]
    with torch.inference_mode():
        step = RaggedStep(slots, [3, 0, 1], counts, left=left)
        logits = run_step(llama, step, tokens, step.positions(), last_only=False)
        step.commit()
        assert slots.lengths == [2, 0, 0, 6] and slots.device_lengths.tolist() == slots.lengths
        for row, count in enumerate(counts[:2]):
            part = slice(6 - count, None) if left else slice(0, count)
            alone = llama(tokens[row : row + 1, part], use_cache=False).logits
            torch.testing.assert_close(logits[row, part], alone[0], rtol=0.02, atol=0.05 if device != "cpu" else 1e-4)
        decode = DecodeStep(slots, [0, 3], max_key=64)
        new = tokens[:2, :1]
        both = run_step(llama, decode, new, decode.begin())
        decode.commit()
    assert slots.lengths == [3, 0, 0, 7] and slots.device_lengths.tolist() == slots.lengths
    front = tokens[1, -2:] if left else tokens[1, :2]
    with torch.inference_mode():
        alone = llama(torch.cat([front, new[0]])[None], use_cache=False).logits[0, -1]
    torch.testing.assert_close(both[0, -1], alone, rtol=0.02, atol=0.05 if device != "cpu" else 1e-4)


def test_steps_refuse_what_is_wrong(llama, device, model):
    slots = Slots(kv_geometry(llama.config), model=model, rows=3, max_tokens=8, dtype=llama.dtype)
    for rows, counts in (([], []), ([0, 0], [1, 1]), ([3], [1]), ([0], [1, 2]), ([0], [-1])):
        with pytest.raises(elastikv.InvalidArgument):
            RaggedStep(slots, rows, counts)
    with pytest.raises(elastikv.InvalidArgument, match=r"0 \+ 9 tokens do not fit"):
        RaggedStep(slots, [0, 1], [1, 9])
    assert slots.tensor.claimed_bytes == 0
    row = slots.acquire()
    assert (row, slots.acquire(), slots.acquire()) == (0, 1, 2)
    with pytest.raises(elastikv.InvalidArgument, match="all 3 slots are taken"):
        slots.acquire()
    slots.release(1)
    with pytest.raises(elastikv.InvalidArgument, match="slot 1 is not taken"):
        slots.release(1)
    assert slots.acquire() == 1


def test_idle_rows_stay_empty_and_hosts_word_counts(llama, device, model):
    slots = Slots(kv_geometry(llama.config), model=model, rows=3, max_tokens=16, dtype=llama.dtype)
    slots.reserve([0, 1], [4, 4])
    slots.set_lengths([0, 1], [2, 3])
    step = DecodeStep(slots, [0, slots.idle_row, slots.idle_row], max_key=16)
    for length in (2, 3):
        assert step.begin().tolist() == [[length], [0], [0]]
        if length == 3:
            slots.set_lengths([1], [1])
        step.commit()
    assert slots.lengths == [4, 1, 0] and slots.all_lengths[-1] == 0
    assert slots.device_lengths.tolist() == slots.lengths
