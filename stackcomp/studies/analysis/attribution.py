"""Which technique gave how much: exact Shapley values of what a stack gives, and leave-one-out beside them.

The game: v(subset) is the mean over the legal orders of the subset, and v of no technique is the model as it came with the recovery
that all pipelines have. The Shapley value of a technique is its marginal contribution v(S and it) - v(S), averaged over all
orders in which the techniques could join (Shapley, 1953); the values sum to v(all) - v(none). Leave-one-out,
v(all) - v(all but it), does not sum to anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from stackcomp.studies.analysis.cells import Cell, Cells, Estimate, combined, mean

Coalition = frozenset[str]
Game = Mapping[Coalition, float]

MEASURES: Mapping[str, Callable[[Cell], Estimate | None]] = {
    "file": lambda cell: cell.log_file,
    "encoder": lambda cell: cell.log_encoder,
    "score": lambda cell: cell.change,
    "speed": lambda cell: cell.log_speed,
}


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What each technique gave of one of `MEASURES`: logarithms of compression and of speed, points of score.

    total: v(all) - v(none); shares: Shapley values, by technique; without: leave-one-out; orders: how many orders of all techniques
    the total is the mean of; partial: for each subset of which some orders have not finished, its name and "k of n"; undefined: why there
    are no figures, empty where there are.
    """

    measure: str
    total: Estimate | None = None
    shares: Mapping[str, Estimate]
    without: Mapping[str, Estimate]
    orders: int = 0
    partial: Mapping[str, str] = field(default_factory=dict[str, str])
    undefined: str = ""


def attribution(cells: Cells, choice: Mapping[str, str], measure: str) -> Attribution:
    """The attribution of `measure` to all techniques, each at the strength chosen for it.

    Undefined when some subset, that of no technique included, has no finished order: illegal in every one, failed, or not run yet; and
    where it was not measured.
    """
    players, value = cells.passes, MEASURES[measure]
    game, partial = dict[Coalition, Estimate](), dict[str, str]()
    for coalition in coalitions(players):
        nothing = [] if cells.dense is None else [cells.dense]
        found = cells.orders(coalition, choice) if coalition else nothing
        if not found:
            return Attribution(
                measure=measure, shares={}, without={}, undefined=cells.missing(coalition, choice)
            )
        measured = [one for one in map(value, found) if one is not None]
        if len(measured) < len(found):
            return Attribution(
                measure=measure, shares={}, without={}, undefined=f"{measure} was not measured"
            )
        game[coalition] = mean(measured)
        planned = cells.planned_orders(coalition, choice) if coalition else 1
        if len(found) < planned:
            partial[cells.said(coalition)] = f"{len(found)} of {planned}"
    everyone = frozenset(players)

    def gap(more: Coalition, less: Coalition) -> Estimate:
        return combined([(1.0, game[more]), (-1.0, game[less])])

    return Attribution(
        measure=measure,
        total=gap(everyone, frozenset()),
        shares={
            player: combined((weight, game[coalition]) for coalition, weight in of.items())
            for player, of in shapley_weights(players).items()
        },
        without={player: gap(everyone, everyone - {player}) for player in players},
        orders=len(cells.orders(players, choice)),
        partial=partial,
    )


def shapley_weights(players: Sequence[str]) -> dict[str, dict[Coalition, float]]:
    """By player, how much the value of each subset counts in the player's Shapley value: with s players beside it of n in
    all, 1 / (n C(n - 1, s)) for the subset with it, and as much less for the one without it."""
    count = len(players)
    found: dict[str, dict[Coalition, float]] = {}
    for player in players:
        of = found[player] = {}
        for others in coalitions([other for other in players if other != player]):
            weight = 1 / (count * comb(count - 1, len(others)))
            of[others | {player}], of[others] = weight, -weight
    return found


def coalitions(players: Sequence[str]) -> Iterator[Coalition]:
    """Every subset, the smaller ones first."""
    for size in range(len(players) + 1):
        yield from map(frozenset, combinations(players, size))
