"""Fingerprints: what a result depends on, as one digest, chained from pass to pass.

Equal fingerprints on one machine type and thread count mean equal weights, so a finished pass need not run
again.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stackcomp.core.passes import Pass

LIBRARIES = ("torch", "transformers", "datasets", "numpy", "scipy")


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
    """Digest of a module's source and of every module that it imports of its top package and of ours, directly or not.

    Read from the files, never by importing; a package that is imported stands for all its files.
    """
    seen: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = None if name in seen else _file(name)
        if path is None:
            continue
        text = path.read_text("utf8")
        seen[name] = hashlib.sha256(text.encode()).hexdigest()
        if path.name == "__init__.py" and "." in name:
            waiting += [f"{name}.{inner.stem}" for inner in sorted(path.parent.glob("*.py")) if inner != path]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _imports(text, package, (name.partition(".")[0], __name__.partition(".")[0]))
    return digest(seen)


def _file(name: str) -> Path | None:
    """The source file of a module or package; None when there is none. Imports nothing but looks up the top
    package."""
    top, _, rest = name.partition(".")
    origin = getattr(sys.modules.get(top), "__file__", None)  # a script has no spec
    if origin is None:
        spec = importlib.util.find_spec(top) if top not in sys.modules else None
        origin = spec.origin if spec is not None else None
    if origin is None:
        return None
    base = Path(origin) if not rest else Path(origin).parent.joinpath(*rest.split("."))
    candidates = [base] if not rest else [base / "__init__.py", base.with_name(f"{base.name}.py")]
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imports(text: str, package: str, tops: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of the packages `tops` that `text`, a module of `package`, imports, inside functions too."""
    inner = tuple(f"{top}." for top in tops)
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [item.name for item in node.names if item.name in tops or item.name.startswith(inner)]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{item.name}" for item in node.names)]
            found += [name for name in names if name.startswith(inner)]
    return tuple(found)
