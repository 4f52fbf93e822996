"""Short mantissas: low bits that are all zero, for a lossless coder to leave out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.settings import whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

MANTISSA = 23  # bits of a float32, behind the leading one


@dataclass(frozen=True, kw_only=True, repr=False)
class RoundMantissa(Pass):
    """Round every stored value of each selected weight to a mantissa of `bits` bits, to nearest, ties to even.

    Works on weights in floating point however they are stored: whole, factored, pruned, tied. Alone it saves nothing, for values stay as
    wide as they were: put EntropyCode behind it, which leaves out what this makes equal.

    bits: of the mantissa behind the leading one, in [0, 23]: 2 is as precise as E5M2, 3 as E4M3, 7 as bfloat16; 23 does nothing. The error
    of a value is at most 2^-(bits + 1) of it.

    Where we differ from the paper: exponents keep all their bits, so that no scale is needed.
    """

    bits: int = 3

    paper: ClassVar[str] = "Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433"
    idle: ClassVar[dict[str, Any]] = {"bits": MANTISSA}

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("bits", self.bits, 0, MANTISSA)

    @property
    def contract(self) -> Contract:
        return Contract(requires=facts(Fact.FLOAT))

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        handles = nn.weights(model)
        error = energy = 0.0
        for id_ in context.progress(context.targets, label="rounding", total=len(context.targets)):
            for values in _stored(handles[id_]):
                short = rounded(values, self.bits)
                error += (short - values).double().square().sum().item()
                energy += values.double().square().sum().item()
                values.copy_(short)
        return {"relative_error": (error / energy) ** 0.5 if energy else 0.0}


def rounded(values: "Tensor", bits: int) -> "Tensor":
    """`values` with a mantissa of `bits` bits, in their own dtype."""
    import torch

    drop = MANTISSA - bits
    if drop == 0:
        return values
    pattern = values.float().view(torch.int32)
    odd = (pattern >> drop) & 1
    pattern = ((pattern + (1 << (drop - 1)) - 1 + odd) >> drop) << drop
    return pattern.view(torch.float32).to(values.dtype)


def _stored(handle: nn.WeightHandle) -> "list[Tensor]":
    """The tensors that hold the values of a weight."""
    if isinstance(handle.modules[0], nn.CompressedLayer):
        return [matrix.values.detach() for matrix in handle.matrices.values()]
    return [handle.parameter.detach()]
