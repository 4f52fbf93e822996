"""Every pass alone, at a usual strength, and a few stacks, on sentence embeddings: score, bytes and latency.

    stackcomp study pipelines/studies/catalogue.py            # about half an hour; stop and go on as you like

All-MiniLM-L6-v2 on the test pairs of STS-B, mean-pooled cosine. Post-training passes take no gradient step; FWSVD, PruneNeurons and
PruneHeads read labels of the training split for the gradients that tell them what matters. Passes that train take a few steps here, 100,
and are measured in earnest in pipelines/dsformer/table.py. A pass that only makes others better stands with the one it is for.
"""

from collections.abc import Iterator

from minilm import LAYERS, WORDS, model

import stackcomp as sc

TASK = sc.tasks.stsb()
SAMPLES = 1024
TRAINED = {"epochs": 1.0, "steps": 100, "learning_rate": 1e-4}


def pipelines() -> Iterator[tuple[str, sc.Pass | sc.Pipeline]]:
    """Each pass by what its line is called."""
    layers = {"only": LAYERS}
    text = {**layers, "samples": SAMPLES}
    yield "dense-sparse, 2x", sc.DenseSparse(ratio=2.0, sensitivity=False, **text)
    yield "low rank, 2x", sc.LowRank(ratio=2.0, sensitivity=False, **text)
    yield "FWSVD, 2x", sc.FWSVD(ratio=2.0, **text)
    yield "ASVD, 2x", sc.ASVD(ratio=2.0, **text)
    yield "Kronecker, 2x", sc.Kronecker(ratio=2.0, **layers)
    yield "sparse plus low rank, 2x", sc.SparseLowRank(ratio=2.0, **text)
    for sparsity in (0.5, "2:4"):
        yield f"magnitude pruning, {sparsity}", sc.MagnitudePrune(sparsity=sparsity, **layers)
        yield f"Wanda, {sparsity}", sc.Wanda(sparsity=sparsity, **text)
        yield f"SparseGPT, {sparsity}", sc.SparseGPT(sparsity=sparsity, **text)
    yield "magnitude pruning, 0.5, blocks of 1x4", sc.MagnitudePrune(sparsity=0.5, block=(1, 4), **layers)
    yield "int8 weights", sc.Int8Weights(**layers)
    yield "int8 dynamic", sc.Int8Dynamic(**layers)
    yield "int8 dynamic, outliers of 6", sc.Int8Dynamic(outliers=6.0, **layers)
    yield "SmoothQuant, int8 dynamic", sc.Pipeline(sc.SmoothQuant(**text), sc.Int8Dynamic(**layers))
    for bits in (4, 3, 2):
        yield f"{bits} bits to nearest", sc.LowBitWeights(bits=bits, **layers)
        yield f"{bits} bits, GPTQ", sc.GPTQ(bits=bits, **text)
        yield f"{bits} bits, clustered", sc.ClusterWeights(bits=bits, **layers)
    yield "4 bits, clustered by rows", sc.ClusterWeights(bits=4, codebook="row", **layers)
    yield "4 bits, NF4", sc.NF4(**layers)
    for bits in (4, 3, 2):
        yield f"{bits} bits everywhere", sc.LowBitWeights(bits=bits, only=(LAYERS, "pooler", "embeddings"))
    yield "low-rank word embeddings, 2x", sc.FactorizeEmbeddings(ratio=2.0)
    yield "4-bit word embeddings", sc.LowBitWeights(bits=4, only=WORDS)
    yield "vocabulary of the training text", sc.PruneVocabulary()
    yield "3/4 of the neurons", sc.PruneNeurons(keep=0.75)
    yield "3/4 of the heads", sc.PruneHeads(keep=0.75)
    yield "5 of 6 layers", sc.DropLayers(keep=5)
    yield "5 of 6 layers, by influence", sc.DropLayers(keep=5, which="influence")
    yield "pairs of layers share", sc.ShareLayers(group=2)
    yield "pairs of layers share, deltas of rank 64", sc.ShareLayers(group=2, delta_rank=64)
    yield "entropy coding", sc.EntropyCode()
    yield "fine-tuned", sc.FineTune(**TRAINED)
    student = sc.Pipeline(sc.DropLayers(keep=5), sc.Distill(**TRAINED))
    yield "5 of 6 layers, distilled", student
    for name, weights in (("attention", {"attention": 1.0}), ("relations", {"relations": 1.0})):
        losses = sc.Distill(**TRAINED, **weights)
        yield f"5 of 6 layers, distilled with {name}", sc.Pipeline(sc.DropLayers(keep=5), losses)
    yield "2 bits, trained", sc.QuantizationAware(bits=2, **layers, **TRAINED)
    yield "movement pruning, 0.5", sc.MovementPrune(sparsity=0.5, start="magnitude", **layers, **TRAINED)
    factors = sc.DenseSparse(ratio=2.0, sensitivity=False, **text)
    yield (
        "dense-sparse, 2x, supports learned",
        sc.Pipeline(factors, sc.STF(sensitivity=False, **layers, **TRAINED)),
    )
    four = sc.LowBitWeights(bits=4, **layers)
    yield "dense-sparse, 2x > 4 bits > entropy coding", sc.Pipeline(factors, four, sc.EntropyCode())
    yield (
        "5 of 6 layers, distilled > dense-sparse, 2x > int8",
        sc.Pipeline(*student, factors, sc.Int8Weights(**layers)),
    )
    words = sc.LowBitWeights(bits=3, only=WORDS)
    yield (
        "vocabulary > 3-bit words > 3 bits, GPTQ > entropy coding",
        sc.Pipeline(sc.PruneVocabulary(), words, sc.GPTQ(bits=3, **text), sc.EntropyCode()),
    )
    yield (
        "vocabulary > 3-bit words > Wanda, 0.5 > 4 bits, GPTQ > entropy coding",
        sc.Pipeline(
            sc.PruneVocabulary(),
            words,
            sc.Wanda(sparsity=0.5, **text),
            sc.GPTQ(bits=4, **text),
            sc.EntropyCode(),
        ),
    )


study = sc.Study(
    name="catalogue",
    entries=tuple(
        sc.Entry(
            key=name,
            model=model(),
            task=TASK,
            pipeline=pipeline,
            labels={"method": name},
            latency=True,
        )
        for name, pipeline in pipelines()
    ),
)
