"""What usual passes make of a decoder: SmolLM2-135M, by perplexity on WikiText-2; factorizations are in pipelines/dsformer/decoder.py.

    stackcomp study pipelines/studies/decoder_catalogue.py            # stop and go on as you like

Only the last one trains, for a few steps. Perplexity is over the same windows of 256 tokens for all.
"""

from collections.abc import Iterator

from smollm2 import BLOCKS, model, task

import stackcomp as sc

WINDOWS = 64
CALIBRATION = {"only": BLOCKS, "samples": 256}


def pipelines() -> Iterator[tuple[str, sc.Pipeline]]:
    """Each by what its line is called."""
    pruned = sc.Wanda(sparsity=0.5, **CALIBRATION)
    yield "int8 weights", sc.Pipeline(sc.Int8Weights(only=BLOCKS))
    yield "4 bits to nearest", sc.Pipeline(sc.LowBitWeights(bits=4, only=BLOCKS))
    yield "4 bits, GPTQ", sc.Pipeline(sc.GPTQ(bits=4, **CALIBRATION))
    yield (
        "4 bits, int8 words, coded",
        sc.Pipeline(
            sc.LowBitWeights(bits=4, only=BLOCKS), sc.Int8Weights(only="embed_tokens"), sc.EntropyCode()
        ),
    )
    yield "Wanda, 0.5", sc.Pipeline(pruned)
    yield "Wanda, 0.5 > 4 bits, GPTQ", sc.Pipeline(pruned, sc.GPTQ(bits=4, **CALIBRATION))
    yield "27 of 30 layers, by influence", sc.Pipeline(sc.DropLayers(keep=27, which="influence", samples=256))
    yield (
        "Wanda, 0.5, distilled",
        sc.Pipeline(pruned, sc.Distill(steps=50, batch_size=8, learning_rate=1e-4, skip="embed_tokens")),
    )


study = sc.Study(
    name="decoder_catalogue",
    entries=tuple(
        sc.Entry(
            key=name,
            model=model(),
            task=task,
            pipeline=pipeline,
            labels={"method": name},
            limit=WINDOWS,
            latency=True,
        )
        for name, pipeline in pipelines()
    ),
)
