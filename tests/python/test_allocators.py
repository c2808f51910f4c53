"""Runs tests/allocator once for each way in which torch's allocations reach the pool, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[1] / "allocator"
WAYS = ("native", "installed", "pluggable", "mem_pool")


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The losses of training, by way; each test adds its own, torch's first."""
    return {}


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
def test_the_suite_passes(way: str, tmp_path: Path, losses: dict[str, list[str]]) -> None:
    path = tmp_path / "losses.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(SUITE)]
    run = subprocess.run(
        [*command, str(SUITE), "--way", way, "--losses", str(path)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    losses[way] = json.loads(path.read_text())
    assert losses[way] == losses.get("native", losses[way])  # to the bit
