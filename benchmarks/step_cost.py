"""What a step of straight-through factorization costs beside a plain fine-tuning step on the same batch.

Segments of each, and a projection of all weights, take turns in one process; all-MiniLM-L6-v2 as a classifier, random tokens, the same
loss and optimizer, in the precision in which training runs by default. Processor time, all threads together: on a busy machine it says
more than the clock.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import stackcomp as sc
from benchmarks import command, factorizing
from stackcomp.studies.rows import Rows, stamp

EVERY = (4, 16, 64)
BATCH, LENGTH = 32, 64


def factorized_copy(model: Any, seed: int) -> Any:
    """The model with its encoder's weights dense-sparse at the shapes of the speed study."""
    from stackcomp import nn, ops

    made = copy.deepcopy(model)
    for id_, handle in nn.weights(made).items():
        if not id_.startswith("encoder.layer."):
            continue
        weight = handle.dense().float()
        rows, columns = weight.shape
        shape = factorizing.automatic(rows, columns)
        found = ops.dense_sparse(weight, **shape, transposed=rows < columns, sweeps=1, seed=seed)
        nn.factorize(
            made,
            id_,
            basis=found.basis.flatten(0, 1),
            values=found.values,
            support=found.support,
            transposed=found.transposed,
        )
    return made


def starts(model: Any, batch: Any, ids: list[str]) -> dict[str, Any]:
    """Where each weight starts: the metric of its inputs, and of the gradients at its outputs, on the batch, as the pass has it."""
    from stackcomp import data, nn, ops, training

    handles, found, hooks = nn.weights(model), {}, []
    for id_ in ids:

        def note(_: Any, given: Any, made: Any, id_: str = id_) -> None:
            flat = given[0].detach().flatten(0, -2)
            moment = data.SecondMoment(total=flat.T @ flat, mean=flat.mean(0), count=len(flat))
            metric, mean = data.input_metric(handles[id_], moment, damping=1e-3)

            def start(gradient: Any) -> None:
                rows = gradient.flatten(0, -2)
                outputs = ops.whitener(rows.T @ rows / len(rows), damping=1e-2)
                found[id_] = training.Start(inputs=metric, outputs=outputs, mean=mean)

            made.register_hook(start)

        hooks.append(handles[id_].modules[0].register_forward_hook(note))
    model(**batch).loss.backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return found


def stepper(model: Any, batch: Any) -> Callable[[], None]:
    """One step of fine-tuning."""
    import torch

    from stackcomp import metrics
    from stackcomp.training.precision import precision

    model.train()
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=5e-5)

    def step() -> None:
        with precision(model.device, bf16=metrics.bf16_pays(model.device)):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(model: Any, inputs: Any, *, steps: int, rounds: int, seed: int) -> dict[str, Any]:
    """Milliseconds of a plain step, a straight-through step and a projection, and the ratio by interval, with its extremes."""
    import torch

    from stackcomp import metrics, nn, training

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (len(inputs["input_ids"]),), generator=generator)
    batch = {**inputs, "labels": labels}
    other = factorized_copy(model, seed)
    chosen = [id_ for id_, handle in nn.weights(other).items() if training.projects(handle)]
    times: list[tuple[float, float, float]] = []
    with training.straightened(other, starts(other, batch, chosen)) as latents:
        plain, ours = stepper(model, batch), stepper(other, batch)

        def project() -> None:
            for latent in latents.values():
                latent.project()

        for turn in range(-1, rounds):  # the first is not counted
            taken = (_ms(plain, steps), _ms(ours, steps), _ms(project, 1))
            times += [taken] if turn >= 0 else []
    ratios = {
        every: [(step + projection / every) / dense for dense, step, projection in times] for every in EVERY
    }
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "weights": len(chosen),
        "plain_ms": middle[0],
        "step_ms": middle[1],
        "projection_ms": middle[2],
        "ratios": [
            {"every": every, "ratio": statistics.median(found), "least": min(found), "most": max(found)}
            for every, found in ratios.items()
        ],
        "default": next(field.default for field in fields(sc.STF) if field.name == "every"),
        "bf16": metrics.bf16_pays("cpu"),
        "steps": steps,
        "rounds": rounds,
        "batch": batch["input_ids"].shape[0],
        "length": batch["input_ids"].shape[1],
    }


def _ms(work: Callable[[], None], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return 1000 * (time.process_time() - start) / times


def run(
    model: Any,
    rows: Rows,
    *,
    steps: int,
    rounds: int,
    batch: int,
    length: int,
    seed: int = 0,
    again: bool = False,
) -> None:
    """Add the row if it is missing."""
    from stackcomp.metrics import latency_inputs

    if not again and rows.has("step", seed=seed):
        command.say("there already: step")
        return
    inputs = latency_inputs(model, batch=batch, length=length, seed=seed)
    found = measure(model, inputs, steps=steps, rounds=rounds, seed=seed)
    rows.add({"key": "step", **found, **stamp("step_cost", seed)})
    command.say(f"step: {found}")


def main() -> int:
    """Run the study."""
    parser = command.parser("step_cost", __doc__ or "")
    parser.add_argument("--steps", type=int, default=4, help="of each segment (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="segments of each (default %(default)s)")
    options = parser.parse_args()
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(command.packaged_model(), num_labels=2)
    with command.study("step_cost", options) as rows:
        run(
            model,
            rows,
            steps=options.steps,
            rounds=options.rounds,
            batch=BATCH,
            length=LENGTH,
            seed=options.seed,
            again=options.again,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
