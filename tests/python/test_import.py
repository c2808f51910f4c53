"""Importing: no CUDA touched, and a torch of another minor version is refused in words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastikv import _build_info
from elastikv._check import check_torch


def test_import_does_not_touch_cuda_or_transformers():
    # torch itself may bring libcuda into the process; what counts is that elastikv adds nothing to it.
    script = """
import sys, torch
has_driver = lambda: "libcuda.so" in open("/proc/self/maps").read()
before = has_driver()
import elastikv
print(has_driver() == before, torch.cuda.is_initialized(), "transformers" in sys.modules, "matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["True", "False", "False", "False"]


def test_another_minor_version_of_torch_is_refused():
    check_torch(_build_info.TORCH_VERSION)
    check_torch(".".join(_build_info.TORCH_VERSION.split(".")[:2]) + ".99")
    with pytest.raises(ImportError, match=r"built for torch .* and torch 1\.13\.1 is running"):
        check_torch("1.13.1")
