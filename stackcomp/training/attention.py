"""What attention heads compute with, caught while a model runs, and how far a student's are from a teacher's.

Letters: b texts of t tokens; a layer has h heads of d features, and k <= h heads of keys and values, each shared by h / k heads where
these are fewer; r relation heads. A `mask` (b x t) is 1 at real tokens and 0 at padding.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from stackcomp.core.errors import SettingError, UnsupportedModel
from stackcomp.core.families import FAMILIES, Family, head_size, known_heads
from stackcomp.nn import absolute

Outputs = TypeVar("Outputs")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What the heads of one layer compute with, side by side: queries (b x t x hd), keys and values (b x t x kd).

    size: d; causal: whether a token attends to itself and earlier ones alone; turns: cosines and sines (b x t x d) that turn queries and
    keys by their positions; bias: what is added to the scores of two positions (t x t x h).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    size: int
    causal: bool = False
    turns: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None

    def scores(self, mask: Int[Tensor, "b t"]) -> Float[Tensor, "b h t t"]:
        """q k^T / sqrt(d), of which softmax makes attention maps; 0 where a token is padding or cannot be attended to."""
        queries, keys = (_split(part, part.shape[-1] // self.size) for part in (self.queries, self.keys))
        if self.turns is not None:
            queries, keys = (_turned(part, *self.turns) for part in (queries, keys))
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = (queries @ keys.transpose(-1, -2)).float() / math.sqrt(self.size)
        if self.bias is not None:
            scores = scores + self.bias.permute(2, 0, 1).float()
        real = mask.bool()
        scores = scores.masked_fill(~(real[:, None, :, None] & real[:, None, None, :]), 0)
        return scores.tril() if self.causal else scores


def depth(model: nn.Module) -> int:
    """How many layers a model has. Raises UnsupportedModel where its family is not in the table of families."""
    family, _ = _known(model)
    layers: Any = _module(model, family.blocks.removesuffix(".*"))
    return len(layers)


def caught(
    model: nn.Module, layers: Sequence[int], run: Callable[[], Outputs]
) -> tuple[Outputs, list[Heads]]:
    """What `run` gives, which calls `model` once, and the heads of its `layers` meanwhile, with their gradients. However weights are
    stored and attention is computed, this is what comes out of the modules of queries, keys and values.

    Raises UnsupportedModel where the model's family is not in the table of families, or a layer lacks its attention.
    """
    family, size = _known(model)
    part, stack = family.attention, family.blocks.removesuffix(".*")
    places = [[_module(model, f"{stack}.{layer}.{path}") for path in part.computed] for layer in layers]
    rotary, bias = (None if path is None else _module(model, path) for path in (part.rotary, part.bias))
    found: dict[nn.Module | None, Any] = {None: None}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found[module] = output

    with ExitStack() as hooks:
        for module in (module for modules in [*places, [rotary, bias]] for module in modules if module):
            hooks.callback(module.register_forward_hook(keep).remove)
        outputs = run()
    heads: list[Heads] = []
    for modules in places:
        queries, keys, values = (
            piece for module in modules for piece in found[module].flatten(2).chunk(part.fused, dim=-1)
        )
        heads.append(
            Heads(
                queries=queries,
                keys=keys,
                values=values,
                size=size,
                causal=part.causal,
                turns=found[rotary],
                bias=found[bias],
            )
        )
    return outputs, heads


def score_error(ours: Sequence[Heads], theirs: Sequence[Heads], mask: Int[Tensor, "b t"]) -> Tensor:
    """Squared error of the scores of a student's layers relative to the energy of the teacher's beside them, meaned over the layers.

    Raises UnsupportedModel where they have different numbers of heads.
    """
    errors: list[Tensor] = []
    for student, teacher in zip(ours, theirs, strict=True):
        found, wanted = student.scores(mask), teacher.scores(mask)
        if found.shape != wanted.shape:
            raise UnsupportedModel(
                f"attention: a layer of the student has {found.shape[1]} heads and that of the teacher {wanted.shape[1]}; set attention=0, "
                "and relations above 0, whose heads are split anew"
            )
        errors.append((found - wanted).pow(2).sum() / wanted.pow(2).sum())
    return torch.stack(errors).mean()


def relation_divergence(
    ours: Heads, theirs: Heads, mask: Int[Tensor, "b t"], count: int | None = None
) -> Tensor:
    """KL(teacher || student) of the relations that each token has to all real ones, meaned over tokens, relation heads, and queries, keys
    and values (Wang et al., MiniLMv2, arXiv 2012.15828).

    Relations of queries are softmax(A A^T / sqrt(e)), A the t x e part of all queries that one of r heads takes; of keys and values alike.
    count: r; None is the greatest common divisor of the teacher's k and the widths of all that is split. Raises SettingError where it
    does not divide one of these.
    """
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ("queries", "keys", "values")}
    widths = {name: [part.shape[-1] for part in pair] for name, pair in pairs.items()}
    if count is None:
        shared = theirs.keys.shape[-1] // theirs.size
        count = math.gcd(shared, *(width for several in widths.values() for width in several))
    for name, several in widths.items():
        for width, whose in zip(several, ("student", "teacher"), strict=True):
            if width % count:
                raise SettingError(
                    f"relation_heads={count} does not divide the {width} features that the {whose}'s {name} have: give a divisor, or "
                    "leave it out"
                )
    real = mask.bool()
    divergences: list[Tensor] = []
    for found, wanted in pairs.values():
        found, wanted = (_relations(part, count, real) for part in (found, wanted))
        total = functional.kl_div(found, wanted, reduction="sum", log_target=True)
        divergences.append(total / (len(found) * count))
    return torch.stack(divergences).mean()


def _relations(part: Tensor, count: int, real: Tensor) -> Tensor:
    """Logarithms of relations (real tokens x r x t)."""
    heads = _split(part, count)
    products = (heads @ heads.transpose(-1, -2)).float() / math.sqrt(heads.shape[-1])
    # the least number, not -inf: at padding both models must give 0, and 0 times a difference of infinities is none
    products = products.masked_fill(~real[:, None, None, :], torch.finfo(products.dtype).min)
    return products.log_softmax(-1).transpose(1, 2)[real]


def _split(part: Tensor, count: int) -> Tensor:
    """(b x t x features) as (b x heads x t x features of each)."""
    return part.unflatten(-1, (count, -1)).transpose(1, 2)


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Every pair of features, i and i + d/2, turned by the angle that its position and i have."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sines.unsqueeze(1)


def _known(model: Any) -> tuple[Family, int]:
    """The family of a model, and how many features a head of it has."""
    size = known_heads(head_size(model.config.to_dict()), "Distill")
    return FAMILIES[model.config.model_type], size


def _module(model: Any, path: str) -> nn.Module:
    """The module at `path`. Raises UnsupportedModel where there is none."""
    name = absolute(model, path)
    if name is None:
        raise UnsupportedModel(
            f"{path}: {type(model).__name__} has no such module, which its family has; set attention=0 and relations=0"
        )
    return model.get_submodule(name)
