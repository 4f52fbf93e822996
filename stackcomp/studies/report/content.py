"""What the report of a study of combinations says, from its rows alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import exp, isfinite
from pathlib import Path

from stackcomp.core.errors import SettingError
from stackcomp.core.files import write_atomic
from stackcomp.studies.analysis import (
    MEASURES,
    Attribution,
    Cell,
    Cells,
    Estimate,
    Extra,
    Order,
    attribution,
    extra,
    interactions,
    orders,
    pareto,
)
from stackcomp.studies.report import pictures
from stackcomp.studies.report.document import Heading, Part, Table, html, markdown
from stackcomp.studies.rows import Row
from stackcomp.studies.study import Study

TITLES = {  # of the measures
    "file": "Compression of the file",
    "encoder": "Compression of the encoder",
    "score": "Points of score",
    "speed": "Speed",
}


def write(study: Study, rows: Sequence[Row], out: Path, floor: float | None = None) -> list[Path]:
    """Write the report's files into `out`; returns their paths. Otherwise as `files`."""
    made = files(study, rows, floor)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        write_atomic(out / name, text)
    return [out / name for name in made]


def files(study: Study, rows: Sequence[Row], floor: float | None = None) -> dict[str, str]:
    """The report as NAME.html and as NAME.md.

    rows: those of the study's entries, failed ones too. floor: a score on the metric's own scale; one point worse than the model as it came
    unless said. Raises StudyRefused when no combination has finished, SettingError for a floor that is no number.
    """
    if floor is not None and not isfinite(floor):
        raise SettingError(f"floor={floor} is no score: give a number on the scale of the metric")
    cells = Cells.of(rows, study.skipped, study.pipelines)
    title = f"Study {study.name}"
    lowest = cells.came.score - cells.sign if floor is None else floor
    parts = list(_parts(study, cells, lowest))
    return {f"{study.name}.html": html(title, parts), f"{study.name}.md": markdown(title, parts)}


def _parts(study: Study, cells: Cells, floor: float) -> Iterator[Part]:
    whole, encoder = extra(cells, floor), extra(cells, floor, "encoder")
    best = whole.stack or whole.nearest[1]
    choice = cells.choice(best)
    yield _counted(study, cells)
    yield Heading("What the stack gives beyond the best single technique")
    yield from _extra(cells, whole)
    yield from _extra(cells, encoder)
    yield (
        f"Pipelines are chosen and scored on the same examples ({cells.came.rows[0]['examples']} of the {cells.cells[0].rows[0]['split']} "
        "split); the interval makes both choices anew for every draw of the scores."
    )
    yield Heading("Score against bytes")
    yield from _front(cells, floor)
    if cells.timed:
        yield Heading("Score against latency")
        yield from _fastest(cells, floor)
    yield Heading("Which technique gave it")
    yield from _attributions(cells, choice)
    yield Heading("Do two techniques help each other?")
    yield from _interactions(cells, choice)
    yield Heading("Does the order matter?")
    yield from _orders(cells, orders(cells))
    if best is not None:
        yield Heading(f"Where the bytes went: {best.name}")
        yield from _components(best)
    yield Heading("How it was run")
    yield from _made(study, cells)
    yield Heading("Every pipeline")
    yield from _pipelines(cells)


# what was run


def _counted(study: Study, cells: Cells) -> str:
    runs, pipelines = len(study.pipelines), len(set(study.pipelines))
    done = sum(len(cell.rows) for cell in cells.ran)
    failed = f", {len(cells.failed)} failed" if cells.failed else ""
    planned = f"{pipelines} pipelines" + (f", {runs} with all seeds," if runs > pipelines else "")
    return (
        f"{len(cells.passes)} techniques: {', '.join(cells.passes)}. Of {planned} {done} have finished{failed}. "
        "± is half of a 95% interval: of the difference to the model as it came, on the same examples, and over seeds where "
        "there are several. Encoder: all of the file but embeddings and header."
    )


def _made(study: Study, cells: Cells) -> Iterator[Part]:
    row, came = cells.cells[0].rows[0], cells.came
    yield (
        f"{row['task']}, {row['split']} split, {row['examples']} examples. The model as it came: {cells.metric} {came.score:.2f} ± "
        f"{came.rows[0]['noise']:.2f}, {_mb(came.size_bytes)}, of which {_mb(came.size_bytes - came.encoder_bytes)} are embeddings and "
        "header."
    )
    made = Counter(map(_where, (row for cell in cells.ran for row in cell.rows)))
    yield f"Seeds: {_seeds(cells)}. Run on {'; '.join(f'{where} ({count} rows)' for where, count in made.items())}."
    if study.skipped:
        reasons = Counter(one.reason for one in study.skipped)
        yield f"{len(study.skipped)} pipelines are illegal by contract and were not run:"
        rows = [[why, str(count)] for why, count in reasons.most_common()]
        yield Table(titles=["why", "pipelines"], rows=rows)


def _where(row: Row) -> str:
    """On what a row was made, and with what."""
    machine, versions = row["machine"], row["versions"]
    return (
        f"{row['date']}: {machine['processor']}, threads: {machine['threads']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, stackcomp {versions['stackcomp']}"
    )


def _seeds(cells: Cells) -> str:
    """Those of all pipelines, and those that only some have."""
    every = [
        seed
        for seed in cells.seeds
        if all(seed in (row["seed"] for row in cell.rows) for cell in cells.cells)
    ]
    some = [seed for seed in cells.seeds if seed not in every]
    said = [", ".join(map(str, every))] if every else []
    return "; ".join([*said, *([f"{', '.join(map(str, some))} of some pipelines"] if some else [])])


# the extra


def _extra(cells: Cells, found: Extra) -> Iterator[Part]:
    where = "Whole file" if found.of == "file" else "Encoder"
    start = f"{where}, at a score of {cells.bound} {found.floor:.2f}: "
    end = (
        f" Singles without a finished row, which do not count: {', '.join(cells.awaited)}."
        if cells.awaited
        else ""
    )
    if found.value is None or found.single is None or found.stack is None:
        yield start + " ".join(_missed(cells, found)) + end
        return
    always = "" if found.drawn > 0.995 else f", where there is a figure: {found.drawn:.0%} of the draws"
    said = (
        f"{abs(found.value):.0%} {'more' if found.value >= 0 else 'less'} compression ({found.sure}{always}): the smallest stack that "
        f"reaches it, {_named(found.stack, found.of)}, against the smallest single technique, {_named(found.single, found.of)}."
    )
    if found.ceiling is not None:
        said += f" If the encoder took no bytes at all, and the rest as many as in this stack, it would be {found.ceiling:+.0%}."
    if found.predicted is not None and found.found is not None:
        more = "more" if found.found > found.predicted else "less"
        said += (
            f" Its techniques alone give {found.predicted:.2f}x when multiplied; together they give {found.found:.2f}x, "
            f"{abs(found.found / found.predicted - 1):.0%} {more}."
        )
    yield start + said + end


def _missed(cells: Cells, found: Extra) -> Iterator[str]:
    """What is said where no single technique, or no stack, reaches the floor."""
    yield "no figure."
    for kind, reached, nearest in zip(
        ("single technique", "stack"), (found.single, found.stack), found.nearest, strict=True
    ):
        if reached is not None:
            yield f"The smallest {kind} that reaches it is {_named(reached, found.of)}."
        elif nearest is not None:
            missed = cells.misses(nearest, found.floor)
            yield f"No {kind} reaches it: the best, {_named(nearest, found.of)}, misses it by {missed:.2f} points."
        else:
            yield f"No {kind} has finished."


def _named(cell: Cell, of: str) -> str:
    size = cell.size_bytes if of == "file" else cell.encoder_bytes
    return f"{cell.name} ({_mb(size)}, {cell.score:.2f})"


# score against bytes


def _front(cells: Cells, floor: float) -> Iterator[Part]:
    front = pareto(cells)
    yield pictures.pareto(cells, front, floor)
    yield "The Pareto front: no other pipeline is as small and scores as well."
    yield Table(
        titles=["", "pipeline", cells.metric, "against dense", "file", "compression", "encoder"],
        rows=[
            [
                str(number),
                cell.name,
                f"{cell.score:.2f}",
                str(cell.change),
                _mb(cell.size_bytes),
                f"{cell.compression:.2f}x",
                f"{exp(cell.log_encoder.value):.2f}x",
            ]
            for number, cell in enumerate(front, 1)
        ],
        left=2,
    )


def _fastest(cells: Cells, floor: float) -> Iterator[Part]:
    across = pictures.LATENCY
    front = pareto(cells, across.of)
    yield pictures.pareto(cells, front, floor, across)
    yield "The Pareto front: no other pipeline is as fast and scores as well. One batch of texts, beside the dense model in turn."
    yield Table(
        titles=["", "pipeline", cells.metric, "against dense", "latency", "file"],
        rows=[
            [
                str(number),
                cell.name,
                f"{cell.score:.2f}",
                str(cell.change),
                f"{across.of(cell):.2f}x",
                _mb(cell.size_bytes),
            ]
            for number, cell in enumerate(front, 1)
        ],
        left=2,
    )


# attribution


def _attributions(cells: Cells, choice: dict[str, str]) -> Iterator[Part]:
    strengths = [f"{name} at {how}" for name, how in choice.items() if how]
    yield (
        "Exact Shapley values: what a technique adds to what is there already, averaged over every way in which the stack can grow; "
        "a subset counts as the mean of its legal orders. Compressions multiply to the stack's, points add up to its change. "
        "Beside them: what is lost when it alone is left out of the whole stack."
        + (f" Strengths: {', '.join(strengths)}." if strengths else "")
    )
    for measure in MEASURES:
        yield from _attribution(attribution(cells, choice, measure), cells.sign if measure == "score" else 1)


def _attribution(found: Attribution, sign: int) -> Iterator[Part]:
    title = TITLES[found.measure]
    if found.total is None:
        yield f"{title}: attribution is undefined: {found.undefined}."
        return
    said = str if found.measure == "score" else _factor
    yield f"{title}: {said(found.total)} in all, the mean of {found.orders} orders."
    if found.partial:
        yield (
            "Not all orders have finished, so that these subsets count as the mean of some: "
            + "; ".join(f"{name}, {count}" for name, count in found.partial.items())
            + "."
        )
    total = found.total
    shown = str if found.measure == "score" else lambda one: _part(one, total)
    yield pictures.bars([(name, one, shown(one)) for name, one in found.shares.items()], sign)
    rows = [[name, shown(one), said(found.without[name])] for name, one in found.shares.items()]
    yield Table(
        titles=["technique", "Shapley value", "when left out"], rows=[*rows, ["all", said(found.total), ""]]
    )


def _part(one: Estimate, whole: Estimate) -> str:
    """A logarithm as the factor that it stands for, and as a part of the whole one."""
    return f"{_factor(one)}, {round(one.value / whole.value, 2) + 0.0:.0%}" if whole.value else _factor(one)


def _factor(one: Estimate) -> str:
    """A logarithm as the factor that it stands for."""
    noise = f" ({exp(one.value - one.half):.2f}-{exp(one.value + one.half):.2f})" if one.half else ""
    return f"{exp(one.value):.2f}x{noise}"


# pairs


def _interactions(cells: Cells, choice: dict[str, str]) -> Iterator[Part]:
    found = interactions(cells, choice)
    if cells.dense is None:
        yield f"Undefined: {cells.missing((), choice)}."
        return
    if not found:
        yield "No pair has finished together and one by one."
        return
    worse = "below" if cells.sign > 0 else "above"
    yield (
        "What two techniques give together against what they give one by one. Compression: the factor by which the pair is beyond "
        f"the product of both; above 1 they help each other. Points: the pair's change less both changes; {worse} 0 they "
        "hinder each other. Two techniques that work on different parts of a file always help each other in bytes: each "
        "makes the other's part count for more."
    )
    yield Table(
        titles=["pair", "file", "encoder", "points", "in points"],
        rows=[
            [
                f"{one.first}, {one.second}",
                _factor(one.file),
                _factor(one.encoder),
                str(one.score),
                "within the noise"
                if one.score.within_noise
                else ("help" if cells.sign * one.score.value > 0 else "hinder"),
            ]
            for one in found
        ],
    )


def _orders(cells: Cells, found: Sequence[Order]) -> Iterator[Part]:
    yield (
        "Points that a pipeline scores more when the technique of the row comes right before that of the column, than when the two have "
        "changed places; the mean over all pipelines that differ in nothing else. Coloured where it is beyond the noise: blue, the "
        "row's technique better comes first; orange, second. A dash: not both orders are legal, or not both have run."
    )
    values: dict[tuple[str, str], Estimate] = {}
    for one in found:
        if one.score is not None:
            values[one.first, one.second] = one.score
            values[one.second, one.first] = Estimate(value=-one.score.value, half=one.score.half)
    largest = max((abs(one.value) for one in values.values()), default=0.0) or 1.0
    names = cells.passes
    yield Table(
        titles=["first \\ then", *names],
        rows=[
            [before, *(str(values[before, after]) if (before, after) in values else "-" for after in names)]
            for before in names
        ],
        shades={
            (row, column): cells.sign * values[before, after].value / largest
            for row, before in enumerate(names)
            for column, after in enumerate(names, 1)
            if (before, after) in values and not values[before, after].within_noise
        },
    )
    yield Table(
        titles=["pair", "finding", "pairs of pipelines"],
        rows=[[f"{one.first}, {one.second}", one.words, str(one.pairs)] for one in found],
        left=2,
    )


# bytes, and all rows


def _components(best: Cell) -> Iterator[Part]:
    row = best.rows[0]
    steps = [(step["name"], step["components"]) for step in row["steps"]]
    yield pictures.components(steps, "Bytes of the file as it came and after each pass, by component.")
    there = [part for part in pictures.COMPONENTS if any(sizes[part] for _, sizes in steps)]
    yield Table(
        titles=["after", *there, "file"],
        rows=[
            [name, *(_mb(sizes[part]) for part in there), _mb(sum(sizes.values()))] for name, sizes in steps
        ],
    )


def _pipelines(cells: Cells) -> Iterator[Part]:
    rows = [row for cell in cells.ran for row in cell.rows]
    timed = cells.timed
    titles = ["key", cells.metric, "against dense", "bytes", "compression", *["latency"] * timed]
    yield Table(
        titles=[*titles, "declaration", "fingerprint"],
        rows=[
            [
                row["key"],
                f"{row['score']:.2f}",
                str(Estimate(value=row["difference"], half=row["difference_noise"])),
                f"{row['size_bytes']:,}",
                f"{row['compression']:.2f}x",
                *([f"{row['latency_ratio']:.2f}x"] if timed else []),
                row["declaration"],
                row["fingerprint"],
            ]
            for row in rows
        ],
        code=frozenset({len(titles), len(titles) + 1}),
    )
    if cells.failed:
        yield "Failed:"
        yield Table(
            titles=["key", "error", "declaration"],
            rows=[
                [row["key"], f"{row['error']['type']}: {row['error']['message']}", row["declaration"]]
                for row in cells.failed
            ],
            left=2,
            code=frozenset({2}),
        )


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
