"""`RoundedMatrix`: a matrix in floating point that computes as it will be stored, so that it is trained with its rounding (arXiv
1308.3432), or rounded with a view to its inputs (arXiv 2210.17323).

    forward: code = the nearest to v / scale,   v' = scale * level(code);      dL/dv = dL/dv'

v are the stored values, one scale a group or a row as the stored form has it, levels those of its grid (`ops.low_bit`). v' is what
an integer `StoredMatrix` gives, bit for bit below 8 bits and to float error at 8, whose scales its products apply last.

Scales start as the stored form finds them. After the values have moved, `refit` takes the least-squares ones for the codes as they are,
or at 8 bits those of the largest values. A new search would find a little less error, but turns the grids of many groups around: after a
drift of a twentieth of the spread of the values it changes v' at 2 bits by ten times as much as a refit does, after a fifth of it by
nearly the error of rounding itself (0.07 and 0.10 of their variance). Ternary scales are found anew all the same: where all
values of a group have come to round to zero, codes as they are say nothing of it. How many values a group keeps may jump then, so
`QuantizationAware` does it at every step: the jumps of eight steps at once undo what was learned.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stackcomp.core.matrices import MatrixSpec
from stackcomp.nn.matrix import DTYPES, StoredMatrix
from stackcomp.nn.products import Product
from stackcomp.ops import low_bit, quantize, second_order


class RoundedMatrix(StoredMatrix):
    """`matrix`, in floating point, rounded to the grid of `stored`, which is the same matrix in integers."""

    steps: Tensor  # the scales, as they are stored

    def __init__(self, matrix: StoredMatrix, stored: StoredMatrix) -> None:
        super().__init__(matrix.spec, device=matrix.device)
        with torch.no_grad():
            self.values.copy_(matrix.values)
            if self.support is not None:
                self.support.copy_(matrix.support)  # pyright: ignore[reportArgumentType]
        self.requires_grad_(matrix.values.requires_grad)
        self._stored = (stored,)  # no submodule: it is not trained
        self.register_buffer("steps", stored.scales.detach().clone())  # pyright: ignore[reportOptionalMemberAccess]

    @torch.no_grad()
    def refit(self) -> None:
        """Fit the scales to the values as they are now."""
        form = self._form_to_be
        if form.coding == "ternary":
            self._search()
            return
        if form.packed:
            assert form.group is not None
            places = self._grid.levels(self._codes()).view(form.lines)
            scales = low_bit.refit_scales(self.values.float().view(form.lines), places, form.group)
            self.steps.copy_(low_bit.stored_scales(scales.flatten(), DTYPES[form.scale_coding]))
            return
        largest = torch.zeros_like(self.steps)
        owners = self._per_value(torch.arange(len(largest), device=self.device))
        largest.scatter_reduce_(0, owners, self.values.flatten().abs(), "amax")
        self.steps.copy_(quantize.row_scales(largest, self.steps.dtype))

    @torch.no_grad()
    def round_columns(self, product: Product, *, damping: float, ordered: bool) -> None:
        """Move the values of this matrix, that of the `product`, to levels of the grid, where later columns of its inputs make up for
        the errors of those before (`ops.second_order`). The scales of groups are searched first, with every squared error weighed by
        the sensitivity of its column; scales of rows follow from the largest values and stay.
        """
        metrics = [
            second_order.curvature(moment, damping=damping, ordered=ordered) for moment in product.moments
        ]
        weights = product.split(self._placed(self.values.flatten().float()))
        if self._form_to_be.packed:
            shares = torch.stack([metric.sensitivity for metric in metrics]).unsqueeze(1).expand_as(weights)
            self._search(self._picked(product.join(shares)))
        steps = product.split(self._placed(self._per_value(self.steps.float())))
        rounded = [
            second_order.round_columns(*each, self._form_to_be.coding)
            for each in zip(weights, metrics, steps, strict=True)
        ]
        self.values.copy_(self._picked(product.join(torch.stack(rounded))).view_as(self.values))

    @torch.no_grad()
    def stored(self) -> StoredMatrix:
        """The same matrix as integers."""
        stored = self._stored[0].to(self.device)
        codes, form = self._codes(), self._form_to_be
        if form.packed:
            stored.values.copy_(low_bit.pack(codes.sub_(self._grid.low).to(torch.uint8), form.coding))
        else:
            stored.values.copy_(codes.view(stored.values.shape))
        assert stored.scales is not None
        stored.scales.copy_(self.steps)
        return stored

    @property
    def _form_to_be(self) -> MatrixSpec:
        """How the matrix will be stored."""
        return self._stored[0].spec

    @property
    def _grid(self) -> low_bit.Grid | low_bit.NormalFloat:
        """The levels on which values are rounded."""
        return low_bit.GRIDS[self._form_to_be.coding]

    def _search(self, weights: Float[Tensor, " n"] | None = None) -> None:
        """Find the scales of groups anew. weights: the importance of every value."""
        form = self._form_to_be
        assert form.group is not None
        _, scales = low_bit.quantize_groups(
            self.values.view(form.lines),
            form.coding,
            form.group,
            scale_dtype=DTYPES[form.scale_coding],
            weights=None if weights is None else weights.view(form.lines),
        )
        self.steps.copy_(scales.flatten())

    def _codes(self) -> Float[Tensor, " n"]:
        """The code of every value."""
        steps = self.steps.float()
        places = self.values.detach().flatten() * self._per_value(torch.where(steps == 0, 0, 1 / steps))
        return self._grid.codes(places)

    def _per_value(self, scales: Tensor) -> Tensor:
        """The scale of every stored value."""
        form = self._form_to_be
        if form.packed:
            assert form.group is not None
            lines, length = form.lines
            return low_bit.per_value(scales.view(lines, -1), form.group, length).flatten()
        if self.support is None:
            return scales.unsqueeze(1 - form.scale_axis).expand(self.shape).flatten()
        return scales[self._support.rows if form.scale_axis == 0 else self._support.cols]

    def _flat(self) -> Tensor:
        return _StraightThrough.apply(self.values.flatten(), self)  # type: ignore[return-value]

    def _at(self, entries: Int64[Tensor, "*t"]) -> Tensor:
        return self._flat()[entries]


class _StraightThrough(torch.autograd.Function):
    """Values on the grid of their matrix; backward as if they had not been rounded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, matrix: RoundedMatrix) -> Tensor:  # type: ignore[override]
        steps = matrix._per_value(matrix.steps.float())
        return matrix._grid.levels(matrix._codes()).mul_(steps).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
