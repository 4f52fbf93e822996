"""Stacks of three and more passes that people ask for: each runs, every step that compresses makes the file smaller, and it reloads."""

from itertools import pairwise

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint
from tests import toys
from tests.passes.test_conformance import manager

BLOCKS = "encoder.layer.*"
DISTILL = sc.Distill(steps=2, batch_size=4)
SHAPE = {"only": BLOCKS, "atoms": 8, "nonzeros": 4, "blocks": 1}
STUDENT = (sc.DropLayers(keep=1), DISTILL, sc.DenseSparse(**SHAPE), sc.Int8Weights(only=BLOCKS))
HEADER = 64  # bytes that coding may cost where there is too little to gain
WORDS = sc.PruneVocabulary(least=1)
STACKS = {
    "pruned, int8, coded": (sc.MagnitudePrune(only=BLOCKS), sc.Int8Weights(only=BLOCKS), sc.EntropyCode()),
    "pruned, 4 bits, coded": (sc.Wanda(only=BLOCKS), sc.LowBitWeights(only=BLOCKS), sc.EntropyCode()),
    "pruned, GPTQ, coded": (sc.SparseGPT(only=BLOCKS), sc.GPTQ(only=BLOCKS), sc.EntropyCode()),
    "factors in int8, coded": (sc.DenseSparse(**SHAPE), sc.Int8Weights(only=BLOCKS), sc.EntropyCode()),
    "factors in 4 bits, coded": (sc.DenseSparse(**SHAPE), sc.LowBitWeights(only=BLOCKS), sc.EntropyCode()),
    "student, factors in int8": STUDENT,
    "vocabulary first": (WORDS, *STUDENT),
    "vocabulary between": (*STUDENT[:2], WORDS, *STUDENT[2:]),
    "vocabulary last": (*STUDENT, WORDS),
    "of unlike widths, in 4 bits, coded": (
        sc.PruneHeads(keep=(0.5, 1.0)),
        sc.PruneNeurons(keep=(0.7, 0.4)),
        DISTILL,
        sc.LowBitWeights(only=(BLOCKS, "embeddings")),
        sc.EntropyCode(),
    ),
    "narrower, pruned, in 4 bits": (
        sc.PruneHeads(),
        sc.PruneNeurons(),
        DISTILL,
        sc.MagnitudePrune(only=BLOCKS),
        sc.LowBitWeights(only=(BLOCKS, "embeddings")),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_every_step_makes_the_file_smaller(name, tokenizer, tmp_path):
    model, pipeline = toys.classifier("bert"), sc.Pipeline(*STACKS[name])
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    sizes = [row.size_bytes for row in result.ledger.rows]
    for step, (before, after) in zip(pipeline.flat(), pairwise(sizes), strict=True):
        most = {"Distill": before, "EntropyCode": before + HEADER}.get(step.name, before - 1)
        assert after <= most, (step.name, sizes)
    predicted = sc.sizes(pipeline, model)[-1]
    assert predicted.size_bytes == sizes[-1] or (predicted.reasons and predicted.size_bytes > sizes[-1])
    batch = toys.batch(result.tokenizer)
    with torch.no_grad():
        logits = result.model(**batch).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(checkpoint.load(tmp_path / "out")(**batch).logits, logits)
