"""Metrics that say which errors of a weight matter: the cost of replacing W by W' is

    tr(G (W - W') C (W - W')^T),

C (m x m) a moment of the layer's inputs, G (n x n) a moment of the loss's gradients at its outputs. This is the Kronecker-factored
(K-FAC) quadratic model of what the error does downstream (arXiv 1503.05671); G left out is the error of the layer's own outputs, both
left out the plain Frobenius error.

Letters: W has n rows (outputs) and m columns (inputs); d is either.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stackcomp.core.errors import BadWeights

GROWTH = 10.0  # how much the damping grows each time the factorization fails
ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Whitener:
    """A damped moment A and its triangular root: A = root root^T."""

    moment: Float[Tensor, "d d"]  # A, with the damping in
    root: Float[Tensor, "d d"]  # lower triangular
    damping: float  # the share of the mean diagonal that was added: more than was asked for if A was not positive definite
    effective_rank: float  # tr(A)^2 / ||A||_F^2 of the moment as given: 1 for one direction, d for white data

    def whiten_columns(self, matrix: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """`matrix root`: its plain Frobenius norm is the norm of `matrix` in the metric."""
        return matrix @ self.root

    def unwhiten_columns(self, matrix: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Undo `whiten_columns`."""
        return torch.linalg.solve_triangular(self.root, matrix, upper=False, left=False)


def whitener(moment: Float[Tensor, "d d"], *, damping: float) -> Whitener:
    """Damp a moment by `damping` times its mean diagonal and take its root.

    A moment that stays singular in float32 is damped ten times more until it is not; `Whitener.damping` says what was used.
    A moment of zeros (an input that is always zero) becomes the identity: no direction is preferred.
    BadWeights: the moment holds NaN or infinite values.
    """
    if not torch.isfinite(moment).all():
        raise BadWeights(
            "a moment of calibration activations holds NaN or infinite values: check the model and the text"
        )
    moment = (moment + moment.T) / 2
    size = len(moment)
    identity = torch.eye(size, dtype=moment.dtype, device=moment.device)
    scale = moment.diagonal().mean()
    if scale <= 0:
        return Whitener(moment=identity, root=identity, damping=damping, effective_rank=0.0)
    effective_rank = float((moment.trace() / torch.linalg.matrix_norm(moment)) ** 2)
    for _ in range(ATTEMPTS):
        damped = moment + damping * scale * identity
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return Whitener(moment=damped, root=root, damping=damping, effective_rank=effective_rank)
        damping = max(damping * GROWTH, torch.finfo(moment.dtype).eps)
    raise BadWeights(
        f"a moment of size {size} is no second moment: it stays indefinite with damping {damping / GROWTH:g}"
    )


def metric_error(
    residual: Float[Tensor, "n m"],
    *,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
) -> float:
    """tr(G R C R^T) of a residual R = W - W', with the damped moments."""
    if inputs is not None:
        residual = inputs.whiten_columns(residual)
    if outputs is not None:
        residual = outputs.whiten_columns(residual.T)
    return float(residual.double().square().sum())
