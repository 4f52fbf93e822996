"""Checkpoints: one folder that `transformers` understands, plus recipe, ledger and a manifest of checksums.

A folder is written beside its place and renamed into it, so it is whole or absent. Weights are one
safetensors file; nothing is pickled.

What only stackcomp can read must not reload as something else. `transformers` skips a quantization method that it does not know and fills
what it misses with random numbers; so config.json names a weights file that is not there, and whose name says what to do. Once stackcomp
is imported, its quantizer takes that name away before any file is looked for.
"""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core import __version__, manifest
from stackcomp.core.errors import CheckpointError, UnsupportedModel
from stackcomp.core.files import copy_atomic, sync_folder, whole_folder, write_atomic
from stackcomp.core.headers import dense_weights, read_header
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
LEDGER = "ledger.json"
FORMAT = 1
ONE_FILE = "1000GB"
IMPORT_FIRST = "import_stackcomp_first.safetensors"  # where transformers looks for weights as long as it does not know ours
COMPONENTS = ("values", "indices", "scales", "embeddings", "dense", "header")
_OF_TENSOR = {"values": "values", "support": "indices", "scales": "scales"}

Sizes = dict[str, int]


def save(
    model: "PreTrainedModel",
    directory: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    recipe: Mapping[str, Any] | None = None,
    ledger: Mapping[str, Any] | Callable[[Sizes], Mapping[str, Any]] | None = None,
) -> None:
    """Write `model` to a new folder: config, weights, tokenizer, `recipe.json`, `ledger.json`, and the
    manifest last.

    A `ledger` that depends on the sizes of the weights file is given as a function of its `components`.
    Raises OutputInUse when the folder exists and is not empty; whatever fails (a full disk), nothing is left
    behind.
    """
    with whole_folder(Path(directory)) as folder:
        _save(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        made = ledger(components(folder)) if callable(ledger) else ledger
        for name, content in ((RECIPE, recipe), (LEDGER, made)):
            _write(folder / name, {"format": FORMAT} | dict(content or {}))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        _write(folder / manifest.NAME, manifest.describe(folder, names, __version__))


def export(model: "PreTrainedModel", directory: str | Path, *, beside: str | Path) -> None:
    """Write `model` to a new folder as `transformers` writes it, nothing more, with the tokenizer that lies in `beside` where there is
    one. Raises OutputInUse when the folder exists and is not empty; whatever fails, nothing is left behind."""
    from transformers import AutoTokenizer

    with whole_folder(Path(directory)) as folder:
        _save(model, folder)
        if (Path(beside) / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(beside).save_pretrained(folder)


def load(directory: str | Path, auto_class: str | type | None = None) -> "PreTrainedModel":
    """The model in `directory`, verified, in evaluation mode.

    auto_class: a class, or the name of one, such as `AutoModel`; by default the class that was saved. Raises
    CheckpointError when the folder is cut short, altered or of a newer version, and when the class needs a
    tensor that is not there.
    """
    import transformers

    from stackcomp.nn import align

    verify(directory)
    config = json.loads((Path(directory) / "config.json").read_text("utf8"))
    saved = (config.get("architectures") or ["AutoModel"])[0]
    wanted = saved if auto_class is None else auto_class
    cls = getattr(transformers, wanted, None) if isinstance(wanted, str) else wanted
    if cls is None:
        raise UnsupportedModel(
            f"{directory}: transformers has no class {wanted!r}; give load(..., auto_class=...)"
        )
    with _without_bars():
        model, report = cls.from_pretrained(directory, output_loading_info=True)
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]) if type(model).__name__ == saved else [],
        "of another shape": sorted(str(key) for key in report["mismatched_keys"]),
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{directory}: {len(names)} tensors are {problem} for {type(model).__name__} "
                f"({', '.join(names[:3])}, ...): load it as {saved}"
            )
    align(model)  # also a plain one
    return model


def verify(directory: str | Path) -> None:
    """Raises CheckpointError unless `directory` is a whole, unaltered checkpoint of a version this one reads."""
    folder = Path(directory)
    listed = manifest.read(folder)["files"]
    for name in ("config.json", WEIGHTS, RECIPE, LEDGER):
        if name not in listed:
            raise CheckpointError(
                f"{folder / manifest.NAME}: damaged ({name} is not in it); copy or save the checkpoint again"
            )
    manifest.check(folder)
    for name in (RECIPE, LEDGER):
        found = json.loads((folder / name).read_text("utf8")).get("format")
        if found != FORMAT:
            raise CheckpointError(
                f"{folder / name}: format {found!r}, this version reads {FORMAT}: install a newer stackcomp"
            )


def is_ours(directory: str | Path) -> bool:
    """Whether `directory` holds a checkpoint that `save` or `publish` wrote."""
    return (Path(directory) / manifest.NAME).is_file()


def publish(source: str | Path, directory: str | Path, *, ledger: Mapping[str, Any]) -> None:
    """Copy the checkpoint `source` into `directory`, which may hold other things, with another ledger.

    The manifest comes last: until then `directory` counts as no checkpoint. Each file is replaced as a whole; those of a checkpoint that
    was there go where `source` has none of the name.
    """
    verify(source)
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    names = sorted(manifest.read(Path(source))["files"])
    with suppress(CheckpointError):  # none was there, or a damaged one
        for name in set(manifest.read(place)["files"]) - {*names}:
            (place / name).unlink(missing_ok=True)
    (place / manifest.NAME).unlink(missing_ok=True)
    sync_folder(place)
    for name in names:
        if name != LEDGER:
            copy_atomic(Path(source) / name, place / name)
    write_atomic(place / LEDGER, _text({"format": FORMAT} | dict(ledger)))
    write_atomic(place / manifest.NAME, _text(manifest.describe(place, names, __version__)))


def components(path: str | Path) -> Sizes:
    """Bytes of the weights file by component; they sum to its length.

    path: the file, or the folder that holds it; config.json beside it says what is compressed. `values`,
    `indices` and `scales` are those of compressed linear layers; `embeddings` whatever embeddings take,
    compressed or not; `dense` the rest.
    """
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    header, header_bytes = read_header(file)
    config = json.loads((file.parent / "config.json").read_text("utf8"))
    ours = config.get("quantization_config") or {}
    specs = [WeightSpec.from_json(id_, data) for id_, data in ours.get("weights", {}).items()]
    kinds = {f"{path}.{part}": spec.kind for spec in specs for path in spec.paths for part in spec.matrices}
    try:
        plain = {spec.id for spec in dense_weights(config, header, taken=specs) if spec.kind == "embedding"}
    except UnsupportedModel:  # of a family that is not in the table: then its plain embeddings count as dense
        plain = set()
    sizes = dict.fromkeys(COMPONENTS, 0) | {"header": header_bytes}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        sizes[_component(name, kinds, plain)] += end - start
    return sizes


def _component(name: str, kinds: Mapping[str, str], plain: set[str]) -> str:
    """What a tensor counts as. Names in the file may carry the base model's prefix, ids never do."""
    owner, _, attribute = name.rpartition(".")
    for path in (owner, owner.partition(".")[2]):
        if path in plain or kinds.get(path) == "embedding":
            return "embeddings"
        if path in kinds:
            return _OF_TENSOR[attribute]
    return "dense"


def _save(model: "PreTrainedModel", folder: Path) -> None:
    """Config and weights, as `transformers` writes them; a compressed model's config refuses a load without stackcomp."""
    with _without_bars():
        model.save_pretrained(folder, max_shard_size=ONE_FILE)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf8"))
    if "quantization_config" in config:
        text = json.dumps(config | {"transformers_weights": IMPORT_FIRST}, indent=2, sort_keys=True)
        path.write_text(text + "\n", "utf8")


@contextmanager
def _without_bars() -> Generator[None]:
    """Files of a run are saved and read often: the bars of `transformers` would drown those of the run."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(_text(content), "utf8")


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
