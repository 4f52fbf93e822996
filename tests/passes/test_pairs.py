"""Every ordered pair of passes on a toy transformer: legal ones run, the others are refused before any
compute."""

import json

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.contract import legal, predict
from stackcomp.core.errors import PipelineRefused
from stackcomp.manager import plan_of
from stackcomp.passes import registered
from stackcomp.run import CHAIN
from tests import toys
from tests.passes.test_conformance import manager, quick

PASSES = {name: quick(cls) for name, cls in registered().items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the first pass of all pairs is run once."""
    return tmp_path_factory.mktemp("cache")


VARIANTS = {"ShareLayers, delta_rank": sc.ShareLayers(group=2, delta_rank=2)}  # which leave other facts


@pytest.mark.parametrize("second", sorted(PASSES))
@pytest.mark.parametrize("first", sorted(PASSES | VARIANTS))
def test_pair(first, second, tmp_path, cache):
    model, tokenizer = (
        toys.classifier("bert", num_hidden_layers=3),
        toys.tokenizer(),
    )  # of which DropLayers leaves two
    pipeline = sc.Pipeline((PASSES | VARIANTS)[first], PASSES[second])
    if not legal(pipeline.flat(), plan_of(model)):
        with pytest.raises(PipelineRefused):
            manager(tmp_path / "out", tokenizer).run(model, pipeline)
        assert not (tmp_path / "out").exists()
        return
    # compares facts with the contract after each pass
    result = manager(tmp_path / "out", tokenizer, cache=cache).run(model, pipeline)
    batch = toys.batch(result.tokenizer)
    with torch.no_grad():
        logits = result.model(**batch).logits
        assert torch.isfinite(logits).all()
        assert torch.equal(checkpoint.load(tmp_path / "out")(**batch).logits, logits)
    file_bytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result.ledger.rows[-1].size_bytes == file_bytes
    assert sum(checkpoint.components(tmp_path / "out").values()) == file_bytes
    predicted = sc.sizes(pipeline, model)[-1]
    assert predicted.size_bytes >= file_bytes if predicted.reasons else predicted.size_bytes == file_bytes
    if sc.Fact.SPARSE in pipeline.flat()[0].contract.adds:
        pruned = checkpoint.load(cache / json.loads((tmp_path / "out" / CHAIN).read_text())[1] / "step")
        came_from = {
            weight.id: weight.origin for weight in predict(pipeline.flat(), plan_of(model))[-1].weights
        }
        assert_zeros_stay(pruned, result.model, came_from)


def assert_zeros_stay(pruned, model, came_from):
    """What was pruned is zero in the weights of another model that came from it, where these have kept their shape."""
    before, seen = nn.weights(pruned), 0
    for id_, handle in nn.weights(model).items():
        zero = before[came_from[id_]].dense() == 0
        if zero.any() and zero.shape == handle.dense().shape:
            assert (handle.dense()[zero] == 0).all(), id_
            seen += 1
    assert seen


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ("DenseSparse", "Int8Weights", True),
        ("DenseSparse", "Int8Dynamic", True),
        ("LowRank", "Int8Weights", True),
        ("LowRank", "MagnitudePrune", True),
        ("MagnitudePrune", "Int8Weights", True),
        ("MagnitudePrune", "Distill", True),
        ("Int8Weights", "Distill", True),
        ("DenseSparse", "LowBitWeights", True),
        ("LowRank", "LowBitWeights", True),
        ("MagnitudePrune", "LowBitWeights", True),
        ("LowBitWeights", "Distill", True),
        ("DenseSparse", "QuantizationAware", True),
        ("LowRank", "QuantizationAware", True),
        ("MagnitudePrune", "QuantizationAware", True),
        ("QuantizationAware", "Distill", True),
        ("DenseSparse", "GPTQ", True),
        ("LowRank", "GPTQ", True),
        ("SparseGPT", "GPTQ", True),
        ("Wanda", "Int8Dynamic", True),
        ("LowRank", "Wanda", True),
        ("LowRank", "SparseGPT", True),
        ("GPTQ", "Distill", True),
        ("SparseLowRank", "Int8Dynamic", True),
        ("SparseLowRank", "LowBitWeights", True),
        ("SparseLowRank", "GPTQ", True),
        ("SparseLowRank", "QuantizationAware", True),
        ("SparseLowRank", "Distill", True),
        ("SmoothQuant", "SparseLowRank", True),
        ("SmoothQuant", "Int8Dynamic", True),
        ("SmoothQuant", "GPTQ", True),
        ("Kronecker", "Int8Weights", True),
        ("Kronecker", "LowBitWeights", True),
        ("Kronecker", "MagnitudePrune", True),
        ("Kronecker", "QuantizationAware", True),
        ("Kronecker", "Distill", True),
        ("SmoothQuant", "Kronecker", True),
        ("Kronecker", "GPTQ", False),
        ("Kronecker", "SparseGPT", False),
        ("Kronecker", "Int8Dynamic", False),
        ("Kronecker", "STF", False),
        ("Kronecker", "LowRank", False),
        ("SparseLowRank", "MagnitudePrune", False),
        ("SparseLowRank", "STF", False),
        ("LowRank", "SparseLowRank", False),
        ("GPTQ", "LowBitWeights", False),
        ("LowBitWeights", "GPTQ", False),
        ("Wanda", "SparseGPT", False),
        ("Int8Dynamic", "SmoothQuant", False),
        ("QuantizationAware", "LowBitWeights", False),
        ("LowBitWeights", "Int8Weights", False),
        ("Int8Weights", "LowBitWeights", False),
        ("LowBitWeights", "DenseSparse", False),
        ("Int8Weights", "DenseSparse", False),
        ("Int8Weights", "Int8Dynamic", False),
        ("DenseSparse", "DenseSparse", False),
        ("DenseSparse", "LowRank", False),
        ("MagnitudePrune", "DenseSparse", False),
        ("MagnitudePrune", "MagnitudePrune", False),
    ],
)
def test_the_contracts_say_what_a_user_expects(first, second, allowed):
    assert legal((PASSES[first], PASSES[second]), plan_of(toys.bert_classifier())) is allowed
