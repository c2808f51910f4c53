"""The demo's engine room: every answer is DynamicCache's, jobs wait rather than fail, and the numbers are true."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import pytest
import torch

import elastikv
from conftest import settled_usage

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, StaticCache

from elastikv.demo import prompts
from elastikv.demo.accounting import Service, dynamic_cache_bytes, static_cache_bytes
from elastikv.demo.check import check_answers
from elastikv.demo.roles import Role, load_roles, smollm2_file
from elastikv.demo.run import Options, run_demo
from elastikv.demo.serve import Server
from elastikv.demo.workload import Job, choose_limit, demand, make_jobs, row_tokens
from elastikv.hf.geometry import kv_geometry
from elastikv.trace import TraceRequest, model_of

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LLAMA = LlamaConfig(**SIZES)
MISTRAL = MistralConfig(**SIZES, sliding_window=9)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


class Recorder:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.samples = []
        self.calls: list[str] = []
        self.plan = None

    def loading(self, device):
        self.calls.append("loading")

    def planned(self, plan):
        self.calls.append("planned")
        self.plan = plan

    def token(self, job):
        self.tokens.append((job.index, job.answer[-1]))

    def finished(self, job):
        self.done.append(job.index)

    def sampled(self, sample):
        self.samples.append(sample)

    def checked(self, job):
        self.calls.append("checked")


def tiny_role(name: str, config, seed: int, device: str, stop=()) -> Role:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()

    def prompt(index: int, length: int) -> list[int]:
        rng = random.Random(100 * seed + index)
        return [rng.randrange(3, 128) for _ in range(length)]

    return Role(name, "tiny", model, prompt, lambda tokens: " ".join(map(str, tokens)), frozenset(stop))


@pytest.fixture
def roles(device):
    return [tiny_role("llama", LLAMA, 1, device), tiny_role("mistral", MISTRAL, 2, device)]


def serve(jobs, roles, *, limit: int, device: str):
    """A server's whole run; every job's tokens and all the memory are checked."""
    with elastikv.SharedMemoryPool(limit, device, park_limit=0) as pool:
        services = []
        for index, role in enumerate(roles):
            handle = pool.register_model(role.name, virtual_capacity=1 << 30)
            count = sum(job.role == index for job in jobs)
            services.append(Service(role, handle, row_tokens(jobs, index), count))
        screen = Recorder()
        server = Server(jobs, services, pool, screen)
        server.run()
        assert settled_usage(pool, *(one.handle for one in services)) == 0
        assert pool.global_stats().peak_physical <= limit
        assert [one.done for one in services] == [one.jobs for one in services]
        assert sorted(screen.done) == [job.index for job in jobs]
        assert check_answers(jobs, roles) == []
        assert sum(one.tokens for one in services) == sum(len(job.answer) for job in jobs)
        return server, screen


def burst(roles, count: int, *, context: int, wanted: int) -> list[Job]:
    return [
        Job(index, index % 2, index // 4, roles[index % 2].prompt(index, context + index), wanted + index % 3)
        for index in range(count)
    ]


# ---- scheduling


def test_serves_everything_when_there_is_room(roles, device, page_size):
    jobs = burst(roles, 8, context=5, wanted=12)
    server, screen = serve(jobs, roles, limit=200 * page_size, device=device)
    assert [len(job.answer) for job in jobs] == [job.wanted for job in jobs]
    assert all(job.pauses == job.restarts == 0 for job in jobs)
    assert len(screen.tokens) == sum(job.wanted for job in jobs)
    assert all(sample.waiting == 0 for sample in screen.samples)
    # The samples are the pool's own numbers, and end with nothing.
    samples = server.timeline.samples
    assert samples == screen.samples and samples[-1].physical == 0
    assert max(sample.physical for sample in samples) >= 4 * page_size
    assert all(sample.physical == sum(one.physical for one in sample.models) for sample in samples)


def test_requests_wait_when_the_pool_is_full(roles, device, page_size):
    per_page = page_size // TOKEN_BYTES
    jobs = burst(roles, 8, context=2 * per_page, wanted=6)  # 3 pages each
    _, screen = serve(jobs, roles, limit=7 * page_size, device=device)
    assert max(sample.waiting for sample in screen.samples) >= 3
    assert max(sum(one.running for one in sample.models) for sample in screen.samples) == 2
    assert all(job.restarts == 0 for job in jobs)


def test_growth_into_a_dry_pool_makes_the_youngest_wait(roles, device, page_size):
    # Four prompts of 2 pages start with room for 2 more, and end at 12: there is room for 26.
    jobs = [Job(i, i % 2, 0, roles[i % 2].prompt(i, 16), 80) for i in range(4)]
    _, screen = serve(jobs, roles, limit=26 * page_size, device=device)
    if device == "cpu":  # a GPU's pages hold a thousand tokens
        assert sum(job.pauses for job in jobs) > 0
    assert jobs[0].pauses == jobs[0].restarts == 0
    assert [len(job.answer) for job in jobs] == [80] * 4
    assert len(screen.tokens) == 4 * 80  # no token that was seen is taken back


def test_a_job_too_large_for_the_pool_is_an_error(roles, device, page_size):
    per_page = page_size // TOKEN_BYTES
    with pytest.raises(elastikv.OutOfPhysicalMemory, match="may hold"):
        serve([Job(0, 0, 0, roles[0].prompt(0, 3 * per_page), 4)], roles, limit=2 * page_size, device=device)


def test_stop_tokens_end_an_answer(device, page_size):
    free = tiny_role("llama", LLAMA, 1, device)
    jobs = [Job(0, 0, 0, free.prompt(0, 8), 20)]
    serve(jobs, [free, free_twin(free)], limit=64 * page_size, device=device)
    ending = jobs[0].answer[5]
    stopping = replace(free, stop=frozenset([ending]))
    again = [Job(0, 0, 0, free.prompt(0, 8), 20)]
    serve(again, [stopping, free_twin(free)], limit=64 * page_size, device=device)
    assert again[0].answer == jobs[0].answer[: jobs[0].answer.index(ending) + 1]


def free_twin(role: Role) -> Role:
    """A second role with the same weights, as SmolLM2 has."""
    return replace(role, name=role.name + "-twin")


def test_idle_times_are_skipped_and_shown_as_nothing(roles, device, page_size):
    jobs = [Job(0, 0, 0, roles[0].prompt(0, 4), 3), Job(1, 1, 500, roles[1].prompt(1, 4), 3)]
    server, screen = serve(jobs, roles, limit=16 * page_size, device=device)
    assert len(screen.samples) < 12 and server.clock >= 500
    quiet = [sample for sample in screen.samples if sample.physical == 0]
    assert quiet[0].seconds < 5 and quiet[-1].seconds > 99


def test_the_check_finds_a_wrong_token(roles, device, page_size):
    jobs = burst(roles, 2, context=5, wanted=5)
    serve(jobs, roles, limit=64 * page_size, device=device)
    right = jobs[1].answer[3]
    jobs[1].answer[3] = right + 1
    jobs[0].answer.pop()
    first, second = check_answers(jobs, roles)
    assert (first.request, first.position, first.elastic) == (0, 4, None)
    assert (second.request, second.position, second.elastic, second.dynamic) == (1, 3, right + 1, right)
    assert "request 1 (mistral), token 3" in str(second)


# ---- accounting


@pytest.mark.parametrize("config", [LLAMA, MISTRAL])
def test_other_caches_are_counted_right(config):
    """Against the tensors that the real ones hold."""
    geometry = kv_geometry(config)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    static, dynamic = StaticCache(config=config, max_cache_len=32), DynamicCache(config=config)
    with torch.inference_mode():
        for cache in (static, dynamic):
            network(torch.arange(3, 23)[None], past_key_values=cache)

    def owned(cache) -> int:
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert static_cache_bytes(geometry, torch.float32, row=32, jobs=1) == owned(static)
    kept = 20 if config is LLAMA else 8
    assert dynamic_cache_bytes(geometry, torch.float32, [20]) == owned(dynamic) + kept * TOKEN_BYTES // 2
    assert dynamic_cache_bytes(geometry, torch.float32, []) == 0
    assert static_cache_bytes(geometry, torch.float32, row=32, jobs=3) == 3 * owned(static)


def test_demand_is_what_an_unlimited_run_takes(roles, device):
    jobs = burst(roles, 6, context=5, wanted=9)
    need = demand(jobs, roles)
    server, _ = serve(jobs, roles, limit=1 << 30, device=device)
    running = [sum(one.running for one in sample.models) for sample in server.timeline.samples]
    assert max(running) == 6
    most = 0
    for now in range(40):
        lengths = [len(j.prompt) + now - j.arrival for j in jobs if 0 <= now - j.arrival < j.wanted]
        most = max(most, sum(lengths) * TOKEN_BYTES)
    assert need.peak == most and need.largest == max(len(j.prompt) + j.wanted for j in jobs) * TOKEN_BYTES
    assert max(need.peaks) <= need.peak <= sum(need.peaks)
    assert choose_limit(need, 4096) >= need.largest * 9 // 8


# ---- workload and prompts


def test_models_take_turns(roles):
    assert [model_of(i, 2.0 * i, models=2, shift=10.0) for i in range(12)] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1]
    requests = [TraceRequest(i / 2, 10 + i, 4) for i in range(20)]
    jobs, cut = make_jobs(requests, roles, shift=5.0)
    assert cut == 0 and [len(job.prompt) for job in jobs] == [10 + i for i in range(20)]
    assert {job.role for job in jobs} == {0, 1} and jobs[4].arrival == 10
    with pytest.raises(elastikv.InvalidArgument, match="above 0"):
        make_jobs(requests, roles, shift=0)


def test_requests_longer_than_the_model_are_cut(roles):
    most = LLAMA.max_position_embeddings
    jobs, cut = make_jobs([TraceRequest(0, 10 * most, 10 * most), TraceRequest(1, 5, 5)], roles, shift=15.0)
    assert cut == 1 and (len(jobs[0].prompt), jobs[0].wanted) == (most // 2, most // 2)


class Letters:
    """A tokenizer whose tokens are letters."""

    chat_template = "has one"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<user>{messages[0]['content']}</user><assistant>"


@pytest.mark.parametrize("length", [1, 7, 90, 1500, 4000])
@pytest.mark.parametrize("index", [0, 5, 23])
def test_prompts_have_the_exact_length(length, index):
    chat = prompts.chat_prompt(Letters(), index, length)
    completion = prompts.completion_prompt(Letters(), index, length)
    assert len(chat) == len(completion) == length
    assert "".join(map(chr, chat)).endswith("</user><assistant>"[-length:])
    assert "".join(map(chr, completion)).endswith(prompts.OPENINGS[index % 8][-length:])
    if length >= 1500:
        text = "".join(map(chr, chat))
        assert text.startswith("<user>") and prompts.QUESTIONS[index % 8] in text


def test_where_models_come_from(tmp_path):
    with pytest.raises(elastikv.InvalidArgument, match="there is no model"):
        load_roles(str(tmp_path / "nothing"), device="cpu", dtype=torch.float32)
    assert smollm2_file() is None or smollm2_file().suffix == ".gguf"


def test_random_models_are_two_architectures_with_fixed_weights():
    first, second = load_roles("random", device="cpu", dtype=torch.float32)
    assert {first.model.config.model_type, second.model.config.model_type} == {"llama", "mistral"}
    config = first.model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert set(first.geometry.windows) == {None} and set(second.geometry.windows) == {384}
    again, _ = load_roles("random", device="cpu", dtype=torch.float32)
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)
    assert first.prompt(3, 20) == again.prompt(3, 20) != first.prompt(4, 20)
    assert first.text([0, 4095]) == "baba zozo"


def test_a_checkpoint_on_disk_serves_both_roles(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate("abcde")}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    chat, completer = load_roles(str(tmp_path), device="cpu", dtype=torch.float32)
    assert chat.model is completer.model and (chat.name, completer.name) == ("chat", "completer")
    assert len(chat.prompt(0, 33)) == len(completer.prompt(0, 33)) == 33


# ---- all of it


@pytest.mark.parametrize("windowed", [False, True])
def test_a_whole_run(tmp_path, monkeypatch, roles, device, windowed):
    both = roles if windowed else [roles[0], free_twin(roles[0])]
    monkeypatch.setattr("elastikv.demo.run.load_roles", lambda *_, **__: both)
    trace = tmp_path / "trace.csv"
    lines = [f"2024-01-01 00:00:{i:02d},{20 + i},{6 + i % 4}" for i in range(10)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    out = tmp_path / "deep" / "out"
    screen = Recorder()
    result = run_demo(Options(trace=trace, shift=4.0, device=device, out=out), screen)

    assert result.ok and result.left == 0 and result.differences == []
    assert screen.calls == ["loading", "planned", *["checked"] * 10]
    assert result.picture == out / "elastikv-demo.png"
    assert result.picture.read_bytes().startswith(b"\x89PNG") and result.picture.stat().st_size > 10_000
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["total"]["requests"] == 10 and summary["differences"] == []
    assert summary["total"]["physical_peak"] <= summary["limit"] == result.plan.limit
    rows = list(csv.DictReader((out / "timeline.csv").read_text().splitlines()))
    assert len(rows) == len(result.timeline.samples)
    assert int(rows[-1]["total_physical"]) == 0 < max(int(row["total_physical"]) for row in rows)
    assert max(int(row[f"{both[0].name}_static_cache"]) for row in rows) == summary["models"][0]["static_cache_peak"]


def test_a_limit_below_the_largest_request(tmp_path, monkeypatch, roles, device):
    monkeypatch.setattr("elastikv.demo.run.load_roles", lambda *_, **__: roles)
    with pytest.raises(elastikv.InvalidArgument, match="too small"):
        run_demo(Options(limit=4096, device=device, out=tmp_path), Recorder())


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(elastikv.DeviceUnavailable, match="cuda:99"):
        run_demo(Options(device="cuda:99", out=tmp_path), Recorder())
