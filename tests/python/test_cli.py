"""The `elastikv` command: exit statuses, what it prints, and its screens."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch

import elastikv

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from elastikv.cli import app  # noqa: E402
from elastikv.cli.board import mib, size_text  # noqa: E402
from elastikv.cli.screen import LiveScreen  # noqa: E402
from elastikv.cli.sizes import parse_size  # noqa: E402
from elastikv.demo.roles import Role  # noqa: E402
from elastikv.demo.run import Options, run_demo  # noqa: E402
from elastikv.hf import Slots  # noqa: E402


def invoke(*arguments: str):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def tiny_models(monkeypatch):
    """Two roles on one small model, in place of whatever would be loaded."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip

    def prompt(index: int, length: int) -> list[int]:
        return [random.Random(index + 77 * i).randrange(3, 128) for i in range(length)]

    def text(tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)

    def load(models, *, device, dtype):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        return [Role(name, "a tiny model", model, prompt, text, frozenset()) for name in ("chat", "completer")]

    monkeypatch.setattr("elastikv.demo.run.load_roles", load)


QUICK = ("demo", "--device", "cpu", "--max-requests", "12", "--token-scale", "0.1")


@pytest.mark.parametrize(
    ("text", "size"),
    [("96MiB", 96 << 20), ("1.5 GiB", 3 << 29), ("64M", 64 << 20), ("10kb", 10240), ("4096", 4096), ("2t", 2 << 40)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-4M", "12 apples", "0", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_sizes_in_words():
    assert (mib(3 << 19), size_text(5 << 20), size_text(3 << 29)) == ("1.5", "5 MiB", "1.5 GiB")


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0 and "demo" in result.output and "doctor" in result.output


def test_demo_prints_numbers_and_text(tiny_models, tmp_path):
    result = invoke(*QUICK, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for expected in (
        "12 requests of the trace's 24",
        "static split would give each model",
        "address space",
        "StaticCache",
        "equal those of transformers' DynamicCache",
        "Picture:",
    ):
        assert expected in result.output
    assert result.output.count(": w") == 12  # each answer's text
    assert "[bold]" not in result.output and "\x1b" not in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"elastikv-demo.png", "timeline.csv", "summary.json"}


def test_demo_exits_1_when_a_token_differs(tiny_models, tmp_path, monkeypatch):
    """A cache that forgets a token is found out."""
    honest = Slots.set_lengths

    def forgetful(slots, rows, lengths):
        honest(slots, rows, [max(length - 1, 0) for length in lengths])

    monkeypatch.setattr(Slots, "set_lengths", forgetful)
    result = invoke(*QUICK, "--out", tmp_path)
    assert result.exit_code == 1
    assert "answers differ from DynamicCache's" in result.output and "the engine gave" in result.output
    assert json.loads((tmp_path / "summary.json").read_text())["differences"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "abacus"), "abacus"),
        (("--models", "nothing-like-it", "--device", "cpu"), "there is no model"),
        (("--models", "random", "--trace", "/nowhere.csv", "--device", "cpu"), "/nowhere.csv"),
        (("--models", "random", "--limit", "64k", "--device", "cpu"), "too small"),
        (("--models", "random", "--limit", "lots"), "not a size"),
        (("--models", "random", "--shift", "0", "--device", "cpu"), "above 0"),
        (("--models", "random", "--max-requests", "0", "--device", "cpu"), "above 0"),
        (("--model", "EMPTY", "--device", "cpu"), "EMPTY"),
        (("--models", "random", "--time-scale", "inf", "--device", "cpu"), "finite"),
        (("--models", "random", "--token-scale", "nan", "--device", "cpu"), "finite"),
    ],
)
def test_demo_exits_2_for_what_it_cannot_do(tmp_path, arguments, complaint):
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / "EMPTY") if argument == "EMPTY" else argument for argument in arguments]
    result = invoke("demo", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert complaint in result.output and "Traceback" not in result.output


def test_demo_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    result = invoke("demo")
    assert result.exit_code == 2
    assert "needs matplotlib: pip install 'elastikv[demo]'" in result.output


def test_the_live_screen(tiny_models, tmp_path):
    """Drawn on a terminal of its own: texts, table and bar all appear."""
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=150, height=50, color_system=None)
    screen = LiveScreen(console)
    with screen:
        result = run_demo(Options(token_scale=0.1, max_requests=12, device="cpu", out=tmp_path), screen)
        console.print(screen._draw())
    screen.ended(result)
    output = terminal.getvalue()
    assert result.ok
    for expected in (
        "chat",
        "completer",
        "both",
        "address space",
        "driver calls",
        "checking against DynamicCache",
        "12/12",
    ):
        assert expected in output
    assert "equal those of transformers' DynamicCache" in output
    assert re.search(r"#\d+ w\d+ w\d+", output)  # the models' text


def test_doctor_prints_a_table():
    result = invoke("doctor")
    assert result.exit_code == 0
    for expected in ("torch", "host backend", "granularity 4 KiB", "what to do"):
        assert expected in result.output


def test_doctor_prints_json():
    result = invoke("doctor", "--json")
    report = json.loads(result.output)
    assert result.exit_code == 0 and report["healthy"] is True
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["host backend"]["ok"] and findings["torch"]["value"].startswith(torch.__version__)
    # What is missing comes with advice.
    assert findings["decode kernels"]["value"].startswith(("torch's operators", "compiled here"))
    assert "views" in findings["attention 'elastikv'"]["value"] or "flash" in findings["attention 'elastikv'"]["value"]
    assert all(finding["advice"] for finding in report["findings"] if not finding["ok"])


def test_doctor_exits_1_without_a_host_backend(monkeypatch):
    def refuse(*_, **__):
        raise elastikv.DeviceUnavailable("no memfd here")

    monkeypatch.setattr("elastikv.SharedMemoryPool", refuse)
    result = invoke("doctor")
    assert result.exit_code == 1 and "no memfd here" in result.output


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "elastikv.cli", "doctor", "--json"], capture_output=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["healthy"]


def test_the_cache_says_what_to_install():
    code = """
import sys
sys.modules["transformers"] = None
import elastikv
try:
    elastikv.hf.ElasticCache
except ImportError as error:
    sys.exit("pip install 'elastikv[hf]'" not in str(error))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_the_command_starts_without_transformers():
    """`elastikv --help` is quick: nothing large is imported before it is needed."""
    code = "import elastikv.cli, sys; sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_vllm_is_run_with_elastic_memory(monkeypatch):
    ran = []
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("os.execvpe", lambda *arguments: ran.append(arguments))
    result = invoke("vllm", "--pool", "serving", "--limit", "70GiB", "serve", "org/model", "--port", 8001)
    assert result.exit_code == 0, result.output
    ((program, arguments, environment),) = ran
    assert (program, arguments) == ("/bin/vllm", ["vllm", "serve", "org/model", "--port", "8001"])
    assert environment["ELASTIKV_VLLM"] == "1" and environment["ELASTIKV_VLLM_POOL"] == "serving"
    assert environment["ELASTIKV_VLLM_LIMIT"] == "70GiB" and "ELASTIKV_VLLM_RESERVE" not in environment
    for bad in (("--limit", "much"), ("--limit", "-1"), ("--pool", ""), ("--layout", "none"), ("--speed", "9")):
        assert invoke("vllm", *bad, "serve").exit_code == 2 and len(ran) == 1
    assert invoke("vllm", "--name", "chat", "--extent", "4MiB", "serve", "--help", "--limit", "3").exit_code == 0
    assert ran[1][1] == ["vllm", "serve", "--help", "--limit", "3"]
    assert (ran[1][2]["ELASTIKV_VLLM_NAME"], ran[1][2]["ELASTIKV_VLLM_EXTENT"]) == ("chat", "4MiB")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert invoke("vllm", "serve").exit_code == 1


def test_a_long_name_of_letters_of_several_bytes_is_found_whole():
    name = "\u00fc" * 40
    with elastikv.SharedMemoryPool(1 << 22, "cpu", name=f"names-{os.getpid()}") as pool:
        pool.register_model(name, 1 << 30)
        listed = json.loads(invoke("list", "--json", "--pool", pool.name).output)
        assert [model["model"] for model in listed["pools"][0]["models"]] == [name]
        assert invoke("limit", name, "1MiB", "--pool", pool.name).exit_code == 0
        assert pool.quotas()[name].limit == 1 << 20
        assert invoke("reserve", name, "none", "--pool", pool.name).exit_code == 0
