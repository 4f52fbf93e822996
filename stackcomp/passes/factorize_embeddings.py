"""A low-rank word embedding, by how often words are used."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Need
from stackcomp.core.families import vocabulary
from stackcomp.core.plan import Plan
from stackcomp.core.settings import within
from stackcomp.layerwise import WeightedSVDPass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class FactorizeEmbeddings(WeightedSVDPass):
    """Replace the word embedding E (v x d) by A B of rank r, A (v x r) the short rows of words, B (r x d) what makes them as wide as the
    model; an output head that is tied to it reads the same factors.

    A B minimises sum_i (1 + f_i)^power ||row i of (E - A B)||^2, f_i how often word piece i stands in the calibration text, all of it: the
    truncated SVD of E with weighted rows. r = vd / (ratio (v + d)) rounded down.

    ratio: dense bytes / stored bytes of the embedding, at least 1, where 1 does nothing; power: how much the frequency of words counts,
    0 to 1: with 0 all count the same, with 1 it is the mean error at a word of the text.

    Both factors can be rounded afterwards, and PruneVocabulary may come before or after. `only` and `skip` cannot be given: other
    embeddings, of positions, are factorized by LowRank(data_aware=False). The model's family must be in the table of families.

    Where we differ from the paper: it trains models that have the factors from the start, and knows no weights of words.
    """

    power: float = 1.0

    paper: ClassVar[str] = "Lan et al., ALBERT, arXiv:1909.11942"
    undivided: ClassVar[str] = "works on the word embedding"
    needs: ClassVar[Need] = Need.CALIBRATION

    def __post_init__(self) -> None:
        super().__post_init__()
        within("power", self.power, 0.0, 1.0)

    def selected(self, plan: Plan) -> tuple[str, ...]:
        words, *_ = vocabulary(plan.paths)
        return tuple(weight.id for weight in plan.weights if words in weight.paths)

    def _importance(
        self, model: "PreTrainedModel", handles: "Mapping[str, nn.WeightHandle]", context: "Context"
    ) -> "Mapping[str, torch.Tensor]":
        import torch

        assert context.calibration is not None
        assert context.tokenizer is not None
        counts = data.count_pieces(
            context.tokenizer, context.calibration(sys.maxsize), progress=context.progress
        )
        ((id_, handle),) = handles.items()
        frequency = torch.ones(handle.spec.rows)
        for piece, place in context.tokenizer.get_vocab().items():
            if place < len(frequency):  # a tokenizer may know more words than the model
                frequency[place] += counts[piece]
        return {id_: frequency**self.power}
