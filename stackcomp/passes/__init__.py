"""The passes, one file each. A file put here is registered by existing; a pass of another package by the
entry point `stackcomp.passes`."""

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from stackcomp.core.errors import ContractBroken
from stackcomp.core.passes import Pass


@cache
def registered() -> dict[str, type[Pass]]:
    """Every registered pass by name, in alphabetical order. A pass that cannot be imported raises: none
    vanishes quietly."""
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for cls in vars(importlib.import_module(module.name)).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Pass)
                and cls.__module__ == module.name
                and not inspect.isabstract(cls)
            ):
                found[cls.__name__] = cls
    for point in entry_points(group="stackcomp.passes"):
        cls = point.load()
        if not (inspect.isclass(cls) and issubclass(cls, Pass)) or cls.__name__ in found:
            raise ContractBroken(
                f"entry point {point.name!r} gives {cls!r}: it must be a Pass with a name of its own"
            )
        found[cls.__name__] = cls
    return dict(sorted(found.items()))
