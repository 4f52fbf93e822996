"""Statistics of what flows into layers, from unlabelled text: one run of the model serves all of them.

Letters: m input features of a layer, X (m x tokens) its inputs over all real tokens (padding never counts).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stackcomp.core.context import Context, Progress, quiet
from stackcomp.core.errors import DataError, TooLittleCalibration, UnsupportedModel
from stackcomp.data.batches import Collator, inference_batches, lengths_of
from stackcomp.nn import WeightHandle, evaluating, position_tables, weights
from stackcomp.ops import Whitener, whitener

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


UNTOLD_LENGTH = 128  # tokens of a calibration text, where no task says how many
Modules = nn.Module | Sequence[nn.Module]  # one, or all that use the same weight


def each(modules: Modules) -> tuple[nn.Module, ...]:
    """The modules, each once."""
    return (modules,) if isinstance(modules, nn.Module) else tuple(dict.fromkeys(modules))


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """Inputs of a layer, in short: total = X X^T (m x m), mean (m), count = tokens.

    Layers that read the very same tensor (query, key and value) share one object.
    """

    total: Tensor
    mean: Tensor
    count: int

    @property
    def average(self) -> Tensor:
        """Second moment per token (m x m)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Second moment per token of what differs from the mean (m x m)."""
        return self.average - torch.outer(self.mean, self.mean)


def input_metric(
    handle: WeightHandle, moment: SecondMoment, *, damping: float
) -> tuple[Whitener, Tensor | None]:
    """The metric in which errors of a weight count, and the mean input where the layer's bias is to take up the mean of an error: the
    metric is then that of the inputs less their mean."""
    if handle.bias is None:
        return whitener(moment.average, damping=damping), None
    return whitener(moment.covariance, damping=damping), moment.mean


class _Enough(Exception):
    """Every layer asked for has been reached: the rest of the forward pass is not needed."""


class Calibration:
    """Unlabelled text, encoded once, that models are run on.

    texts: strings, or pairs where the model reads two texts together. Batches are sorted by length, so the
    result depends on the texts and the model alone. Texts without a token say nothing and are left out. Raises `DataError` where no
    text is left.
    """

    def __init__(
        self,
        texts: Sequence[Any],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int = UNTOLD_LENGTH,
        batch_size: int = 32,
    ) -> None:
        if not len(texts):
            raise DataError("calibration needs text, and there is none: give a task with a training split")
        rows = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=True)
        told = [place for place, ids in enumerate(rows["input_ids"]) if ids]
        if not told:
            raise DataError(f"calibration needs text, and its {len(texts)} texts are blank: give other ones")
        columns = {key: [part[place] for place in told] for key, part in rows.items()}
        self.tokens = sum(
            sum(mask) for key, part in columns.items() if "attention_mask" in key for mask in part
        )
        self._rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._order = inference_batches(lengths_of(columns), batch_size=batch_size)
        self._tokenizer = tokenizer

    @classmethod
    def of(
        cls, model: "PreTrainedModel", context: Context, samples: int, *, first: int | None = None
    ) -> "Calibration":
        """`samples` calibration texts of a run, or the `first` of them, as long as its task reads them; without a task, as long as `model`
        can read them, up to UNTOLD_LENGTH tokens."""
        assert context.calibration is not None
        assert context.tokenizer is not None
        texts = context.calibration(samples)[:samples]
        length = (
            min([UNTOLD_LENGTH, *position_tables(model).values()])
            if context.task is None
            else context.task.max_length
        )
        return cls(texts[:first], context.tokenizer, max_length=length)

    def __len__(self) -> int:
        return len(self._order)

    def batches(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Padded batches on the device of the model, longest first, always the same."""
        collate, device = Collator(self._tokenizer, model), _device(model)
        for order in self._order:
            yield {key: part.to(device) for key, part in collate([self._rows[i] for i in order]).items()}

    def second_moments(
        self, model: nn.Module, modules: Mapping[str, Modules], *, progress: Progress = quiet
    ) -> dict[str, SecondMoment]:
        """X X^T of the inputs of each module, by name, in float32: one run over the text for all of them.

        modules: submodules of `model` called with one tensor (..., m); of several under one name, such as all that use
        a shared weight, the inputs are taken together. The model runs in eval mode without
        gradients, only as far as the last module asked for, and is left as it was. Raises
        `UnsupportedModel` naming a module that never runs; warns `TooLittleCalibration` where there are
        fewer tokens than features.
        """
        total: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        count = dict.fromkeys(modules, 0)
        tickets: dict[str, list[int]] = {name: [] for name in modules}
        last: tuple[int, Tensor, Tensor] | None = None

        def listen(name: str, x: Tensor, ticket: int) -> None:
            nonlocal last
            if last is None or last[0] != ticket:
                last = (ticket, x.T @ x, x.sum(0))
            _accumulate(total, name, last[1])
            _accumulate(first, name, last[2])
            count[name] += x.shape[0]
            tickets[name].append(ticket)

        with evaluating(model), torch.no_grad(), _Listening(modules, listen) as listening:
            for batch in progress(self.batches(model), label="calibrating", total=len(self)):
                listening.run(model, batch)
        _refuse_unreached(count)
        shared: dict[tuple[int, ...], SecondMoment] = {}
        result = {}
        for name in modules:
            moment = SecondMoment(total=total[name], mean=first[name] / count[name], count=count[name])
            result[name] = shared.setdefault(tuple(tickets[name]), moment)
        _warn_if_short(result)
        return result

    def largest_inputs(
        self, model: nn.Module, modules: Mapping[str, Modules], *, progress: Progress = quiet
    ) -> dict[str, Tensor]:
        """max |x_j| over the text for every input j of each module (m), by name, in float32. Modules and errors as in
        `second_moments`."""
        return self._folded(model, modules, lambda x: x.abs().amax(0), torch.maximum, progress)[0]

    def mean_inputs(
        self, model: nn.Module, modules: Mapping[str, Modules], *, progress: Progress = quiet
    ) -> dict[str, Tensor]:
        """The mean of |x_j| in the place of the largest."""
        sums, count = self._folded(model, modules, lambda x: x.abs().sum(0), torch.add, progress)
        return {name: total / count[name] for name, total in sums.items()}

    def influence(
        self, model: nn.Module, layers: Sequence[nn.Module], *, progress: Progress = quiet
    ) -> list[float]:
        """1 - E cos(h, h') of each layer over all real tokens, h the hidden state that enters it and h' the one that leaves it: 0 where
        it changes nothing (block influence, Men et al., ShortGPT, arXiv 2403.03853). The model is left as it was."""
        alike, count = [0.0] * len(layers), 0
        mask = torch.ones(0, 0, dtype=torch.bool)

        def listen(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                entering = inputs[0] if inputs else named["hidden_states"]
                leaving = output[0] if isinstance(output, tuple) else output
                if entering.shape[:-1] != mask.shape or leaving.shape[:-1] != mask.shape:
                    raise UnsupportedModel(
                        f"which='influence': layer {place} gives hidden states of shape {tuple(leaving.shape)} for {tuple(mask.shape)} "
                        "tokens: choose layers otherwise, as which='even'"
                    )
                states = (state[mask].float() for state in (entering, leaving))
                alike[place] += float(nn.functional.cosine_similarity(*states, dim=-1).sum())

            return hook

        with evaluating(model), torch.no_grad(), ExitStack() as hooks:
            for place, layer in enumerate(layers):
                hooks.callback(layer.register_forward_hook(listen(place), with_kwargs=True).remove)
            for batch in progress(self.batches(model), label="influence", total=len(self)):
                mask = batch["attention_mask"].bool()
                count += int(mask.sum())
                model(**batch)
        return [1 - total / count for total in alike]

    def _folded(
        self,
        model: nn.Module,
        modules: Mapping[str, Modules],
        of_tokens: Callable[[Tensor], Tensor],
        fold: Callable[[Tensor, Tensor], Tensor],
        progress: Progress,
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What is made `of_tokens` (tokens x m) of a batch, folded over the text, and how many tokens there were; both by name."""
        found: dict[str, Tensor] = {}
        count = dict.fromkeys(modules, 0)

        def listen(name: str, x: Tensor, ticket: int) -> None:
            part = of_tokens(x)
            found[name] = fold(found[name], part) if name in found else part
            count[name] += x.shape[0]

        with evaluating(model), torch.no_grad(), _Listening(modules, listen) as listening:
            for batch in progress(self.batches(model), label="calibrating", total=len(self)):
                listening.run(model, batch)
        _refuse_unreached(count)
        return found, count


def input_moments(model: "PreTrainedModel", context: Context, samples: int) -> dict[str, Tensor]:
    """E[x x^T] (m x m) of the inputs of each weight that a pass works on, by id, over `samples` calibration texts of its run."""
    handles = weights(model)
    modules = {id_: handles[id_].modules for id_ in context.targets}
    found = Calibration.of(model, context, samples).second_moments(model, modules, progress=context.progress)
    return {id_: moment.average for id_, moment in found.items()}


class _Listening:
    """Forward pre-hooks on modules that hand over the real tokens of their input, (tokens x m) in float32.

    `listen` gets the module's name, the tokens, and a number that is the same for two modules exactly where
    they were called one after the other with the same tensor.
    """

    def __init__(self, modules: Mapping[str, Modules], listen: Callable[[str, Tensor, int], None]) -> None:
        self._modules = modules
        self._listen = listen
        self._mask = torch.ones(0, 0, dtype=torch.bool)
        self._ticket = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._calls = 0
        self._expected: int | None = (
            None  # calls in a whole forward pass; a shared layer is called more than once
        )

    def __enter__(self) -> "_Listening":
        self._hooks = ExitStack()
        for name, modules in self._modules.items():
            for module in each(modules):
                handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.close()

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """One forward pass; from the second on it ends at the last module asked for."""
        self._mask = batch["attention_mask"].bool()
        self._calls = 0
        try:
            model(**batch)
            self._expected = self._calls
        except _Enough:
            pass
        finally:
            self._last = None

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            if self._last is None or self._last[0] is not x:
                self._last = (x, self._real(name, x.detach()))
                self._ticket += 1
            self._listen(name, self._last[1], self._ticket)
            self._calls += 1
            if self._calls == self._expected:
                raise _Enough

        return hook

    def _real(self, name: str, x: Tensor) -> Tensor:
        texts, length = self._mask.shape
        if x.shape[:-1] == (texts, length):
            return x[self._mask].float()
        if x.shape[:-1] == (texts * length,):
            return x[self._mask.flatten()].float()
        if x.shape[:-1] == (texts,):  # one vector a text, as the heads of encoders read
            return x.float()
        raise UnsupportedModel(
            f"{name}: its input has shape {tuple(x.shape)}, which is neither tokens nor texts of a batch of "
            f"{texts} x {length}; leave it out with skip="
        )


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    if name in sums:
        sums[name] += part
    else:
        sums[name] = part.clone()


def _refuse_unreached(count: Mapping[str, int]) -> None:
    name = next((name for name, tokens in count.items() if tokens == 0), None)
    if name is not None:
        raise UnsupportedModel(f"{name}: the model never runs this module on text; leave it out with skip=")


def _warn_if_short(moments: Mapping[str, SecondMoment]) -> None:
    short = {name: moment for name, moment in moments.items() if moment.count < moment.mean.numel()}
    if short:
        name, moment = max(short.items(), key=lambda item: item[1].mean.numel())
        warnings.warn(
            TooLittleCalibration(
                f"{name}: {moment.count} calibration tokens for {moment.mean.numel()} input features, so "
                "its second "
                f"moment has rank {moment.count} at most; give more calibration text ({len(short)} layers "
                "affected)"
            ),
            stacklevel=3,
        )


def _device(model: nn.Module) -> torch.device:
    return next((part.device for part in model.parameters()), torch.device("cpu"))
