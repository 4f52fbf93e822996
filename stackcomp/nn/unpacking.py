"""From stored forms back to layers that compute fast: what a file holds is small, and decoding it at every step is slow."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackcomp.core.matrices import Dense
from stackcomp.core.spec import WeightSpec
from stackcomp.nn.layers import CompressedLayer
from stackcomp.nn.quantizer import detach
from stackcomp.nn.storing import store
from stackcomp.nn.surgery import store_as
from stackcomp.nn.tree import WeightHandle, absolute, built, retie, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unpack(model: "PreTrainedModel", *, factors: bool = False) -> "PreTrainedModel":
    """Decode every compressed weight, in place, once for all: an ordinary model of `transformers`, which other tools read, with the size
    and the speed that it had before it was compressed. Its values stay what compression made of them. Returns the model.

    factors: keep products of two matrices, both decoded, where going through them takes fewer multiplications than the whole weight: the
    fastest form of factorized models. Without it `save_pretrained` writes a plain checkpoint, for which stackcomp need not be imported;
    a model with fewer attention heads than its config can say is still one of ours.

    What is computed differs in the last bits of sums, and where inputs were rounded (`Int8Dynamic`): they no longer are. Weights that
    layers share are copied for each, but for those that the architecture ties. In float32 a model is as accurate as it was; cast it
    (`model.to(torch.bfloat16)`) where that is faster.
    """
    plain = built(model)
    for handle in weights(model).values():
        if not isinstance(handle.modules[0], CompressedLayer):
            _separate(model, handle, plain)
        elif factors and _pays(handle.spec):
            found = {
                part: store(matrix.dense().detach().to(model.dtype), Dense()).requires_grad_(
                    handle.requires_grad
                )
                for part, matrix in handle.matrices.items()
            }
            store_as(model, handle, found, transposed=handle.spec.transposed)
        else:
            _restore(model, handle, plain)
    retie(model, plain)
    detach(model)
    return model


def _pays(spec: WeightSpec) -> bool:
    """Whether a weight is a product through which a token goes in fewer multiplications than through the whole."""
    if spec.kind != "linear" or not spec.factored or spec.tile or "weight" in spec.matrices:
        return False
    return sum(matrix.rows * matrix.cols for matrix in spec.matrices.values()) < spec.dense_count


def _separate(model: "PreTrainedModel", handle: WeightHandle, plain: "PreTrainedModel") -> None:
    """Give plain layers that share their weight, and do not by the architecture, one each."""
    names = [name for name in (absolute(model, path) for path in handle.spec.paths) if name is not None]
    likes: list[Any] = [plain.get_submodule(name) for name in names]
    own: dict[int, nn.Parameter] = {id(likes[0].weight): handle.parameter}
    for name, like in zip(names, likes, strict=True):
        if id(like.weight) not in own:
            own[id(like.weight)] = _copied(handle.parameter, handle.requires_grad)
        layer: Any = model.get_submodule(name)
        layer.weight = own[id(like.weight)]


def _restore(model: "PreTrainedModel", handle: WeightHandle, plain: "PreTrainedModel") -> None:
    """Put plain layers in the places of a compressed weight."""
    tied: dict[int, nn.Parameter] = {}  # by the parameter of the architecture
    made: dict[int, nn.Module] = {}  # by the module replaced: one module under two names stays one
    for name in (absolute(model, path) for path in handle.spec.paths):
        if name is None:
            continue
        replaced: Any = model.get_submodule(name)
        like: Any = plain.get_submodule(name)
        if id(replaced) not in made and isinstance(replaced, CompressedLayer):
            if id(like.weight) not in tied:
                weight = replaced.dense().to(model.dtype)  # that of its own branch
                tied[id(like.weight)] = _copied(weight, handle.requires_grad)
            made[id(replaced)] = _layer(like, replaced, tied[id(like.weight)])
        if id(replaced) in made:
            model.set_submodule(name, made[id(replaced)])


def _layer(like: nn.Module, replaced: Any, weight: nn.Parameter) -> nn.Module:
    """A plain layer of the kind of `like` with the bias or padding of the one it replaces."""
    rows, cols = weight.shape
    with torch.device("meta"):
        if isinstance(like, nn.Embedding):
            layer: Any = nn.Embedding(rows, cols, like.padding_idx)
        elif isinstance(like, Conv1D):
            layer = Conv1D(rows, cols)
            weight = _copied(weight.t(), weight.requires_grad)
        else:
            layer = nn.Linear(cols, rows, bias=replaced.bias is not None)
    layer.weight = weight
    if not isinstance(like, nn.Embedding):
        layer.bias = replaced.bias
    return layer.train(replaced.training)


def _copied(weight: Tensor, requires_grad: bool) -> nn.Parameter:
    """A weight of its own, row after row."""
    copied = weight.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=requires_grad)
