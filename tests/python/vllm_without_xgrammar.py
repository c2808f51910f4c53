"""Imported before vLLM: stands in for xgrammar, which does not import everywhere and is not needed here."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from unittest import mock


class _Nothing(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        made = mock.MagicMock(name=spec.name)
        made.__name__, made.__spec__, made.__path__ = spec.name, spec, []
        return made

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "xgrammar":
            return None
        return importlib.machinery.ModuleSpec(name, _Nothing(), is_package=True)


if not any(isinstance(each, _Finder) for each in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
