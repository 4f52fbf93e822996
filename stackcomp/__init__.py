"""stackcomp: compress text transformers by stacking techniques, and measure what each one gives.

Importing the package is light: torch is imported when first used. Importing it also teaches `transformers` to
load our checkpoints.
"""

from typing import TYPE_CHECKING, Any

from stackcomp import _hooks
from stackcomp.core import __version__ as __version__
from stackcomp.core import errors
from stackcomp.core.contract import Contract, Need
from stackcomp.core.facts import Fact
from stackcomp.core.ledger import Ledger
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.selection import nearest
from stackcomp.passes import registered

if TYPE_CHECKING:  # what __getattr__ gives
    from stackcomp.checkpoint import load
    from stackcomp.data import tasks
    from stackcomp.manager import Measuring, PassManager, check
    from stackcomp.nn import unpack
    from stackcomp.size import sizes
    from stackcomp.studies import Entry, Rung, Search, Study, combinations

__all__ = [
    "Contract",
    "Entry",
    "Fact",
    "Ledger",
    "Measuring",
    "Need",
    "Pass",
    "PassManager",
    "Pipeline",
    "Rung",
    "Search",
    "Study",
    "check",
    "combinations",
    "errors",
    "load",
    "parse",
    "sizes",
    "tasks",
    "unpack",
]

_hooks.on_transformers_import()


def parse(text: str) -> Pipeline:
    """The pipeline that `text` declares, read without running it; registered passes and literal settings
    only."""
    return Pipeline.parse(text, registered())


def __getattr__(name: str) -> Any:
    if name in ("Measuring", "PassManager", "check"):
        from stackcomp import manager

        return getattr(manager, name)
    if name == "sizes":
        from stackcomp.size import sizes

        return sizes
    if name == "load":
        from stackcomp.checkpoint import load

        return load
    if name == "unpack":
        from stackcomp.nn import unpack

        return unpack
    if name in ("Entry", "Rung", "Search", "Study", "combinations"):
        from stackcomp import studies

        return getattr(studies, name)
    if name == "tasks":
        from stackcomp.data import tasks

        return tasks
    if not name[:1].isupper():  # never a pass, but maybe a subpackage, which is asked for while passes load
        raise AttributeError(f"module 'stackcomp' has no attribute {name!r}")
    if name in registered():
        return registered()[name]
    raise AttributeError(
        f"module 'stackcomp' has no attribute {name!r}; the nearest passes are {nearest(name, registered())}"
    )


def __dir__() -> list[str]:
    return sorted([*__all__, *registered()])
