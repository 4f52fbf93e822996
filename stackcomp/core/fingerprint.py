"""Fingerprints: what a result depends on, as one digest, chained from pass to pass.

Equal fingerprints on one machine type and thread count mean equal weights, so a finished pass need not run again.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stackcomp.core.passes import Pass

LIBRARIES = ("torch", "transformers", "datasets", "numpy", "scipy", "torchao")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def link(previous: str, step: Pass, *, seed: int, data: str, machine: Mapping[str, Any]) -> str:
    """The fingerprint after `step`, from the one before it."""
    return digest(
        {
            "previous": previous,
            "declaration": repr(step),
            "source": source_digest(type(step).__module__),
            "seed": seed,
            "data": data,
            "libraries": versions(),
            "machine": dict(machine),
        }
    )


@cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@cache
def source_digest(module: str) -> str:
    """Digest of a module's source and of every module of its top package that it imports, directly or not.

    Read from the files, never by importing; a package that is imported stands for all its files.
    """
    top = module.partition(".")[0]
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        text = Path(spec.origin).read_text("utf8")
        seen[name] = hashlib.sha256(text.encode()).hexdigest()
        if spec.submodule_search_locations and name != top:
            folder = Path(spec.origin).parent
            waiting += [f"{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        waiting += _imports(text, top)
    return digest(seen)


def _imports(text: str, top: str) -> list[str]:
    """Modules of package `top` that `text` imports, inside functions too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inside = [f"{node.module}.{item.name}" for item in node.names]
            known = [name for name in inside if name.startswith(f"{top}.") and _is_module(name)]
            found += known or [node.module]
    return [name for name in found if name.startswith(f"{top}.")]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
