"""Changing how the weights of a model are stored, and which layers there are, in place.

Every function but those that keep a part of the model takes the id of a logical weight and changes all modules that use it; dtype, device,
biases, padding and what trains are kept. Afterwards `model.save_pretrained` writes the new form and `from_pretrained`
reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackcomp.core.errors import SettingError, UnsupportedModel
from stackcomp.core.families import attention_of, between, feed_forward_of, head_features
from stackcomp.core.settings import one_of
from stackcomp.core.spec import Coding, Dense, Fixed, Free, WeightSpec
from stackcomp.nn.layers import CompressedEmbedding, CompressedLayer
from stackcomp.nn.matrix import StoredMatrix, store, take_rows, to_int8, to_low_bit
from stackcomp.nn.products import products
from stackcomp.nn.quantizer import attach
from stackcomp.nn.rounded import RoundedMatrix
from stackcomp.nn.tree import WeightHandle, absolute, put, weights
from stackcomp.ops import low_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask = Callable[[Tensor], Tensor]
Prune = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def factorize(
    model: "PreTrainedModel",
    id_: str,
    *,
    basis: Float[Tensor, "atoms g"],
    values: Float[Tensor, "..."],
    support: Int64[Tensor, "n groups s"] | None = None,
    transposed: bool = False,
) -> None:
    """Store W = S D (`transposed`: W^T = S D) with the basis D (blocks*b x g) and coefficients S.

    With a `support`, S has `values` (n, blocks*q, s) at the ascending columns `support` of each of the q groups of a
    block (q is mostly 1); without one S is dense, and `values` are (n, blocks*b): low rank. Raises ValueError when the shapes do not
    make W.
    """
    handle = weights(model)[id_]
    rows, cols = handle.spec.rows, handle.spec.cols
    n, m = (cols, rows) if transposed else (rows, cols)
    atoms, width = basis.shape
    blocks = m // width
    if m % width or atoms % blocks or (support is None and values.shape != (n, atoms)):
        raise ValueError(
            f"{id_}: basis {tuple(basis.shape)} and values {tuple(values.shape)} do not make {n} x {m}"
        )
    like = handle.dense()
    if support is None:
        coefficients = store(values.to(like), Dense())
    else:
        spans = support.shape[1]
        if support.shape != values.shape or len(support) != n or spans % blocks or atoms % spans:
            raise ValueError(
                f"{id_}: support {tuple(support.shape)} and values {tuple(values.shape)} do not make {n} x {blocks} x s"
            )
        group = atoms // spans
        layout = Fixed(block=group, nonzeros=support.shape[2])
        spread = torch.zeros(n, spans, group, dtype=like.dtype, device=like.device)
        mask = torch.zeros(n, spans, group, dtype=torch.bool, device=like.device)
        spread.scatter_(-1, support.to(like.device), values.detach().to(like))
        mask.scatter_(-1, support.to(like.device), True)
        coefficients = store(spread.flatten(1), layout, mask.flatten(1))
    matrices = {"basis": store(basis.to(like), Dense()), "coefficients": coefficients}
    for matrix in matrices.values():
        matrix.requires_grad_(handle.requires_grad)
    _put(model, handle, matrices, transposed=transposed)


def sparsify(
    model: "PreTrainedModel", id_: str, mask: Mask, *, groups: tuple[int, int] | None = None
) -> None:
    """Keep of every dense matrix of a weight the entries that `mask(matrix)`, a boolean of its shape, names;
    the rest is zero from now on.

    groups: (n, m) stores them as n of every m columns of a row, which the mask must then keep; else any
    entries, beside a bitmap.
    """
    handle = weights(model)[id_]
    matrices = dict(_matrices(handle))
    for part, matrix in matrices.items():
        if isinstance(matrix.spec.layout, Dense) and not matrix.spec.integers:
            values = matrix.dense().detach()
            matrices[part] = _sparse(matrix, values, mask(values), groups)
    _put(model, handle, matrices, transposed=handle.spec.transposed)


def prune(
    model: "PreTrainedModel",
    id_: str,
    choose: Prune,
    *,
    moment: Float[Tensor, "m m"],
    groups: tuple[int, int] | None = None,
) -> None:
    """The same with a view to the inputs of a linear weight, of second moment `moment`.

    `choose(weight, moment)` gives new values of a weight (n x m) and a boolean of its shape, which of them to keep; it is asked for
    every product that the weight is made of, with the moment of what flows into it.
    """
    handle = weights(model)[id_]
    matrices = dict(_matrices(handle))
    for product in products(handle.spec, matrices, moment):
        parts = product.split(product.matrix.dense().detach().float())
        found = [choose(part, inputs) for part, inputs in zip(parts, product.moments, strict=True)]
        values, kept = (product.join(torch.stack(each)) for each in zip(*found, strict=True))
        matrices[product.part] = _sparse(product.matrix, values.to(product.matrix.dtype), kept, groups)
    _put(model, handle, matrices, transposed=handle.spec.transposed)


def quantize(
    model: "PreTrainedModel",
    id_: str,
    *,
    coding: Coding = "int8",
    group: int | None = None,
    scale_coding: Coding | None = None,
    dynamic: bool = False,
) -> None:
    """Round every floating-point matrix of a weight to integers.

    int8: with scales in the dtype that the weight had. A matrix has one scale a row, or a column where its product
    sums over the rows (both factors of a transposed weight). dynamic: the inputs of its products are rounded too,
    token by token.

    int4, int3, int2, nf4, ternary and binary: packed codes, with a scale for every `group` stored values of a row (of a
    `Free` layout, of all values), kept as `scale_coding`: float16, or bfloat16 in a model that is so, where nothing is
    said. Raises SettingError for other codings, and for a group or inputs that do not go with them.
    """
    handle = weights(model)[id_]
    rounded = _rounded(handle, coding, group, scale_coding, dynamic)
    _put(model, handle, _matrices(handle) | rounded, transposed=handle.spec.transposed)


def round_in_training(
    model: "PreTrainedModel", id_: str, *, coding: Coding = "int8", group: int | None = None
) -> list[RoundedMatrix]:
    """Let every floating-point matrix of a weight compute as `quantize` with the same settings would store it, and take gradients
    straight through; returns these matrices. `settle` then stores them as they compute."""
    handle = weights(model)[id_]
    before = _matrices(handle)
    learning = {
        part: RoundedMatrix(before[part], stored)
        for part, stored in _rounded(handle, coding, group, None, dynamic=False).items()
    }
    _put(model, handle, before | learning, transposed=handle.spec.transposed)
    return list(learning.values())


def round_columns(
    model: "PreTrainedModel",
    id_: str,
    *,
    moment: Float[Tensor, "m m"],
    coding: Coding,
    group: int | None,
    damping: float,
    ordered: bool,
) -> None:
    """As `quantize`, for a linear weight whose inputs have the second moment `moment`: of every product that it is made of, values
    that are rounded later make up for the errors of those before (see `RoundedMatrix.round_columns`)."""
    round_in_training(model, id_, coding=coding, group=group)
    handle = weights(model)[id_]
    for product in products(handle.spec, _matrices(handle), moment):
        if isinstance(product.matrix, RoundedMatrix):
            product.matrix.round_columns(product, damping=damping, ordered=ordered)
    settle(model, id_)


def settle(model: "PreTrainedModel", id_: str) -> None:
    """Store a weight that is rounded in training: as integers, with the scales it computes with."""
    handle = weights(model)[id_]
    matrices = {
        part: matrix.stored() if isinstance(matrix, RoundedMatrix) else matrix
        for part, matrix in _matrices(handle).items()
    }
    _put(model, handle, matrices, transposed=handle.spec.transposed)


def share(model: "PreTrainedModel", ids: Sequence[str], value: Float[Tensor, "rows cols"]) -> None:
    """Make one weight, W = `value`, of the plain weights `ids`: every module that used one of them uses it from now on, and keeps
    its own bias. What trains is as it was for the first."""
    handles = [weights(model)[id_] for id_ in ids]
    kept = handles[0].parameter
    with torch.no_grad():
        kept.copy_(handles[0].oriented(value))
    for handle in handles:
        for module in handle.modules:
            module.weight = kept
    attach(model)


def rescale(
    model: "PreTrainedModel", source: str, readers: Sequence[str], factors: Float[Tensor, " m"]
) -> None:
    """Divide the m outputs of the module at path `source`, a norm or a plain linear layer, by `factors`, and multiply the columns of
    the plain weights `readers` with them. Where these alone read it, the model computes the same.
    """
    found = absolute(model, source)
    assert found is not None
    module: Any = model.get_submodule(found)
    handles = weights(model)
    with torch.no_grad():
        outputs = handles[source].oriented(module.weight) if source in handles else module.weight
        outputs /= factors.to(outputs).unsqueeze(1) if outputs.ndim == 2 else factors.to(outputs)
        if getattr(module, "bias", None) is not None:
            module.bias /= factors.to(module.bias)
        for reader in readers:
            columns = handles[reader].oriented(handles[reader].parameter)
            columns *= factors.to(columns)


def keep_layers(model: "PreTrainedModel", stack: str, kept: Sequence[int]) -> None:
    """Leave of the list of layers at path `stack` only those at `kept`, in this order, numbered anew, and say so in the config.

    Raises UnsupportedModel where a layer computes with its number.
    """
    config: Any = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel(
            "scale_attn_by_inverse_layer_idx=True: attention depends on a layer's number, so that layers cannot be renumbered; "
            "leave this model its depth"
        )
    name = absolute(model, stack)
    if name is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layers at {stack}: give a model of this family"
        )
    layers: Any = model.get_submodule(name)
    left = nn.ModuleList(layers[place] for place in kept)
    for place, layer in enumerate(left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # by which a cache is addressed
                module.layer_idx = place  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    model.set_submodule(name, left.train(layers.training))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[place] for place in kept]
    config.num_hidden_layers = len(left)
    for handle in weights(model).values():
        used = [module for module in handle.modules if isinstance(module, CompressedLayer)]
        if used and not any(module.owner for module in used):  # the layer that held the matrices is gone
            put(model, handle.spec, used[0].matrices)


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
    """Leave of the neurons of every layer's feed-forward part those that `kept` names by the id of the weight out of them, as many in each,
    and say so in the config."""
    paths = _paths(model)
    stack, part = feed_forward_of(path for several in paths.values() for path in several)
    for out_of, into in between(stack, part, paths).items():
        _keep_units(model, into, out_of, kept[out_of])
        setattr(model.config, part.size, len(kept[out_of]))


def keep_heads(model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
    """Leave of the attention heads of every layer (of groups of them, where they share keys and values) those that `kept` names by the id
    of the weight out of them, as many in each, and say so in the config: in the model's own, where that reads as a smaller model, else in
    what it carries for compressed weights. Where layers add one bias by head, all must name the same."""
    features = head_features(model.config.to_dict())
    assert features is not None
    paths = _paths(model)
    stack, part = attention_of(path for several in paths.values() for path in several)
    (left,) = {len(places) for places in kept.values()}
    for out_of, into in between(stack, part, paths).items():
        _keep_units(model, into, out_of, kept[out_of], features=features, fused=part.fused)
    if part.bias in paths:
        _keep_columns(model, weights(model)[part.bias], next(iter(kept.values())))
    for layer in range(stack.count):
        module = model.get_submodule(absolute(model, f"{stack.path}.{layer}.{part.module}") or "")
        for attribute, size in ((part.count, left), (part.span, left * features)):
            if attribute is not None:
                setattr(module, attribute, size)
    said = _say_heads(model.config, left, features)
    if not said:
        attach(model)
    beside: Any = getattr(model.config, "quantization_config", None)
    if beside is not None:
        beside.heads = None if said else left


def _say_heads(config: Any, groups: int, features: int) -> bool:
    """Whether the config can say that there are so many groups of heads of so many features together, as one can that knows the size of a
    head apart from the width of the model; it says so then."""
    if not hasattr(config, "num_key_value_heads"):
        return False
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
        return False
    return True


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
    if handle.spec.factored and handle.spec.transposed:
        raise UnsupportedModel(
            f"{handle.spec.id}: rows of W^T = S D are not stored side by side; leave it out with skip="
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
    part = "coefficients" if handle.spec.factored else "weight"
    matrices = _matrices(handle)
    matrices = {**matrices, part: take_rows(matrices[part], rows)}
    _put(model, replace(handle, spec=replace(handle.spec, rows=len(kept))), matrices, transposed=False)


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
    _put(model, narrower, {"weight": whole}, transposed=False)


def _swap(model: "PreTrainedModel", old: nn.Parameter, value: Tensor) -> None:
    """Put a parameter of another shape wherever `old` is: one that is tied stays so."""
    new = nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)


def _sparse(
    matrix: StoredMatrix,
    values: Float[Tensor, "rows cols"],
    kept: Bool[Tensor, "rows cols"],
    groups: tuple[int, int] | None,
) -> StoredMatrix:
    """`values` in the place of `matrix`, of them those that are `kept`."""
    layout = Fixed(block=groups[1], nonzeros=groups[0]) if groups else Free(nonzeros=int(kept.sum()))
    return store(values, layout, kept).requires_grad_(matrix.values.requires_grad)


def _rounded(
    handle: WeightHandle, coding: Coding, group: int | None, scale_coding: Coding | None, dynamic: bool
) -> dict[str, StoredMatrix]:
    """The floating-point matrices of a weight as integers."""
    one_of("coding", coding, low_bit.GRIDS)
    if coding == "int8" and group is not None:
        raise SettingError(
            f"group={group} does not go with coding='int8': leave it out, or give another coding"
        )
    axis = 1 if handle.spec.factored and handle.spec.transposed else 0

    def rounded(matrix: StoredMatrix) -> StoredMatrix:
        if coding == "int8":
            return to_int8(matrix, axis=axis, dynamic=dynamic, scale_dtype=matrix.dtype)
        short: Coding = "bfloat16" if matrix.dtype == torch.bfloat16 else "float16"
        return to_low_bit(
            matrix, coding=coding, group=group or 0, scale_coding=scale_coding or short, dynamic=dynamic
        )

    return {part: rounded(matrix) for part, matrix in _matrices(handle).items() if not matrix.spec.integers}


def _matrices(handle: WeightHandle) -> dict[str, StoredMatrix]:
    """The matrices of a weight; a plain one is taken as a whole dense matrix."""
    module = handle.modules[0]
    if isinstance(module, CompressedLayer):
        return module.matrices
    whole = store(handle.dense(), Dense())
    return {"weight": whole.requires_grad_(handle.requires_grad)}


def _put(
    model: "PreTrainedModel", handle: WeightHandle, matrices: dict[str, StoredMatrix], *, transposed: bool
) -> None:
    spec = handle.spec
    put(
        model,
        WeightSpec(
            id=spec.id,
            kind=spec.kind,
            rows=spec.rows,
            cols=spec.cols,
            paths=spec.paths,
            matrices={part: matrix.spec for part, matrix in matrices.items()},
            transposed=transposed,
        ),
        matrices,
    )
    attach(model)
