"""What the rows of a study of combinations say, from the rows alone: no model is read and torch is not imported."""

from stackcomp.studies.analysis.attribution import MEASURES, Attribution, attribution
from stackcomp.studies.analysis.cells import Cell, Cells, Estimate
from stackcomp.studies.analysis.extra import Extra, Interaction, extra, interactions, pareto
from stackcomp.studies.analysis.orders import Order, orders

__all__ = [
    "MEASURES",
    "Attribution",
    "Cell",
    "Cells",
    "Estimate",
    "Extra",
    "Interaction",
    "Order",
    "attribution",
    "extra",
    "interactions",
    "orders",
    "pareto",
]
