"""The ways to decode that bench_decode compares: each is a step that can be taken again and again on one model."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import elastikv
from elastikv.hf import Decoder, ElasticCache, JoinedProjections
from elastikv.hf.forward import cache_argument

LAYERS = 16
#: Steps that are not timed, and tokens beside the timed ones that rows have addresses for.
WARM = 4
ROOM = 64


def config_of(kind: str, tiny: bool) -> LlamaConfig:
    if tiny:
        heads = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
        return LlamaConfig(**heads, num_key_value_heads=2 if kind == "gqa" else 4, vocab_size=256,
                           max_position_embeddings=65536)  # fmt: skip
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": 32000, "max_position_embeddings": 65536, "head_dim": 128}
    if kind == "gqa":
        return LlamaConfig(**sizes, hidden_size=4096, intermediate_size=8192, num_attention_heads=32,
                           num_key_value_heads=8)  # fmt: skip
    return LlamaConfig(**sizes, hidden_size=2048, intermediate_size=8192, num_attention_heads=16,
                       num_key_value_heads=16)  # fmt: skip


@dataclass
class Way:
    """A step, and under what it is taken. row: what is found beside its times."""

    step: Callable[[], Any]
    attention: str
    flash: bool = False  # SDPA's flash back end is forced
    row: dict[str, Any] = field(default_factory=dict)


class Model:
    """One model with random weights on one device, and the ways to decode `batch` rows of `tokens` tokens with it."""

    def __init__(self, kind: str, device: str, tiny: bool) -> None:
        self.device = device
        self.config = config_of(kind, tiny)
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
        self.cache_name = cache_argument(type(self.model))
        self.weight_bytes = sum(each.numel() * each.element_size() for each in self.model.parameters())
        self.heads = self.config.num_key_value_heads
        self.token_bytes = 2 * self.config.num_hidden_layers * self.heads * self.config.head_dim * self.dtype.itemsize
        self._makers = {
            "graph": self._graph,
            "graph, resident": self._graph,
            "graph, joined": self._graph,
            "graph, compiled": self._graph,
            "eager": self._eager,
            "eager, sdpa": self._eager,
            "dynamic": self._dynamic,
            "dynamic, flash": self._dynamic,
            "static": self._static,
            "static, compiled": self._static,
        }

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def race(self, names: Sequence[str], batch: int, tokens: int, steps: int) -> dict[str, dict[str, Any]]:
        """Milliseconds of `steps` steps of each of these ways, by turns: clocks that drift tell on all alike."""
        with contextlib.ExitStack() as opened:
            ways = {name: opened.enter_context(self._makers[name](name, batch, tokens, steps)) for name in names}
            times: dict[str, list[float]] = {name: [] for name in names}
            for number in range(WARM + steps):
                for name, way in ways.items():
                    taken = self._timed(way)
                    if number >= WARM:
                        times[name].append(taken)
        for name, way in ways.items():
            ordered = sorted(times[name])
            way.row.update(p50=statistics.median(ordered), p99=ordered[min(steps - 1, int(steps * 0.99))])
        return {name: way.row for name, way in ways.items()}

    def _timed(self, way: Way) -> float:
        if self.model.config._attn_implementation != way.attention:
            self.model.set_attn_implementation(way.attention)
        forced = way.flash and self.device != "cpu"
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if forced else contextlib.nullcontext():
            self.synchronize()
            begin = time.perf_counter()
            way.step()
            self.synchronize()
            return (time.perf_counter() - begin) * 1e3

    def _one_token(self, cache: Any, batch: int, forward: Any = None) -> Callable[[], None]:
        """A greedy step of the model's own forward."""
        token = torch.full((batch, 1), 7, device=self.device)
        forward = forward or self.model

        def step() -> None:
            logits = forward(input_ids=token, use_cache=True, **{self.cache_name: cache}).logits
            token.copy_(logits[:, -1:].argmax(-1))

        return step

    def _fill(self, cache: Any, batch: int, tokens: int) -> Any:
        """With the same random states in all layers: what a step costs does not depend on them."""
        keys = torch.randn(batch, self.heads, tokens, self.config.head_dim, device=self.device, dtype=self.dtype)
        for layer in range(self.config.num_hidden_layers):
            cache.update(keys, keys, layer)
        return cache

    # ---- the ways

    @contextlib.contextmanager
    def _elastic(
        self, batch: int, tokens: int, room: int, attention: str = "elastikv"
    ) -> Iterator[tuple[ElasticCache, elastikv.Model]]:
        """An ElasticCache that holds so many tokens, on a pool of its own, for a model with this attention."""
        needed = batch * (tokens + room) * self.token_bytes
        with elastikv.SharedMemoryPool(2 * needed + (1 << 30), self.device) as pool:
            handle = pool.register_model("bench", virtual_capacity=1 << 44)
            config = copy.deepcopy(self.config)
            config._attn_implementation = "sdpa"
            cache = ElasticCache(config, model=handle, max_batch=batch, max_tokens=tokens + room)
            try:
                self._fill(cache, batch, tokens)
                config._attn_implementation = attention
                yield cache, handle
            finally:
                cache.close()

    @contextlib.contextmanager
    def _graph(self, name: str, batch: int, tokens: int, steps: int) -> Iterator[Way]:
        room = WARM + steps + ROOM
        together = name in ("graph, joined", "graph, compiled")
        projections = JoinedProjections(self.model) if together else contextlib.nullcontext()
        with projections, self._elastic(batch, tokens, room) as (cache, handle):
            slots = cache.slots
            assert slots.tensor is not None
            if name == "graph, resident":
                slots.tensor.grow(list(range(batch)), [slots.max_tokens + 1] * batch, exact=True)
            self.model.set_attn_implementation("elastikv")
            if name == "graph, compiled":
                torch._dynamo.reset()
            model = torch.compile(self.model, fullgraph=True) if name == "graph, compiled" else self.model
            self.synchronize()
            begin = time.perf_counter()
            decoder = Decoder(model, slots, range(batch), capacity=room)
            decoder.start(torch.randn(batch, self.config.vocab_size, device=self.device), limits=[room] * batch)
            decoder.step()
            self.synchronize()
            way = Way(decoder.step, "elastikv", row={"first_token_s": time.perf_counter() - begin})
            yield way
            decoder.finish()
            # Beside the tokens: a page's rest in each row, and what is claimed and mapped ahead in tokens.
            way.row.update(
                bytes=handle.stats().peak_physical,
                needed=sum(slots.lengths) * self.token_bytes,
                slack=batch * (2 * handle.page_size + 96 * self.token_bytes),
                captures=decoder.captures,
            )

    @contextlib.contextmanager
    def _eager(self, name: str, batch: int, tokens: int, steps: int) -> Iterator[Way]:
        attention = "elastikv" if name == "eager" else "sdpa"
        with self._elastic(batch, tokens, WARM + steps + ROOM, attention) as (cache, handle):
            way = Way(self._one_token(cache, batch), attention, flash=attention == "sdpa")
            yield way
            way.row["bytes"] = handle.stats().peak_physical

    @contextlib.contextmanager
    def _dynamic(self, name: str, batch: int, tokens: int, steps: int) -> Iterator[Way]:
        with self._torch_bytes() as row:
            cache = self._fill(DynamicCache(config=self.config), batch, tokens)
            yield Way(self._one_token(cache, batch), "sdpa", flash=name == "dynamic, flash", row=row)

    @contextlib.contextmanager
    def _static(self, name: str, batch: int, tokens: int, steps: int) -> Iterator[Way]:
        with self._torch_bytes() as row:
            length = tokens + WARM + steps + ROOM
            cache = self._fill(StaticCache(config=self.config, max_cache_len=length), batch, tokens)
            if name == "static":
                yield Way(self._one_token(cache, batch), "sdpa", row=row)
                return
            torch._dynamo.reset()
            self.model.set_attn_implementation("sdpa")
            # As generate() compiles it.
            step = self._one_token(cache, batch, torch.compile(self.model.__call__, mode="reduce-overhead"))
            begin = time.perf_counter()
            step()
            self.synchronize()
            row["first_token_s"] = time.perf_counter() - begin
            yield Way(step, "sdpa", row=row)

    @contextlib.contextmanager
    def _torch_bytes(self) -> Iterator[dict[str, Any]]:
        """A row that gets what torch allocates at most meanwhile, beyond what it had: a cache, and copies of it."""
        row: dict[str, Any] = {}
        if self.device == "cpu":
            yield row
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield row
        row["bytes"] = torch.cuda.max_memory_allocated() - before
