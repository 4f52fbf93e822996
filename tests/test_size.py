"""Sizes predicted against sizes written. Every pass and every legal pair of passes is in tests/passes/test_pairs.py."""

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import nn
from stackcomp.cli import main
from stackcomp.core.errors import PipelineRefused, UnsupportedModel
from stackcomp.loading import outline
from tests import toys
from tests.passes.test_conformance import apply, manager

DENSE_SPARSE = sc.DenseSparse(ratio=1.5, data_aware=False, only="encoder.*")


def written(pipeline, model, out, **settings):
    return [
        row.size_bytes for row in manager(out, toys.tokenizer(), **settings).run(model, pipeline).ledger.rows
    ]


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_what_settings_determine_is_exact_in_every_family(family, tmp_path):
    decoder = family in ("gpt2", "llama")
    model = toys.language_model(family) if decoder else toys.classifier(family)
    task = toys.language_task() if decoder else toys.classification_task()
    embeddings = {"gpt2": "wte", "llama": "embed_tokens"}.get(family, "embeddings.word_embeddings")
    pipeline = sc.Pipeline(
        sc.PruneNeurons(keep=(0.5, 0.75)),
        sc.DropLayers(keep=1),
        sc.ASVD(ratio=1.5),
        sc.MagnitudePrune(sparsity=0.3),
        sc.LowBitWeights(bits=3, group=8, only=("*", embeddings)),
    )
    told = sc.sizes(pipeline, model)
    assert not told[-1].reasons
    assert [size.size_bytes for size in told] == written(pipeline, model, tmp_path / "out", task=task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "then", [sc.Int8Weights(), sc.LowBitWeights(bits=2), sc.LowBitWeights(bits=1, group=4)]
)
def test_a_budget_bounds_what_is_rounded_later(dtype, then, tmp_path):
    model = toys.classifier("bert", hidden_size=64, intermediate_size=128).to(dtype)
    pipeline = sc.Pipeline(DENSE_SPARSE, type(then)(**{**vars(then), "only": "encoder.*"}))
    told, found = sc.sizes(pipeline, model), written(pipeline, model, tmp_path / "out")
    assert told[0].size_bytes == found[0]
    for size, real in zip(told[1:], found[1:], strict=True):
        assert real <= size.size_bytes <= 1.3 * real
    assert "DenseSparse shares one budget" in told[-1].reasons[0]


@pytest.mark.parametrize(
    "shape", [{"nonzeros": 4}, {"nonzeros": 1, "groups": 4}, {"nonzeros": 3, "groups": 4}]
)
def test_shapes_that_are_asked_for_are_exact(tmp_path, shape):
    model = toys.classifier("bert", hidden_size=64, intermediate_size=128)
    given = sc.DenseSparse(atoms=12, **shape, blocks=1, data_aware=False, sweeps=1, only="encoder.*")
    pipeline = sc.Pipeline(given, sc.Int8Dynamic())
    told = sc.sizes(pipeline, model)
    assert not told[-1].reasons
    assert [size.size_bytes for size in told] == written(pipeline, model, tmp_path / "out")


def test_a_global_sparsity_is_a_bound(tmp_path):
    model = toys.classifier("bert", hidden_size=64, intermediate_size=128)
    pipeline = sc.Pipeline(
        sc.MovementPrune(sparsity=0.8, scope="global", steps=2, batch_size=4, only="encoder.*"),
        sc.LowBitWeights(bits=2, only="encoder.*"),
    )
    told, found = sc.sizes(pipeline, model), written(pipeline, model, tmp_path / "out")
    assert all(real <= size.size_bytes <= 1.1 * real for size, real in zip(told, found, strict=True))
    assert told[-1].reasons == ("MovementPrune shares what is kept out over the weights by their scores",)


def test_a_compressed_checkpoint_is_where_a_prediction_may_start(tmp_path):
    model = toys.classifier("bert", hidden_size=64, intermediate_size=128)
    manager(tmp_path / "one", toys.tokenizer()).run(model, DENSE_SPARSE)
    pipeline = sc.Pipeline(sc.Int8Weights(only="encoder.*"), sc.EntropyCode())
    told = sc.sizes(pipeline, outline(tmp_path / "one", toys.classification_task()))
    assert told == sc.sizes(pipeline, tmp_path / "one", toys.classification_task())
    found = written(pipeline, tmp_path / "one", tmp_path / "two")
    assert told[0].size_bytes == (tmp_path / "one" / "model.safetensors").stat().st_size
    assert [size.size_bytes for size in told[:2]] == found[:2]
    assert told[2].size_bytes >= found[2]


def test_no_value_is_read(tmp_path):
    toys.make("bert").save_pretrained(tmp_path)
    model = outline(tmp_path, toys.classification_task())
    assert all(parameter.is_meta for parameter in model.parameters())
    told = sc.sizes(DENSE_SPARSE, model)
    real = toys.classifier("bert")
    assert told[0].size_bytes == sc.sizes(DENSE_SPARSE, real)[0].size_bytes


def test_what_check_refuses_is_refused(tmp_path):
    with pytest.raises(PipelineRefused):
        sc.sizes(sc.Pipeline(sc.Int8Weights(), sc.Int8Weights()), toys.classifier("bert"))
    with pytest.raises(UnsupportedModel, match="float64"):
        sc.sizes(DENSE_SPARSE, toys.classifier("bert").double())
    with pytest.raises(UnsupportedModel, match="transformers finds no model there"):
        sc.sizes(DENSE_SPARSE, tmp_path / "none")


def test_a_pass_that_says_nothing_is_named():
    class Silent(sc.Int8Weights):
        stores = sc.Pass.stores

    told = sc.sizes(Silent(), toys.classifier("bert"))
    assert told[-1].size_bytes == told[0].size_bytes
    assert told[-1].reasons == ("Silent does not say how it stores a weight, which is counted as it was",)


def test_check_prints_sizes(tmp_path, capsys):
    toys.make("bert").save_pretrained(tmp_path / "model")
    file = tmp_path / "mine.py"
    file.write_text(
        "import stackcomp as sc\npipeline = sc.Pipeline(sc.LowRank(ratio=1.2), sc.Int8Weights())\n"
    )
    assert main(["check", str(file), "--size"]) == 2
    assert "give --model DIR" in capsys.readouterr().err
    assert main(["check", str(file), "--model", str(tmp_path / "model"), "--size"]) == 0
    printed = capsys.readouterr().out
    assert "as it came" in printed
    assert "at most, since LowRank shares one budget" in printed


def scaled():
    """A model whose head is tied to an embedding that multiplies what it looks up."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3TextConfig(
        vocab_size=toys.VOCABULARY, head_dim=8, num_key_value_heads=1, tie_word_embeddings=True, **sizes
    )
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "step"),
    [
        (scaled, sc.Int8Weights()),
        (lambda: toys.language_model("bert"), sc.Int8Weights()),
        (lambda: toys.language_model("roberta"), sc.DropLayers(keep=1)),
    ],
)
def test_a_tensor_of_two_names_is_written_and_counted_once(build, step, tmp_path):
    model = build()
    for name, told in zip(("before", "after"), sc.sizes(step, model), strict=True):
        if name == "after":
            apply(step, model, toys.tokenizer(), tmp_path)
        model.save_pretrained(tmp_path / name)
        assert told.size_bytes == (tmp_path / name / "model.safetensors").stat().st_size


def test_a_head_that_is_tied_to_a_scaled_embedding_is_left_alone():
    model = scaled()
    assert not [id_ for id_ in nn.weights(model) if "head" in id_ or "embed" in id_]
    for id_ in nn.weights(model):
        nn.quantize(model, id_)
    assert model.lm_head.weight is model.model.embed_tokens.weight
