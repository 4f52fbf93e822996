"""The best score of MiniLM-L6 on SST-2 in a file that is 24 times smaller.

    stackcomp search pipelines/studies/sst2_24x.py            # stop and go on as you like

All-MiniLM-L6-v2 is fine-tuned on SST-2; that is the model every pipeline starts from, and its teacher. Pipelines are scored on examples
carved from the training split; what is chosen is scored once on the 872 of the validation split.

Half of the file are embeddings, so the vocabulary goes first. Layers and embeddings are rounded while they learn from the teacher's hidden
states, which also mends what dropped layers leave open. Only "depth" may be left out. An earlier search rounded the embeddings at once, in
3 bits: with 4 layers and as many steps as in the second rung its file was larger and had lost no less than here.
"""

from minilm import LAYERS, classifier

import stackcomp as sc

WEIGHTS = (LAYERS, "pooler", "embeddings.word_embeddings", "embeddings.position_embeddings")

tuned = classifier()
DENSE_BYTES = 90_867_952  # of the fine-tuned model in float32


def within(times: float) -> int:
    """The largest file that is so many times smaller."""
    return int(DENSE_BYTES / times)


two_bits = sc.QuantizationAware(bits=2, group=64, only=WEIGHTS, epochs=100, steps=4800, learning_rate=2e-4)

search = sc.Search(
    name="smallest_sst2",
    model=tuned,
    task=tuned.task,
    size_bytes=within(24),
    passes={
        "vocabulary": [sc.PruneVocabulary(least=least) for least in (6, 20)],
        "depth": [sc.DropLayers(keep=keep) for keep in (5, 4, 3)],
        "2 bits": two_bits,
        "coding": sc.EntropyCode(),
    },
    always=("vocabulary", "2 bits", "coding"),
    pipelines=8,
    rungs=(sc.Rung(examples=500, steps=1 / 30), sc.Rung(examples=1500, steps=0.11), sc.Rung()),
    keep=0.35,
)
