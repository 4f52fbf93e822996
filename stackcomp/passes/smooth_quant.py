"""SmoothQuant: outliers of inputs move into weights, before both are rounded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import NothingToCompress, UnsupportedModel
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import FAMILIES, Family, readings
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import whole, within

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class SmoothQuant(Pass):
    """Divide the inputs of selected weights by factors s and multiply their columns with them, so that Int8Dynamic, which comes
    later, meets fewer outliers. The division is folded into what makes the inputs: the model computes the same, up to float error,
    and is as large as before.

    s_j = max|x_j|^strength / max|W_ij|^(1 - strength), x over calibration text, W over all weights that read x.

    strength: how much of the difficulty moves into the weights, 0 to 1; samples: calibration texts.

    It is folded where nothing else reads the inputs: into the norms of pre-norm models (Llama-like: before query, key and value,
    and before gate and up; GPT-2: before c_attn and c_fc), and, where the source is selected too, into the value projection before
    the attention's output (but for grouped heads), and into `up` before `down`. Other weights, and those that layers share, are left
    as they are, and the findings say so: in BERT-like models the norms feed the residual, too, so that only the attention's output
    is reached.

    Where we differ from the paper: it folds into norms alone; values and `up` are folded as AWQ does (arXiv:2306.00978).
    """

    strength: float = 0.5
    samples: int = 1024

    paper: ClassVar[str] = "Xiao et al., SmoothQuant, arXiv:2211.10438"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("strength", self.strength, 0.0, 1.0)
        whole("samples", self.samples, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            needs=frozenset({Need.CALIBRATION}),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        paths = [weight.id for weight in weights]
        shapes = {weight.id: (weight.rows, weight.cols) for weight in weights if len(weight.paths) == 1}
        if not any(_folds(family, shapes) for family in FAMILIES.values()):
            raise NothingToCompress(
                f"SmoothQuant: none of the {len(paths)} selected weights ({', '.join(paths[:3])}) alone reads what can be rescaled; "
                f"select whole layers that share no weights (put it before ShareLayers) of one of the families {', '.join(FAMILIES)}"
            )

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        kind: str = model.config.model_type
        if kind not in FAMILIES:
            raise UnsupportedModel(
                f"model_type={kind!r} is not in the table of families ({', '.join(FAMILIES)}): SmoothQuant cannot tell what reads its "
                "norms; leave it out, or add a line to stackcomp/core/families.py"
            )
        handles = nn.weights(model)
        specs = [handles[id_].spec for id_ in context.targets]
        folds = _folds(
            FAMILIES[kind], {spec.id: (spec.rows, spec.cols) for spec in specs if len(spec.paths) == 1}
        )
        first = {source: handles[readers[0]].modules for source, readers in folds.items()}
        found = data.Calibration.of(model, context, self.samples).largest_inputs(
            model, first, progress=context.progress
        )
        for source, readers in folds.items():
            nn.rescale(
                model, source, readers, self._factors(found[source], [handles[id_] for id_ in readers])
            )
        reached = {id_ for readers in folds.values() for id_ in readers}
        return {
            "folded": {source: list(readers) for source, readers in folds.items()},
            "left as they are": [id_ for id_ in context.targets if id_ not in reached],
        }

    def _factors(self, inputs: "torch.Tensor", readers: "list[nn.WeightHandle]") -> "torch.Tensor":
        """s (m) for inputs of these largest magnitudes; 1 where an input or all that reads it is zero."""
        import torch

        columns = torch.stack([handle.dense().float().abs().amax(0) for handle in readers]).amax(0)
        factors = inputs**self.strength / columns ** (1 - self.strength)
        return torch.where((inputs > 0) & (columns > 0), factors, 1.0)


def _folds(family: Family, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[str, ...]]:
    """What of a family's layers can be rescaled, and the weights that alone read it, all with rows and columns in `shapes`; a weight among
    them only where it has one row for each column of these."""
    return {
        source: readers
        for source, readers in readings(family, shapes)
        if source not in shapes or shapes[source][0] == shapes[readers[0]][1]
    }
