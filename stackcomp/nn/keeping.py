"""Keeping a part of a model, in place: some of its layers, words, neurons or attention heads.

What is kept is an ordinary smaller model wherever its config can say so; dtype, device and what trains are kept.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackcomp.core.errors import UnsupportedModel
from stackcomp.core.families import attention_of, between, feed_forward_of, head_features
from stackcomp.core.matrices import Dense
from stackcomp.nn.layers import CompressedEmbedding, CompressedLayer
from stackcomp.nn.quantizer import attach, detach
from stackcomp.nn.storing import store, take_rows
from stackcomp.nn.surgery import store_as
from stackcomp.nn.tree import WeightHandle, absolute, built, put, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_LAYER = (
    "layer",
    "window",
)  # a list of the config whose name has one of these, and as many values as there are layers, is of layers
NUMBERS = ("layer_idx", "layer_id")  # what a layer's number is called in it
SETTINGS = (bool, int, float, str, list, tuple, type(None))


def keep_layers(model: "PreTrainedModel", stack: str, kept: Sequence[int]) -> None:
    """Leave of the list of layers at path `stack` only those at `kept`, in this order, numbered anew, and say so in the config.

    Raises UnsupportedModel, with the model as it was, where a layer computes with its number, or would be another one in a model that the
    config alone makes.
    """
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx=True: attention depends on a layer's number, so that layers cannot be renumbered; "
            "leave this model its depth"
        )
    name = absolute(model, stack)
    if name is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layers at {stack}: give a model of this family"
        )
    _check_depth(model, name, kept)
    layers: Any = model.get_submodule(name)
    left = nn.ModuleList(layers[place] for place in kept)
    for place, layer in enumerate(left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # by which a cache is addressed
                module.layer_idx = place  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    model.set_submodule(name, left.train(layers.training))
    _say_depth(model.config, len(layers), kept)
    for handle in weights(model).values():
        used = [module for module in handle.modules if isinstance(module, CompressedLayer)]
        if used and not any(module.owner for module in used):  # the layer that held the matrices is gone
            put(model, handle.spec, used[0].matrices)


def _say_depth(config: Any, depth: int, kept: Sequence[int]) -> None:
    """Say in a config of `depth` layers that those at `kept` are left, in each of its lists of what layers are, too."""
    said: Any = config.get_text_config()
    for name, value in vars(said).items():
        if any(word in name for word in PER_LAYER) and isinstance(value, list) and len(value) == depth:
            vars(said)[name] = [value[place] for place in kept]
    said.num_hidden_layers = len(kept)


def _check_depth(model: "PreTrainedModel", name: str, kept: Sequence[int]) -> None:
    """Raises UnsupportedModel where the config of the layers at `kept` makes a model of other layers than these, or of other parts around
    them."""
    whole = built(model)
    layers = [*whole.get_submodule(name).children()]
    config = deepcopy(model.config)
    _say_depth(config, len(layers), kept)
    try:
        shallow = built(model, type(config).from_dict(config.to_dict()))
    except (ValueError, AssertionError, IndexError, StrictDataclassError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"{type(model).__name__}: its config does not say which {len(kept)} layers are left ({why}): leave this model its depth"
        ) from error
    pairs = [
        (layers[old], new) for old, new in zip(kept, shallow.get_submodule(name).children(), strict=True)
    ]
    differs = [
        place for place, (old, new) in zip(kept, pairs, strict=True) if _described(old) != _described(new)
    ]
    if differs:
        raise UnsupportedModel(
            f"{name}.{differs[0]}: its place decides what layer it is ({type(model).__name__}), so that layers cannot be renumbered: name "
            "others that stay, as in which=(0, 2), or leave this model its depth"
        )
    around = [
        {path: part.shape for path, part in each.state_dict().items() if not path.startswith(f"{name}.")}
        for each in (whole, shallow)
    ]
    if around[0] != around[1]:
        changed = next(path for path in around[0] | around[1] if around[0].get(path) != around[1].get(path))
        raise UnsupportedModel(
            f"{changed}: it has a part for each layer of {type(model).__name__}: leave this model its depth"
        )


def _described(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, without what it holds and its number: its modules with their settings, and the shapes of its tensors."""
    found: dict[str, Any] = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    for path, module in layer.named_modules():
        found[f"{path}:"] = type(module)
        for name, value in vars(module).items():
            if isinstance(value, SETTINGS) and name not in NUMBERS:
                found[f"{path}:{name}"] = value
    return found


def keep_words(model: "PreTrainedModel", kept: Sequence[int]) -> None:
    """Leave of the vocabulary of a model the words with the ids `kept`, in this order, numbered anew, and say so in the config: rows of
    the word embedding and of an output head go, and of the head's bias.

    Raises UnsupportedModel for a factored embedding whose rows are not stored side by side, and where positions are counted from the id
    of the padding and this id changes.
    """
    config: Any = model.config
    ids = {old: new for new, old in enumerate(kept)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    handles = [handle for handle in weights(model).values() if {*handle.modules} & {*ends}]
    padding = config.pad_token_id
    if ids.get(padding, padding) != padding:
        for id_, handle in weights(model).items():
            if handle not in handles and getattr(handle.modules[0], "padding_idx", None) is not None:
                raise UnsupportedModel(
                    f"{id_}: positions are counted from the id of the padding, {padding}: keep all words before it, too"
                )
    for handle in handles:
        _keep_rows(model, handle, kept)
    for holder in (config, model.generation_config) if model.can_generate() else (config,):
        for name, value in list(vars(holder).items()):
            if name.endswith("_token_id") and value is not None:
                several = value if isinstance(value, list) else [value]
                found = [ids[old] for old in several if old in ids]
                setattr(holder, name, found if isinstance(value, list) else next(iter(found), None))
    config.vocab_size = len(kept)


def keep_neurons(model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
    """Leave of the neurons of every layer's feed-forward part those that `kept` names by the id of the weight out of them, and say
    so in the config, where it can. `say_widths` says the rest."""
    paths = _paths(model)
    stack, part = feed_forward_of(path for several in paths.values() for path in several)
    for out_of, into in between(stack, part, paths).items():
        _keep_units(model, into, out_of, kept[out_of])
    left = {len(places) for places in kept.values()}
    if len(left) == 1:
        setattr(model.config, part.size, *left)


def keep_heads(model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
    """Leave of the attention heads of every layer (of groups of them, where they share keys and values) those that `kept` names by the id
    of the weight out of them, and say so in the config, where it can. `say_widths` says the rest. Where layers add one bias by head, all
    must name the same."""
    features = head_features(model.config.to_dict())
    assert features is not None
    paths = _paths(model)
    stack, part = attention_of(path for several in paths.values() for path in several)
    for out_of, into in between(stack, part, paths).items():
        _keep_units(model, into, out_of, kept[out_of], features=features, fused=part.fused)
        for path in paths[out_of]:
            place = stack.split(path)
            if place is None or place[1] != part.out_of:
                continue
            module = model.get_submodule(absolute(model, f"{stack.path}.{place[0]}.{part.module}") or "")
            for attribute, size in (
                (part.count, len(kept[out_of])),
                (part.span, len(kept[out_of]) * features),
            ):
                if attribute is not None:
                    setattr(module, attribute, size)
    if part.bias in paths:
        _keep_columns(model, weights(model)[part.bias], next(iter(kept.values())))
    left = {len(places) for places in kept.values()}
    if len(left) == 1:
        _say_heads(model.config, left.pop(), features)


def say_widths(model: "PreTrainedModel") -> None:
    """Let a model carry how many neurons and heads its layers have, as one with compressed weights does, or nothing where its own config
    says all that there is to say."""
    attach(model)
    said: Any = model.config.quantization_config
    if not said.coded:
        detach(model)


def _say_heads(config: Any, groups: int, features: int) -> None:
    """Say in a config that there are so many groups of heads of so many features together, where it can: where it knows the size of a head
    apart from the width of the model."""
    if not hasattr(config, "num_key_value_heads"):
        return
    before = {
        name: getattr(config, name, None)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    }
    size = before["head_dim"] or config.hidden_size // config.num_attention_heads
    said = {"num_attention_heads": groups * features // size, "num_key_value_heads": groups, "head_dim": size}
    vars(config).update(said)
    try:
        config.validate()
    except StrictDataclassError:  # Llama's width must be a multiple of the number of heads
        vars(config).update(before)


def _keep_units(
    model: "PreTrainedModel",
    into: Sequence[str],
    out_of: str,
    kept: Sequence[int],
    *,
    features: int = 1,
    fused: int = 1,
) -> None:
    """Leave of the units between weights those at `kept`, in this order. A unit is a run of `features` inputs of `out_of`, and its share of
    the outputs of each of `into`, of each of the `fused` matrices that stand below each other there."""
    handles = weights(model)
    units = handles[out_of].spec.cols // features

    def places(size: int, stacked: int) -> list[int]:
        run = size // (stacked * units)
        starts = [(above * units + unit) * run for above in range(stacked) for unit in kept]
        return [start + place for start in starts for place in range(run)]

    for id_ in into:
        _keep_rows(model, handles[id_], places(handles[id_].spec.rows, fused))
    _keep_columns(model, handles[out_of], places(handles[out_of].spec.cols, 1))


def _paths(model: "PreTrainedModel") -> dict[str, tuple[str, ...]]:
    """The paths of every weight, by id."""
    return {id_: handle.spec.paths for id_, handle in weights(model).items()}


def _keep_rows(model: "PreTrainedModel", handle: WeightHandle, kept: Sequence[int]) -> None:
    """Leave of a weight the rows `kept`, and of what its modules have beside it: a bias, and the row that is padding."""
    rows = torch.tensor(kept, device=handle.dense().device)
    if handle.spec.factored and (handle.spec.transposed or handle.spec.tile):
        raise UnsupportedModel(
            f"{handle.spec.id}: rows of W^T = S D, or of a sum of Kronecker products, are not stored side by side; leave it out with skip="
        )
    for module in handle.modules:
        if isinstance(module, nn.Embedding | CompressedEmbedding):
            module.num_embeddings = len(kept)
            padding = module.padding_idx
            module.padding_idx = kept.index(padding) if padding in kept else None
            continue
        setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", len(kept))
        if isinstance(module.bias, nn.Parameter) and len(module.bias) == handle.spec.rows:
            _swap(model, module.bias, module.bias.detach()[rows])
    if not isinstance(handle.modules[0], CompressedLayer):
        _swap(model, handle.parameter, handle.oriented(handle.dense()[rows]))
        return
    matrices = {
        part: matrix if part == "basis" else take_rows(matrix, rows)
        for part, matrix in handle.matrices.items()
    }
    shorter = replace(handle, spec=replace(handle.spec, rows=len(kept)))
    store_as(model, shorter, matrices, transposed=False)


def _keep_columns(model: "PreTrainedModel", handle: WeightHandle, kept: Sequence[int]) -> None:
    """Leave of a weight in floating point, stored whole, the columns `kept`."""
    value = handle.dense()[:, torch.tensor(kept, device=handle.dense().device)]
    for module in handle.modules:
        embeds = isinstance(module, nn.Embedding | CompressedEmbedding)
        inputs = "nx" if isinstance(module, Conv1D) else "in_features"
        setattr(module, "embedding_dim" if embeds else inputs, len(kept))
    if not isinstance(handle.modules[0], CompressedLayer):
        _swap(model, handle.parameter, handle.oriented(value))
        return
    whole = store(value, Dense()).requires_grad_(handle.requires_grad)
    narrower = replace(handle, spec=replace(handle.spec, cols=len(kept)))
    store_as(model, narrower, {"weight": whole}, transposed=False)


def _swap(model: "PreTrainedModel", old: nn.Parameter, value: Tensor) -> None:
    """Put a parameter of another shape wherever `old` is: one that is tied stays so."""
    new = nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)
