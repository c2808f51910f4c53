"""The engine: transformers' tokens for every request, whoever joins, leaves or makes way; nothing is left after."""

from __future__ import annotations

import random

import pytest
import torch

import elastikv

pytest.importorskip("transformers")

from elastikv.hf import Sampling
from elastikv.serving import Finish, State, run_until_idle
from hf_networks import make_network
from serving_tools import Clock, closed, expected, make_engine, make_pool, prompt, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pool_pages():
    return 1024


# ---- what comes out


@pytest.mark.parametrize("name", ["gqa", "sliding"])
def test_requests_of_many_lengths_get_transformers_answers(name, device, shared):
    network = make_network(name, device)
    engine = make_engine(shared, network)
    lengths = [(3, 9), (40, 5), (17, 1), (1, 30), (33, 12), (16, 16), (5, 3)]
    requests = [engine.submit(prompt(i, n), max_new_tokens=new) for i, (n, new) in enumerate(lengths)]
    run_until_idle(engine)
    for index, (request, (length, new)) in enumerate(zip(requests, lengths)):
        assert request.finish is Finish.LENGTH and request.done
        assert same(request.answer, expected(network, prompt(index, length), new), device)
        assert request.result() == request.answer and list(request.tokens) == prompt(index, length) + request.answer
    assert engine.counts.decoded_tokens == sum(new - 1 for _, new in lengths)
    closed(shared, engine)


def test_stop_tokens_end_an_answer(llama, device, shared):
    engine = make_engine(shared, llama)
    free = engine.submit(prompt(1, 9), max_new_tokens=20).result()
    stop = free[6]
    request = engine.submit(prompt(1, 9), max_new_tokens=20, stop=[stop])
    assert request.result() == free[: free.index(stop) + 1]
    assert request.finish is Finish.STOP
    closed(shared, engine)


def test_each_request_is_sampled_by_its_own_settings(llama, device, shared):
    engine = make_engine(shared, llama)
    settings = [
        {"sampling": Sampling(temperature=1.0), "seed": 1},
        {"sampling": Sampling(temperature=0.7, top_k=5), "seed": 2},
        {"sampling": Sampling(temperature=1.3, top_p=0.6), "seed": 3},
        {"repetition_penalty": 1.5},
        {},
    ]
    together = [engine.submit(prompt(9, 7), max_new_tokens=24, **each) for each in settings]
    run_until_idle(engine)
    alone = []
    for each in settings:
        alone.append(engine.submit(prompt(9, 7), max_new_tokens=24, **each))
        run_until_idle(engine)
    for first, second in zip(together, alone):
        assert same(first.answer, second.answer, device)
    assert len({tuple(one.answer) for one in together}) == 5
    assert len(set(together[3].answer)) > len(set(together[4].answer)) or len(set(together[4].answer)) == 24
    other = engine.submit(prompt(9, 7), max_new_tokens=24, sampling=Sampling(temperature=1.0), seed=7).result()
    assert other != together[0].answer
    closed(shared, engine)


def test_draws_follow_the_probabilities(device):
    from elastikv.serving.choice import Choice, Kind
    from elastikv.serving.request import Asked

    device = torch.device(device)
    count, logits = 2000, torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5], device=device)
    choice = Choice(Kind(draws=True), 1, 5, device)

    def shares(**options) -> list[float]:
        choice.set(0, Asked((1,), 1, Sampling(**options), seed=11), [])
        drawn = [int(choice(logits[None], torch.tensor([position], device=device))) for position in range(count)]
        return [drawn.count(token) / count for token in range(5)]

    for options, kept in (
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 3}, [1, 2, 4]),
        ({"temperature": 1.0, "top_p": 0.6}, [1, 4]),
    ):
        wanted = torch.full((5,), -torch.inf)
        wanted[kept] = logits.cpu()[kept] / options["temperature"]
        for found, right in zip(shares(**options), wanted.softmax(0).tolist()):
            assert abs(found - right) < 0.04


# ---- joining, leaving, making way


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_events_gives_the_same_tokens(llama, device, seed):
    """Random joins, cancels, deadlines and preemptions in a pool that is too small for all."""
    page_size = 4096 if device == "cpu" else 2 << 20
    rng = random.Random(seed)
    with make_pool(device, page_size, pages=[70, 1000, 45][seed % 3]) as pool:
        clock = Clock()
        engine = make_engine(
            pool, llama, clock=clock, keep_pages=seed % 2 == 0, promise=rng.choice([1, 8, 64, None]),
            prefix_entries=rng.choice([0, 2, 16]), max_batch=rng.choice([1, 3, 8]),
        )  # fmt: skip
        engine._lanes._lag = 1 if device != "cpu" else seed % 2  # the host reads a step late, as on a GPU
        common = prompt(100, 60)
        requests = []
        for _ in range(250):
            clock.now += 1
            event = rng.random()
            if event < 0.2 and len(requests) < 20:
                shared_tokens = rng.choice([0, 0, 20, 60])
                text = common[:shared_tokens] + prompt(len(requests), rng.randint(1, 50))
                deadline = clock.now + rng.randint(1, 200) if rng.random() < 0.2 else None
                requests.append(engine.submit(text, max_new_tokens=rng.randint(1, 40), deadline=deadline))
            elif event < 0.18 and requests:
                rng.choice(requests).cancel()
            elif event < 0.22 and requests:
                engine.pause(rng.choice(requests))
            elif event < 0.26:
                engine.give_way(rng.choice([None, *requests]))
            engine.advance()
            held = sum(request.stored for request in engine.running)
            assert held * engine.slots.token_bytes <= pool.global_stats().physical_usage + engine.handle.stats().aliased
        run_until_idle(engine)
        assert len(requests) > 10
        for request in requests:
            right = expected(llama, list(request.asked.prompt), request.asked.max_new_tokens)
            if request.finish is Finish.LENGTH:
                assert same(request.answer, right, device)
            else:
                assert request.finish in (Finish.CANCELLED, Finish.DEADLINE)
                assert same(request.answer, right[: len(request.answer)], device)
            assert request.result() == request.answer
        counts = engine.counts
        assert sum(counts.finished.values()) == counts.submitted == len(requests)
        assert engine.running == [] and engine.waiting == 0
        closed(pool, engine)


@pytest.mark.parametrize(("keep_pages", "lag"), [(True, 0), (True, 1), (False, 0), (False, 1)])
def test_a_pool_that_runs_dry_interrupts_the_youngest(llama, device, page_size, keep_pages, lag):
    token = 3 * 2 * 2 * 16 * llama.dtype.itemsize
    per_page = page_size // token
    row = 2 * per_page  # what each has in the end
    with make_pool(device, page_size, pages=5) as pool:
        engine = make_engine(
            pool, llama, max_tokens=3 * per_page, promise=1, prefix_entries=0, keep_pages=keep_pages,
            chunk=per_page,
        )  # fmt: skip
        engine._lanes._lag = lag  # as on a GPU, where the host reads a step late
        start = per_page - 4
        requests = [engine.submit(prompt(i, start), max_new_tokens=12 if device != "cpu" else row - start)
                    for i in range(4)]  # fmt: skip
        run_until_idle(engine)
        assert all(request.finish is Finish.LENGTH for request in requests)
        assert requests[0].pauses == requests[0].restarts == 0
        assert sum(one.restarts for one in requests) > 0 or keep_pages
        assert (sum(one.pauses for one in requests) > 0) == keep_pages
        ended = [request.ended for request in requests]
        assert ended == sorted(ended)
        for index, request in enumerate(requests):
            right = expected(llama, prompt(index, start), request.asked.max_new_tokens)
            assert same(request.answer, right, device)
        closed(pool, engine)


def test_what_is_promised_whole_is_never_interrupted(llama, device, page_size):
    with make_pool(device, page_size, pages=25) as pool:
        engine = make_engine(pool, llama, max_tokens=300, promise=None, prefix_entries=0, max_batch=8)
        requests = [engine.submit(prompt(i, 20), max_new_tokens=30 + i) for i in range(8)]
        run_until_idle(engine)
        assert all(request.finish is Finish.LENGTH for request in requests)
        assert engine.counts.pauses == engine.counts.restarts == 0
        closed(pool, engine)


@pytest.mark.parametrize("lag", [0, 1])
def test_places_that_nobody_takes_do_not_lack_memory(llama, device, page_size, lag):
    """Five rows in a decoder of more places, in a pool that holds the rows to the page, and one more."""
    per_page = page_size // (3 * 2 * 2 * 16 * llama.dtype.itemsize)
    with make_pool(device, page_size, pages=5 * 6 + 1) as pool:
        engine = make_engine(
            pool, llama, max_batch=5, max_tokens=8 * per_page, promise=None, prefix_entries=0, chunk=8 * per_page
        )
        engine._lanes._lag = lag
        requests = [engine.submit(prompt(i, 5 * per_page), max_new_tokens=min(per_page, 20)) for i in range(5)]
        run_until_idle(engine)
        assert all(request.finish is Finish.LENGTH for request in requests)
        assert engine.counts.pauses == engine.counts.restarts == 0 and engine.counts.admitted == 5
        closed(pool, engine)


def test_starts_are_in_the_order_of_arrival(llama, device, shared):
    engine = make_engine(shared, llama, max_batch=2, prefix_entries=0)
    order: list[int] = []
    requests = [
        engine.submit(prompt(i, 60 - 7 * i), max_new_tokens=4, on_token=lambda one, _: order.append(one.number))
        for i in range(8)
    ]
    run_until_idle(engine)
    firsts = list(dict.fromkeys(order))
    assert firsts[::2] == [one.number for one in requests[::2]] or firsts == [one.number for one in requests]
    assert [sorted(firsts[i : i + 2]) for i in range(0, 8, 2)] == [
        [one.number for one in requests[i : i + 2]] for i in range(0, 8, 2)
    ]
    closed(shared, engine)


def test_long_prompts_do_not_stop_those_who_decode(llama, device, shared):
    engine = make_engine(shared, llama, chunk=8, prefix_entries=0)
    first = engine.submit(prompt(0, 4), max_new_tokens=40)
    engine.advance()
    second = engine.submit(prompt(1, 96), max_new_tokens=4)  # 12 chunks
    before = len(first.answer)
    for _ in range(12):
        engine.advance()
    assert len(first.answer) >= before + 11 and second.state in (State.PREFILL, State.DECODE)
    run_until_idle(engine)
    assert same(second.answer, expected(llama, prompt(1, 96), 4), device)
    closed(shared, engine)


# ---- ends before the end


def test_cancel_and_deadline(llama, device, shared):
    clock = Clock()
    engine = make_engine(shared, llama, clock=clock, prefix_entries=0, max_batch=2)
    cancelled = engine.submit(prompt(0, 6), max_new_tokens=100)
    late = engine.submit(prompt(1, 6), max_new_tokens=100, deadline=10.0)
    never = engine.submit(prompt(2, 6), max_new_tokens=5, deadline=3.0)  # never gets a row in time
    other = engine.submit(prompt(3, 6), max_new_tokens=5)
    for _ in range(5):
        clock.now += 1
        engine.advance()
    cancelled.cancel()
    cancelled.cancel()
    clock.now = 10.0
    run_until_idle(engine)
    assert [one.finish for one in (cancelled, late, never)] == [Finish.CANCELLED, Finish.DEADLINE, Finish.DEADLINE]
    assert never.answer == [] and len(late.answer) >= 4 and other.finish is Finish.LENGTH
    assert cancelled.answer == expected(llama, prompt(0, 6), 100)[: len(cancelled.answer)] or device != "cpu"
    assert never.ended == 3.0
    closed(shared, engine)


def test_an_error_of_the_model_ends_those_it_concerns(llama, device, shared, monkeypatch):
    engine = make_engine(shared, llama, prefix_entries=0)
    first = engine.submit(prompt(0, 6), max_new_tokens=8)
    engine.advance()
    from elastikv.serving import prompts

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "run_step", broken)
        second = engine.submit(prompt(1, 6), max_new_tokens=8)
        engine.advance()
    run_until_idle(engine)
    assert second.finish is Finish.ERROR
    with pytest.raises(RuntimeError, match="broken"):
        second.result()
    assert first.finish is Finish.LENGTH and same(first.answer, expected(llama, prompt(0, 6), 8), device)
    closed(shared, engine)


def test_a_listener_that_fails_ends_its_own_request(llama, device, shared):
    engine = make_engine(shared, llama)

    def listener(request, token):
        if len(request.answer) >= 3:
            raise ValueError("enough")

    first = engine.submit(prompt(0, 6), max_new_tokens=20, on_token=listener)
    second = engine.submit(prompt(1, 6), max_new_tokens=20)
    run_until_idle(engine)
    with pytest.raises(ValueError, match="enough"):
        first.result()
    assert first.finish is Finish.ERROR and second.finish is Finish.LENGTH
    closed(shared, engine)


def test_what_can_never_be_served_is_refused(llama, device, shared, page_size):
    engine = make_engine(shared, llama)
    for tokens, options, complaint in (
        ([], {}, "a prompt of 0 tokens"),
        ([5], {"max_new_tokens": 0}, "0 new ones"),
        ([5] * 100, {"max_new_tokens": 62}, "do not fit an engine of max_tokens=160"),
        ([5], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([5], {"repetition_penalty": 1e39}, "repetition_penalty=1e.39"),
        ([5], {"sampling": Sampling(1e300)}, "temperature=1e.300"),
        ([5], {"seed": 1 << 63}, "seed=9223372036854775808"),
    ):
        with pytest.raises(elastikv.InvalidArgument, match=complaint):
            engine.submit(tokens, **options)
    engine.handle.set_quota(limit=2 * page_size)
    big = make_engine(shared, llama, "big", max_tokens=100_000)
    big.handle.set_quota(limit=page_size)
    with pytest.raises(elastikv.OutOfPhysicalMemory, match="may hold"):
        big.submit([5] * 90_000)
    open_one = engine.submit([5], max_new_tokens=3)
    closed(shared, engine, big)
    assert open_one.finish is Finish.CANCELLED and open_one.result() == []
    with pytest.raises(elastikv.PoolClosed, match="was closed"):
        engine.submit([5])
    with pytest.raises(elastikv.PoolClosed, match="was closed"):
        engine.advance()
    engine.close()
    late = make_engine(shared, llama, "late", clock=lambda: late.close() or 0.0)  # amid the call of submit
    with pytest.raises(elastikv.PoolClosed, match="was closed"):
        late.submit([5])
    assert late.idle
    with pytest.raises(elastikv.InvalidArgument, match="max_batch=0"):
        make_engine(shared, llama, "third", max_batch=0)
