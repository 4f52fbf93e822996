"""Learned scores: which entries of a weight are kept is learned beside their values, as in movement pruning (Sanh et al., arXiv
2005.07683).

    W' = M * W,  M chosen from scores S of the shape of W;  dL/dW = M * dL/dW',  dL/dS = W * dL/dW' (straight through the choice)

Scores are parameters and masks are buffers of the model while it trains, so a checkpoint of the loop holds both.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stackcomp.nn import weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ScoredMask(nn.Module):
    """A mask on one weight and the scores it is chosen by, both in the shape of the parameter; at first everything is kept."""

    mask: Tensor

    def __init__(self, weight: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """M * W, with the gradient of the scores passed straight through."""
        passed = self.scores - self.scores.detach()  # exactly 0
        return weight * (self.mask + passed).to(weight.dtype)


@contextmanager
def scored(
    model: "PreTrainedModel", ids: Iterable[str], *, magnitude: bool = False
) -> Iterator[dict[str, ScoredMask]]:
    """Mask the plain weights `ids`, in every module that uses them, as long as the context lasts; afterwards they are whole again.

    magnitude: scores start at |W|, not at 0.
    """
    known = weights(model)
    handles = {id_: known[id_] for id_ in ids}
    masks: dict[str, ScoredMask] = {}
    for id_, handle in handles.items():
        start = handle.parameter.detach().float().abs()
        masks[id_] = ScoredMask(handle.parameter.detach(), start if magnitude else torch.zeros_like(start))
    done: list[nn.Module] = []
    try:
        for id_, handle in handles.items():
            for module in dict.fromkeys(handle.modules):
                parametrize.register_parametrization(module, "weight", masks[id_])
                done.append(module)
        yield masks
    finally:
        for module in done:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
