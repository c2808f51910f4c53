"""Builds the extension by one CMake run; everything else stands in pyproject.toml and CMakeLists.txt.

Environment: ELASTIKV_BUILD_DIR, the CMake build folder (default build/pip, reused from run to run);
ELASTIKV_CMAKE_ARGS, further arguments for configuring; CMAKE_BUILD_PARALLEL_LEVEL, jobs at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_RANGE = "torch>=2.9,<2.16"


def torch_requirement() -> str:
    """The torch minor version built against: C++ extensions don't load under another one."""
    try:
        version = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        version = None
    if version is None:
        return TORCH_RANGE
    major, minor = map(int, version.groups())
    return f"torch>={major}.{minor},<{major}.{minor + 1}"


def find_tool(name: str) -> str:
    """cmake or ninja: from the environment that builds, else from the PATH."""
    beside_python = str(Path(sys.executable).parent) + os.pathsep + sysconfig.get_path("scripts")
    tool = shutil.which(name, path=beside_python) or shutil.which(name)
    if tool is None:
        raise RuntimeError(f"{name} is needed to build elastikv: install it (pip install {name})")
    return tool


class CMakeExtension(Extension):
    """The module that CMake's target _core becomes; setuptools compiles nothing itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CleanBuild(build):
    """setuptools never removes a file from its build folder, so a deleted module would be packaged for ever."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake component "python" into the package's folder."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        folder = self.cmake_folder()
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DELASTIKV_BUILD_TORCH=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("ELASTIKV_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--target", "_core"], check=True)
        self.install_to(Path(self.get_ext_fullpath(ext.name)).resolve().parent)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the same files, into python/elastikv."""
        package_dir = self.get_finalized_command("build_py").get_package_dir("elastikv")
        self.install_to(Path(package_dir).resolve())

    def cmake_folder(self) -> Path:
        return Path(os.environ.get("ELASTIKV_BUILD_DIR", ROOT / "build" / "pip")).resolve()

    def install_to(self, folder: Path) -> None:
        command = [find_tool("cmake"), "--install", str(self.cmake_folder()), "--component", "python"]
        subprocess.run([*command, "--prefix", str(folder)], check=True)


setup(
    ext_modules=[CMakeExtension("elastikv._core")],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    options={"build": {"build_base": "build/setuptools"}},
    install_requires=[torch_requirement(), "typer>=0.12", "rich>=13"],
)
