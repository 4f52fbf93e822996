"""The model card: README.md of a run's folder, for whoever gets the folder and not the run.

It says how to load the model, what was done to it and what came of that. It is not in the manifest: people edit cards.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core import __version__
from stackcomp.core.files import write_atomic
from stackcomp.core.fingerprint import versions
from stackcomp.core.ledger import Ledger, Row
from stackcomp.core.pipeline import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.data.tasks import Task

NAME = "README.md"
OURS = (
    "<!-- Written by stackcomp. Remove this line, and a later run in this folder leaves your text alone. -->"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(
    folder: Path, source: "PreTrainedModel", pipeline: Pipeline, ledger: Ledger, task: "Task | None"
) -> None:
    """Write the card of the checkpoint in `folder`, or leave the one that a person made of it."""
    path = folder / NAME
    if not path.is_file() or OURS.encode() in path.read_bytes():
        config = json.loads((folder / "config.json").read_text("utf8"))
        write_atomic(path, _card(config, source.config._name_or_path, pipeline, ledger, task))


def _card(
    config: dict[str, Any], source: str, pipeline: Pipeline, ledger: Ledger, task: "Task | None"
) -> str:
    (name,) = config["architectures"]
    made_with = {"stackcomp": __version__, **versions()}
    parts = [
        _front_matter(source),
        OURS,
        f"# {name}, compressed by stacking techniques",
        _outcome(ledger, task),
        "## Load it",
        _loading(name, "quantization_config" in config),
        "## How it was made",
        f"```text\n{pipeline!r}\n```",
        f"Seed {ledger.rows[-1].seed}; {', '.join(f'{of} {version}' for of, version in made_with.items())}.",
        "## What each pass changed",
        _table(*ledger.table()),
        "Sizes are those of the whole weights file, *layers* those of the linear weights that the pipeline changes. ± is half of a 95% "
        "interval; *vs dense* is the difference to the model as it came, on the same examples; latency is its ratio, above 1 is slower.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(source: str) -> str:
    """What a hub reads. source: where the model came from, said where that is a name on a hub."""
    base = [f"base_model: {source}"] if _HUB_NAME.fullmatch(source) and not Path(source).exists() else []
    return "\n".join(["---", "library_name: transformers", "tags:", "- stackcomp", *base, "---"])


def _outcome(ledger: Ledger, task: "Task | None") -> str:
    """The last row in a sentence or two."""
    dense, last = ledger.rows[0], ledger.rows[-1]
    size = (
        f"{_megabytes(last)} where the model as it came has {_megabytes(dense)}: "
        f"{ledger.compression(last):.2f}x smaller."
    )
    found = last.measured
    if task is None or found.score is None:
        return f"{size} Its quality was not measured."
    beside = (
        ""
        if found.difference is None
        else f", {found.difference:+.2f} ± {found.difference_noise:.2f} beside it"
    )
    return f"{size} Its {found.metric}: {found.score:.2f} ± {found.noise:.2f}{beside}, on {found.examples} examples of {task.name}."


def _loading(name: str, compressed: bool) -> str:
    if not compressed:
        return (
            f"It is an ordinary checkpoint: `transformers.{name}.from_pretrained(folder)`, without stackcomp."
        )
    return (
        "```python\nimport stackcomp  # first: transformers alone does not know these layers\n"
        f"from transformers import {name}\n\nmodel = {name}.from_pretrained(folder)  # or stackcomp.load(folder)\n```\n\n"
        "`stackcomp unpack folder --out plain` makes an ordinary checkpoint of it, at full size."
    )


def _megabytes(row: Row) -> str:
    return f"{row.size_bytes / 1e6:.2f} MB"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))
