"""What DSFormer still brings on top of other techniques: the rows of pipelines/dsformer/stacked.py as Markdown.

    marginal extra = S(stack without DSFormer) / S(stack with it) - 1,  S in bytes, of the encoder's layers or of the whole file

A stack counts where its score is at most TOLERANCE points below that of the stack without DSFormer. No pass touches the embeddings,
so the extra of the whole file has a ceiling: what it would be if DSFormer left no byte of the layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.tables import made_by, not_run, plus_minus, table
from stackcomp.studies.rows import Row

BASES = ("distilled student", "shared layers", "int8")
ON_TOP = " + DSFormer"
TOLERANCE = 1.0  # points of score
ROWS = 26  # of the whole study: two dense models, and every base alone and with DSFormer at three ratios

READING = f"""\
Each base technique alone, and with DSFormer at a ratio of its own on top, both with the same number of training steps where the base
is trained. *Extra* is how many times more compression the stack with DSFormer has than the stack without it, less one; *ceiling* is
what the extra of the whole file would be if the layers took no byte at all, since no pass here touches the embeddings. Scores are
differences to the dense model that each row came of, which another processor trains into another. Bold lines are within {TOLERANCE:g}
point of the stack without DSFormer. Rounded values take no gradient, so int8 comes last: DSFormer is put under it."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A base with DSFormer beside the base alone, on one task."""

    alone: Row
    stacked: Row

    @property
    def base(self) -> str:
        """The technique below."""
        return self.alone["labels"]["method"]

    @property
    def place(self) -> str:
        """The task and the base, as a reader sees them."""
        return f"{self.alone['labels']['task']}, {self.base}"

    @property
    def change(self) -> float:
        """The score with DSFormer less that without, each beside the dense model that it came of."""
        return self.stacked["difference"] - self.alone["difference"]

    @property
    def counts(self) -> bool:
        """Whether the score is near enough."""
        return self.change >= -TOLERANCE

    @property
    def layers(self) -> float:
        """Marginal extra on the bytes of the encoder's layers."""
        return self.alone["layer_bytes"] / self.stacked["layer_bytes"] - 1

    @property
    def file(self) -> float:
        """Marginal extra on the whole file."""
        return self.alone["size_bytes"] / self.stacked["size_bytes"] - 1

    @property
    def ceiling(self) -> float:
        """Marginal extra on the whole file, had the layers no bytes."""
        whole = self.alone["size_bytes"]
        return whole / (whole - self.alone["layer_bytes"]) - 1


def stacks(rows: Sequence[Row]) -> Iterator[Stack]:
    """Every stack with a finished row beside a finished row of its base, in the order of tasks, bases and ratios."""
    done = [row for row in rows if "error" not in row]
    for task in dict.fromkeys(row["labels"]["task"] for row in done):
        here = [row for row in done if row["labels"]["task"] == task]
        for base in BASES:
            alone = [row for row in here if row["labels"]["method"] == base]
            with_it = [row for row in here if row["labels"]["method"] == base + ON_TOP]
            for row in sorted(with_it, key=lambda row: row["labels"]["ratio"]) if alone else ():
                yield Stack(alone=alone[0], stacked=row)


def section(rows: Sequence[Row]) -> str:
    """The table of all stacks and what each base leaves for DSFormer."""
    found = list(stacks(rows))
    if not found:
        return not_run("stacked")
    return "\n\n".join([READING, *_partial(rows), _table(found), _verdicts(found), made_by("stacked", rows)])


def headline(rows: Sequence[Row]) -> str:
    """What each base leaves for DSFormer, in a line each."""
    found = list(stacks(rows))
    if not found:
        return not_run("stacked")
    return "\n\n".join([_verdicts(found), *_partial(rows), made_by("stacked", rows)])


def _partial(rows: Sequence[Row]) -> list[str]:
    done = sum("error" not in row for row in rows)
    return [] if done >= ROWS else [f"Partial: {done} of {ROWS} rows so far."]


def _table(found: Sequence[Stack]) -> str:
    titles = [
        "task, base",
        "DSFormer at",
        "vs dense, without",
        "with",
        "encoder, extra",
        "file, extra",
        "ceiling",
    ]
    cells = []
    for stack in found:
        line = [
            stack.place,
            f"{stack.stacked['labels']['ratio']:g}x",
            *(
                plus_minus(row["difference"], row["difference_noise"], signed=True)
                for row in (stack.alone, stack.stacked)
            ),
            f"{stack.layers:+.0%}",
            f"{stack.file:+.0%}",
            f"{stack.ceiling:+.0%}",
        ]
        cells.append([f"**{cell}**" for cell in line] if stack.counts else line)
    return table(titles, cells, left=1)


def _verdicts(found: Sequence[Stack]) -> str:
    """The largest extra that counts, one line a task and base."""
    lines = []
    for place in dict.fromkeys(stack.place for stack in found):
        here = [stack for stack in found if stack.place == place]
        fine = [stack for stack in here if stack.counts]
        if fine:
            best = max(fine, key=lambda stack: stack.layers)
            said = (
                f"{best.layers:+.0%} on the encoder and {best.file:+.0%} on the file (ceiling {best.ceiling:+.0%}), "
                f"score {best.change:+.2f}"
            )
        else:
            nearest = max(here, key=lambda stack: stack.change)
            said = f"no stack within {TOLERANCE:g} point; the nearest is at {nearest.change:+.2f}"
        lines.append(f"- {place}: {said}.")
    return "\n".join(lines)
