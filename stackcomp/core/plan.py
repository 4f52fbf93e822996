"""What is known of a model without reading a weight: its logical weights and the forms each may have.

A *form* is the facts of each stored part. Before a pass has run, a weight may have several possible forms (a
layer too small to gain is left as it was, and only the run tells which): a plan carries them all, and what
the run finds must be among them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stackcomp.core.facts import Facts, spell
from stackcomp.core.selection import Globs, select
from stackcomp.core.spec import WeightSpec

Form = frozenset[tuple[str, Facts]]


def form(parts: Mapping[str, Facts]) -> Form:
    """The form with these parts."""
    return frozenset(parts.items())


def spell_form(parts: Form) -> str:
    """`basis: float, dense; coefficients: float, sparse`, for messages."""
    return "; ".join(f"{name}: {spell(words)}" for name, words in sorted(parts))


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """One logical weight: rows x cols (output x input features), its module paths, and the forms it may
    have; origin and came are the id, and rows and cols, that it had in the model as it came."""

    id: str
    origin: str
    kind: Literal["linear", "embedding"]
    rows: int
    cols: int
    paths: tuple[str, ...]
    forms: frozenset[Form]
    came: tuple[int, int] = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """The logical weights of a model, in the order of the model; head_features: how many features an attention head has, or the heads
    together that share keys and values, where that is known."""

    weights: tuple[PlannedWeight, ...]
    head_features: int | None = None

    @property
    def paths(self) -> Iterator[str]:
        """Where the weights are, one after the other."""
        return (path for weight in self.weights for path in weight.paths)

    @staticmethod
    def of(specs: Iterable[WeightSpec], *, head_features: int | None = None) -> "Plan":
        """The plan of a model whose weights are stored as `specs`: one form each."""
        return Plan(
            tuple(
                PlannedWeight(
                    id=spec.id,
                    origin=spec.id,
                    kind=spec.kind,
                    rows=spec.rows,
                    cols=spec.cols,
                    paths=spec.paths,
                    forms=frozenset({form(spec.parts())}),
                    came=(spec.rows, spec.cols),
                )
                for spec in specs
            ),
            head_features,
        )

    def select(self, *, only: Globs, skip: Globs) -> tuple[str, ...]:
        """Ids of the weights that the globs select; with no `only`, every linear weight that is not tied to
        an embedding."""
        chosen = select(
            [weight.paths for weight in self.weights],
            only=only,
            skip=skip,
            default=[weight.kind == "linear" for weight in self.weights],
        )
        return tuple(weight.id for weight, taken in zip(self.weights, chosen, strict=True) if taken)

    def __getitem__(self, id_: str) -> PlannedWeight:
        return next(weight for weight in self.weights if weight.id == id_)
