"""One rank of test_two_gpus.py, run as `two_gpus_worker.py RANK RANKS FOLDER KIND`, KIND cpu (gloo) or cuda (NCCL).

What goes wrong ends it with a traceback."""

# ruff: noqa: PT017 (what a rank must see depends on the dice)

from __future__ import annotations

import copy
import datetime
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import elastikv
from elastikv.distributed import Ranks, split
from elastikv.hf import ElasticCache, Sampling, generate
from elastikv.hf.decoder import Decoder
from elastikv.hf.forward import cache_argument
from elastikv.hf.slots import Slots

GROWTHS = 1000
SIZES = {"num_hidden_layers": 3, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2,
         "max_position_embeddings": 4096}  # fmt: skip
# Tokens so large that a page holds some ten of them on the host, and some 340 on a GPU.
HOST = {**SIZES, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
GPU = {**SIZES, "vocab_size": 512, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 16,
       "num_key_value_heads": 8, "head_dim": 128, "initializer_range": 0.05}  # fmt: skip


class InjectedError(Exception):
    """What fails on one rank, and is no want of memory."""


class FaultyRanks(Ranks):
    """Counts growths, and makes some fail on one rank: all throw the same dice."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.dice = random.Random(seed)
        self.faults = False
        self.hoard: Callable[[], Callable[[], None]] | None = None  # takes all memory; what it returns gives it back
        self.seen = {"growths": 0, "hoarded": 0, "injected": 0, "short": 0, "refused": 0}

    def propose(self, what, numbers, stage):
        if what != "grow":
            return super().propose(what, numbers, stage)
        self.seen["growths"] += 1
        fault = self.dice.choices(["none", "memory", "error"], [8, 2, 1])[0] if self.faults else "none"
        mine = self.dice.choice(self.members) == dist.get_rank()
        if fault == "error":
            self.seen["injected"] += 1
            if mine:
                return super().propose(what, numbers, self.fail)
        elif fault == "memory":
            self.seen["hoarded"] += 1
            if mine:
                give_back = self.hoard()
                try:
                    return super().propose(what, numbers, stage)
                finally:
                    give_back()
        return super().propose(what, numbers, stage)

    def fail(self):
        raise InjectedError


class Rank:
    """This rank's device, its share of a network, the whole of it, and a pool with a cache."""

    def __init__(self, kind: str, seed: int) -> None:
        self.device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", dist.get_rank())
        self.dtype = torch.float32 if kind == "cpu" else torch.float16
        self.ranks = FaultyRanks(seed, timeout=60)
        # Of the test's own, for what the ranks tell each other; the default one may be NCCL's.
        self.told = dist.new_group(backend="gloo")
        torch.manual_seed(4)
        config = LlamaConfig(**(HOST if kind == "cpu" else GPU))
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.whole = whole.to(self.device, self.dtype)
        self.network = split(copy.deepcopy(self.whole))
        self.network.set_attn_implementation("elastikv")
        self.page = 4096 if kind == "cpu" else 2 << 20
        self.pool = elastikv.SharedMemoryPool(512 * self.page, str(self.device), park_limit=0)
        self.model = self.pool.register_model("model", 1 << 40)
        self.ballast = self.pool.register_model("ballast", 1 << 40)
        self.ranks.hoard = self.hoard
        self.cache = self.new_cache()
        self.copied = False  # there is another cache, too

    def new_cache(self) -> ElasticCache:
        return ElasticCache(self.network.config, model=self.model, max_batch=4, max_tokens=1024, ranks=self.ranks)

    def hoard(self) -> Callable[[], None]:
        free = self.pool.global_stats().available
        if not free:
            return lambda: None
        taken = self.pool.allocate_for_model("ballast", free)
        return lambda: self.pool.deallocate_for_model("ballast", taken - self.ballast.base_address, free)

    def same_everywhere(self, numbers: torch.Tensor) -> None:
        numbers = numbers.flatten().to("cpu", torch.int64)
        ends = torch.cat((numbers, -numbers))
        dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=self.told)
        assert torch.equal(ends, torch.cat((numbers, -numbers))), (numbers, ends)

    def agree(self) -> None:
        """No rank holds a page that the other lacks."""
        slots, stats = self.cache.slots, self.model.stats()
        rows = [] if slots.tensor is None else [slots.tensor.resident(row) for row in range(slots.rows + 1)]
        self.same_everywhere(torch.tensor([*rows, *slots.lengths]))
        if slots.tensor is None or slots.tensor.settled:
            held = 0 if slots.tensor is None else slots.tensor.claimed_bytes
            self.same_everywhere(torch.tensor([held, stats.used, stats.live]))
            assert stats.used == stats.live and (held == stats.used or self.copied)

    def until_it_works(self, act: Callable[[], Any]) -> Any:
        """What ranks do about a growth that failed on one of them: nothing has changed, so it is tried again."""
        while True:
            before = self.ranks.seen["growths"]
            try:
                return act()
            except elastikv.OutOfPhysicalMemory:
                self.ranks.seen["short"] += 1
            except (elastikv.RankFailed, InjectedError) as error:
                assert isinstance(error, InjectedError) or error.rank is not None, error
                self.ranks.seen["refused"] += 1
            finally:
                if self.ranks.seen["growths"] != before:
                    self.agree()

    def prompts(self, dice: random.Random, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = dice.randint(1, 4), dice.randint(2, longest)
        generator = torch.Generator().manual_seed(dice.randint(0, 1 << 30))
        tokens = torch.randint(3, self.whole.config.vocab_size, (batch, length), generator=generator)
        mask = torch.ones_like(tokens)
        for row in range(1, batch):
            mask[row, : dice.randint(0, length - 1)] = 0
        return (tokens * mask).to(self.device), mask.to(self.device)

    def as_good(self, answers: torch.Tensor, mask: torch.Tensor, stops: list[int]) -> None:
        """One GPU with the whole network finds each token as likely as its own best, within the dtype's tolerance."""
        prompt, new = mask.shape[1], answers.shape[1] - mask.shape[1]
        full = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = self.whole(answers, attention_mask=full, position_ids=positions).logits[:, prompt - 1 : -1].float()
        chosen = logits.gather(2, answers[:, prompt:, None]).squeeze(2)
        best = logits.max(2).values
        ends = torch.isin(answers[:, prompt:], torch.tensor(stops, device=answers.device)).int()
        live = ends.cumsum(1) - ends == 0  # up to the first stop
        off = ((best - chosen) / logits.abs().amax(2))[live]
        assert off.max() <= (1e-4 if self.dtype == torch.float32 else 2e-2), off.max()
        assert (off == 0).float().mean() > 0.9


def same_logits(rank: Rank) -> None:
    """A pass of the split network is a pass of the whole one, and the ranks' results are the same to the bit."""
    tokens, _ = rank.prompts(random.Random(3), 40)
    with torch.inference_mode():
        ours = rank.network(tokens, use_cache=False).logits
        theirs = rank.whole(tokens, use_cache=False).logits
    tolerance = 1e-4 if rank.dtype == torch.float32 else 3e-2
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    rank.same_everywhere((ours.float() * 2**20).round())
    weights = [
        sum(each.numel() for each in network.model.layers.parameters()) for network in (rank.network, rank.whole)
    ]
    assert 0.49 < weights[0] / weights[1] < 0.52
    assert rank.network.config.num_key_value_heads * 2 == rank.whole.config.num_key_value_heads


def random_growths(rank: Rank) -> None:
    """Answers to random prompts, rows that reserve and crop, and growths that fail on one rank throughout."""
    dice, slots, stops = random.Random(5), rank.cache.slots, [7, 19, 40, 77]
    longest, new = (60, 12) if rank.dtype == torch.float32 else (600, 90)
    answered = 0
    rank.ranks.faults = True
    while rank.ranks.seen["growths"] < GROWTHS:
        rank.cache.reset()
        rank.agree()
        tokens, mask = rank.prompts(dice, longest)
        drawn = dice.random() < 0.2
        settings = {"temperature": 1.0, "top_k": 20, "seed": dice.randint(0, 1 << 30)} if drawn else {}
        answers = generate(
            rank.network, tokens, rank.cache, attention_mask=mask, max_new_tokens=dice.randint(1, new), stop=stops,
            pad=0, **settings,
        )  # fmt: skip
        rank.same_everywhere(answers)
        answered += 1
        if not drawn:
            rank.as_good(answers, mask, stops)
        for _ in range(8):
            rows = dice.sample(range(slots.rows), dice.randint(1, slots.rows))
            slots.reserve(rows, [dice.randint(0, min(400, slots.max_tokens - slots.lengths[row])) for row in rows])
            slots.crop(range(slots.rows), list(slots.lengths))
            rank.agree()
    rank.ranks.faults = False
    seen = rank.ranks.seen
    assert seen["short"] > 50 and seen["refused"] > 50 and answered > 20, (seen, answered)
    rank.cache.reset()
    rank.agree()
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    rank.model.drain()
    rank.pool.trim()
    rank.same_everywhere(torch.tensor([rank.model.stats().physical_usage]))
    assert rank.model.stats().physical_usage == 0


def few_collectives(rank: Rank) -> None:
    """The ranks are asked once in many tokens, ahead of need, so that no step waits for an answer."""
    tokens, mask = rank.prompts(random.Random(9), 8)
    new = 400 if rank.dtype == torch.float32 else 900
    rank.cache.reset()
    growths = []
    ask, begin = rank.ranks.propose, type(rank.cache.slots.tensor).begin_growth
    ahead = []
    rank.ranks.propose = lambda *given: growths.append(1) or ask(*given)
    type(rank.cache.slots.tensor).begin_growth = lambda *given: ahead.append(1) or begin(*given)
    try:
        answers = generate(rank.network, tokens, rank.cache, attention_mask=mask, max_new_tokens=new, stop=[], pad=0)
    finally:
        del rank.ranks.propose
        type(rank.cache.slots.tensor).begin_growth = begin
    made = answers.shape[1] - tokens.shape[1]
    assert made == new
    assert 0 < len(growths) <= new // 24 + 3, len(growths)
    assert len(growths) - len(ahead) <= 3, (len(growths), len(ahead))  # prompt and first step, which had none before
    rank.as_good(answers, mask, [])
    decoder = rank.cache.decoder(rank.network)
    if rank.device.type == "cuda":
        assert decoder.captures >= 1 and decoder._graphed


def through_transformers(rank: Rank) -> None:
    """The split model's own generate on such a cache, and copies of the cache, whose memory is the ranks' too."""
    tokens, mask = rank.prompts(random.Random(21), 20)
    rank.cache.reset()
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    cache = {cache_argument(type(rank.network)): rank.cache}
    answers = rank.network.generate(tokens, attention_mask=mask, **cache, **options)
    rank.as_good(answers, mask, [])
    rank.same_everywhere(answers)
    rank.agree()
    used = rank.model.stats().used
    rank.copied = True
    other = copy.deepcopy(rank.cache)
    assert other.slots.ranks is rank.ranks and rank.model.stats().used > used
    rank.same_everywhere(torch.tensor([rank.model.stats().used]))
    keys = [each.slots.view(0, 0, 0, 3)[0] for each in (rank.cache, other)]
    assert torch.equal(*keys)
    del keys
    other.close()
    rank.copied = False
    rank.agree()


def views_on_one_rank(rank: Rank) -> None:
    """Memory stays on all ranks while one holds views of it, and addresses change on all."""
    tokens, mask = rank.prompts(random.Random(12), 30)
    rank.cache.reset()
    generate(rank.network, tokens, rank.cache, attention_mask=mask, max_new_tokens=4, stop=[], pad=0)
    slots = rank.cache.slots
    held = slots.view(0, 0, 0, slots.lengths[0]) if dist.get_rank() == 0 else None
    with pytest.raises(elastikv.InvalidArgument, match="views" if held else "rank 0 can't shrink"):
        slots.tensor.shrink([0], [0])
    rank.agree()
    generation = slots.generation
    rank.cache.reset()
    assert slots.tensor is None
    del held
    generate(rank.network, tokens, rank.cache, attention_mask=mask, max_new_tokens=4, stop=[], pad=0)
    assert slots.generation == generation + 1
    rank.agree()
    with pytest.raises(elastikv.InvalidArgument, match="one seed"):
        rank.cache.decoder(rank.network, sampling=Sampling(temperature=1.0)).start(
            torch.zeros(len(tokens), rank.whole.config.vocab_size, device=rank.device), limits=[1] * len(tokens)
        )
    with pytest.raises(elastikv.InvalidArgument, match="can't fork"):
        slots.tensor.fork(3, 0, 1)
    rank.cache.reset()


def what_can_not_be_split(rank: Rank) -> None:
    odd = LlamaConfig(**{**HOST, "num_key_value_heads": 1})
    with pytest.raises(elastikv.InvalidArgument, match="1 KV heads can't be split evenly among 2 ranks"):
        split(AutoModelForCausalLM.from_config(odd))
    with pytest.raises(elastikv.InvalidArgument, match=r"gate_proj has 97 features, which 2 ranks"):
        split(AutoModelForCausalLM.from_config(LlamaConfig(**{**HOST, "intermediate_size": 97})))
    empty = AutoModelForCausalLM.from_config(LlamaConfig(**HOST))
    empty.model.layers = torch.nn.ModuleList()
    with pytest.raises(elastikv.InvalidArgument, match="no layers like Llama's"):
        split(empty)


def main() -> None:
    number, count, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(number)
    dist.init_process_group(
        "gloo" if kind == "cpu" else "nccl", init_method=f"file://{folder}/store", rank=number, world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    rank = Rank(kind, seed=11)
    step, reserve = Decoder.step, Slots.reserve
    Decoder.step = lambda self: rank.until_it_works(lambda: step(self))
    Slots.reserve = lambda self, rows, tokens: rank.until_it_works(lambda: reserve(self, rows, tokens))
    parts = (
        same_logits, random_growths, few_collectives, through_transformers, views_on_one_rank, what_can_not_be_split,
    )  # fmt: skip
    for part in parts:
        begun = datetime.datetime.now()
        part(rank)
        print(part.__name__, datetime.datetime.now() - begun, rank.ranks.seen, flush=True)
    (folder / f"done-{number}").touch()
    dist.barrier(group=rank.told)
    os._exit(0)  # NCCL's threads are not waited for


main()
