"""How much what a model says depends on its layers: on the outputs of each, from unlabelled text, and on the rows of each weight, from
labels.

Letters: n output features of a layer; g (n) the gradient of what the model says with respect to one token's output of that layer.

The moment G = E[g g^T] weighs the errors a compressed layer makes: directions that nothing downstream reads cost nothing. No label is
read for it: for next tokens the gradient is that of log p(y) with y drawn from the model's own prediction (the Fisher matrix, as in FWSVD,
arXiv 2207.00112, but whole and without labels), and for answers to questions the same with y the first and the last token; for classes
the same of a softened prediction, since at `TEMPERATURE` 1 the many texts of which a fine-tuned model is sure would say next to nothing;
for numbers that of the number; for plain encoders that of the normalised mean embedding along random signs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stackcomp.core.context import Context, Progress, quiet
from stackcomp.core.errors import UnsupportedModel
from stackcomp.data.batches import Collator, inference_batches, lengths_of, mean_over_tokens
from stackcomp.data.calibration import Calibration, Modules, each
from stackcomp.data.question_answering import position_logits
from stackcomp.nn import WeightHandle, evaluating

TEMPERATURE = 4.0  # of predicted classes
PROBES = 1  # random draws a batch: many texts say more than many draws


def gradient_moments(
    calibration: Calibration,
    model: nn.Module,
    modules: Mapping[str, Modules],
    *,
    seed: int,
    progress: Progress = quiet,
) -> dict[str, Tensor | None]:
    """G (n x n) for the outputs of each module, by name, averaged over real tokens; None where nothing downstream reads the module.

    modules: submodules of `model` that return one tensor; of several under one name, such as all that use a shared weight, the
    moments are added, as an error of the weight is made by each of them. The model is left as it was; the caller's random state too.
    """
    sums: dict[str, Tensor | None] = dict.fromkeys(modules)
    tokens = dict.fromkeys(modules, 0)
    outputs: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    with _open(model, modules, outputs):
        for batch in progress(calibration.batches(model), label="sensitivity", total=len(calibration)):
            outputs.clear()
            said = model(**batch)
            if not any(part.requires_grad for part in said.values() if isinstance(part, Tensor)):
                raise UnsupportedModel(
                    f"{type(model).__name__}: nothing it says depends on its word embedding, so that no gradient is found: set "
                    "sensitivity=False"
                )
            reached = [(name, out) for name, outs in outputs.items() for out in outs if out.requires_grad]
            for probe in range(PROBES):
                gradients = torch.autograd.grad(
                    _probe(said, batch, generator),
                    [out for _, out in reached],
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                )
                counted: dict[str, int] = {}
                for (name, _), gradient in zip(reached, gradients, strict=True):
                    if gradient is None:
                        continue
                    real = _real(gradient, batch["attention_mask"].bool()).float()
                    moment, counted[name] = (
                        real.T @ real,
                        len(real),
                    )  # of one use: those of the others are the same tokens
                    before = sums[name]
                    sums[name] = moment if before is None else before + moment
                for name, count in counted.items():
                    tokens[name] += count
    return {name: None if total is None else total / tokens[name] for name, total in sums.items()}


def row_importance(
    model: nn.Module,
    handles: Mapping[str, WeightHandle],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
) -> dict[str, Tensor]:
    """I (n) of each plain weight W (n x m): I_i = sum_j F_ij, F_ij = E[(dL/dW_ij)^2] the diagonal of the empirical Fisher matrix.

    The mean is over batches, and L is the mean `loss` of a batch: with batches of one example this is the formula of FWSVD (arXiv
    2207.00112); with batches of B the gradients are averaged before they are squared, which divides I by about B where they cancel out.
    A weight that the loss does not reach has I = 0. The model runs without dropout and is left as it was.
    """
    sums = {id_: torch.zeros(handle.spec.rows) for id_, handle in handles.items()}
    count = 0
    with _frozen(model):
        parameters = [handle.parameter.requires_grad_() for handle in handles.values()]
        device = parameters[0].device
        for batch in batches:
            count += 1
            given = {key: part.to(device) for key, part in batch.items()}
            gradients = torch.autograd.grad(loss(model, given), parameters, allow_unused=True)
            for (id_, handle), gradient in zip(handles.items(), gradients, strict=True):
                if gradient is not None:
                    sums[id_] += handle.oriented(gradient.float().square()).sum(1).cpu()
    return {id_: total / count for id_, total in sums.items()}


def labelled_batches(
    context: Context, model: nn.Module, limit: int, *, batch_size: int, label: str
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of a fixed random subset of a run's training examples for `model`, longest first, under a bar with this label."""
    assert context.task is not None
    assert context.tokenizer is not None
    encoded = context.task.encode(context.tokenizer, "train", limit)
    rows = encoded.to_list()
    order = inference_batches(lengths_of(encoded[:]), batch_size=batch_size)
    collate = Collator(context.tokenizer, model)
    for batch in context.progress(order, label=label, total=len(order)):
        yield collate([rows[i] for i in batch])


def input_importance(
    model: nn.Module,
    modules: Mapping[str, Modules],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    *,
    together: int = 1,
) -> dict[str, Tensor]:
    """I of the input features of each module, so many `together`: I_k = E |sum_tj x_tj dL/dx_tj|, over the tokens t of an example and
    the features j of the k-th run of them.

    To first order this is what the loss L of an example changes by when these are zero at all its tokens (Molchanov et al., arXiv
    1611.06440; with a head's features together: Michel et al., arXiv 1905.10650). Of several modules under one name, which use one weight,
    the importances are added. `loss` is the mean of a batch. The model runs without dropout and is left as it was.
    """
    sums: dict[str, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {}
    examples = 0
    device = next(model.parameters()).device
    with _open(model, modules, inputs, of_inputs=True):
        for batch in batches:
            inputs.clear()
            found = loss(model, {key: part.to(device) for key, part in batch.items()})
            named = [(name, x) for name, several in inputs.items() for x in several]
            gradients = torch.autograd.grad(found, [x for _, x in named])
            for (name, x), gradient in zip(named, gradients, strict=True):
                change = (x.detach() * gradient).float().sum(1).unflatten(-1, (-1, together)).sum(-1)
                change = change.abs().sum(0) * len(x)
                sums[name] = sums[name] + change if name in sums else change
            examples += len(batch["input_ids"])
    return {name: total / examples for name, total in sums.items()}


def _probe(said: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """A random scalar of what the model says, whose gradients have the moment wanted."""
    if "start_logits" in said:
        return _log_chance(position_logits(said, batch["attention_mask"]).flatten(0, 1), generator)
    if "logits" not in said:
        mean = mean_over_tokens(said.last_hidden_state, batch["attention_mask"])
        return (functional.normalize(mean, dim=-1) * _signs(mean, generator)).sum()
    logits = said.logits.float()
    if logits.shape[-1] == 1:
        return (logits * _signs(logits, generator)).sum()
    if logits.ndim == 3:
        return _log_chance(logits[batch["attention_mask"].bool()], generator)
    return _log_chance(logits / TEMPERATURE, generator)


def _log_chance(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of log p(y), y drawn from the softmax of each row."""
    chance = logits.detach().softmax(-1).cpu()
    drawn = torch.multinomial(chance, 1, generator=generator).to(logits.device)
    return logits.log_softmax(-1).gather(1, drawn).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1.0).to(like.device)


def _real(gradient: Tensor, mask: Tensor) -> Tensor:
    """The gradients of real tokens, or of texts where a head gives one vector a text."""
    if gradient.ndim == 3:
        return gradient[mask]
    return gradient[mask.flatten()] if len(gradient) == mask.numel() else gradient


@contextmanager
def _open(
    model: nn.Module,
    modules: Mapping[str, Modules],
    kept: dict[str, list[Tensor]],
    *,
    of_inputs: bool = False,
) -> Iterator[None]:
    """Run with a graph from the embeddings on, keeping the outputs of `modules`, or their inputs; nothing accumulates in parameters."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept.setdefault(name, []).append(inputs[0] if of_inputs else output)

        return hook

    def begin(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    with ExitStack() as hooks, _frozen(model):
        for embedding in _embeddings(model):
            hooks.callback(embedding.register_forward_hook(begin).remove)
        for name, found in modules.items():
            for module in each(found):
                hooks.callback(module.register_forward_hook(keep(name)).remove)
        yield


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """What looks words up: the input embedding of a model, and those of its encoder and decoder that share the weight."""
    first: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    own = getattr(first, "weight", None)
    others = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not first and module.weight is own
    ]
    return [first, *others]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Run in eval mode with gradients on and no parameter that requires one; gives modes and flags back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
