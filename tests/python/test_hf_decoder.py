"""The decoder and elastikv.hf.generate: transformers' tokens, sampled, stopped and stored on the device."""

from __future__ import annotations

import copy

import pytest
import torch

import elastikv

transformers = pytest.importorskip("transformers")


from elastikv.hf import Decoder, ElasticCache, Slots, generate  # noqa: E402
from elastikv.hf.decoder import SMALLEST_CLASS, size_class  # noqa: E402
from elastikv.hf.forward import cache_argument  # noqa: E402
from elastikv.hf.generation import prefill  # noqa: E402
from elastikv.hf.geometry import kv_geometry  # noqa: E402
from elastikv.hf.room import SLACK  # noqa: E402
from hf_networks import CONFIGS, agree, make_network, prompts, reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


@pytest.fixture(params=list(CONFIGS))
def network(request, device):
    return make_network(request.param, device)


# ---- generate


@pytest.mark.parametrize("chunk", [5, 4096])
def test_generates_what_transformers_does(network, device, model, chunk):
    tokens, mask = prompts(device)
    cache = ElasticCache(network.config, model=model, max_batch=3, max_tokens=64)
    ours = generate(network, tokens, cache, attention_mask=mask, max_new_tokens=30, chunk=chunk)
    agree(ours, reference(network, tokens, mask, 30), device)
    made = [answer.index(2) + 1 if 2 in answer else len(answer) for answer in ours[:, 12:].tolist()]
    assert cache.slots.lengths == [length + new - 1 for length, new in zip(mask.sum(1).tolist(), made)]
    assert cache.slots.device_lengths.tolist() == cache.slots.lengths
    assert cache.get_seq_length() == ours.shape[1] - 1


def test_memory_for_a_prompt_is_claimed_at_once_though_it_comes_in_chunks():
    network, page = make_network("gqa", "cpu"), 4096
    tokens = torch.full((2, 60), 5)
    pages = -(-60 * kv_geometry(network.config).token_bytes(network.dtype) // page)
    extents = []
    for chunk in (4, 60):
        with elastikv.SharedMemoryPool(1024 * page, "cpu", page_size=page, park_limit=0) as pool:
            handle = pool.register_model("model", virtual_capacity=1 << 42)
            cache = ElasticCache(network.config, model=handle, max_batch=2, max_tokens=64)
            generate(network, tokens, cache, max_new_tokens=1, chunk=chunk)
            extents.append(handle.stats().extents)
            cache.reset()
            ballast = elastikv.empty((1024 - 2 * pages + 1, page), (1024, page), torch.uint8, handle)
            with pytest.raises(elastikv.OutOfPhysicalMemory):
                generate(network, tokens, cache, max_new_tokens=1, chunk=chunk)
            assert cache.slots.lengths == [0, 0] and handle.stats().used == ballast.numel()
            cache.close()
    assert extents[0] == extents[1] < 2 * pages


def test_rows_end_at_their_stops(llama, device, model):
    tokens, mask = prompts(device)
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=80)
    free = generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=40, stop=())
    stops = {int(free[0, 12 + 3]), int(free[1, 12 + 9])}
    cache.reset()
    ours = generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=40, stop=sorted(stops), pad=1)
    for row in range(3):
        answer = free[row, 12:].tolist()
        end = next((index for index, token in enumerate(answer) if token in stops), len(answer) - 1)
        assert ours[row, 12 : 13 + end].tolist() == answer[: end + 1]
        assert set(ours[row, 13 + end :].tolist()) <= {1}
        assert cache.slots.lengths[row] == int(mask[row].sum()) + end


def test_several_turns(llama, device, model):
    """Rows end at different times; the next turn brings what they have not stored."""
    tokens, mask = prompts(device)
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=128)
    free = generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=12, stop=())
    cache.reset()
    first = generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=12, stop=[int(free[0, 14])], pad=0)
    more, _ = prompts(device, length=4)
    more = more.clamp(min=3)
    seen = torch.cat([mask, (first[:, 12:] != 0).long(), torch.ones_like(more)], 1)
    both = torch.cat([first, more], 1)
    second = generate(llama, both, cache, attention_mask=seen, max_new_tokens=8, stop=())
    for row in range(3):
        alone = ElasticCache(llama.config, model=model, max_tokens=128)
        whole = both[row][seen[row].bool()][None]
        agree(second[row : row + 1, both.shape[1] :], generate(llama, whole, alone, max_new_tokens=8, stop=())[
            :, whole.shape[1] :], device)  # fmt: skip


def test_model_generate_goes_on_where_ours_ended(llama, device, model):
    tokens, _ = prompts(device, batch=1)
    cache = ElasticCache(llama.config, model=model, max_tokens=64)
    first = generate(llama, tokens, cache, max_new_tokens=10, stop=())
    name = cache_argument(type(llama))
    both = llama.generate(first, **{name: cache}, do_sample=False, min_new_tokens=10, max_new_tokens=10)
    agree(both, reference(llama, tokens, None, 20, min_new_tokens=20), device)


def test_max_tokens_is_the_last_place(llama, device, model):
    tokens, mask = prompts(device)
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=20)
    ours = generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=9, stop=())
    assert cache.slots.lengths == [20, 15, 10]
    agree(ours, reference(llama, tokens, mask, 9, min_new_tokens=9), device)
    with pytest.raises(elastikv.InvalidArgument, match="21 tokens, prompt and answer, do not fit"):
        generate(llama, tokens[:1], ElasticCache(llama.config, model=model, max_tokens=20), max_new_tokens=10)


def test_bad_input_leaves_the_cache_as_it_was(llama, device, model):
    tokens, mask = prompts(device)
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=64)
    generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=3, stop=())
    before = list(cache.slots.lengths)
    for options, complaint in (
        ({"max_new_tokens": 0}, "need something to do"),
        ({"max_new_tokens": 60}, "do not fit a cache"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"attention_mask": mask[:, :3]}, "attention_mask"),
        ({"stop": list(range(40))}, "40 stops"),
    ):
        longer = torch.cat([tokens, tokens], 1)
        seen = torch.cat([mask, torch.ones_like(mask)], 1)
        with pytest.raises(elastikv.InvalidArgument, match=complaint):
            generate(llama, longer, cache, **{"attention_mask": seen, "max_new_tokens": 3, **options})
        if "stops" in complaint:  # the prompt was stored by then
            break
        assert cache.slots.lengths == before
    with pytest.raises(elastikv.InvalidArgument, match="does not hold"):
        generate(llama, tokens[:, :2], cache)
    with pytest.raises(elastikv.InvalidArgument, match="batch of 3, not of 1"):
        generate(llama, tokens[:1], cache)
    plain = copy.deepcopy(llama)
    plain.set_attn_implementation("sdpa")
    with pytest.raises(elastikv.InvalidArgument, match="set_attn_implementation"):
        generate(plain, tokens, cache)


def test_a_pool_that_runs_dry(llama, device, shared, model, page_size):
    per_page = page_size // (3 * 2 * 2 * 16 * (4 if device == "cpu" else 2))
    tokens = torch.full((2, per_page - 4), 5, device=device)
    tokens[1] = 9
    cache = ElasticCache(llama.config, model=model, max_batch=2, max_tokens=4 * per_page)
    ballast = elastikv.empty((1022, page_size), (1022, page_size), torch.uint8, model)
    with pytest.raises(elastikv.OutOfPhysicalMemory):
        generate(llama, tokens, cache, max_new_tokens=20, stop=())
    assert cache.slots.lengths == [per_page, per_page]  # all that fit
    del ballast
    model.drain()  # or the next cache takes up a corner of it, and the rest is stranded
    whole = ElasticCache(llama.config, model=model, max_batch=2, max_tokens=4 * per_page)
    expected = generate(llama, tokens, whole, max_new_tokens=20, stop=())
    done = expected[:, : per_page + 1]
    agree(generate(llama, done, cache, max_new_tokens=15, stop=()), expected, device)


# ---- the decoder


def start(llama, model, device, *, rows=(4, 1, 2), capacity=64, max_tokens=256, sampling=None, **options):
    """Prompts of different lengths in scattered rows, and a decoder over them."""
    slots = Slots(kv_geometry(llama.config), model=model, rows=6, max_tokens=max_tokens, dtype=llama.dtype)
    tokens, mask = prompts(device, len(rows))
    with torch.inference_mode():
        logits = prefill(llama, slots, rows, tokens, mask.bool().cpu())
    decoder = Decoder(llama, slots, rows, capacity=capacity, sampling=sampling)
    decoder.start(logits, limits=[capacity] * len(rows), **options)
    return decoder, tokens, mask


def test_scattered_rows_step_as_one(llama, device, model):
    decoder, tokens, mask = start(llama, model, device)
    for _ in range(9):
        decoder.step()
    assert decoder.finish() == [10, 10, 10]
    theirs = reference(llama, tokens, mask, 10, min_new_tokens=10)
    agree(decoder.history[:, :10], theirs[:, 12:], device)
    assert [decoder.slots.lengths[row] for row in (4, 1, 2)] == [12 + 9, 7 + 9, 2 + 9]
    assert decoder.slots.lengths[0] == 0


def test_limits_are_by_row(llama, device, model):
    decoder, *_ = start(llama, model, device, capacity=8)
    decoder.start(torch.randn(3, 128, device=device), limits=[1, 4, 8], pad=7)
    for _ in range(12):  # steps beyond the end change nothing
        decoder.step()
    assert decoder.finish() == [1, 4, 8] and decoder.all_ended
    assert decoder.history[0, 1:].tolist() == [7] * 7
    assert [decoder.slots.lengths[row] for row in (4, 1, 2)] == [12, 7 + 3, 2 + 7]
    for limits in ([0, 1, 1], [9, 1, 1], [1, 1]):
        with pytest.raises(elastikv.InvalidArgument):
            decoder.start(torch.randn(3, 128, device=device), limits=limits)


def test_sequences_join_and_leave_between_steps(llama, device, model):
    """One decoder of two places serves five prompts, each as if it were alone."""
    slots = Slots(kv_geometry(llama.config), model=model, rows=4, max_tokens=128, dtype=llama.dtype)
    decoder = Decoder(llama, slots, [slots.idle_row] * 2, capacity=32)
    waiting = [(prompts(device, 1, 4 + 3 * number)[0], 5 + 4 * number) for number in range(5)]
    running: dict[int, tuple[int, int]] = {}
    answers: dict[int, torch.Tensor] = {}
    number = 0
    for _ in range(80):
        while number < 5 and len(running) < 2:
            tokens, limit = waiting[number]
            row, index = slots.acquire(), next(index for index in range(2) if index not in running)
            with torch.inference_mode():
                logits = prefill(llama, slots, [row], tokens, torch.ones(tokens.shape, dtype=torch.bool))
            decoder.put(index, row, int(logits.argmax()), limit)
            running[index] = (number, row)
            number += 1
        decoder.step()
        for index, (which, row) in list(running.items()):
            if bool(decoder.ended[index]):
                answers[which] = decoder.history[index].clone()
                assert decoder.drop(index) == waiting[which][1]
                assert slots.lengths[row] == waiting[which][0].shape[1] + waiting[which][1] - 1
                slots.release(row)
                del running[index]
    assert sorted(answers) == [0, 1, 2, 3, 4] and slots.lengths == [0] * 4
    for which, (tokens, limit) in enumerate(waiting):
        alone = generate(
            llama, tokens, ElasticCache(llama.config, model=model, max_tokens=64), max_new_tokens=limit, stop=()
        )
        agree(torch.cat([tokens, answers[which][None, :limit]], 1), alone, device)
    assert decoder.captures == (0 if device == "cpu" else 1)
    for wrong in ((2, 0, 5, 1), (0, 9, 5, 1), (0, 0, 5, 33), (0, 0, 5, 0)):
        with pytest.raises(elastikv.InvalidArgument):
            decoder.put(*wrong)
    with pytest.raises(elastikv.InvalidArgument, match="place 0 of 2 is free"):
        decoder.drop(0)


def test_steady_decode_makes_no_driver_call(llama, device, model):
    decoder, *_ = start(llama, model, device, capacity=2048, max_tokens=4096)
    quiet = 0
    for _ in range(300):
        model.drain()  # the worker is done, so what is counted is the calling thread's
        captures, opens_the_books = decoder.captures, decoder._room._steps <= 0
        before, allocations = model.stats().total_driver_calls, torch_allocations(device)
        decoder.step()
        if not opens_the_books and decoder.captures == captures:
            assert model.stats().total_driver_calls == before
            assert torch_allocations(device) == allocations
            quiet += 1
    assert quiet > 280


def test_growth_finds_its_pages_mapped(llama, device, model):
    """What the calling thread claims, the worker has mapped: claiming alone makes no extent."""
    decoder, *_ = start(llama, model, device, capacity=1024, max_tokens=2048)
    tensor, rows = decoder.slots.tensor, decoder.rows
    claims = 0
    for number in range(600):
        if number > 64 and decoder._room._steps <= 0:
            model.drain()
            before = mapping_calls(model)
            tensor.grow(rows, [used + SLACK for used in decoder._room.used], exact=True)  # what make() does first
            assert mapping_calls(model) == before
            claims += 1
        decoder.step()
    assert (claims > 5 or device != "cpu") and decoder.finish() == [601] * 3
    model.drain()
    used = sum(decoder.slots.lengths) * decoder.slots.token_bytes
    extent = 3 * SLACK * decoder.slots.token_bytes + 2 * model.page_size
    assert model.stats().physical_usage <= used * 1.13 + 3 * extent


def torch_allocations(device: str) -> int:
    """So many were ever made on the GPU."""
    return 0 if device == "cpu" else torch.cuda.memory_stats(device)["allocation.all.allocated"]


def mapping_calls(model) -> int:
    calls = model.stats().driver_calls
    return sum(calls[name].count for name in ("create", "map", "set_access"))


def test_size_classes():
    sizes = [size_class(tokens) for tokens in (1, 1024, 1025, 1536, 1537, 2048, 2049, 8192, 8193, 9217, 40000)]
    assert sizes == [1024, 1024, 1536, 1536, 2048, 2048, 3072, 8192, 9216, 10240, 40960]
    assert size_class(1) == SMALLEST_CLASS


def test_decoders_are_kept_with_their_graphs(llama, device, model):
    tokens, mask = prompts(device)
    cache = ElasticCache(llama.config, model=model, max_batch=3, max_tokens=64)
    answers = []
    for _ in range(3):
        answers.append(generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=12, stop=()))
        cache.reset()
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[2])
    assert len(cache._decoders) == 1
    assert next(iter(cache._decoders.values())).captures == (0 if device == "cpu" else 1)
    generate(llama, tokens, cache, attention_mask=mask, max_new_tokens=4, temperature=0.5, top_k=3)
    assert len(cache._decoders) == 2
    cache.close()
    assert not cache._decoders


def test_other_addresses_need_another_decoder(llama, device, model):
    decoder, *_ = start(llama, model, device)
    decoder.slots.allocate(decoder.slots.shapes, decoder.slots.dtype)
    assert decoder.stale
    with pytest.raises(elastikv.InvalidArgument, match="make a new decoder"):
        decoder.start(torch.randn(3, 128, device=device), limits=[1, 1, 1])


# ---- compiled


def test_a_compiled_model_has_no_graph_break(llama, device, model):
    """The attention is one operator to the compiler; the rest is a single graph."""
    tokens, mask = prompts(device)
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager" if device == "cpu" else "inductor", fullgraph=True)
    slots = Slots(kv_geometry(llama.config), model=model, rows=3, max_tokens=64, dtype=llama.dtype)
    with torch.inference_mode():
        logits = prefill(llama, slots, range(3), tokens, mask.bool().cpu())
    decoder = Decoder(compiled, slots, range(3), capacity=10)
    decoder.start(logits, limits=[10] * 3)
    while not decoder.all_ended:
        decoder.step()
    assert decoder.finish() == [10] * 3
    agree(decoder.history[:, :10], reference(llama, tokens, mask, 10, min_new_tokens=10)[:, 12:], device)
