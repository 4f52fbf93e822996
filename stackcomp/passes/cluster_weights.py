"""Weight sharing: codes into a codebook that k-means finds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.matrices import CODEBOOKS
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.settings import one_of, whole
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

ROW_BITS = 5  # of a code, at most, where every row has a codebook


@dataclass(frozen=True, kw_only=True, repr=False)
class ClusterWeights(Pass):
    """Let the stored values of a matrix share 2^bits values, which k-means finds, and store for each the code of the nearest.

    bits: of a code, 2 to 8, packed without a gap. (With 1 bit two levels are left: those of LowBitWeights, but for a mean.) codebook: whose
    the 16-bit shared values are: of the whole "matrix", as in the paper, which takes bits a value and 2 * 2^bits bytes a matrix; or of
    every "row", with bits up to 5, bits + 16 * 2^bits / n bits a value, n the values that a row stores.

    Reaches what LowBitWeights reaches: whole matrices, both factors of a dense-sparse or low-rank layer, what pruning kept (where rows
    differ in length, with one codebook), and embeddings that `only` names. Zeros of pruned weights are not stored, and take no part. The
    product is computed in floating point, after a matrix was unpacked. Codes are fixed; the shared values stay trainable, the gradient
    of each the sum of those of its members, so that Distill or FineTune afterwards are the paper's fine-tuning; EntropyCode is its third
    step.

    Where we differ from the paper: the levels of k-means start as dense as is best where values are many, and not in equal steps (see
    `ops.clusters`).
    """

    bits: int = 4
    codebook: Literal["matrix", "row"] = "matrix"

    paper: ClassVar[str] = (
        "Han et al., Deep Compression, arXiv:1510.00149; by rows: Kim et al., SqueezeLLM, arXiv:2306.07629"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("bits", self.bits, 2, 8)
        one_of("codebook", self.codebook, ("matrix", "row"))
        if self.codebook == "row" and self.bits > ROW_BITS:
            raise SettingError(
                f"bits={self.bits} does not go with codebook='row', whose codebooks would outweigh the codes: give 2 to {ROW_BITS}, "
                "or codebook='matrix'"
            )

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT), adds=facts(Fact.CODEBOOK), removes=facts(Fact.FLOAT, Fact.TRAINABLE)
        )

    @property
    def _group(self) -> int | None:
        """How a stored matrix says whose the codebooks are."""
        return 1 if self.codebook == "row" else None

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded(CODEBOOKS[self.bits], self._group),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="clustering"):
            nn.quantize(model, id_, coding=CODEBOOKS[self.bits], group=self._group)
        return {}
