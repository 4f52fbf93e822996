"""Range checks for settings: each raises a SettingError that names the setting, the value and the range."""

import re
from collections.abc import Collection, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

from stackcomp.core.errors import SettingError
from stackcomp.core.matrices import ROUNDED, Coding

if TYPE_CHECKING:
    from stackcomp.core.plan import PlannedWeight


def within(name: str, value: object, low: float, high: float = float("inf"), *, above: bool = False) -> None:
    """Refuse a number outside [low, high], or (low, high] with `above`; refuses booleans, NaN and what is no
    number."""
    bracket = "(" if above else "["
    ok = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not ok or not (low < value if above else low <= value) or value > high:  # pyright: ignore[reportOperatorIssue]
        raise SettingError(f"{name}={value!r} is out of range: give a number in {bracket}{low:g}, {high:g}]")


def whole(name: str, value: object, low: int, high: float = float("inf")) -> None:
    """Refuse anything but an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SettingError(f"{name}={value!r} is out of range: give a whole number in [{low}, {high:g}]")


def one_of(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse a value that is not among `choices`, and True for a 1."""
    if isinstance(value, bool) or value not in choices:
        raise SettingError(f"{name}={value!r} is not known: give one of {', '.join(map(repr, choices))}")


def switch(name: str, value: object) -> None:
    """Refuse what is neither True nor False: any text would count as true."""
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value!r} is neither on nor off: give True or False")


def plain(value: Any) -> Any:
    """The same setting of Python's own types, whose text can be read again: numbers of numpy, and those in a tuple, have another."""
    if isinstance(value, tuple):
        return tuple(map(plain, cast("tuple[Any, ...]", value)))
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    is_scalar = hasattr(value, "dtype") and value.shape == ()
    return value.item() if is_scalar else value


def shape(name: str, value: object) -> tuple[int, int]:
    """A setting (rows, columns) as a tuple; refuses anything but two whole numbers of at least 1."""
    sides = cast("list[object]", [*value]) if isinstance(value, tuple | list) else []
    if len(sides) != 2:
        raise SettingError(f"{name}={value!r} is no shape: give (rows, columns)")
    for side in sides:
        whole(name, side, 1)
    return cast("tuple[int, int]", tuple(sides))


def shape_fits(name: str, value: tuple[int, int], weights: "Sequence[PlannedWeight]") -> None:
    """Refuse a shape whose sides do not divide those of a weight."""
    for weight in weights:
        if weight.rows % value[0] or weight.cols % value[1]:
            raise SettingError(
                f"{name}={value} does not divide the {weight.rows} x {weight.cols} of {weight.id}; give another, or "
                f"skip={weight.id!r}"
            )


def sparsity_groups(sparsity: object) -> tuple[int, int] | None:
    """(n, m) of a sparsity "n:m", None of a share; refuses anything else."""
    if not isinstance(sparsity, str):
        within("sparsity", sparsity, 0.0, 0.999)
        return None
    found = re.fullmatch(r"(\d+):(\d+)", sparsity)
    kept, group = map(int, found.groups()) if found else (0, 0)
    if not 1 <= kept < group <= 64:
        raise SettingError(
            f"sparsity={sparsity!r} is not known: give 'n:m' with 1 <= n < m <= 64, as '2:4', or a share"
        )
    return kept, group


def groups_fit(sparsity: object, weights: "Sequence[PlannedWeight]") -> None:
    """Refuse a sparsity "n:m" whose groups do not divide the inputs of a weight."""
    groups = sparsity_groups(sparsity)
    for weight in weights:
        if groups and weight.cols % groups[1]:
            raise SettingError(
                f"sparsity={sparsity!r}: {groups[1]} does not divide the {weight.cols} inputs of {weight.id}; "
                f"give another pattern or skip={weight.id!r}"
            )


def rounding(bits: float, group: int | None) -> tuple[Coding, int | None]:
    """How integers of `bits` bits are stored, and how many share a scale: `group`, or 32 where nothing is said; None at 8 bits, which
    have a scale a row and refuse a group."""
    one_of("bits", bits, ROUNDED)
    coding = ROUNDED[bits]
    if group is None:
        return coding, None if bits == 8 else 32
    whole("group", group, 1)
    if bits == 8:
        raise SettingError(
            f"group={group} does not go with bits=8, which has a scale a row: leave it out, or give fewer bits"
        )
    return coding, group


def have_inputs(weights: "Sequence[PlannedWeight]", instead: str) -> None:
    """Refuse embeddings, whose inputs are no vectors, for a pass that looks at inputs; `instead` names passes that do not."""
    for weight in weights:
        if weight.kind == "embedding":
            raise SettingError(
                f"{weight.id} is an embedding, and takes no inputs that could be measured: give skip={weight.id!r}, and "
                f"{instead} for it"
            )
