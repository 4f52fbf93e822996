"""What is still to run, and how long that may take: mean seconds of each pass and of measuring what it leaves, from the rows there are."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stackcomp.studies.study import Entry


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """passes: how often each pass is still to run, by its name; saved: runs that entries share with others;
    means: seconds of one run, by the name of the pass; workers: how many processes share the work."""

    passes: Mapping[str, int]
    saved: int
    means: Mapping[str, float]
    workers: int = 1

    @property
    def time(self) -> str:
        """The time in words, as far as it is known."""
        known = {name: count for name, count in self.passes.items() if name in self.means}
        unknown = sum(self.passes.values()) - sum(known.values())
        seconds = duration(sum(count * self.means[name] for name, count in known.items()) / self.workers)
        if not unknown:
            return f"about {seconds}"
        return f"about {seconds}, and {unknown} passes of unknown time" if known else "unknown"


def forecast(
    entries: Iterable[Entry], made: Collection[str], rows: Iterable[Mapping[str, Any]], workers: int = 1
) -> Forecast:
    """What running `entries` takes, when the steps named in `made` are there already."""
    wanted = [
        (name, item.name)
        for entry in entries
        for name, item in zip(entry.steps[1:], entry.passes, strict=True)
        if name not in made
    ]
    return Forecast(
        passes=Counter(dict(wanted).values()),
        saved=len(wanted) - len(dict(wanted)),
        means=_means(rows),
        workers=workers,
    )


def _means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds by the name of the pass; a step that several rows share counts once. Older rows do not say what measuring took."""
    took = {
        step["fingerprint"]: (step["name"], step["seconds"] + (step.get("measuring_seconds") or 0.0))
        for row in rows
        for step in row.get("steps", [])
    }
    seconds: dict[str, list[float]] = {}
    for name, value in took.values():
        seconds.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in seconds.items()}


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
