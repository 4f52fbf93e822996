"""Range checks for settings: each raises a SettingError that names the setting, the value and the range."""

from collections.abc import Collection
from math import isfinite

from stackcomp.core.errors import SettingError


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
    """Refuse a value that is not among `choices`."""
    if value not in choices:
        raise SettingError(f"{name}={value!r} is not known: give one of {', '.join(map(repr, choices))}")
