"""Fewer kernels for a model: which of its parts take part, and that all is as before in the end."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from elastikv import _core

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from elastikv.hf import kernels
from elastikv.hf.lean import Lean, Rotary

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def network_of(config, device):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device, dtype_of(device))


def test_heads_that_are_turned_in_part(device):
    network = network_of(Phi3Config(**SIZES, partial_rotary_factor=0.5), device)
    lean = Lean(network)
    with torch.inference_mode():
        for tokens in (torch.tensor([[5, 6, 7]]), torch.tensor([[5]])):
            wanted = network(tokens.to(device)).logits
            with lean:
                found = network(tokens.to(device)).logits
            torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 if device != "cpu" else 1e-4)


def test_a_norm_with_an_outlier_is_not_mistaken(device):
    """Gemma's counts its weight from one, which tells by the small weights alone."""
    norm = GemmaRMSNorm(256).to(device, torch.bfloat16)
    norm.weight.data = torch.randn(256, generator=torch.Generator().manual_seed(1)).mul(0.5).to(norm.weight)
    norm.weight.data[7] = 100
    assert len(Lean(torch.nn.Sequential(norm))) == 0


def test_states_of_another_dtype_than_the_norm(device):
    norm = LlamaRMSNorm(64).to(device)
    lean = Lean(torch.nn.Sequential(norm))
    states = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    assert len(lean) == 1
    with torch.inference_mode(), lean:
        found = norm(states)
    assert found.dtype == torch.float32 and torch.equal(found, norm(states))


class ClampedMLP(LlamaMLP):
    def forward(self, x):
        gates, factors = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(gates) * factors)


def mlp_of(kind, device, act="silu"):
    torch.manual_seed(2)
    config = SimpleNamespace(
        hidden_size=64, intermediate_size=96, hidden_act=act, hidden_activation=act, mlp_bias=False
    )
    return torch.nn.Sequential(kind(config)).to(device, torch.bfloat16)


@pytest.mark.cuda
def test_gates_of_other_kinds_stay():
    assert len(Lean(mlp_of(LlamaMLP, "cuda"))) == 1
    assert len(Lean(mlp_of(ClampedMLP, "cuda"))) == 0
    assert len(Lean(mlp_of(GemmaMLP, "cuda", "gelu_pytorch_tanh"))) == 0
    hooked = mlp_of(LlamaMLP, "cuda")
    hooked[0].act_fn.register_forward_hook(lambda *_: None)
    assert len(Lean(hooked)) == 0


@pytest.mark.cuda
def test_what_is_exchanged_later_counts():
    network = mlp_of(LlamaMLP, "cuda")
    lean, states = Lean(network), torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    network[0].gate_proj = torch.nn.Linear(64, 96, bias=False, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = network(states)
        with lean:
            found = network(states)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.cuda
def test_what_lies_behind_a_gate_is_not_computed_to_look():
    """Of a split model it would wait for the other ranks."""
    network, calls = mlp_of(LlamaMLP, "cuda"), []
    network[0].down_proj.register_forward_hook(lambda *_: calls.append(1))
    assert len(Lean(network)) == 1 and not calls
    assert len(network[0].down_proj._forward_pre_hooks) == 0


def test_a_forward_that_was_put_there_since_stays(device):
    norm = LlamaRMSNorm(64).to(device, dtype_of(device))
    lean = Lean(torch.nn.Sequential(norm))
    norm.forward = lambda states: states * 2
    with torch.inference_mode(), lean:
        assert torch.equal(norm(torch.ones(1, 64, device=device)), torch.full((1, 64), 2.0, device=device))
    assert "forward" in norm.__dict__


def test_gradients_pass_as_before(device):
    network = network_of(LlamaConfig(**SIZES), device)
    tokens = torch.tensor([[5]], device=device)
    with Lean(network):
        network(tokens).logits.sum().backward()
    assert all(each.grad is not None for each in network.model.layers.parameters())


def test_two_models_of_one_architecture(device):
    """The second is made while the first one runs, and the first one ends while the second runs."""
    original = modeling_llama.apply_rotary_pos_emb
    first, second = (network_of(LlamaConfig(**SIZES), device) for _ in range(2))
    lean, made = Lean(first), []
    with lean:
        maker = threading.Thread(target=lambda: made.append(Lean(second)))
        maker.start()
        maker.join()
        made[0].__enter__()
    assert isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
    made[0].__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert len(made[0]) == len(lean)


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "served"), [("default", True), ("linear", True), ("dynamic", False)])
def test_angles_of_frequencies_that_stay(kind, served):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    network = network_of(LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope), "cuda")
    embedding, positions = network.model.rotary_emb, torch.arange(100, device="cuda").unsqueeze(0)
    states, lean = torch.zeros(1, 1, 64, device="cuda", dtype=torch.bfloat16), Lean(network)
    with torch.inference_mode():
        wanted = embedding(states, position_ids=positions)
        with lean:
            assert ("forward" in embedding.__dict__) == served
            found = embedding(states, position_ids=positions)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)


class ThreefoldRotaryEmbedding(torch.nn.Module):
    """Of a model that wants its positions by time, height and width."""

    rope_type, attention_scaling = "default", 1.0

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4))

    def forward(self, x, position_ids):
        angles = position_ids[:, :, None, :].float() * self.inv_freq[None, None, :, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_positions_of_another_kind_stay(monkeypatch):
    monkeypatch.setattr(kernels, "serve", lambda like: True)
    monkeypatch.setattr(_core, "fused_angles", lambda positions, *_: (torch.zeros(*positions.shape, 8),) * 2)
    network = torch.nn.Sequential(ThreefoldRotaryEmbedding(), torch.nn.Linear(4, 4))
    assert len(Lean(network)) == 0


@pytest.mark.cuda
def test_where_kernels_can_not_be_compiled_torchs_serve(monkeypatch, caplog):
    monkeypatch.setattr(_core, "why_no_decode_kernels", lambda like: "no compiler here")
    monkeypatch.setattr(_core, "why_no_decode_attention", lambda *args: "no compiler here")
    monkeypatch.setattr(_core, "why_no_step_kernels", lambda like: "no compiler here")
    monkeypatch.setattr(kernels, "_there", set())
    monkeypatch.setattr(kernels, "_said", set())
    network = network_of(LlamaConfig(**SIZES), "cuda:0")
    tokens = torch.tensor([[5]], device="cuda")
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "elastikv.hf"):
        wanted = network(tokens).logits
        lean = Lean(network)
        assert len(lean) == 2 * 2 + 1 + 1  # norms and the rotary function, by torch's operators
        with lean:
            found = network(tokens).logits
        window = torch.zeros(8, 1, 64, device="cuda", dtype=torch.bfloat16)
        assert not kernels.attend(window, window, 2) and not kernels.steps(window)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert [record.message for record in caplog.records if "no compiler here" in record.message] != []
    assert len(caplog.records) == 1
