"""Narrower feed-forward parts: whole neurons go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.families import Part, Stack, feed_forward_of
from stackcomp.pruning import NarrowingPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneNeurons(NarrowingPass):
    """Keep the most important neurons of every layer's feed-forward part, and drop the others whole. Put Distill after it.

    The importance of neuron j is E |sum_t x_tj dL/dx_tj| over labelled training examples, x_tj its activation at token t: to first order,
    what the loss of an example changes by when the neuron is silent. Nothing makes up for a neuron that goes.

    keep: share of a layer's neurons that stay, in (0, 1], rounded to a whole number and at least one; 1 does nothing; or a share for each
    layer, from the first on. samples: labelled training examples, a fixed random subset; batch_size: of one gradient, which changes nothing
    but the time. `only` and `skip` cannot be given. Layers that share their weights keep the same neurons. The model's family must be in
    the table of families.

    With one share for all it becomes an ordinary model of the same family with a smaller intermediate size. A config says no width for each
    layer: with unlike shares its own stays, the widths stand beside it, and the checkpoint is read as all compressed ones are.

    Where we differ from the papers: their units are the channels of convolutions and the heads of attention.
    """

    paper: ClassVar[str] = "Molchanov et al., arXiv:1611.06440; of heads: Michel et al., arXiv:1905.10650"

    def _part(self, paths: Iterable[str]) -> tuple[Stack, Part]:
        return feed_forward_of(paths)

    def _features(self, of_head: int | None) -> int:
        return 1

    def _cut(self, model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
        nn.keep_neurons(model, kept)
