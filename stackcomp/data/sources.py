"""Where the rows of a task come from: a closed family of final, frozen classes, read through `datasets`.

A source only names its data: nothing is opened, and neither torch nor `datasets` is imported, until
`load_splits` is called.
"""

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core.errors import DataError, SettingError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER_VARIABLE = "STACKCOMP_DATA"
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the hub, or its copy on disk.

    Where the environment variable STACKCOMP_DATA names a folder that holds `local`, the `<split>*.parquet`
    files in there are read instead, under the hub's names of splits and columns. `rename` gives (old, new)
    column names, applied where `old` exists.
    """

    path: str
    config: str | None = None
    local: str | None = None
    rename: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Files:
    """Local files, as (split, path) pairs; `format` is one of csv, json, parquet, text, and squad: JSON as SQuAD
    is published, articles of paragraphs of questions, read as the hub's rows."""

    format: str
    paths: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        known = sorted({*FORMATS.values(), "squad"})
        if self.format not in known:
            raise SettingError(f"Files: format={self.format!r} is not one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One data file inside an installed Python package (which is found, not imported), read as
    the split "train".

    `where` keeps the rows whose columns have the given values.
    """

    package: str
    file: str
    format: str = "csv"
    where: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows given in memory: column names, and for each split its rows as tuples. `rows(...)` builds one
    from dictionaries."""

    columns: tuple[str, ...]
    splits: tuple[tuple[str, tuple[tuple[Any, ...], ...]], ...]


Source = Hub | Files | Package | Rows


def rows(splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Rows:
    """Freeze `{split: [{column: value, ...}, ...]}`; a column that a row lacks reads as None there.

    A dictionary in a column becomes a column a key, as in `answers.text`; lists become tuples.
    """
    found = {name: [_frozen(name, row) for row in _listed(name, part)] for name, part in splits.items()}
    columns = tuple(dict.fromkeys(column for part in found.values() for row in part for column in row))
    frozen = tuple(
        (name, tuple(tuple(row.get(c) for c in columns) for row in part)) for name, part in found.items()
    )
    return Rows(columns=columns, splits=frozen)


def _listed(split: str, part: Any) -> Iterable[Any]:
    if isinstance(part, str) or not isinstance(part, Iterable):
        raise DataError(
            f"split {split!r}: {part!r} holds no rows: give a list of dictionaries, column: value"
        )
    return part


def _frozen(split: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"split {split!r}: {row!r} is no row: give a dictionary, column: value")
    found: dict[str, Any] = {}
    for column, value in row.items():
        parts = (
            {f"{column}.{key}": part for key, part in value.items()}
            if isinstance(value, Mapping)
            else {column: value}
        )
        found |= {name: _fixed(part) for name, part in parts.items()}
    for column, value in found.items():
        try:
            hash(value)
        except TypeError as error:
            raise DataError(
                f"split {split!r}: column {column!r} holds {value!r:.80}, which is no value that can be kept: give numbers, texts or "
                "lists of them, or leave the column out"
            ) from error
    return found


def _fixed(value: Any) -> Any:
    """A value that can be compared for good: lists, whatever is in them included, as tuples."""
    return tuple(map(_fixed, value)) if isinstance(value, list | tuple) else value


def files(splits: Mapping[str, str | Path]) -> Files:
    """Name local files by split; the format is read from the suffix, and all files share it."""
    formats = set()
    for path in splits.values():
        suffix = Path(path).suffix.lower()
        if suffix not in FORMATS:
            raise SettingError(
                f"files: {str(path)!r} ends in {suffix!r}; known endings are {', '.join(FORMATS)}"
            )
        formats.add(FORMATS[suffix])
    if len(formats) != 1:
        raise SettingError(
            f"files: all splits must share one format, and these are {', '.join(sorted(formats)) or 'none'}"
        )
    return Files(format=formats.pop(), paths=tuple((name, str(path)) for name, path in splits.items()))


def as_source(source: Any, config: str | None = None) -> Source:
    """Accept what people have at hand: a source, a hub name, a file, a mapping of splits to files or to rows, or rows alone, which are
    the split "train". Raises SettingError for anything else."""
    if isinstance(source, Hub | Files | Package | Rows):
        return source
    if isinstance(source, Mapping):
        if all(isinstance(part, str | Path) for part in source.values()):
            return files(source)
        return rows(source)
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise SettingError(
                f"source={source!r} is no data: give a hub name, a file, or a mapping of splits to files or to rows"
            )
        return rows({"train": source})
    if Path(source).suffix.lower() in FORMATS:
        return files({"train": source})
    return Hub(path=str(source), config=config, local=config)


def anywhere(source: Source) -> Source | None:
    """What a source says of its data wherever they lie: rows themselves, the names of files without their folders. None of a data set or a
    package, which the name of a task stands for."""
    if isinstance(source, Files):
        return replace(source, paths=tuple((split, Path(path).name) for split, path in source.paths))
    return source if isinstance(source, Rows) else None


def load_splits(source: Source) -> "dict[str, Dataset]":
    """Read all splits of a source. Raises `DataError` where there is nothing to read, with a way out."""
    return _load_splits(source, os.environ.get(DATA_FOLDER_VARIABLE))


@functools.lru_cache(maxsize=4)
def _load_splits(source: Source, folder: str | None) -> "dict[str, Dataset]":
    # The folder is part of the key, so that a changed environment is seen.
    if isinstance(source, Hub):
        return _load_hub(source, folder)
    if isinstance(source, Files):
        for name, path in source.paths:
            if not Path(path).is_file():
                raise DataError(
                    f"split {name!r}: there is no file {path!r}; paths are relative to the working directory"
                )
        if source.format == "squad":
            return {name: _load_squad(path) for name, path in source.paths}
        return _load_files(source.format, {name: [path] for name, path in source.paths})
    if isinstance(source, Package):
        return {"train": _load_package(source)}
    loaded = {}
    for name, part in source.splits:
        columns = map(list, zip(*part, strict=True)) if part else ([] for _ in source.columns)
        loaded[name] = _joined(name, dict(zip(source.columns, columns, strict=True)))
    return loaded


def _joined(split: str, columns: Mapping[str, list[Any]]) -> "Dataset":
    import datasets

    for column, values in columns.items():
        try:
            datasets.Dataset.from_dict({column: values})
        except (ValueError, TypeError) as error:  # pyarrow's own are kinds of these
            raise DataError(
                f"split {split!r}: the values of column {column!r} are not of one type ({error}): make them so"
            ) from error
    return datasets.Dataset.from_dict(dict(columns))


def _load_hub(source: Hub, folder: str | None) -> "dict[str, Dataset]":
    here = Path(folder, source.local) if folder and source.local else None
    if here is not None and here.is_dir():
        found: dict[str, list[str]] = {}
        for path in sorted(here.glob("*.parquet")):
            found.setdefault(path.stem.split("-")[0], []).append(str(path))
        if not found:
            raise DataError(f"{here}: no parquet file; expected one per split, such as train.parquet")
        loaded = _load_files("parquet", found)
    else:
        import datasets

        try:
            with _quiet():
                fetched: Any = datasets.load_dataset(source.path, source.config)
                loaded = dict(fetched)
        except (OSError, ValueError) as error:
            way_out = (
                f"; or set {DATA_FOLDER_VARIABLE} to a folder that holds {source.local}"
                if source.local
                else ""
            )
            raise DataError(
                f"data set {source.path!r} ({source.config}) cannot be read: {error}. Check the name and "
                f"the network{way_out}"
            ) from error
    for old, new in source.rename:
        loaded = {
            name: part.rename_column(old, new) if old in part.column_names else part
            for name, part in loaded.items()
        }
    return loaded


def _load_files(kind: str, paths: Mapping[str, Iterable[str]]) -> "dict[str, Dataset]":
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    tabs = all(str(p).endswith(".tsv") for part in paths.values() for p in part)
    options: dict[str, Any] = {"sep": "\t"} if tabs else {}
    try:
        with _quiet():
            loaded: Any = load_dataset(kind, data_files={k: list(v) for k, v in paths.items()}, **options)
            return dict(loaded)
    except Exception as error:  # of every kind, StopIteration for an empty file among them
        named = ", ".join(str(path) for part in paths.values() for path in part)
        why = (
            error.__cause__
            if isinstance(error, DatasetGenerationError) and error.__cause__ is not None
            else error
        )
        said = f"{type(why).__name__}: {why}".rstrip(": ")
        raise DataError(
            f"{named}: cannot be read as {kind} ({said}): mend the file, or give one that holds rows"
        ) from error


def _load_squad(path: str) -> "Dataset":
    import datasets

    try:
        flat = [
            {
                "id": asked["id"],
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": asked["question"],
                "answers.text": [answer["text"] for answer in asked["answers"]],
                "answers.answer_start": [answer["answer_start"] for answer in asked["answers"]],
            }
            for article in json.loads(Path(path).read_text("utf8"))["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path!r} is not JSON as SQuAD is published ({type(error).__name__}: {error}); for a file of rows give its path alone"
        ) from error
    return datasets.Dataset.from_list(flat)


def _load_package(source: Package) -> "Dataset":
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"package {source.package!r} is not installed; install it with pip: "
            f"{source.package.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations)), source.file)
    part = _load_files(source.format, {"train": [str(path)]})["train"]
    for column, value in source.where:
        part = part.select([i for i, found in enumerate(part[column]) if found == value])
    return part


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # `datasets` draws a bar for each file it converts; ours is the only one that people should see.
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
