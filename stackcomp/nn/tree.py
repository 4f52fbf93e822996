"""Where the weights of a model are: logical weights by id, and putting compressed layers in their places.

Paths are relative to the base model (`encoder.layer.0.output.dense`, without `bert.`; `classifier`). A weight
that several modules use (tied embeddings, one layer under two names) is one weight with several paths; its id
is the first.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackcomp.core.errors import BadWeights, CheckpointError, UnsupportedModel
from stackcomp.core.families import POSITIONS
from stackcomp.core.matrices import Dense, MatrixSpec
from stackcomp.core.spec import WeightSpec
from stackcomp.nn.layers import CompressedEmbedding, CompressedLayer, build
from stackcomp.nn.matrix import CODINGS, StoredMatrix
from stackcomp.nn.storing import store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIGNMENT = 64  # bytes: what torch gives its own tensors
PLAIN = (nn.Linear, Conv1D, nn.Embedding)  # by exact type: a subclass may compute something else


@dataclass(frozen=True, kw_only=True)
class WeightHandle:
    """One logical weight of a model, and the modules that use it: `modules[i]` is at `spec.paths[i]`."""

    spec: WeightSpec
    modules: tuple[nn.Module, ...]

    def dense(self) -> Tensor:
        """W (output x input features, or vocabulary x width), detached. Not to be written to: it may be the
        weight itself.
        """
        module = self.modules[0]
        if isinstance(module, CompressedLayer):
            return module.dense().detach()
        return self.oriented(_parameter(module).detach())

    @property
    def parameter(self) -> nn.Parameter:
        """The weight of a plain layer, as the layer keeps it."""
        weight = _parameter(self.modules[0])
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that can take up the mean of an error of this weight: that of its layer, where there is but one."""
        return getattr(self.modules[0], "bias", None) if len(self.modules) == 1 else None

    @property
    def matrices(self) -> dict[str, StoredMatrix]:
        """The matrices it is stored as, by part; a plain one is taken as a whole dense matrix."""
        module = self.modules[0]
        if isinstance(module, CompressedLayer):
            return module.matrices
        return {"weight": store(self.dense(), Dense()).requires_grad_(self.requires_grad)}

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of `parameter` as output x input features, and back."""
        return tensor.t() if isinstance(self.modules[0], Conv1D) else tensor

    @property
    def requires_grad(self) -> bool:
        """Whether any of its values takes part in training."""
        module = self.modules[0]
        if isinstance(module, CompressedLayer):
            return any(
                parameter.requires_grad
                for matrix in module.matrices.values()
                for parameter in matrix.parameters()
            )
        return _parameter(module).requires_grad


def relative(model: "PreTrainedModel", name: str) -> str:
    """`name` of a module or tensor without the base model's prefix."""
    return name.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else name


def absolute(model: "PreTrainedModel", path: str) -> str | None:
    """The name that the module or tensor at `path` has in `model`; None when there is none."""
    names = [path, f"{model.base_model_prefix}.{path}"]
    return next((name for name in names if relative(model, name) == path and _exists(model, name)), None)


def weights(model: "PreTrainedModel") -> dict[str, WeightHandle]:
    """All logical weights by id, in the model's order: every `nn.Linear`, `Conv1D`, `nn.Embedding` and
    compressed layer; without those that share their weight with a module that computes something else with it, as heads tied to embeddings
    that are scaled do (Gemma, BART).

    Raises UnsupportedModel when another library keeps them quantized, or in a dtype that is not floating
    point.
    """
    groups: dict[int, dict[str, nn.Module]] = {}
    elsewhere: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedLayer):
            groups.setdefault(id(next(iter(module.matrices.values()))), {})[relative(model, name)] = module
        elif type(module) in PLAIN:
            groups.setdefault(id(module.weight), {})[relative(model, name)] = module
        else:
            elsewhere.update(map(id, module.parameters(recurse=False)))
    handles = {}
    for members in (members for tensor, members in groups.items() if tensor not in elsewhere):
        first = next(iter(members))
        handles[first] = WeightHandle(spec=_spec(first, members), modules=tuple(members.values()))
    return handles


def built(model: "PreTrainedModel", config: Any = None) -> "PreTrainedModel":
    """The model as its config, or another one, alone makes it, without memory: what kinds of layers it has, and which the architecture
    ties."""
    with torch.device("meta"):
        return type(model)(config or model.config)


def align(model: nn.Module) -> None:
    """Move tensors that do not start at a multiple of `ALIGNMENT` bytes, as those that lie in a file as it was read may not: products take
    another path there on some processors, and differ in their last bits from those of the model that was saved."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def position_tables(model: "PreTrainedModel") -> dict[str, int]:
    """How many tokens of a text each plain table of learned positions has a place for, by its path: those up to its padding's, as in
    RoBERTa, are none."""
    return {
        path: module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for path, module in model.named_modules()
        if type(module) is nn.Embedding and path.rpartition(".")[2] in POSITIONS
    }


def padding_id(model: nn.Module) -> int | None:
    """The token by which a model knows places that hold none, as heads that read the last one of a text do; None where its config names
    none that it has an embedding for."""
    whole: Any = getattr(model, "config", None)
    config = None if whole is None else whole.get_text_config()
    found = getattr(config, "pad_token_id", None)
    return found if found in range(getattr(config, "vocab_size", 0)) else None


def check_finite(model: "PreTrainedModel") -> None:
    """Raises BadWeights, with the path of the layer, where a tensor of the model holds NaN or infinite
    values.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            layer, _, part = relative(model, name).rpartition(".")
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadWeights(
                f"{layer}: {bad} of the {tensor.numel()} values of its {part} are NaN or infinite; "
                "train it again or load a sound checkpoint"
            )


def weights_digest(model: "PreTrainedModel") -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors of the model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def put(model: "PreTrainedModel", spec: WeightSpec, matrices: Mapping[str, StoredMatrix]) -> None:
    """Replace the modules at `spec.paths` by compressed layers over `matrices`; paths that the model lacks
    are passed over.
    """
    _place(model, spec, matrices)
    _untie(model)


def _place(model: "PreTrainedModel", spec: WeightSpec, matrices: Mapping[str, StoredMatrix]) -> None:
    """The same, without a look at what `transformers` ties."""
    layers: dict[int, CompressedLayer] = {}  # by the module replaced: one module under two names stays one
    for place, path in enumerate(spec.paths):
        name = absolute(model, path)
        if name is None:
            continue
        replaced = model.get_submodule(name)
        if any(replaced is layer for layer in layers.values()):
            continue  # its parent is one module under two names
        if id(replaced) not in layers:
            layers[id(replaced)] = build(spec, replaced, matrices, place=place, owner=not layers)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layers[id(replaced)])


def install(model: "PreTrainedModel", specs: Iterable[WeightSpec]) -> None:
    """Put uninitialised compressed layers where `specs` say, in a model built from its config alone (on any
    device, meta included).

    Raises CheckpointError when the model has another layer there. Weights all of whose paths the model lacks
    are passed over: it is then the base model, and the weight was in the head.
    """
    for spec in specs:
        for path in spec.paths:
            name = absolute(model, path)
            found = None if name is None else model.get_submodule(name)
            if found is None:
                continue
            shape = _shape(found) if type(found) in PLAIN else None
            if shape != (spec.rows, spec.cols):
                raise CheckpointError(
                    f"{path}: {type(found).__name__} of shape {shape} in the model, a weight of {spec.rows} x {spec.cols} in its "
                    "config.json: load it with the class and settings it was saved with"
                )
        _place(
            model,
            spec,
            {part: StoredMatrix(matrix, dtype=model.dtype) for part, matrix in spec.matrices.items()},
        )
    _untie(model)


def _untie(model: "PreTrainedModel") -> None:
    """Take compressed weights off the lists by which `transformers` ties parameters: they share their
    matrices themselves.
    """
    from transformers import (
        PreTrainedModel,  # at import it would close a circle: this runs while transformers is imported
    )

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            gone = _compressed(module)
            tied = module._tied_weights_keys
            if tied:
                module._tied_weights_keys = {
                    target: source for target, source in tied.items() if not {target, source} & gone
                }
            module.all_tied_weights_keys = {
                target: source
                for target, source in module.all_tied_weights_keys.items()
                if not {target, source} & gone
            }


def retie(model: "PreTrainedModel", plain: "PreTrainedModel") -> None:
    """Put plain weights back on the lists by which `transformers` ties parameters, as they are in `plain`, a model of the same
    architecture."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            like: Any = plain.get_submodule(name)
            module._tied_weights_keys = like._tied_weights_keys
            module.all_tied_weights_keys = dict(like.all_tied_weights_keys)
    _untie(model)


def _compressed(model: nn.Module) -> set[str]:
    """Names that the weights of the compressed layers of `model` had as parameters."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, CompressedLayer)
    }


def _parameter(module: nn.Module) -> Tensor:
    """The weight of a plain layer, as it keeps it."""
    assert isinstance(module.weight, Tensor)
    return module.weight


def _shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the W of a plain layer."""
    rows, cols = _parameter(module).shape
    return (cols, rows) if isinstance(module, Conv1D) else (rows, cols)


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _spec(id_: str, members: Mapping[str, nn.Module]) -> WeightSpec:
    module = members[id_]
    if isinstance(module, CompressedLayer):
        rows, cols, matrices = module.rows, module.cols, module.specs
        transposed, tile, branched = module.transposed, module.tile, module.branch is not None
    else:
        weight = _parameter(module)
        if weight.dtype not in CODINGS or not weight.is_floating_point():
            raise UnsupportedModel(
                f"{id_}: dtype {weight.dtype} cannot be compressed; give a model in float32, bfloat16 or float16"
            )
        rows, cols = _shape(module)
        matrices = {"weight": MatrixSpec(rows=rows, cols=cols, coding=CODINGS[weight.dtype])}
        transposed, tile, branched = False, None, False
    return WeightSpec(
        id=id_,
        kind="embedding" if isinstance(module, nn.Embedding | CompressedEmbedding) else "linear",
        rows=rows,
        cols=cols,
        paths=tuple(members),
        matrices=matrices,
        transposed=transposed,
        tile=tile,
        branched=branched,
    )
