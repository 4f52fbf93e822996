"""The names of tensors: second names of one that is stored once, and those in a file beside those that a model expects."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stackcomp.core import coding
from stackcomp.core.errors import CheckpointError
from stackcomp.core.headers import read_headers
from stackcomp.nn.layers import CompressedLayer
from stackcomp.nn.tree import absolute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NAMED = 3  # tensors named in a message


def shared(model: "PreTrainedModel") -> dict[str, str]:
    """Second names of parameters and buffers, and the first name of each; but for those that `transformers`
    ties by itself.
    """
    first: dict[int, str] = {}
    second: dict[str, str] = {}
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name and name not in tied and kept not in tied:
            second[name] = kept
    return second


def share(model: "PreTrainedModel", names: Mapping[str, str]) -> None:
    """Put the tensors that were read under their second names, too.

    Not by the list of what `transformers` ties: there they would count as ties of the class itself when the model is saved
    again, and the bias of a `Conv1D` would be cut, as if its weight were that of an output head.
    """
    tensors = model.state_dict(keep_vars=True)
    for target, source in pairs(model, names).items():
        owner, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensors[source])


def pairs(model: "PreTrainedModel", names: Mapping[str, str]) -> dict[str, str]:
    """Second names and first ones as `model` has them; without those that another class than the one saved may lack."""
    tensors = model.state_dict()
    named = {_tensor(model, name): _tensor(model, first) for name, first in names.items()}
    return {
        target: source
        for target, source in named.items()
        if target is not None and source is not None and {target, source} <= tensors.keys()
    }


@dataclass  # not frozen: torch writes a mark on its hooks
class Omit:
    """A hook that leaves `names` out of a state dict, so that a load does not miss them: `transformers` would put
    uninitialised memory there."""

    names: frozenset[str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in self.names:
            state.pop(prefix + name, None)


def _tensor(model: "PreTrainedModel", name: str) -> str | None:
    """The name in `model` of the tensor with this name relative to the base model."""
    path, _, attribute = name.rpartition(".")
    owner = absolute(model, path)
    return None if owner is None else f"{owner}.{attribute}"


def check(model: "PreTrainedModel", files: list[Path]) -> None:
    """Compare the tensors of the files with those the model will hold. Raises CheckpointError on a
    difference; tensors that `transformers` computes anew instead of saving them (positions as sines) are none.

    A class other than the one saved may lack the parts that are unexpected then (the base model of a model
    with a head), and may have a new head to train; but what is stored of a compressed weight, and of the base
    model, must be there.
    """
    stored = {name: entry for entries, _ in read_headers(files).values() for name, entry in entries.items()}
    stored.pop(coding.LISTING, None)
    found = _renamed(model, stored)
    expected = model.state_dict()
    tied = model.all_tied_weights_keys
    same_class = type(model).__name__ in (model.config.architectures or [])
    derived = [*(model._keys_to_ignore_on_save or ()), *(model._keys_to_ignore_on_load_missing or ())]
    missing = [
        name
        for name in expected
        if name not in found
        and not any(re.search(pattern, name) for pattern in derived)
        and not (name in tied and tied[name] in found)
        and not any(source == name and target in found for target, source in tied.items())
        and (same_class or _in_base(model, name))
    ]
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, CompressedLayer)]
    unexpected = [
        name
        for name in found
        if name not in expected and (same_class or any(name.startswith(start) for start in inside))
    ]
    other = [
        f"{name}: {entry['shape']} in the file, {list(expected[name].shape)} in the model"
        for name, entry in found.items()
        if name in expected and list(expected[name].shape) != entry["shape"]
    ]
    for words, names in (
        ("lacks", missing),
        ("holds unexpected", unexpected),
        ("has other shapes for", other),
    ):
        if names:
            saved = " or ".join(model.config.architectures or ["the class it was saved from"])
            without = " or add_pooling_layer=False" if any("pooler." in name for name in names) else ""
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            raise CheckpointError(
                f"{files[0]}: the file {words} {', '.join(names[:MAX_NAMED])}{more} for {type(model).__name__}: load it with "
                f"{saved} and its own settings{without}, or copy or save it again"
            )


def _in_base(model: "PreTrainedModel", name: str) -> bool:
    """Whether a tensor belongs to the base model (all do, when the model is one)."""
    return model.base_model is model or name.startswith(f"{model.base_model_prefix}.")


def conversions() -> list[Any]:
    """What `transformers` renames in the files of compressed models on load: old words for parts of norms alone."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping("legacy") or []


def _renamed(model: "PreTrainedModel", header: Mapping[str, Any]) -> dict[str, Any]:
    """The header under the names the tensors will have in the model: the renaming that `transformers` itself
    does on load."""
    from transformers.core_model_loading import rename_source_key

    expected, renamings = model.state_dict(), conversions()
    return {
        rename_source_key(key, renamings, [], model.base_model_prefix, expected)[0]: entry
        for key, entry in header.items()
    }
