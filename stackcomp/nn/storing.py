"""Making stored matrices: of a tensor, of another one by rounding its values, and of some of its rows."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stackcomp.core.errors import SettingError
from stackcomp.core.matrices import Dense, Layout, MatrixSpec
from stackcomp.nn.matrix import CODINGS, DTYPES, StoredMatrix
from stackcomp.nn.support import encode
from stackcomp.ops import clusters, low_bit, quantize


def store(
    matrix: Float[Tensor, "rows cols"], layout: Layout, mask: Bool[Tensor, "rows cols"] | None = None
) -> StoredMatrix:
    """A copy of `matrix`, in floating point, with this layout; of it the entries of `mask`, where it is
    given.
    """
    rows, cols = matrix.shape
    stored = StoredMatrix(
        MatrixSpec(rows=rows, cols=cols, layout=layout, coding=CODINGS[matrix.dtype]), device=matrix.device
    )
    with torch.no_grad():
        if mask is None:
            stored.values.copy_(matrix.reshape(stored.values.shape))
            return stored
        packed = None if isinstance(layout, Dense) else encode(layout, mask)
        stored.values.copy_(matrix[mask].reshape(stored.values.shape))
        if stored.support is not None and packed is not None:
            stored.support.copy_(packed)
    return stored


def encoded(matrix: StoredMatrix, form: MatrixSpec) -> StoredMatrix:
    """The same matrix, in floating point until now, with its stored values as the codes of `form`, which has its layout."""
    stored = StoredMatrix(form, device=matrix.device, dtype=matrix.dtype)
    with torch.no_grad():
        assert stored.scales is not None
        values, scales = _packed(matrix, form) if form.packed else _int8(matrix, form)
        stored.values.copy_(values.reshape(stored.values.shape))
        stored.scales.copy_(scales.flatten())
    if matrix.support is not None:
        assert stored.support is not None
        stored.support.copy_(matrix.support)
    trains = any(parameter.requires_grad for parameter in matrix.parameters())
    stored.scales.requires_grad_(trains)
    return stored


def _int8(matrix: StoredMatrix, form: MatrixSpec) -> tuple[Tensor, Tensor]:
    """The stored values as integers, and the scales of rows or columns."""
    whole = matrix.dense()
    turned = whole if form.scale_axis == 0 else whole.t()
    integers, scales = quantize.quantize_rows(turned, DTYPES[form.scale_coding])
    integers = integers if form.scale_axis == 0 else integers.t()
    return integers if matrix.support is None else integers[matrix.mask()], scales


def _packed(matrix: StoredMatrix, form: MatrixSpec) -> tuple[Tensor, Tensor]:
    """The stored values as packed codes, and the scales of groups or the shared values."""
    dtype = DTYPES[form.scale_coding]
    if form.clustered:
        lines = matrix.values.view(form.books, -1)
        codes, scales = clusters.cluster(lines, int(form.bits), level_dtype=dtype)
    else:
        assert form.group is not None
        lines = matrix.values.view(form.lines)
        codes, scales = low_bit.quantize_groups(lines, form.coding, form.group, scale_dtype=dtype)
    return low_bit.pack(codes.flatten(), form.coding), scales


def take_rows(matrix: StoredMatrix, rows: Int64[Tensor, " n"]) -> StoredMatrix:
    """The matrix of these rows of a dense one, as they are stored. Raises SettingError where entries are missing: rows of such a
    matrix may share a scale."""
    form = matrix.spec
    if not isinstance(form.layout, Dense):
        raise SettingError(
            f"rows of a matrix that is {form.layout.kind} cannot be taken: take them while it is dense"
        )
    taken = StoredMatrix(replace(form, rows=len(rows)), device=matrix.device, dtype=matrix.dtype)
    with torch.no_grad():
        if form.packed:
            codes = low_bit.unpack(matrix.values, form.coding, form.count).view(form.lines)[rows]
            taken.values.copy_(low_bit.pack(codes.flatten(), form.coding))
        else:
            taken.values.copy_(matrix.values[rows])
        if matrix.scales is not None and taken.scales is not None:
            apart = form.group is not None if form.packed else form.scale_axis == 0
            scales = matrix.scales.view(form.rows, -1)[rows].flatten() if apart else matrix.scales
            taken.scales.copy_(scales)
    return taken.requires_grad_(any(parameter.requires_grad for parameter in matrix.parameters()))
