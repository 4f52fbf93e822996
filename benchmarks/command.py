"""What the commands of this package share: options, the working folder, the real model."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stackcomp.core.errors import OutputInUse
from stackcomp.core.files import locked
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies.rows import FOLDER, Rows

ROOT = Path(__file__).resolve().parent.parent


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every study has."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument(
        "--out", type=Path, default=Path("out/bench") / name, help="working folder (default %(default)s)"
    )
    made.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (default %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of every random choice (default %(default)s)")
    made.add_argument("--again", action="store_true", help="run what has a row already, too")
    return made


@contextmanager
def study(name: str, options: argparse.Namespace) -> Iterator[Rows]:
    """The rows of a study, with its working folder held for this process, so that two runs cannot mix."""
    if options.out.resolve() == options.results.resolve():
        raise OutputInUse(
            f"--out and --results are both {options.out}, which is held for the run: give two folders"
        )
    with locked(options.out):
        # a key says all; what is run again with other settings replaces its row
        yield Rows(name=name, folder=options.results, by=())


def pipeline_file(name: str) -> dict[str, Any]:
    """The names that pipelines/NAME.py defines."""
    return read_file(ROOT / "pipelines" / f"{name}.py")


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2, or what STACKCOMP_MODEL names."""
    return os.environ.get("STACKCOMP_MODEL") or pipeline_file("quickstart")["packaged_model"]()


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)
