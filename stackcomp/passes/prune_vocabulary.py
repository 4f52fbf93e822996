"""A smaller vocabulary: the word pieces that texts use."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import UnsupportedModel
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import vocabulary
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan
from stackcomp.core.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneVocabulary(Pass):
    """Keep the word pieces that the training text uses, in the word embedding, in an output head and in the tokenizer; the others go.

    The training text is the task's, or the calibration text where that is given. Special tokens, single characters and bytes stay too,
    so that any text can still be read. A text all of whose pieces stay has the same logits as before, to the last bit; a word outside
    this vocabulary is read by smaller pieces. The tokenizer is rewritten, saved with the checkpoint and used from here on, for the
    teacher too; texts encoded by the old one do not fit the new model.

    least: how often a piece must stand in the text to stay, at least 1.

    Embeddings may be rounded or low rank by then, but not sparse: every row must be stored on its own. How many pieces will stay is known
    when it has run: until then sizes are predicted for all of them, which is an upper bound. `only` and `skip` cannot be given. The model's
    family must be in the table of families, and its tokenizer must be a fast one.

    Where we differ from the paper: it goes by the frequency in large corpora of a language, we by the text of one task, which is much
    smaller. A perplexity afterwards is over other tokens, and is not compared with that of the model as it came.
    """

    least: int = 1

    paper: ClassVar[str] = "Abdaoui et al., Load What You Need, arXiv:2010.05609"
    undivided: ClassVar[str] = "works on the word embedding and its output head"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("least", self.least, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.DENSE),
            forbids=facts(Fact.KRONECKER),
            needs=frozenset({Need.CALIBRATION}),
        )

    def selected(self, plan: Plan) -> tuple[str, ...]:
        found = {*vocabulary(plan.paths)}
        return tuple(weight.id for weight in plan.weights if found & {*weight.paths})

    @property
    def undetermined(self) -> str:
        return "keeps the word pieces that the text uses: all are counted"

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        assert context.calibration is not None
        assert context.tokenizer is not None
        before = len(context.tokenizer)
        words = nn.weights(model)[context.targets[0]].spec.rows
        if before > words:
            raise UnsupportedModel(
                f"PruneVocabulary: the tokenizer knows {before} word pieces, and {context.targets[0]} has {words} rows: "
                "give the model the others first, by model.resize_token_embeddings(len(tokenizer))"
            )
        counts = data.count_pieces(
            context.tokenizer, context.calibration(sys.maxsize), progress=context.progress
        )
        kept = data.keep_pieces(
            context.tokenizer, {piece for piece, count in counts.items() if count >= self.least}
        )
        nn.keep_words(model, kept)
        return {"kept": len(kept), "of": before}
