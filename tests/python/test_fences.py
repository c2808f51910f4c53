"""The fences between the rooms of csrc, by text: includes go downwards only, foreign headers stay in their room.

bindings -> torch -> {shared, heap} -> pool -> vmm -> driver -> base
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# Each room and the rooms below it, which it may include.
BELOW: dict[str, set[str]] = {"base": set()}
BELOW["driver"] = {"base"}
BELOW["vmm"] = BELOW["driver"] | {"driver"}
BELOW["pool"] = BELOW["vmm"] | {"vmm"}
BELOW["shared"] = BELOW["pool"] | {"pool"}
BELOW["heap"] = BELOW["pool"] | {"pool"}
BELOW["torch"] = BELOW["shared"] | {"shared", "heap"}
BELOW["bindings"] = BELOW["torch"] | {"torch"}
CORE = {"base", "driver", "vmm", "pool", "shared", "heap"}

# Headers from outside, and the rooms that may include them; a header that several lines name needs them all.
FOREIGN = [
    (re.compile(r"cuda(Typedefs)?\.h"), {"driver"}),
    (re.compile(r"cuda_runtime\w*\.h"), {"torch"}),
    (re.compile(r"dlfcn\.h|sys/mman\.h"), {"driver"}),
    (re.compile(r"(torch|ATen|c10)/.*"), {"torch", "bindings"}),
    (re.compile(r"Python\.h|pybind11/.*|torch/csrc/(utils/pybind|autograd/python_).*"), {"bindings"}),
]

# The ledger of processes lies in POSIX shared memory, which no driver has to do with.
EXCEPTIONS = {("shared/ledger_segment.cpp", "sys/mman.h")}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?P<open>[<"])(?P<path>[^">]+)[">]', re.MULTILINE)


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in {".h", ".cpp"}]
    assert found, f"no sources in {folders}"
    return found


def includes(path: Path) -> Iterator[tuple[bool, str]]:
    """Every include of a file: whether it is in quotes, and its path."""
    for match in INCLUDE.finditer(path.read_text()):
        yield match["open"] == '"', match["path"]


def faults_in(path: Path, room: str) -> Iterator[str]:
    """What a file of csrc may not include, in words."""
    for quoted, header in includes(path):
        where = f"{path.relative_to(ROOT)} includes {header}"
        if quoted:
            target = header.split("/")[0]
            if not (CSRC / header).is_file():
                yield f"{where}: in quotes stand our own headers, written from csrc"
            elif target != room and target not in BELOW[room]:
                yield f"{where}: {room} is not above {target}"
            continue
        if (path.relative_to(CSRC).as_posix(), header) in EXCEPTIONS:
            continue
        for pattern, rooms in FOREIGN:
            if pattern.fullmatch(header) and room not in rooms:
                yield f"{where}: only for {', '.join(sorted(rooms))}"


def test_includes_go_downwards() -> None:
    faults: list[str] = []
    for path in sources("csrc"):
        room = path.relative_to(CSRC).parts[0]
        assert room in BELOW, f"{path}: csrc/{room} is no room"
        faults += faults_in(path, room)
    assert not faults, "\n".join(faults)


def test_cpp_tests_and_benchmarks_see_the_core_only() -> None:
    faults: list[str] = []
    for path in sources("tests/cpp", "benchmarks/cpp"):
        own = (path.parent, ROOT / "tests" / "cpp")
        for quoted, header in includes(path):
            beside = any((folder / header).is_file() for folder in own)
            if quoted and not beside and header.split("/")[0] not in CORE:
                faults.append(f"{path.relative_to(ROOT)} includes {header}")
    assert not faults, "\n".join(faults)


def test_our_torch_headers_hide_none_of_torchs() -> None:
    """csrc comes first on the include path, so csrc/torch/x.h would be found for <torch/x.h>."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("torch is not installed")
    include = Path(next(iter(spec.submodule_search_locations))) / "include"
    for path in CSRC.glob("torch/*.h"):
        assert not (include / "torch" / path.name).exists(), path.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["csrc", "python", "tests", "benchmarks", "scripts"])
def test_no_file_is_over_400_lines(folder: str) -> None:
    data = {".csv", ".gz", ".json", ".png", ".so", ".pyc"}
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in data]
    files = [p for p in files if p.parent.suffix != ".egg-info"]  # what a build leaves
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_versions_agree() -> None:
    python = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cmake = re.search(r"project\(elastikv VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert python is not None
    assert cmake is not None
    assert python[1] == cmake[1]
