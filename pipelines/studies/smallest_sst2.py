"""The smallest file of MiniLM-L6 on SST-2 that loses at most a point.

    stackcomp search pipelines/studies/smallest_sst2.py            # stop and go on as you like

All-MiniLM-L6-v2 is fine-tuned on SST-2; that is the model every pipeline starts from, and its teacher. Pipelines are scored on examples
carved from the training split; what is chosen is scored once on the 872 of the validation split.

Half of the file are embeddings, so the vocabulary goes first. Layers are rounded while they learn from the teacher's hidden states, which
also mends what dropped layers leave open. Every pipeline has a strength of all techniques but "depth": a first search, in which all could
be left out, found that no file without one of them comes near.
"""

from minilm import FROZEN, LAYERS, classifier

import stackcomp as sc

TABLES = ("embeddings.word_embeddings", "embeddings.position_embeddings")

tuned = classifier()


def rounded(bits: float) -> sc.Pass:
    """The layers in so many bits, learned."""
    return sc.QuantizationAware(
        bits=bits,
        group=128,
        only=(LAYERS, "pooler"),
        epochs=100,
        steps=1600,
        learning_rate=2e-4,
        frozen=FROZEN,
    )


search = sc.Search(
    name="smallest_sst2",
    model=tuned,
    task=tuned.task,
    loss=1.0,
    passes={
        "vocabulary": [sc.PruneVocabulary(least=least) for least in (6, 20)],
        "depth": [sc.DropLayers(keep=keep) for keep in (5, 4)],
        "tables": [sc.LowBitWeights(bits=bits, group=64, only=TABLES) for bits in (3, 2)],
        "layers": [rounded(bits) for bits in (2, 1.6)],
        "coding": sc.EntropyCode(),
    },
    always=("vocabulary", "tables", "layers", "coding"),
    pipelines=8,
    rungs=(sc.Rung(examples=500, steps=0.1), sc.Rung(examples=1500, steps=0.33), sc.Rung()),
    keep=0.35,
)
