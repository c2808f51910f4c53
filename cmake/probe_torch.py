"""Tells CMake what the installed torch brings, as KEY=VALUE lines; lists are joined by ";".

torch itself is found but never imported: that would take seconds and could fail on a machine without its libraries.
Keys: TORCH_DIR, TORCH_VERSION, TORCH_CUDA (e.g. 13.0, empty for a CPU build), TORCH_CXX11_ABI (0 or 1), PYBIND11_DIR
(its CMake folder) and CUDA_INCLUDE_DIRS (include folders with a cuda.h in NVIDIA's wheels), CRT_INCLUDE_DIRS.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sysconfig
from pathlib import Path


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def torch_facts(torch: Path) -> dict[str, str]:
    text = (torch / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
    # With the old ABI no symbol of libc10 names std::__cxx11::string.
    new_abi = b"__cxx1112basic_string" in (torch / "lib" / "libc10.so").read_bytes()
    return {
        "TORCH_DIR": str(torch),
        "TORCH_VERSION": version.group(1) if version else "",
        "TORCH_CUDA": cuda.group(1) if cuda else "",
        "TORCH_CXX11_ABI": str(int(new_abi)),
    }


def wheel_roots(torch: Path | None) -> list[Path]:
    """Folders that hold installed packages, the one with torch first."""
    paths = sysconfig.get_paths()
    roots = [torch.parent] if torch else []
    roots += [Path(paths["purelib"]), Path(paths["platlib"]), *map(Path, site.getsitepackages())]
    return list(dict.fromkeys(roots))


def main() -> None:
    torch = package_dir("torch")
    facts = torch_facts(torch) if torch else {}
    pybind11 = package_dir("pybind11")
    if pybind11:
        facts["PYBIND11_DIR"] = str(pybind11 / "share" / "cmake" / "pybind11")
    roots = wheel_roots(torch)
    cuda = [h.parent for root in roots for h in sorted(root.glob("nvidia/*/include/cuda.h"), reverse=True)]
    # cuda_runtime_api.h needs crt/host_defines.h, which is in a wheel that torch does not pull in (nvidia-cuda-crt).
    # triton, which it does pull in, has a copy.
    crt = [d for root in roots for d in [*cuda, root / "triton/backends/nvidia/include"] if (d / "crt").is_dir()]
    facts["CUDA_INCLUDE_DIRS"] = ";".join(dict.fromkeys(map(str, cuda)))
    facts["CRT_INCLUDE_DIRS"] = ";".join(dict.fromkeys(map(str, crt)))
    for key, value in facts.items():
        print(f"{key}={value}")


if __name__ == "__main__":
    main()
