"""What the tests of passes that turn values into codes share: the forms in which they may find weights."""

import stackcomp as sc
from stackcomp import nn
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"
WORDS = "embeddings.word_embeddings"
FIRST = [
    None,
    sc.DenseSparse(ratio=1.3, only=BLOCKS, value_bits=4),
    sc.LowRank(ratio=1.3, only=BLOCKS),
    sc.MagnitudePrune(sparsity=0.6, only=BLOCKS),
    sc.MagnitudePrune(sparsity="2:4", only=BLOCKS),
]


def coded(first, step, tokenizer, tmp_path):
    """The toy, compressed by `first` and then by `step`; its weights between the two."""
    model = toys.bert_classifier()
    if first is not None:
        apply(first, model, tokenizer, tmp_path)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    apply(step, model, tokenizer, tmp_path)
    return model, before
