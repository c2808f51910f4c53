"""Query, key and value projections that read their weights as one."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from elastikv.hf import ElasticCache, JoinedProjections, generate  # noqa: E402
from hf_networks import SIZES, agree, make_network, prompts  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = SIZES["num_hidden_layers"]
SETS = 2 * LAYERS  # of an attention and an MLP each


@pytest.fixture
def pool_pages():
    return 1024


def biased(device: str):
    torch.manual_seed(4)
    network = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES), attn_implementation="elastikv")
    for layer in network.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    return network.to(device, torch.float32 if device == "cpu" else torch.float16).eval()


def projections(network, layer: int = 0) -> list:
    attention = network.model.layers[layer].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def with_other_weights(device: str):
    network = make_network("gqa", device)
    with torch.no_grad():
        for each in network.parameters():
            each.mul_(0.9)
    return network


def logits_of(network, tokens) -> torch.Tensor:
    with torch.inference_mode():
        return network(tokens).logits


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_values_from_one_matrix(device, bias):
    network = biased(device) if bias else make_network("gqa", device)
    tokens, _ = prompts(device)
    expected = logits_of(network, tokens)
    names = list(network.state_dict())
    before = {name: (each, each.detach().clone()) for name, each in network.named_parameters()}
    with JoinedProjections(network) as joined:
        assert len(joined) == SETS
        calls = []
        run = torch.nn.functional.linear
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("elastikv.hf.projections.linear", lambda *given: calls.append(given) or run(*given))
            torch.testing.assert_close(logits_of(network, tokens), expected, rtol=1e-3, atol=2e-3)
        assert len(calls) == SETS  # not one for each projection
        assert all(group._states is None and group._output is None for group in joined._groups)
        for name, each in network.named_parameters():
            assert each is before[name][0] and torch.equal(each, before[name][1])
        assert list(network.state_dict()) == names
        # Side by side, and nowhere else.
        parts = projections(network)
        assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
        assert parts[0].weight.untyped_storage().nbytes() == sum(part.weight.nbytes for part in parts)
    assert all(type(part) is torch.nn.Linear for part in projections(network))
    assert torch.equal(logits_of(network, tokens), expected)
    joined.undo()


@pytest.mark.parametrize("made_within", [False, True])
@pytest.mark.parametrize("joined_within", [False, True])
def test_inference_mode_may_begin_before_or_after(device, made_within, joined_within):
    with torch.inference_mode(made_within):
        network = biased(device)
    tokens, _ = prompts(device)
    expected = logits_of(network, tokens)
    with torch.inference_mode(joined_within), JoinedProjections(network) as joined:
        assert len(joined) == SETS
        torch.testing.assert_close(logits_of(network, tokens), expected, rtol=1e-3, atol=2e-3)
    assert all(each.is_inference() == made_within for each in network.parameters())
    assert torch.equal(logits_of(network, tokens), expected)


def test_weights_that_are_loaded_later_count(device):
    network = make_network("gqa", device)
    tokens, _ = prompts(device)
    other = with_other_weights(device)
    expected = logits_of(other, tokens)
    with JoinedProjections(network):
        network.load_state_dict(other.state_dict())
        torch.testing.assert_close(logits_of(network, tokens), expected, rtol=1e-3, atol=2e-3)


def test_weights_that_go_elsewhere_are_read_there(device):
    tokens, _ = prompts(device)
    other = with_other_weights(device)
    expected = logits_of(other, tokens)

    def replaced(network):
        for layer in range(LAYERS):
            for mine, theirs in zip(projections(network, layer), projections(other, layer)):
                mine.weight = torch.nn.Parameter(theirs.weight.clone())
        network.load_state_dict(other.state_dict())
        return network

    def copied(network):
        network = copy.deepcopy(network)
        assert all(type(part) is torch.nn.Linear for part in projections(network))
        network.load_state_dict(other.state_dict())
        return network

    def assigned(network):
        network.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
        return network

    for change in (replaced, copied, assigned):
        network = make_network("gqa", device)
        with JoinedProjections(network):
            torch.testing.assert_close(logits_of(change(network), tokens), expected, rtol=1e-3, atol=2e-3)
    network = make_network("gqa", device)
    with JoinedProjections(network):
        assert logits_of(network.double(), tokens).dtype == torch.float64


def test_projections_of_different_inputs_part_again(device):
    network = make_network("gqa", device)
    first, second = (torch.randn(1, 2, SIZES["hidden_size"], device=device, dtype=network.dtype) for _ in range(2))
    parts = projections(network)
    expected = [part(states) for part, states in zip(parts, (first, second, second))]
    with JoinedProjections(network):
        for part, states, value in zip(parts, (first, second, second), expected):
            torch.testing.assert_close(part(states), value, rtol=1e-3, atol=2e-3)
        assert all(type(part) is torch.nn.Linear for part in parts)
        assert type(projections(network, 1)[0]) is not torch.nn.Linear


def test_nothing_is_joined_where_memory_ends_midway(device, monkeypatch):
    network = make_network("gqa", device)
    tokens, _ = prompts(device)
    expected, join, calls = logits_of(network, tokens), torch.cat, []

    def cat(*given, **options):
        calls.append(given)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return join(*given, **options)

    monkeypatch.setattr("elastikv.hf.projections.torch.cat", cat)
    with pytest.raises(torch.OutOfMemoryError):
        JoinedProjections(network)
    monkeypatch.undo()
    assert all(type(part) is torch.nn.Linear for layer in range(LAYERS) for part in projections(network, layer))
    assert torch.equal(logits_of(network, tokens), expected)


def test_who_asks_twice_gets_nothing_the_second_time(device):
    network = make_network("gqa", device)
    with JoinedProjections(network), JoinedProjections(network) as again:
        assert len(again) == 0


def test_what_is_not_plain_layers_of_one_input_stays(device):
    class Own(torch.nn.Linear):
        pass

    def other_class(part):
        part.__class__ = Own

    def hooked(part):
        part.register_forward_hook(lambda *_: None)

    def patched(part):
        part.forward = lambda states: torch.nn.Linear.forward(part, states)

    def biased_alone(part):
        part.bias = torch.nn.Parameter(torch.zeros(part.out_features, device=device, dtype=part.weight.dtype))

    def widened(part):
        part.to(torch.float64)

    for change in (other_class, hooked, patched, biased_alone, widened):
        network = make_network("gqa", device)
        part = projections(network, 1)[2]
        change(part)
        kept = part.weight.data_ptr()
        with JoinedProjections(network) as joined:
            assert len(joined) == SETS - 1
            assert part.weight.data_ptr() == kept


def test_generates_the_same(device, model):
    network = make_network("gqa", device)
    tokens, mask = prompts(device)
    answers = []
    for _ in range(2):
        cache = ElasticCache(network.config, model=model, max_batch=3, max_tokens=64)
        answers.append(generate(network, tokens, cache, attention_mask=mask, max_new_tokens=20, stop=()))
        cache.close()
        JoinedProjections(network)
    agree(answers[1], answers[0], device)


def test_a_compiler_sees_one_product_instead_of_several():
    network = make_network("gqa", "cpu")
    network.set_attn_implementation("sdpa")
    tokens, _ = prompts("cpu")
    expected = logits_of(network, tokens)
    products = []

    def count(graph, _):
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    def check():
        torch._dynamo.reset()
        compiled = torch.compile(network, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        torch.testing.assert_close(logits_of(compiled, tokens), expected, rtol=1e-4, atol=1e-4)

    check()
    with JoinedProjections(network):
        check()
    assert products[0] - products[1] == 3 * LAYERS
