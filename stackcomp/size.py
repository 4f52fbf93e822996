"""The bytes of the file that a pipeline will leave, before it runs: how each pass stores a weight follows from shapes and settings.

    model -> (ways to store each weight, names and shapes of the rest) -> pass by pass -> bytes

Where the data decide (which layer gets what of a budget), a weight has several ways, and what is told is an upper bound.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

from stackcomp.core import coding, contract, headers
from stackcomp.core.errors import UnsupportedModel
from stackcomp.core.families import stack_of
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.data.task import Task

DTYPES = {name: dtype for dtype, name in headers.CODINGS.items()} | {"int8": "I8"}
ORDER = ("F32", "BF16", "F16", "I8", "U8")  # in which safetensors writes tensors, then by name


@dataclass(frozen=True, kw_only=True)
class Size:
    """The weights file after a pass (or of the model as it came, name ""). size_bytes: its length, or with `reasons` an upper bound of
    it; reasons: why the passes up to here leave it open."""

    name: str
    size_bytes: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A way to store a weight; counted: its bytes in the budget that it is under, where there is one."""

    spec: WeightSpec
    counted: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A weight of the model as it is by then. prefix: what its paths lack of their names in the file; budget: which one it is under."""

    prefix: str
    ways: tuple[_Way, ...]
    budget: int | None = None


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file; its name there is prefix and path. others: paths of the same tensor that are not in the file."""

    prefix: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in the file."""
        return self.prefix + self.path

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return coding.width(self.dtype) // 8 * prod(self.shape)


def sizes(
    pipeline: Pipeline | Pass, model: "PreTrainedModel | str | Path", task: "Task | None" = None
) -> list[Size]:
    """The file of the model as it came, and after each pass.

    model: one in memory, on the meta device, too, or a folder or hub name, of which the headers are read; then `task` says which head it
    has. Nothing is computed. Raises what `check` raises.
    """
    from stackcomp.loading import outline
    from stackcomp.run import plan_of

    model = outline(model, task) if isinstance(model, str | Path) else model
    passes = pipeline.flat()
    plans = contract.predict(passes, plan_of(model))
    found, rest = _read(model)
    budgets: list[float] = []
    overhead = 0
    told = [Size(name="", size_bytes=_bytes(found, budgets, rest))]
    for step, (before, after) in zip(passes, pairwise(plans), strict=True):
        found = _followed(step, before, found, budgets) if step.contract.selects else found
        found = _reshaped(after, found)
        rest = _left(after, rest) if type(step).reshape is not Pass.reshape else rest
        reasons = told[-1].reasons + ((f"{step.name} {step.undetermined}",) if step.undetermined else ())
        overhead += step.overhead
        told.append(Size(name=step.name, size_bytes=_bytes(found, budgets, rest) + overhead, reasons=reasons))
    return told


def _read(model: "PreTrainedModel") -> tuple[dict[str, _Weight], list[_Tensor]]:
    """The weights of a model by id, and all other tensors of its file by their paths."""
    from stackcomp import nn
    from stackcomp.nn.names import shared

    found: dict[str, _Weight] = {}
    covered: set[str] = set()
    for id_, handle in nn.weights(model).items():
        spec = handle.spec
        names = [nn.tree.absolute(model, path) or path for path in spec.paths]
        found[id_] = _Weight(prefix=names[0].removesuffix(id_), ways=(_Way(spec=spec),))
        covered |= {
            f"{name}.{tensor.path.removeprefix(f'{id_}.')}"
            for name in names
            for tensor in _tensors(found[id_])
        }
    state = model.state_dict(keep_vars=True)
    twice = {
        name: first
        for name, first in (shared(model) | model.all_tied_weights_keys).items()
        if name in state and state.get(first) is state[name]
    }
    rest: list[_Tensor] = []
    for name, tensor in state.items():
        path = nn.tree.relative(model, name)
        if name not in covered and name not in twice:
            others = tuple(nn.tree.relative(model, other) for other, first in twice.items() if first == name)
            dtype = _dtype(name, tensor.dtype)
            rest.append(_Tensor(name.removesuffix(path), path, dtype, tuple(tensor.shape), others))
    return found, rest


def _dtype(name: str, dtype: object) -> str:
    known = str(dtype).removeprefix("torch.")
    if known not in DTYPES:
        raise UnsupportedModel(
            f"{name}: dtype {known} is not stored: cast the model to float32, bfloat16 or float16"
        )
    return DTYPES[known]


def _followed(
    step: Pass, plan: Plan, found: Mapping[str, _Weight], budgets: list[float]
) -> dict[str, _Weight]:
    """The weights after a pass, with the shapes they had before it."""
    chosen = [plan[id_].origin for id_ in step.selected(plan)]
    bound = step.budget([way.spec for origin in chosen for way in found[origin].ways])
    if bound is not None:
        budgets.append(bound)

    def stored(weight: _Weight) -> _Weight:
        ways = [(way, spec) for way in weight.ways for spec in step.stores(way.spec)]
        if bound is None:
            return replace(weight, ways=tuple(replace(way, spec=spec) for way, spec in ways))
        counted = tuple(_Way(spec=spec, counted=step.counted(spec)) for _, spec in ways)
        return replace(weight, ways=counted, budget=len(budgets) - 1)

    return {**found, **{origin: stored(found[origin]) for origin in chosen}}


def _reshaped(plan: Plan, found: Mapping[str, _Weight]) -> dict[str, _Weight]:
    """The weights that a plan still has, of its shapes and paths."""
    return {
        weight.origin: replace(
            found[weight.origin],
            ways=tuple(
                replace(way, spec=way.spec.reshaped(weight.id, weight.paths, weight.rows, weight.cols))
                for way in found[weight.origin].ways
            ),
        )
        for weight in plan.weights
    }


def _left(plan: Plan, rest: Sequence[_Tensor]) -> list[_Tensor]:
    """The tensors beside the weights once layers went or became narrower: those of layers that the plan lacks go, and a bias is as long
    as its weight has rows. (All layers are alike, so that it does not matter which stay.)"""
    stack = stack_of(plan.paths)
    rows = {f"{path}.bias": weight.rows for weight in plan.weights for path in weight.paths}
    there = [
        tensor for tensor in rest if (place := stack.split(tensor.path)) is None or place[0] < stack.count
    ]
    lengths = [
        next((rows[path] for path in (tensor.path, *tensor.others) if path in rows), None) for tensor in there
    ]
    return [
        tensor if length is None else replace(tensor, shape=(length,))
        for tensor, length in zip(there, lengths, strict=True)
    ]


def _bytes(found: Mapping[str, _Weight], budgets: Sequence[float], rest: Sequence[_Tensor]) -> int:
    """The most bytes that a file with these weights and tensors may have."""
    most = sum(tensor.size_bytes for tensor in rest)
    for number in {weight.budget for weight in found.values()}:
        under = [weight for weight in found.values() if weight.budget == number]
        free = sum(max(way.spec.total_bytes for way in weight.ways) for weight in under)
        if number is None:
            most += free
            continue
        worth = max(way.spec.total_bytes / way.counted for weight in under for way in weight.ways)
        most += min(free, ceil(budgets[number] * worth))
    return most + _header_bytes(
        [*rest, *(tensor for weight in found.values() for tensor in _tensors(weight))]
    )


def _tensors(weight: _Weight) -> list[_Tensor]:
    """The tensors of a weight, stored in the way that has most of them."""

    def of(spec: WeightSpec) -> Iterator[_Tensor]:
        for part, matrix in spec.matrices.items():
            dtype = DTYPES.get(matrix.coding, "U8")
            if spec.plain:
                yield _Tensor(weight.prefix, f"{spec.id}.weight", dtype, (matrix.rows, matrix.cols))
                return
            path = f"{spec.id}.{part}"
            yield _Tensor(weight.prefix, f"{path}.values", dtype, matrix.values_shape)
            if matrix.index_bytes:
                yield _Tensor(weight.prefix, f"{path}.support", "U8", (matrix.index_bytes,))
            if matrix.integers:
                scales = DTYPES[matrix.scale_coding]
                yield _Tensor(weight.prefix, f"{path}.scales", scales, (matrix.scale_count,))

    stored = [[*of(way.spec)] for way in weight.ways]
    return max(stored, key=lambda tensors: (len(tensors), sum(tensor.size_bytes for tensor in tensors)))


def _header_bytes(tensors: Iterable[_Tensor]) -> int:
    """Length of what safetensors write before the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (ORDER.index(tensor.dtype), tensor.name)):
        start, end = end, end + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8
