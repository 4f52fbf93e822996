"""Teaches `transformers` our checkpoints as soon as it is imported, without importing it."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = (
    "transformers.quantizers.auto"  # where methods are registered; every road to `from_pretrained` imports it
)


def on_transformers_import() -> None:
    """Register our method now when `transformers` is there, else right after its registry is imported."""
    if WATCHED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("stackcomp.nn.quantizer")  # registers itself


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the watched module, and wraps its loader, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the module as its own loader does, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        _register()
