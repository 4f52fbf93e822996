"""Straight-through factorization: a dense weight is trained while the model runs on its dense-sparse projection (DSFormer, arXiv
2312.13211).

    forward: W' = W + shift,  shift = S D - W when the weight was last projected;   dL/dW = dL/dW'

At a projection W' is S D exactly. Until the next one it moves with W, so a step costs what a dense step costs, and what the projection
leaves out stays in W. That rest is what moves supports. A W that starts as the dense weight that was factorized has it at once; one that
starts as S D has none, and an atom outside a support must outgrow one inside by gradient steps alone.

A projection is the best one where it counts: in the metric of the layer's inputs, less their mean where a bias can take up what the
projection does to it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackcomp.core.matrices import Dense, Fixed
from stackcomp.core.spec import WeightSpec
from stackcomp.nn import CompressedLinear, WeightHandle, factorize, weights
from stackcomp.nn.tree import absolute
from stackcomp.ops import DenseSparseFactors, Factorizer, Whitener

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_STEPS = 3  # conjugate gradient steps of a projection: the last one is near


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a latent weight starts, beside its factors. inputs, outputs: the metric of projections, of the layer's inputs and of the
    gradients at its outputs, plain without them; mean: of these inputs, where the layer's bias takes up the mean of what a projection
    changes; dense: what W starts as, where that is not S D; noise: what rounding will do to the factors, in share of their mean square."""

    inputs: Whitener | None = None
    outputs: Whitener | None = None
    mean: Tensor | None = None
    dense: Tensor | None = None
    noise: float = 0.0


class Latent(nn.Module):
    """The dense weight behind one factorized weight, in float32, and the state of its factorization; the loop's checkpoints hold it all."""

    weight: nn.Parameter  # W, n x m
    shift: Tensor
    basis: Tensor
    code: Tensor
    mask: Tensor
    raised: Tensor | None  # n: what projections have added to the layer's bias, where it takes up their mean

    def __init__(self, factors: DenseSparseFactors, start: Start | None = None) -> None:
        super().__init__()
        start = start or Start()
        self._mean = start.mean
        product = factors.product()
        blocks, atoms, _ = factors.basis.shape
        spans, nonzeros = factors.support.shape[1:]
        self._factorizer = Factorizer(
            product,
            atoms=atoms,
            nonzeros=nonzeros,
            blocks=blocks,
            groups=spans // blocks,
            transposed=factors.transposed,
            inputs=start.inputs,
            outputs=start.outputs,
            noise=start.noise,
            start=factors,
        )
        self.weight = nn.Parameter((product if start.dense is None else start.dense).clone())
        self.register_buffer("shift", product - self.weight.detach())
        for name in ("basis", "code", "mask"):
            self.register_buffer(name, getattr(self._factorizer, name).clone())
        self.register_buffer("raised", None if start.mean is None else product.new_zeros(len(product)))

    def forward(self) -> Tensor:
        """W'."""
        return self.weight + self.shift

    @torch.no_grad()
    def project(self, *, last: bool = False) -> float:
        """Project W anew, from where the last projection ended; returns the share of the support that changed. last: polish the factors,
        as nothing can make up any more for what they leave."""
        factorizer, before, was = self._factorizer, self.mask.clone(), self()
        factorizer.resume(self.basis, self.code, self.mask)
        factorizer.aim(self.weight.detach())
        factorizer.sweep(steps=WARM_STEPS)
        if last:
            factorizer.polish()
        for name in ("basis", "code", "mask"):
            getattr(self, name).copy_(getattr(factorizer, name))
        self.shift.copy_(factorizer.product() - self.weight)
        if self._mean is not None and self.raised is not None:
            self.raised += (was - self()) @ self._mean
        return float((before & ~self.mask).sum() / before.sum())

    def factors(self) -> DenseSparseFactors:
        """S and D of the last projection."""
        return self._factorizer.factors()


class LatentLinear(nn.Module):
    """y = x W'^T + b in the place of a compressed layer while it trains."""

    bias: nn.Parameter | None

    def __init__(self, latent: Latent, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.latent = latent
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's outputs, in the dtype of x."""
        return nn.functional.linear(x, self.latent().to(x.dtype), self.raised_bias())

    def raised_bias(self) -> Tensor | None:
        """b with what the projections have added to it."""
        raised = self.latent.raised
        return self.bias if self.bias is None or raised is None else self.bias + raised


def projects(handle: WeightHandle) -> bool:
    """Whether a weight is dense-sparse, in floating point and used by linear layers: what can be trained through its projection."""
    found = handle.spec.matrices.get("coefficients")
    return (
        found is not None
        and isinstance(found.layout, Fixed)
        and isinstance(handle.spec.matrices["basis"].layout, Dense)
        and all(matrix.scale_count == 0 for matrix in handle.spec.matrices.values())
        and all(isinstance(module, CompressedLinear) for module in handle.modules)
    )


@contextmanager
def straightened(model: "PreTrainedModel", starts: Mapping[str, Start]) -> Iterator[dict[str, Latent]]:
    """Train the dense-sparse weights of `starts` through their projections as long as the context lasts; afterwards the model holds the
    factors of the last projection."""
    handles = {id_: handle for id_, handle in weights(model).items() if id_ in starts}
    latents = {id_: Latent(_factors(handle), starts[id_]) for id_, handle in handles.items()}
    places = [_layers(model, handle.spec) for handle in handles.values()]
    for place, latent in zip(places, latents.values(), strict=True):
        made: dict[int, LatentLinear] = {}
        for name, layer in place.items():
            _set(model, name, made.setdefault(id(layer), LatentLinear(latent, layer.bias)))
    try:
        yield latents
    finally:
        for place in places:
            for name, layer in place.items():
                _set(model, name, layer)
    for id_, latent in latents.items():
        bias, raised = handles[id_].bias, latent.raised
        if bias is not None and raised is not None:
            bias.data += raised
        found = latent.factors()
        factorize(
            model,
            id_,
            basis=found.basis.flatten(0, 1),
            values=found.values,
            support=found.support,
            transposed=found.transposed,
        )


def _layers(model: "PreTrainedModel", spec: WeightSpec) -> dict[str, CompressedLinear]:
    """The layers of one weight by the names they have in the model."""
    names = [name for name in (absolute(model, path) for path in spec.paths) if name is not None]
    return {name: model.get_submodule(name) for name in names}  # type: ignore[misc]


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _factors(handle: WeightHandle) -> DenseSparseFactors:
    """The factors that a dense-sparse weight is stored as."""
    layer = handle.modules[0]
    assert isinstance(layer, CompressedLinear)
    matrices = layer.matrices
    coefficients, layout = matrices["coefficients"], matrices["coefficients"].spec.layout
    assert isinstance(layout, Fixed)
    rows, atoms = coefficients.shape
    grouped = coefficients.mask().view(rows, atoms // layout.block, layout.block)
    return DenseSparseFactors(
        basis=matrices["basis"].dense().detach().float().unflatten(0, (layer.blocks, -1)).clone(),
        support=grouped.nonzero()[:, 2].view(rows, -1, layout.nonzeros),
        values=coefficients.values.detach().float().view(rows, -1, layout.nonzeros).clone(),
        transposed=layer.transposed,
    )
