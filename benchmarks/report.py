"""Render docs/results/*.jsonl: the generated blocks of README.md and the pictures under docs/assets.

    python -m benchmarks.report            # or: make report
    python -m benchmarks.report --check    # exit status 1 when something is out of date; writes nothing

A generated block stands between `<!-- generated: NAME -->` and `<!-- end -->`. A picture carries the digest of the rows it
shows, and is out of date when they changed: how a library draws it may differ between machines.
"""

import argparse
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import combined, conclusions, dsformer, low_bit, pictures, smallest, tables
from benchmarks.command import ROOT
from benchmarks.comparison import Comparison
from stackcomp.core.files import write_atomic
from stackcomp.core.fingerprint import digest
from stackcomp.studies.rows import Row, Rows

BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the rows under `root` render to."""

    root: Path = ROOT

    def rows(self, name: str) -> list[Row]:
        """The rows of a study."""
        return Rows(name=name, folder=self.root / "docs" / "results").read()

    def dsformer(self) -> Comparison:
        """What the rows of the DSFormer study say together."""
        return Comparison(study=dsformer.study(), rows=self.rows("dsformer"))

    def low_bit(self) -> Comparison:
        """What the rows in few bits say together."""
        return low_bit.comparison(self.rows("low_bit"))

    def blocks(self) -> dict[str, str]:
        """Markdown of every generated block of the README, by name."""
        names = ("catalogue", *combined.NAMES, smallest.NAME, "stsb", "speed", "decoder")
        finished = {name: [row for row in self.rows(name) if "error" not in row] for name in names}
        alone = finished[smallest.SINGLE] = smallest.singles(self.rows(smallest.SINGLE))
        found = {
            "conclusions": conclusions.headline(finished, self.dsformer()),
            "quickstart": tables.quickstart(self.rows("quickstart")),
            "smallest": smallest.headline(self.rows(smallest.NAME), alone),
            "refused": refusal(),
        }
        drawn = self.pictures()
        for name, words in PICTURES.items():
            shown = f"![{words}](docs/assets/{name}.svg)" if name in drawn else tables.not_run(name)
            found[f"{name}-picture"] = shown
        return found

    def pictures(self) -> dict[str, Callable[[], str]]:
        """What draws every picture that has its rows, by name."""
        found: dict[str, Callable[[], str]] = {}
        stsb, declared = self.rows("stsb"), tables.ledgers(self.rows("quickstart"), "declared")
        if any(row["method"] == "dense" for row in stsb):
            found["stsb"] = lambda: pictures.stsb(stsb, self._rounded())
        if declared:
            found["quickstart"] = lambda: pictures.terminal(declared[0][1], "make demo")
        compared = self.dsformer()
        if compared.finished:
            found["dsformer"] = lambda: pictures.dsformer(compared, dsformer.TASKS)
            found["dsformer_mean"] = lambda: pictures.dsformer_mean(compared)
        few = self.low_bit()
        if few.finished:
            found["low_bit"] = lambda: pictures.low_bit(few, dsformer.TASKS)
        return found

    def readme(self) -> str:
        """README.md with its blocks made anew. Raises ValueError for a block that no study makes."""
        blocks = self.blocks()

        def made(found: re.Match[str]) -> str:
            if found["name"] not in blocks:
                raise ValueError(
                    f"README.md: no study makes the block {found['name']!r}: {', '.join(blocks)}"
                )
            return f"{found[1]}{blocks[found['name']]}\n{found[3]}"

        return BLOCK.sub(made, (self.root / "README.md").read_text("utf8"))

    def stale(self) -> list[str]:
        """What is out of date."""
        old = [] if self.readme() == (self.root / "README.md").read_text("utf8") else ["README.md"]
        drawn = self.pictures()
        for path in sorted((self.root / "docs" / "assets").glob("*.svg")):
            old += [f"{path.name} (has no rows)"] if path.stem not in drawn else []
        for name in drawn:
            path = self._picture(name)
            if not path.is_file() or self._mark(name) not in path.read_text("utf8"):
                old.append(f"docs/assets/{path.name}")
        return old

    def write(self) -> None:
        """Write what is out of date."""
        self._picture("stsb").parent.mkdir(parents=True, exist_ok=True)
        for name, draw in self.pictures().items():
            if not self._picture(name).is_file() or self._mark(name) not in self._picture(name).read_text(
                "utf8"
            ):
                write_atomic(self._picture(name), f"{draw().rstrip()}\n{self._mark(name)}\n")
        write_atomic(self.root / "README.md", self.readme())

    def _rounded(self) -> list[Row]:
        """Plain rounding of the same model on the same pairs, where factorizations reach."""
        return [
            row for row in self.rows("catalogue") if row["key"] in ("4 bits everywhere", "3 bits everywhere")
        ]

    def _picture(self, name: str) -> Path:
        return self.root / "docs" / "assets" / f"{name}.svg"

    def _mark(self, name: str) -> str:
        """The comment that tells which rows, and which drawing code, a picture shows."""
        code = Path(pictures.__file__).read_text("utf8")
        compared = {
            "dsformer": self.dsformer,
            "dsformer_mean": self.dsformer,
            "low_bit": self.low_bit,
        }
        rows = compared[name]().finished if name in compared else self.rows(name)
        rows = [*rows, *self._rounded()] if name == "stsb" else rows
        return f"<!-- rows: {digest([rows, code])} -->"


def refusal(file: str = "pipelines/refused.py") -> str:
    """What the command line says of a pipeline that cannot run, as a user sees it now. Raises RuntimeError when it is not
    refused."""
    done = subprocess.run(
        [sys.executable, "-m", "stackcomp.cli", "check", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 2:
        raise RuntimeError(f"{file} was not refused (status {done.returncode}): {done.stdout}{done.stderr}")
    lines = [part for line in done.stderr.splitlines() for part in _wrapped(line)]
    return "\n".join(["```text", f"$ stackcomp check {file}", *lines, "```"])


def _wrapped(line: str) -> list[str]:
    """A line as a terminal of 100 columns breaks it, at spaces."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


PICTURES = {
    "stsb": "STS-B score against encoder compression for dense-sparse and low rank, in floating point and in int8",
    "dsformer": "Score against bytes of the encoder for DSFormer and its rivals, one panel a task, beside the dense model and its noise",
    "dsformer_mean": "Points against the dense model, mean of the tasks, against bytes of the encoder: DSFormer and its rivals",
    "low_bit": "Score against bits a weight for dense-sparse, low rank, rounding and pruning, beside the dense model and its noise",
    "quickstart": "The table that the quickstart ends with",
}


def main() -> int:
    """Write the report, or with --check tell what is out of date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when something is out of date"
    )
    options = parser.parse_args()
    report = Report()
    if not options.check:
        report.write()
        return 0
    stale = report.stale()
    for name in stale:
        print(f"{name} is out of date: run python -m benchmarks.report", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
