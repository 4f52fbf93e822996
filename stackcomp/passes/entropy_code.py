"""Lossless coding of the weights file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core import coding
from stackcomp.core.contract import Contract
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class EntropyCode(Pass):
    """Write the weights file Huffman coded, byte plane by byte plane; loading gives every tensor back to the last bit.

    Only the file gets smaller, and only the whole file's compression tells: memory, speed and the bytes of layers are as without. A
    tensor that would not get smaller stays as it is. It changes no fact, and is best put last, but need not be: the file stays coded
    whatever follows, and codes what it becomes. What a file will take depends on its values: until it has been written, sizes are predicted
    without coding, which is an upper bound. `only` and `skip` cannot be given.

    Where we differ from the paper: codes are for bytes rather than for single values, which for packed values codes several of them
    together, and scales, embeddings and what was never compressed are coded too.
    """

    paper: ClassVar[str] = "Han et al., Deep Compression, arXiv:1510.00149"
    undivided: ClassVar[str] = "codes the whole file"
    overhead: ClassVar[int] = (
        coding.ENTRY_BYTES
    )  # of the list of what is coded; each entry of it saves more than it takes

    @property
    def contract(self) -> Contract:
        return Contract()

    def selected(self, plan: Plan) -> tuple[str, ...]:
        return tuple(weight.id for weight in plan.weights)

    @property
    def undetermined(self) -> str:
        return "codes values by how often they occur"

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        del context  # what is coded is the file
        nn.code(model)
        return {}
