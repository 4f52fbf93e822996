"""How long dense-sparse factorization takes at BERT-base's shapes, beside scikit-learn's dictionary learning; how the time grows
with the weight; and how much memory it needs.

The weights are BERT-base's in shape only: each is put together from four real ones of all-MiniLM-L6-v2, and no metric is used.
Processor seconds are those of this process, all threads together: on a busy machine they say more than the clock.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from benchmarks import command
from stackcomp.studies.rows import Row, Rows, stamp

if TYPE_CHECKING:
    from torch import Tensor


class Shape(TypedDict):
    """Of a dense-sparse weight."""

    blocks: int
    atoms: int
    nonzeros: int


SWEEPS = 6  # the default of the pass
PAPER = Shape(blocks=12, atoms=32, nonzeros=8)
RATIO = 2.8
ONE_BLOCK = Shape(blocks=1, atoms=192, nonzeros=24)
PASSES = (1, 5)  # of scikit-learn over the rows of a block
MORE_SWEEPS = (*range(9), 10, 12, 16, 24)  # of ours, until the error is no larger than scikit-learn's
TIMED = 2  # blocks of a matrix that scikit-learn factorizes; the others take as long
WIDTH = 64  # columns of a block where the weight grows
MEASURE = "import sys; from benchmarks.factorizing import needed; needed(*sys.argv[1:])"


def pieces() -> "dict[str, list[Tensor]]":
    """The real weights by kind: square, tall and wide."""
    from pathlib import Path

    from safetensors.torch import load_file

    found: dict[str, list[Tensor]] = {"square": [], "tall": [], "wide": []}
    for name, weight in sorted(load_file(Path(command.packaged_model(), "model.safetensors")).items()):
        if "encoder.layer." in name and weight.ndim == 2:
            rows, columns = weight.shape
            kind = "square" if rows == columns else "tall" if rows > columns else "wide"
            found[kind].append(weight.float())
    return found


def joined(parts: "Sequence[Tensor]", number: int) -> "Tensor":
    """A weight twice as long and wide: four different ones side by side."""
    import torch

    a, b, c, d = (parts[(number + step) % len(parts)] for step in range(4))
    return torch.cat([torch.cat([a, b], dim=1), torch.cat([c, d], dim=1)])


def whole_model(parts: "Mapping[str, Sequence[Tensor]]", layers: int = 12) -> "Iterator[Tensor]":
    """The weights of BERT-base's encoder: four square ones, a tall and a wide one a layer."""
    for layer in range(layers):
        yield from (joined(parts["square"], 4 * layer + place) for place in range(4))
        yield joined(parts["tall"], layer)
        yield joined(parts["wide"], layer)


def automatic(rows: int, columns: int) -> Shape:
    """The shape that the pass would take for all layers at RATIO."""
    from stackcomp import ops
    from stackcomp.passes.dense_sparse import MANY

    long, wide = max(rows, columns), min(rows, columns)
    blocks = MANY.blocks if rows == columns else 1
    atoms, nonzeros = ops.shape_of_size(
        long, wide, size_bytes=4 * rows * columns / RATIO, density=MANY.density, blocks=blocks
    )
    return Shape(blocks=blocks, atoms=atoms, nonzeros=nonzeros)


def clocked(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and the time it took."""
    wall, processor = time.perf_counter(), time.process_time()
    made = work()
    taken = {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
    }
    return made, taken


def factorized(weight: "Tensor", shape: Shape, sweeps: int, seed: int) -> "Tensor":
    """Our approximation of a weight."""
    from stackcomp import ops

    rows, columns = weight.shape
    return ops.dense_sparse(weight, **shape, transposed=rows < columns, sweeps=sweeps, seed=seed).product()


def learned(block: "Tensor", shape: Shape, passes: int, seed: int) -> "Tensor":
    """scikit-learn's approximation of one block: a dictionary learned online, then orthogonal matching pursuit."""
    import warnings

    import torch
    from sklearn.decomposition import MiniBatchDictionaryLearning

    scale = block.std()
    rows = (block / scale).numpy()
    learner = MiniBatchDictionaryLearning(
        shape["atoms"],
        max_iter=passes,
        fit_algorithm="cd",
        transform_algorithm="omp",
        transform_n_nonzero_coefs=shape["nonzeros"],
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few passes do not converge
        code = learner.fit(rows).transform(rows)
    return scale * torch.from_numpy(code @ learner.components_)


def relative(made: "Tensor", weight: "Tensor") -> float:
    """The squared error over the weight's energy."""
    return float((weight - made).square().sum() / weight.square().sum())


def beside(weight: "Tensor", shape: Shape, passes: int, seed: int) -> dict[str, Any]:
    """scikit-learn on some blocks, then our whole matrix, at as many sweeps as reach its error on these blocks."""
    width = weight.shape[1] // shape["blocks"]
    blocks = weight[:, : TIMED * width].split(width, dim=1)
    wide = sum(block.shape[1] for block in blocks)
    theirs, ours = [], {}
    for block in blocks:
        theirs.append(clocked(lambda block=block: learned(block, shape, passes, seed)))
    error = sum(
        relative(made, part) * part.square().sum() for (made, _), part in zip(theirs, blocks, strict=True)
    )
    error = float(error / weight[:, :wide].square().sum())
    for sweeps in MORE_SWEEPS:
        made, taken = clocked(lambda sweeps=sweeps: factorized(weight, shape, sweeps, seed))
        ours = {"sweeps": sweeps, "error": relative(made[:, :wide], weight[:, :wide]), **taken}
        if ours["error"] <= error:
            break
    share = shape["blocks"] / len(blocks)
    taken = {name: share * sum(times[name] for _, times in theirs) for name in theirs[0][1]}
    return {
        "timed_blocks": len(blocks),
        "ours": ours,
        "theirs": {"passes": passes, "error": error, **taken},
        "ratio": taken["processor_seconds"] / ours["processor_seconds"],
    }


def whole(weights: "Iterator[Tensor]", shape: Shape | None, seed: int) -> dict[str, Any]:
    """The time of all weights one after the other; without a shape, each in its automatic one."""
    total, count, parameters = {"seconds": 0.0, "processor_seconds": 0.0}, 0, 0
    for weight in weights:
        chosen = shape or automatic(*weight.shape)
        _, taken = clocked(lambda weight=weight, chosen=chosen: factorized(weight, chosen, SWEEPS, seed))
        total = {name: value + taken[name] for name, value in total.items()}
        count, parameters = count + 1, parameters + weight.numel()
    return {"weights": count, "parameters": parameters, **total}


def growth(weight: "Tensor", width: int, shape: Shape, seed: int) -> dict[str, Any]:
    """The time of ever more columns of a weight, in blocks of the same width and atoms; each the least of three."""
    from stackcomp import ops

    points = []
    for divisor in (8, 4, 2, 1):
        part = weight[:, : weight.shape[1] // divisor].contiguous()
        inside = Shape(**{**shape, "blocks": part.shape[1] // width})

        def work(part: "Tensor" = part, inside: Shape = inside) -> object:
            return ops.dense_sparse(part, **inside, sweeps=SWEEPS, seed=seed)

        least = min(clocked(work)[1]["processor_seconds"] for _ in range(3))
        points.append(
            {
                "rows": part.shape[0],
                "columns": part.shape[1],
                "processor_seconds": least,
                "nanoseconds_a_weight": 1e9 * least / part.numel(),
            }
        )
    return {"points": points}


def memory(rows: int, columns: int, shape: Shape, seed: int) -> dict[str, Any]:
    """The most memory that a new process took beyond what it held with the weight in it, over the weight's bytes."""
    arguments = json.dumps({"rows": rows, "columns": columns, "shape": dict(shape), "seed": seed})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, arguments],
        check=True,
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def needed(arguments: str) -> None:
    """The process whose memory is measured; a small factorization first loads what torch loads late."""
    import torch

    from stackcomp.metrics import PeakMemory

    asked = json.loads(arguments)
    torch.manual_seed(asked["seed"])
    factorized(torch.randn(64, 32), {"blocks": 4, "atoms": 8, "nonzeros": 2}, 1, 0)
    weight = torch.randn(asked["rows"], asked["columns"])
    with PeakMemory() as found:
        factorized(weight, asked["shape"], SWEEPS, asked["seed"])
    weight_bytes = 4 * weight.numel()
    extra = found.peak_bytes - found.start_bytes
    print(json.dumps({"weight_bytes": weight_bytes, "extra_bytes": extra, "ratio": extra / weight_bytes}))


def run(
    parts: "Mapping[str, Sequence[Tensor]]",
    rows: Rows,
    *,
    seed: int = 0,
    again: bool = False,
    layers: int = 12,
) -> None:
    """Add the rows that are missing."""
    square, tall, wide = (joined(parts[kind], 0) for kind in ("square", "tall", "wide"))
    factorized(square, PAPER, 1, seed)  # the first call of a process loads kernels, or a library
    learned(square[:64, :64], PAPER, 1, seed)
    studies: dict[str, Callable[[], Row]] = {}
    for weight in (square, tall):
        for passes in PASSES:
            studies[f"scikit-learn, {_size(weight)}, {_spoken(PAPER)}, {passes} passes"] = (
                lambda weight=weight, passes=passes: beside(weight, PAPER, passes, seed)
            )
    studies[f"scikit-learn, {_size(square)}, {_spoken(ONE_BLOCK)}, 1 passes"] = lambda: beside(
        square, ONE_BLOCK, 1, seed
    )
    studies[f"all weights, {_spoken(PAPER)}"] = lambda: whole(whole_model(parts, layers), PAPER, seed)
    studies["growth"] = lambda: growth(wide, WIDTH, PAPER, seed)
    rows_of_tall, columns_of_tall = tall.shape
    for name, shape in (("paper", PAPER), ("automatic", automatic(rows_of_tall, columns_of_tall))):
        studies[f"memory, {name}, {_size(tall)}"] = lambda shape=shape: memory(
            rows_of_tall, columns_of_tall, shape, seed
        )
    studies[f"all weights, automatic at {RATIO:g}x"] = lambda: whole(whole_model(parts, layers), None, seed)
    for key, study in studies.items():
        if not again and rows.has(key, seed=seed):
            command.say(f"there already: {key}")
            continue
        found = study()
        rows.add({"key": key, "kind": key.partition(",")[0], **found, **stamp(key, seed)})
        command.say(f"{key}: {found}")


def _size(weight: "Tensor") -> str:
    return f"{weight.shape[0]}x{weight.shape[1]}"


def _spoken(shape: Shape) -> str:
    return f"{shape['nonzeros']} of {shape['atoms']} atoms in {shape['blocks']} block{'s' * (shape['blocks'] > 1)}"


def main() -> int:
    """Run the study."""
    options = command.parser("factorizing", __doc__ or "").parse_args()
    with command.study("factorizing", options) as rows:
        run(pieces(), rows, seed=options.seed, again=options.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
