"""The command line: `stackcomp check | run | study | search | report | unpack | show | passes`.

Exit status: 0 when all went well, 2 for a refused pipeline or bad input, 1 when the machine failed (a full
disk, an entry of a study) or a search reaches no goal, 130 when interrupted. Results go to standard output, messages to standard
error. Torch is imported by `run`, `study`, `search`, `unpack` and `check --size` only.
"""

import argparse
import errno
import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core import __version__
from stackcomp.core.errors import (
    CheckpointError,
    PipelineFileError,
    SettingError,
    StackcompError,
    StudyRefused,
    UnknownPass,
)
from stackcomp.core.files import disk_is_full
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.pipeline_file import read_file
from stackcomp.core.selection import nearest
from stackcomp.loading import hush

if TYPE_CHECKING:
    from stackcomp.studies import Rows, Study

PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
)  # of a path that was given badly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    hush()
    try:
        return options.command(options)
    except StackcompError as error:
        print(f"stackcomp: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print(
            f"stackcomp: interrupted; run the same command again{options.again} to go on from the last finished pass",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in PLACE:
            print(f"stackcomp: {error}: give another place, or the right to write there", file=sys.stderr)
            return 2
        if not disk_is_full(error):
            raise
        print(
            "stackcomp: the disk is full; nothing is half-written: free some space, then run the same command again"
            f"{options.again}",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stackcomp",
        description="Compress text transformers by stacking techniques, and measure what each one gives.",
    )
    parser.set_defaults(again="")
    parser.add_argument("--version", action="version", version=f"stackcomp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("check", help="judge a pipeline without reading a weight")
    command.add_argument(
        "file",
        type=Path,
        metavar="FILE.py",
        help="defines `pipeline`, and may define `model` (a folder or hub name) and `task`",
    )
    command.add_argument("--model", metavar="DIR", help="a folder or hub name, in place of the file's model")
    command.add_argument(
        "--size", action="store_true", help="predict the bytes of the weights file after every pass"
    )
    command.set_defaults(command=_check)

    command = commands.add_parser(
        "run", help="run a pipeline; leaves checkpoint, recipe and ledger in a folder"
    )
    command.add_argument("file", type=Path, metavar="FILE.py", help="defines `pipeline`, `model` and `task`")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    command.add_argument("--resume", action="store_true", help="go on from the last finished pass in DIR")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of every random choice (default 0)"
    )
    command.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where passes and scores run, as torch calls it (default cpu)",
    )
    command.set_defaults(command=_run, again=" with --resume")

    command = commands.add_parser(
        "study", help="run what a study misses; leaves one row an entry, and goes on where it was stopped"
    )
    command.add_argument("file", type=Path, metavar="FILE.py", help="defines `study`")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="working folder, shared by processes (default out/study/NAME)"
    )
    _add_results(command)
    command.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="GLOB", help="entries whose key matches"
    )
    command.add_argument(
        "--minutes", type=float, metavar="N", help="start no further entry after so many minutes"
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="share the work between N processes of this machine"
    )
    command.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="share it between the nodes of this Ray cluster, which must see the same folders",
    )
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each worker (default: what its share of the cores is; on Ray 1)",
    )
    command.add_argument("--list", action="store_true", help="say what is done and what is missing, and stop")
    command.add_argument(
        "--resume", action="store_true", help="what a study does anyway: what has a row is not run again"
    )
    command.add_argument(
        "--replay",
        metavar="KEY",
        help="run a finished row again, in the new folder --out, and compare the bytes",
    )
    command.set_defaults(command=_study)

    command = commands.add_parser(
        "search",
        help="find the smallest file for a score, or the best score for a size; goes on where it was stopped",
    )
    command.add_argument("file", type=Path, metavar="FILE.py", help="defines `search`")
    command.add_argument("--out", type=Path, metavar="DIR", help="working folder (default out/search/NAME)")
    _add_results(command)
    command.set_defaults(command=_search)

    command = commands.add_parser(
        "report",
        help="write what the rows of a study of combinations say, as HTML and Markdown; runs nothing",
    )
    command.add_argument("file", type=Path, metavar="FILE.py", help="defines `study`")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write NAME.html and NAME.md"
    )
    _add_results(command)
    command.add_argument(
        "--floor",
        type=float,
        metavar="SCORE",
        help="what a pipeline must score to count (default: one point worse than the model as it came)",
    )
    command.set_defaults(command=_report)

    command = commands.add_parser(
        "unpack",
        help="write a compressed checkpoint as an ordinary one, at full size, which any tool reads and which computes fast",
    )
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    command.add_argument(
        "--factors",
        action="store_true",
        help="keep products of two matrices where they are cheaper: faster; `transformers` loads them after `import stackcomp`",
    )
    command.set_defaults(command=_unpack)

    command = commands.add_parser("show", help="print the ledger of a finished or running folder")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--json", action="store_true", help="the whole ledger as JSON")
    command.set_defaults(command=_show)

    command = commands.add_parser(
        "passes", help="list all registered passes with settings, contract and paper, or say all of some"
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="a pass, and what its settings mean")
    command.set_defaults(command=_passes)
    return parser


def _add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results"),
        metavar="DIR",
        help="where NAME.jsonl is (default %(default)s)",
    )


def _check(options: argparse.Namespace) -> int:
    from stackcomp.manager import check

    found = read_file(options.file)
    pipeline = _pipeline(found, options.file)
    model = found.get("model") if options.model is None else options.model
    against = model if isinstance(model, str | Path) else None
    plans = check(pipeline, against, found.get("task"))
    predicted = _predicted(pipeline, against, found.get("task"), options.file) if options.size else []
    weights = len(plans[-1].weights)
    print(f"legal on {against or 'a plain dense model'} ({weights} weights):")
    for index, step in enumerate(pipeline.flat()):
        chosen = (
            "trains the whole model" if not step.contract.selects else _count(step.selected(plans[index]))
        )
        print(f"  {index + 1}. {step}: {chosen}")
    for line in predicted:
        print(line)
    return 0


def _predicted(pipeline: Pipeline, model: str | Path | None, task: Any, file: Path) -> list[str]:
    """A line for every size of the file, and for why it is not known to the byte."""
    if model is None:
        raise PipelineFileError(
            f"{file}: --size needs the shapes of a model, and the file names no folder: give --model DIR"
        )
    from stackcomp.size import sizes

    told = sizes(pipeline, model, task)
    lines = ["weights file:"]
    for size in told:
        bound = "at most " if size.reasons else ""
        times = told[0].size_bytes / size.size_bytes
        lines.append(
            f"  {size.name or 'as it came':<20} {bound:>8}{size.size_bytes / 1e6:8.2f} MB  {times:5.2f}x  ({size.size_bytes} bytes)"
        )
    return lines + [f"  at most, since {reason}" for reason in told[-1].reasons]


def _count(ids: Sequence[str]) -> str:
    return f"{len(ids)} weight{'s' if len(ids) != 1 else ''}"


def _run(options: argparse.Namespace) -> int:
    found = read_file(options.file)
    pipeline = _pipeline(found, options.file)
    for name in ("model", "task"):
        if name not in found:
            raise PipelineFileError(
                f"{options.file} defines no `{name}`: `run` needs pipeline, model and task"
            )
    from stackcomp.manager import PassManager, check

    if isinstance(found["model"], str | Path):
        check(pipeline, found["model"], found["task"])
    model: Any = (
        found["model"]()
        if callable(found["model"]) and not hasattr(found["model"], "forward")
        else found["model"]
    )
    manager = PassManager(
        out=options.out,
        task=found["task"],
        tokenizer=_tokenizer(found, model, options.file),
        seed=options.seed,
        device=options.device,
    )
    result = manager.run(model, pipeline, resume=options.resume)
    print(result.ledger)
    print(result.farewell)
    return 0


def _tokenizer(found: dict[str, Any], model: Any, file: Path) -> Any:
    """The file's `tokenizer`, or the one beside the model."""
    if "tokenizer" in found:
        return found["tokenizer"]
    from transformers import AutoTokenizer

    source = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PipelineFileError(
            f"{file}: no tokenizer beside the model ({source!r}): define `tokenizer` in the file"
        ) from error


def _study(options: argparse.Namespace) -> int:
    from stackcomp.studies import Rows, Runner, declared, workers

    study = declared(options.file)
    rows = Rows(name=study.name, folder=options.results)
    out = options.out or Path("out/study") / study.name
    if options.replay is not None:
        from stackcomp.studies.replay import replay

        _refuse_beside_replay(options)
        found = replay(
            study,
            rows,
            options.replay,
            options.out or Path("out/replay") / study.name,
            threads=options.threads,
        )
        print(found.words)
        return 0 if found.same else 1
    runner = Runner(
        study=study,
        rows=rows,
        out=out,
        only=tuple(options.only),
        minutes=options.minutes,
        workers=options.workers or 1,
    )
    if options.list:
        print(f"{runner.table()}\n{runner.summary()}")
        return 0
    if options.workers is None and options.ray is None and options.threads is None:
        well = not runner.go()
    else:
        crew = workers.Crew(
            file=options.file.resolve(), runner=runner, workers=options.workers, threads=options.threads
        )
        well = crew.here() if options.ray is None else crew.on_ray(options.ray)
    if study.pipelines:
        with suppress(StudyRefused):  # nothing to compare yet; `stackcomp report` says why
            _write_report(study, rows, out / "report")
    return 0 if well else 1


def _refuse_beside_replay(options: argparse.Namespace) -> None:
    given = [name for name in ("list", "only", "minutes", "workers", "ray") if getattr(options, name)]
    if given:
        raise SettingError(f"--replay runs one row, here and now: leave out --{given[0]}")


def _search(options: argparse.Namespace) -> int:
    from stackcomp.studies import Rows
    from stackcomp.studies.search import Search, search

    asked = read_file(options.file).get("search")
    if not isinstance(asked, Search):
        raise PipelineFileError(f"{options.file} defines no `search`: write search = stackcomp.Search(...)")
    out = options.out or Path("out/search") / asked.name
    found = search(asked, Rows(name=asked.name, folder=options.results), out)
    print(found)
    return 0 if found.reached else 1


def _report(options: argparse.Namespace) -> int:
    from stackcomp.studies import Rows, declared

    study = declared(options.file)
    _write_report(study, Rows(name=study.name, folder=options.results), options.out, options.floor)
    return 0


def _write_report(study: "Study", rows: "Rows", out: Path, floor: float | None = None) -> None:
    from stackcomp.studies.report import write

    for path in write(study, study.own(rows.read()), out, floor):
        print(path)


def _unpack(options: argparse.Namespace) -> int:
    from stackcomp import checkpoint
    from stackcomp.nn import unpack

    model = unpack(checkpoint.load(options.directory), factors=options.factors)
    checkpoint.export(model, options.out, beside=options.directory)
    sizes = [(folder / checkpoint.WEIGHTS).stat().st_size for folder in (options.directory, options.out)]
    print(f"{options.out}: {sizes[1] / 1e6:.2f} MB, from {sizes[0] / 1e6:.2f} MB")
    return 0


def _show(options: argparse.Namespace) -> int:
    from stackcomp.core import ledger

    path = options.directory / ledger.RUNNING
    if not path.is_file():
        path = options.directory / "ledger.json"
    if not path.is_file():
        raise CheckpointError(
            f"{options.directory} holds no ledger.json: give a folder that `stackcomp run` wrote"
        )
    try:
        found = ledger.read(path.read_text("utf8"))
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return 0


def _passes(options: argparse.Namespace) -> int:
    from stackcomp.passes import registered

    known = registered()
    for name in options.names:
        if name not in known:
            raise UnknownPass(f"no pass is named {name!r}: the nearest are {nearest(name, known)}")
    told = [explain(known[name]) for name in options.names] or [describe(cls) for cls in known.values()]
    print("\n\n".join(told))
    return 0


def describe(cls: type[Pass]) -> str:
    """What a user asks of a pass: its summary, settings with defaults, contract and paper."""
    words = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    summary = words.partition(". ")[0].removesuffix(".")
    default = cls()
    settings = ", ".join(f"{field.name}={getattr(default, field.name)!r}" for field in fields(cls))
    lines = [
        cls.__name__,
        f"  {summary}.",
        f"  settings: {settings}",
        f"  contract: {str(default.contract) or 'asks nothing and keeps every fact'}",
        f"  paper: {cls.paper}",
    ]
    return "\n".join(lines)


def explain(cls: type[Pass]) -> str:
    """The same, and all that the pass and what it shares with others say of themselves."""
    told = [inspect.cleandoc(base.__doc__ or "") for base in cls.__mro__ if is_dataclass(base)]
    return "\n\n".join([describe(cls), *told])


def _pipeline(found: dict[str, Any], file: Path) -> Pipeline:
    if "pipeline" not in found:
        raise PipelineFileError(f"{file} defines no `pipeline`: write pipeline = stackcomp.Pipeline(...)")
    pipeline = found["pipeline"]
    if isinstance(pipeline, Pass):
        return Pipeline(pipeline)
    if isinstance(pipeline, Pipeline) and not len(pipeline):
        raise PipelineFileError(
            f"{file}: the pipeline holds no pass: write stackcomp.Pipeline(Pass(...), ...)"
        )
    if not isinstance(pipeline, Pipeline):
        raise SettingError(
            f"{file}: pipeline={pipeline!r} is no Pipeline: write pipeline = stackcomp.Pipeline(...)"
        )
    return pipeline


if __name__ == "__main__":
    sys.exit(main())
