"""A plan from a checkpoint's config.json and safetensors headers alone: no weight is read and torch is not
imported."""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from stackcomp.core import coding
from stackcomp.core.errors import CheckpointError, UnsupportedModel
from stackcomp.core.families import FAMILIES, Family, head_features, ties_heads, word_embedding
from stackcomp.core.matrices import Coding, MatrixSpec
from stackcomp.core.plan import Plan
from stackcomp.core.selection import nearest
from stackcomp.core.spec import WeightSpec

CODINGS: dict[str, Coding] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER_BYTES = 100_000_000
_NOT_OURS: dict[str, Any] = {"weights": {}}  # what the config of a plain model says of ours


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, coded tensors as what they stand for, and the bytes it takes, its length word included.

    Raises CheckpointError for a file that is cut short or no safetensors file.
    """
    return read_headers([path])[path]


def read_headers(paths: Iterable[Path]) -> dict[Path, tuple[dict[str, Any], int]]:
    """The same for all files of one model, of which one lists the coded tensors of all."""
    found = {path: _raw_header(path) for path in paths}
    for path, (header, start) in found.items():
        if coding.LISTING in header:
            listed = _listed(path, header, start)
            return {one: (coding.described(plain, listed), first) for one, (plain, first) in found.items()}
    return found


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands in the file, and the bytes it takes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: cut short or no safetensors file ({size} bytes); copy or save it again"
            )
        try:
            header = _object(json.loads(file.read(length)))
            header.pop("__metadata__", None)
            if not all(map(_is_tensor, header.values())):
                raise ValueError("it lists what are no tensors")
        except ValueError as error:
            raise CheckpointError(
                f"{path}: damaged safetensors header ({error}); copy or save it again"
            ) from error
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: {size} bytes where its header says {8 + length + end}; copy or save it again"
        )
    return header, 8 + length


def _object(value: object) -> dict[str, Any]:
    """A JSON object. Raises ValueError for any other value."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    return cast("dict[str, Any]", value)


def _is_tensor(entry: Any) -> bool:
    """Whether an entry of a header has the shape of one."""
    try:
        places = [*entry["data_offsets"], *entry["shape"]]
        return (
            len(entry["data_offsets"]) == 2
            and {type(place) for place in places} == {int}
            and bool(entry["dtype"])
        )
    except (KeyError, TypeError):
        return False


def _listed(path: Path, header: Mapping[str, Any], start: int) -> dict[str, Any]:
    """What a file says of coded tensors; `start`: where its data begin."""
    first, last = header[coding.LISTING]["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + first)
        listed = file.read(last - first)
    try:
        return {name: _object(one) for name, one in _object(coding.listed(listed)).items()}
    except (ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path}: damaged list of its coded tensors ({error}); copy or save it again"
        ) from error


def plan_of(directory: str | Path) -> Plan:
    """The plan of the model in `directory` (a local folder, or a name on the hub whose headers are fetched).

    Raises UnsupportedModel when there is no model or its family is not in the table, CheckpointError when a
    file is damaged.
    """
    config, tensors = _read(directory)
    try:
        ours = _object(config.get("quantization_config") or _NOT_OURS)
        if ours.get("quant_method") != "stackcomp":
            ours = _NOT_OURS
        stored, shared = _object(ours["weights"]), _object(ours.get("shared", {}))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: damaged config.json (quantization_config: {error}); copy or save it again"
        ) from error
    compressed = [WeightSpec.from_json(id_, data) for id_, data in stored.items()]
    dense = [
        replace(spec, paths=(*spec.paths, *_others(spec, shared)))
        for spec in dense_weights(config, tensors, taken=compressed)
    ]
    return Plan.of([*dense, *compressed], head_features=head_features(config))


def shapes_of(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model in `directory`, by its name in the file. Raises as `plan_of` does."""
    return {name: tuple(entry["shape"]) for name, entry in _read(directory)[1].items()}


def coding_of(directory: str | Path) -> Coding:
    """In which dtype `transformers` loads the model in `directory`: what its config says, or its first tensor in floating point. Raises as
    `plan_of` does."""
    config, tensors = _read(directory)
    said = config.get("dtype") or config.get("torch_dtype")
    named: dict[Any, Coding] = {name: name for name in CODINGS.values()}
    found: list[Coding | None] = [
        named.get(said),
        *(CODINGS.get(entry["dtype"]) for entry in tensors.values()),
        CODINGS["F32"],
    ]
    return next(known for known in found if known is not None)


def _others(spec: WeightSpec, shared: Mapping[str, str]) -> list[str]:
    """Other paths at which a plain weight is used, by `shared`: second names of tensors and the first of each."""
    names = [name for name, first in shared.items() if first == f"{spec.id}.weight"]
    return [name.removesuffix(".weight") for name in names]


def dense_weights(
    config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]], taken: list[WeightSpec]
) -> list[WeightSpec]:
    """The dense logical weights among `tensors` (safetensors header entries by name), those `taken` left
    out."""
    kind = config.get("model_type") or ""
    if kind not in FAMILIES:
        raise UnsupportedModel(
            f"model_type={kind!r} is not in the table of families ({', '.join(FAMILIES)}; the nearest is {nearest(kind, FAMILIES, 1)}): "
            "give the model itself, or add a line to stackcomp/core/families.py"
        )
    family = FAMILIES[kind]
    covered = {path for spec in taken for path in spec.paths}
    found: dict[str, WeightSpec] = {}
    for name, entry in tensors.items():
        path = name.removesuffix(".weight").removeprefix(f"{family.prefix}.")
        if (
            name.endswith(".weight")
            and len(entry["shape"]) == 2
            and path not in covered
            and not _inside(path, covered)
        ):
            found[path] = _dense(path, entry, family)
    words = word_embedding(family, [*found])
    if ties_heads(config) and words:
        heads = [path for path in family.tied_heads if path in found] or [family.tied_heads[0]]
        embedding = found[words]
        for head in heads:
            found.pop(head, None)
        found[words] = replace(embedding, paths=(words, *heads))
    return list(found.values())


def _inside(path: str, covered: set[str]) -> bool:
    """Whether `path` is a matrix of a compressed layer (`query.basis` of `query`)."""
    return path.rpartition(".")[0] in covered


def _dense(path: str, entry: Mapping[str, Any], family: Family) -> WeightSpec:
    rows, cols = entry["shape"]
    if any(fnmatchcase(path, glob) for glob in family.stored_transposed):
        rows, cols = cols, rows
    embedding = any(fnmatchcase(path, glob) for glob in family.embeddings)
    coding = CODINGS.get(entry["dtype"])
    if coding is None:
        raise UnsupportedModel(
            f"{path}: dtype {entry['dtype']} cannot be compressed; give a model in F32, BF16 or F16"
        )
    return WeightSpec(
        id=path,
        kind="embedding" if embedding else "linear",
        rows=rows,
        cols=cols,
        paths=(path,),
        matrices={"weight": MatrixSpec(rows=rows, cols=cols, coding=coding)},
    )


def _read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and all safetensors header entries of a local folder or a hub name."""
    folder = Path(directory)
    if not folder.is_dir():
        return _fetch(str(directory))
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UnsupportedModel(
            f"{folder} holds no model: config.json and *.safetensors are needed; save it with model.save_pretrained({str(folder)!r})"
        )
    try:
        config: Any = json.loads((folder / "config.json").read_text("utf8"))
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: damaged ({error}); copy or save it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: damaged (no object); copy or save it again")
    tensors: dict[str, Any] = {}
    for entries, _ in read_headers(files).values():
        tensors |= entries
    return cast("dict[str, Any]", config), tensors


def _fetch(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same from the hub: the config file and the headers, never the weights."""
    from huggingface_hub import HfApi

    hub: Any = HfApi()
    try:
        config = json.loads(Path(hub.hf_hub_download(name, "config.json")).read_text("utf8"))
        found = hub.get_safetensors_metadata(name)
    except Exception as error:
        raise UnsupportedModel(
            f"{name!r} is neither a folder with a model nor a name the hub gives ({type(error).__name__}): check the path"
        ) from error
    tensors = {
        key: {"shape": entry.shape, "dtype": entry.dtype}
        for file in found.files_metadata.values()
        for key, entry in file.tensors.items()
    }
    return config, tensors


def plain(kind: str) -> Plan:
    """The plan of a plain dense model of a family: twelve layers of width 64 and 4 heads with a classifier, to check a
    pipeline without a model."""
    family = FAMILIES[kind]
    width = 64
    entry = {"shape": [width, width], "dtype": "F32"}
    tables = ("word_embeddings", "position_embeddings")
    paths = [
        *dict.fromkeys(glob.replace("*_embeddings", table) for glob in family.embeddings for table in tables),
        *(
            f"{family.blocks.replace('*', str(layer))}.{name}"
            for layer in range(12)
            for name in _INSIDE[kind]
        ),
    ]
    tensors = {f"{path}.weight": entry for path in [*paths, "pooler.dense", "classifier"]}
    return Plan.of(dense_weights({"model_type": kind}, tensors, taken=[]), head_features=width // 4)


_BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_LLAMA_LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_INSIDE: dict[str, tuple[str, ...]] = {
    "bert": _BERT_LAYER,
    "distilbert": (*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "llama": _LLAMA_LAYER,
}
PLAIN_KINDS = tuple(_INSIDE)
