"""Rows of results as Markdown: the same tables for README and docs.

Each function takes the rows of one study and returns Markdown, or says how to run the study when there are none.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from benchmarks import small
from stackcomp.core.ledger import Ledger
from stackcomp.studies.rows import Row


def table(titles: Sequence[str], cells: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left, the others right."""
    marks = ["---" if index < left else "--:" for index in range(len(titles))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, marks, *cells])


def command(name: str) -> str:
    """The command that makes the rows of a study."""
    pipelines = {
        "dsformer": "pipelines/dsformer/table.py",
        "stacked": "pipelines/dsformer/stacked.py",
        "low_bit": "pipelines/dsformer/low_bit.py",
        "options": "pipelines/dsformer/options.py",
        "metrics": "pipelines/dsformer/metrics.py",
        "decoder": "pipelines/dsformer/decoder.py",
        "catalogue": "pipelines/studies/catalogue.py",
        "decoder_catalogue": "pipelines/studies/decoder_catalogue.py",
        "encoder_stack_sts": "pipelines/studies/encoder_stack_sts.py",
        "encoder_stack": "pipelines/studies/encoder_stack.py",
    }
    return f"stackcomp study {pipelines[name]}" if name in pipelines else f"python -m benchmarks.{name}"


def not_run(name: str) -> str:
    """What stands where a study has no rows yet."""
    return f"Not run yet: `{command(name)}` makes the rows."


def made_by(name: str, rows: Sequence[Row]) -> str:
    """The command, the machines and the dates behind the table of a study."""
    return made_with([command(name)], rows)


def made_with(commands: Iterable[str], rows: Sequence[Row]) -> str:
    """The same, of a table whose rows these commands make."""
    rows = [row for row in rows if "error" not in row]
    last = rows[-1]
    machine, versions = last["machine"], last["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    dates = sorted({row["date"] for row in rows})
    when = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"
    processors = " and ".join(sorted({row["machine"]["processor"] for row in rows}))
    return (
        f"Made by {' and '.join(f'`{one}`' for one in commands)} {when}: {processors}, {threads}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, seed {last['seed']}."
    )


def plus_minus(value: float | None, noise: float | None, *, signed: bool = False) -> str:
    """`81.20 ± 1.10`, a dash where there is no value."""
    if value is None or noise is None:
        return "-"
    return f"{value:+.2f} ± {noise:.2f}" if signed else f"{value:.2f} ± {noise:.2f}"


# what is stored, and what computes


def speed(rows: Sequence[Row]) -> str:
    """Every form of every model beside the dense one in float32: a table for each batch."""
    if not rows:
        return not_run("speed")
    batches = [part for place in range(len(rows[0]["timings"])) for part in _batch(rows, place)]
    return "\n\n".join(
        [
            *batches,
            "Time of a batch over that of the dense model in fp32, in turn in one process; below 1.00x is faster. What a bf16 model has to "
            "beat is the dense one in bf16.",
            made_by("speed", rows),
        ]
    )


def _batch(rows: Sequence[Row], place: int) -> Iterator[str]:
    timings = [row["timings"][place] for row in rows]
    forms = list(dict.fromkeys(form for timing in timings for form in timing["ratios"]))
    cells = [
        [
            row["key"],
            f"{row['size_bytes'] / 1e6:.1f} MB",
            *(f"{timing['ratios'][form]:.2f}x" if form in timing["ratios"] else "-" for form in forms),
        ]
        for row, timing in zip(rows, timings, strict=True)
    ]
    batch, length, milliseconds = (timings[0][name] for name in ("batch", "length", "dense_ms"))
    texts = "1 text" if batch == 1 else f"{batch} texts"
    yield f"{texts} of {length} tokens ({milliseconds:.1f} ms dense):"
    titles = (form.replace("float32", "fp32").replace("bfloat16", "bf16") for form in forms)
    yield table(["model", "file", *titles], cells)


# every pass alone


def catalogue(name: str, rows: Sequence[Row], planned: Sequence[str] | None = None) -> str:
    """One line a pipeline of the study `name` that has finished, in the order of their keys `planned` if it is known: score, bytes, latency
    and what it took."""
    found = {row["key"]: row for row in rows if "error" not in row}
    planned = list(found) if planned is None else planned
    rows = [found[key] for key in planned if key in found]
    if not rows:
        return not_run(name)
    cells = [
        [
            row["key"],
            f"{row['score']:.2f}",
            plus_minus(row["difference"], row["difference_noise"], signed=True),
            f"{row['size_bytes'] / 1e6:.2f} MB",
            f"{row['compression']:.2f}x",
            f"{row['latency_ratio']:.2f}x",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    titles = ["pass", rows[0]["metric"], "vs as it came", "file", "compression", "latency", "seconds"]
    partial = f"**{len(rows)} of {len(planned)} entries are done.** " if len(rows) < len(planned) else ""
    return f"{table(titles, cells)}\n\n{partial}{made_by(name, rows)}"


# the STS benchmark


def stsb(rows: Sequence[Row]) -> str:
    """One line a ratio and method, plain and with int8 on top, and what the rows say in words."""
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if dense is None:
        return not_run("stsb")
    found = {(row["ratio"], row["method"], row["int8"]): row for row in rows}
    cells = []
    for ratio, method in sorted({(row["ratio"], row["method"]) for row in rows}):
        plain, rounded = found.get((ratio, method, False)), found.get((ratio, method, True))
        if plain and rounded:
            cells.append([f"{ratio:g}x", _spoken(method), *_side(plain), *_side(rounded)])
    titles = [
        "encoder, asked",
        "factorization",
        "score",
        "encoder",
        "file",
        "+ int8: score",
        "encoder",
        "file",
    ]
    whole = plus_minus(dense["score"], dense["noise"])
    start = f"As it came: {whole} ({dense['examples']} pairs, Spearman x 100), {dense['size_bytes'] / 1e6:.1f} MB."
    words = [*_int8_alone(found), *_against_low_rank(found), *_int8_change(found)]
    return "\n\n".join([start, table(titles, cells, left=2), *words, made_by("stsb", rows)])


def _spoken(method: str) -> str:
    return method.replace("DenseSparse", "dense-sparse").replace("LowRank", "low rank")


def _side(row: Row) -> list[str]:
    return [f"{row['score']:.2f}", f"{row['layer_compression']:.2f}x", f"{row['compression']:.2f}x"]


def _int8_alone(found: dict[Any, Row]) -> list[str]:
    """The rival in bytes."""
    alone = found.get((1.0, "Int8Weights", True))
    if alone is None:
        return []
    return [
        f"Int8 alone, without a factorization: {alone['score']:.2f} at {alone['layer_compression']:.2f}x of the encoder and "
        f"{alone['compression']:.2f}x of the file. A factorization in floating point has to be read beside it."
    ]


def _against_low_rank(found: dict[Any, Row]) -> list[str]:
    """Dense-sparse minus the better of the low ranks at each ratio, whatever its sign."""
    gains = []
    for ratio in sorted({ratio for ratio, method, _ in found if method == "DenseSparse"}):
        ours = found.get((ratio, "DenseSparse", False))
        theirs = [
            found[key]["score"]
            for key in found
            if key[0] == ratio and key[1].startswith("LowRank") and not key[2]
        ]
        if ours and theirs:
            gains.append(f"{ours['score'] - max(theirs):+.2f} at {ratio:g}x")
    return [f"Dense-sparse minus the better low rank, before rounding: {', '.join(gains)}."] if gains else []


def _int8_change(found: dict[Any, Row]) -> list[str]:
    """The largest change that rounding made, and what it did to the bytes."""
    both = [
        (found[ratio, method, True], found[ratio, method, False])
        for ratio, method, int8 in found
        if int8 and (ratio, method, False) in found
    ]
    if not both:
        return []
    most = max((rounded["score"] - plain["score"] for rounded, plain in both), key=abs)
    shrunk = [plain["layer_bytes"] / rounded["layer_bytes"] for rounded, plain in both]
    return [
        f"Rounding to int8 changed a score by at most {abs(most):.2f} and shrank the factorized layers "
        f"{min(shrunk):.2f} to {max(shrunk):.2f} times more."
    ]


# the quickstart


def ledgers(rows: Sequence[Row], role: str) -> list[tuple[Row, Ledger]]:
    """(row, its ledger) of every pipeline in a role: declared, other order, alone."""
    return [(row, Ledger.from_json(row["ledger"])) for row in rows if row["role"] == role]


def ledger(found: Ledger) -> str:
    """A ledger's own table."""
    titles, cells = found.table()
    return table(titles, cells)


def quickstart(rows: Sequence[Row]) -> str:
    """One line a pipeline, as it ended: declared, other orders, each pass alone, plain rounding to 4 bits."""
    if not ledgers(rows, "declared"):
        return not_run("quickstart")
    cells = []
    for role in ("declared", "other order", "alone", "yardstick"):
        for _, found in ledgers(rows, role):
            names = " → ".join(row.name for row in found.rows[1:])
            names = f"{names}, 4 bits, nothing else" if role == "yardstick" else names
            _, lines = found.table()
            seconds = sum(row.seconds for row in found.rows[1:])
            cells.append(
                [f"**{names}**" if role == "declared" else names, *lines[-1][1:-1], f"{seconds:.0f}"]
            )
    (_, declared), *_ = ledgers(rows, "declared")
    titles, lines = declared.table()
    cells.append(["the model as it came", *lines[0][1:-1], "-"])
    return "\n\n".join([table(["passes", *titles[1:-1], "seconds"], cells), made_by("quickstart", rows)])


def brought(found: Ledger) -> str:
    """What each pass of one pipeline changed: bytes, score, latency, and the seconds it took."""
    cells = []
    for before, after in pairwise(found.rows):
        then, now = before.measured, after.measured
        cells.append(
            [
                after.name,
                f"{(before.size_bytes - after.size_bytes) / 1e6:.2f} MB",
                _change(then.score, now.score, "+.2f"),
                _change(then.latency_ratio, now.latency_ratio, "+.2f", "x of dense"),
                f"{after.seconds:.0f} s",
            ]
        )
    return table(["pass", "bytes saved", "score changed by", "latency changed by", "took"], cells)


def _change(before: float | None, after: float | None, how: str, unit: str = "") -> str:
    return "-" if before is None or after is None else f"{after - before:{how}}{unit}"


# reloading and resuming


STACKS = {"quickstart": "the quickstart's stack"}  # rows that are not of one pass alone


def reload(rows: Sequence[Row]) -> str:
    """One line a pass: bits and bytes."""
    if not rows:
        return not_run("reload")
    cells = []
    for row in sorted(rows, key=lambda row: (":" in row["key"], row["key"] in STACKS, row["key"])):
        sizes = {row[name] for name in ("file_bytes", "ledger_bytes", "component_bytes", "tensor_bytes")}
        cells.append(
            [
                STACKS.get(row["key"]) or (row["key"] if ":" in row["key"] else f"`{row['key']}`"),
                _yes(row["load_identical"]),
                _yes(row["auto_identical"]),
                f"{row['file_bytes']:,}",
                _yes(len(sizes) == 1),
            ]
        )
    titles = [
        "pass",
        "`stackcomp.load`: same bits",
        "`AutoModel`: same bits",
        "bytes on disk",
        "equal the ledger's sum",
    ]
    note = (
        f"Of single passes the model is all-MiniLM-L6-v2 cut to {small.LAYERS} layers; passes took 3 steps of training and 64 texts of "
        "calibration."
    )
    written = {row["written_tokens"] for row in rows} - {0}
    if written:
        note += f" Of SmolLM2-135M {max(written)} tokens that it wrote after each of {len(small.TEXTS)} texts were compared, too."
    made = [command("reload"), *([f"{command('reload')} --decoder"] if written else [])]
    return "\n\n".join([table(titles, cells), note, made_with(made, rows)])


def kill(rows: Sequence[Row]) -> str:
    """One line a kill point."""
    points = [row for row in rows if row["key"] != "whole"]
    if not points:
        return not_run("kill")
    cells = [
        [
            row["key"].removeprefix("point "),
            f"{row['after_seconds']:.1f} s",
            row["last_step"] if row["killed"] else "(had ended)",
            _yes(row["identical"]),
        ]
        for row in points
    ]
    return "\n\n".join(
        [kill_in_words(rows), table(["point", "killed after", "last finished step", "same bytes"], cells)]
    )


def kill_in_words(rows: Sequence[Row]) -> str:
    """How many points there were and how many ended in the same bytes."""
    points = [row for row in rows if row["key"] != "whole"]
    whole = [row for row in rows if row["key"] == "whole"]
    if not points or not whole:
        return not_run("kill")
    same, dead = sum(row["identical"] for row in points), sum(row["killed"] for row in points)
    return (
        f"{dead} of {len(points)} runs of a {whole[0]['seconds']:.0f}-second stack were killed before they ended; "
        f"after resuming, {same} of {len(points)} weights files were the same bytes as the uninterrupted run's. "
        f"{made_by('kill', rows)}"
    )


def kill_study(rows: Sequence[Row]) -> str:
    """How many kills a study went through, and whether it ended as the one that was left alone."""
    if not rows or not rows[-1]["moments"]:
        return not_run("kill_study")
    row = rows[-1]
    spread = [moment["rows"] for moment in row["moments"]]
    ended = "the same" if row["identical"] else "**not the same**"
    return (
        f"A {row['seconds']:.0f}-second study of {row['entries']} pipelines was killed {len(spread)} times, with {min(spread)} to "
        f"{max(spread)} rows finished, and started again after each. What it ended with {row['ended']} times: {ended} rows as left alone, "
        f"each once, with the same bytes. {made_by('kill_study', rows)}"
    )


def _yes(held: bool) -> str:
    return "yes" if held else "**no**"


# speed


def factorizing(rows: Sequence[Row]) -> str:
    """scikit-learn beside ours, all weights of a model, growth with the weight, memory."""
    if not rows:
        return not_run("factorizing")
    kinds = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("scikit-learn", "all weights", "growth", "memory")
    }
    note = (
        "Processor seconds, all threads together. Weights of BERT-base's shapes, each put together from four of all-MiniLM-L6-v2's; "
        "plain squared error."
    )
    return "\n\n".join(
        part
        for part in [
            note,
            _beside(kinds["scikit-learn"]),
            _all_weights(kinds["all weights"]),
            _growth(kinds["growth"]),
            _memory(kinds["memory"]),
            made_by("factorizing", rows),
        ]
        if part
    )


def _beside(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]
        cells.append(
            [
                row["key"].removeprefix("scikit-learn, "),
                f"{theirs['error']:.4f}",
                f"{theirs['processor_seconds']:.1f}",
                f"{ours['error']:.4f}",
                f"{ours['processor_seconds']:.2f}",
                str(ours["sweeps"]),
                f"{row['ratio']:.0f}x",
            ]
        )
    titles = [
        "weight, form, passes of scikit-learn",
        "its error",
        "its seconds",
        "our error",
        "our seconds",
        "sweeps",
        "faster",
    ]
    words = (
        "MiniBatchDictionaryLearning with orthogonal matching pursuit on single blocks, its time multiplied up to all blocks; "
        "ours on the whole matrix with as many sweeps as reach its error on the same blocks."
    )
    return f"{words}\n\n{table(titles, cells)}" if rows else ""


def _all_weights(rows: Sequence[Row]) -> str:
    cells = [
        [
            row["key"].removeprefix("all weights, "),
            str(row["weights"]),
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['processor_seconds']:.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return (
        table(
            ["all weights of an encoder", "weights", "parameters", "processor seconds", "by the clock"], cells
        )
        if rows
        else ""
    )


def _growth(rows: Sequence[Row]) -> str:
    cells = [
        [
            f"{point['rows']}x{point['columns']}",
            f"{point['processor_seconds']:.2f}",
            f"{point['nanoseconds_a_weight']:.0f}",
        ]
        for row in rows
        for point in row["points"]
    ]
    return (
        table(["weight, blocks of equal width", "processor seconds", "nanoseconds a value"], cells)
        if rows
        else ""
    )


def _memory(rows: Sequence[Row]) -> str:
    cells = [
        [row["key"].removeprefix("memory, "), f"{row['extra_bytes'] / 1e6:.1f} MB", f"{row['ratio']:.1f}x"]
        for row in rows
    ]
    return (
        table(["most memory beyond the weight itself", "bytes", "over the weight's"], cells) if rows else ""
    )


def step_cost(rows: Sequence[Row]) -> str:
    """The cost of a straight-through step by interval."""
    if not rows:
        return not_run("step_cost")
    row = rows[-1]
    cells = [
        [
            f"**{found['every']}** (default)" if found["every"] == row["default"] else str(found["every"]),
            f"{found['ratio']:.2f}x",
            f"{found['least']:.2f} to {found['most']:.2f}",
        ]
        for found in row["ratios"]
    ]
    words = (
        f"A plain fine-tuning step takes {row['plain_ms']:.0f} ms, a straight-through step {row['step_ms']:.0f} ms and a projection of "
        f"all {row['weights']} weights {row['projection_ms']:.0f} ms of processor time (all-MiniLM-L6-v2, batch {row['batch']}, "
        f"{row['length']} tokens{', bf16' if row.get('bf16') else ''}), in turn in one process, {row['rounds']} times {row['steps']} steps."
    )
    titles = ["steps between projections", "over a plain step", "from to"]
    return "\n\n".join([words, table(titles, cells), made_by("step_cost", rows)])
