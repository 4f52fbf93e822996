"""Choosing layers by glob.

A glob speaks of paths relative to the base model (`encoder.layer.0.attention.self.query`, `classifier`). `*`
crosses dots, and a matched module includes its children: `encoder.layer.0` selects every weight of that
layer.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from stackcomp.core.errors import SelectionEmpty

Globs = str | tuple[str, ...] | None


def as_tuple(globs: Globs) -> tuple[str, ...]:
    """`globs` as a tuple: one string is one glob, None is none."""
    if globs is None:
        return ()
    return (globs,) if isinstance(globs, str) else tuple(globs)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether `path` or a module above it matches one of `globs`."""
    names = path.split(".")
    above = [".".join(names[: end + 1]) for end in range(len(names))]
    return any(fnmatchcase(name, glob) for glob in globs for name in above)


def chooses(path: str, *, only: Globs, skip: Globs) -> bool:
    """Whether the globs leave `path` in: everything is in where there is no `only`."""
    return (only is None or matches(path, as_tuple(only))) and not matches(path, as_tuple(skip))


def nearest(wanted: str, known: Iterable[str], count: int = 3) -> str:
    """The `count` names nearest to `wanted`, for messages."""
    names = list(dict.fromkeys(known))
    found = difflib.get_close_matches(wanted, names, n=count, cutoff=0.0)
    return ", ".join(found) or "none"


def all_match(paths: Iterable[str], **settings: Globs) -> None:
    """Raise SelectionEmpty for a glob of `settings` that matches none of `paths`. Layers that differ in their number alone are named
    once, as a glob."""
    known = list(paths)
    for setting, globs in settings.items():
        for glob in as_tuple(globs):
            if not any(matches(path, (glob,)) for path in known):
                layers = (re.sub(r"\b\d+\b", "*", path) for path in known)
                raise SelectionEmpty(
                    f"{setting}={glob!r} matches no layer; the nearest paths are {nearest(glob, layers)}"
                )


def select(
    paths: Sequence[tuple[str, ...]], *, only: Globs, skip: Globs, default: Sequence[bool]
) -> list[bool]:
    """Which of the weights with these `paths` are selected.

    With no `only`, those that `default` marks; a weight used at several paths is selected by any one of them
    and skipped by any one. Raises SelectionEmpty for a glob that matches nothing.
    """
    all_match((path for group in paths for path in group), only=only, skip=skip)
    wanted = [
        any(matches(path, as_tuple(only)) for path in group) if only is not None else chosen
        for group, chosen in zip(paths, default, strict=True)
    ]
    return [
        chosen and not any(matches(path, as_tuple(skip)) for path in group)
        for group, chosen in zip(paths, wanted, strict=True)
    ]
