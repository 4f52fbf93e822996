import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from stackcomp import nn as snn
from stackcomp.core.errors import BadWeights, SettingError, UnsupportedModel
from stackcomp.core.matrices import Dense, Fixed, Free
from stackcomp.ops import round_groups
from tests import toys


def low_rank(model, id_, rank, transposed=False):
    weight = snn.weights(model)[id_].dense()
    u, s, v = torch.linalg.svd((weight.t() if transposed else weight).float(), full_matrices=False)
    snn.factorize(model, id_, basis=v[:rank], values=(u * s)[:, :rank], transposed=transposed)


def linear_ids(model):
    return [id_ for id_, handle in snn.weights(model).items() if handle.spec.kind == "linear"]


@pytest.fixture(params=toys.FAMILIES)
def model(request):
    return toys.classifier(request.param)


@pytest.fixture
def inputs():
    return toys.batch(toys.tokenizer())


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_every_weight_is_found_once(model):
    handles = snn.weights(model)
    prefix = f"{model.base_model_prefix}."
    assert not any(path.startswith(prefix) for handle in handles.values() for path in handle.spec.paths)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert sum(handle.spec.dense_count for handle in handles.values()) == sum(p.numel() for p in matrices)
    for handle in handles.values():
        assert handle.dense().shape == (handle.spec.rows, handle.spec.cols)
        assert len(handle.modules) == len(handle.spec.paths)
        assert isinstance(handle.spec.matrices["weight"].layout, Dense)


def test_full_rank_factors_change_nothing(model, inputs):
    before = logits(model, inputs)
    for place, id_ in enumerate(linear_ids(model)):
        shape = snn.weights(model)[id_].spec
        low_rank(model, id_, min(shape.rows, shape.cols), transposed=bool(place % 2))
    assert torch.allclose(logits(model, inputs), before, atol=1e-4)


def test_orientation_of_conv1d():
    model = toys.make("gpt2")
    conv = model.h[0].attn.c_attn
    handle = snn.weights(model)["h.0.attn.c_attn"]
    assert (handle.spec.rows, handle.spec.cols) == (48, 16)
    assert torch.equal(handle.dense(), conv.weight.t())
    x = torch.randn(3, 16)
    expected = conv(x)
    low_rank(model, "h.0.attn.c_attn", 16)
    assert torch.allclose(model.h[0].attn.c_attn(x), expected, atol=1e-4)


def test_dense_sparse_factors(inputs):
    model = toys.bert_classifier()
    id_ = "encoder.layer.1.output.dense"
    support = torch.tensor([0, 2, 3]).repeat(16, 4, 1)
    values, basis = torch.randn(16, 4, 3), torch.randn(4 * 5, 8)
    snn.factorize(model, id_, basis=basis, values=values, support=support)
    spec = snn.weights(model)[id_].spec
    assert spec.matrices["coefficients"].layout == Fixed(block=5, nonzeros=3)
    spread = torch.zeros(16, 4, 5).scatter(-1, support, values)
    expected = torch.cat([spread[:, k] @ basis[5 * k : 5 * k + 5] for k in range(4)], dim=1)
    assert torch.allclose(snn.weights(model)[id_].dense(), expected, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_that_do_not_make_the_weight_are_refused(transposed):
    model = toys.bert_classifier()
    for basis, values, support in (
        (torch.randn(4, 7), torch.randn(16, 4), None),
        (torch.randn(4, 16), torch.randn(15, 4), None),
        (torch.randn(4, 16), torch.randn(16, 1, 2), torch.zeros(16, 2, 1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"encoder\.layer\.0\.attention\.self\.query"):
            snn.factorize(
                model,
                "encoder.layer.0.attention.self.query",
                basis=basis,
                values=values,
                support=support,
                transposed=transposed,
            )


def test_sparsify_keeps_exactly_the_mask():
    model = toys.bert_classifier()
    id_ = "encoder.layer.0.intermediate.dense"
    weight = snn.weights(model)[id_].dense().clone()
    snn.sparsify(model, id_, lambda matrix: matrix > 0.1)
    assert torch.equal(snn.weights(model)[id_].dense(), weight * (weight > 0.1))
    assert isinstance(snn.weights(model)[id_].spec.matrices["weight"].layout, Free)
    low_rank(model, "encoder.layer.0.output.dense", 4)
    snn.sparsify(model, "encoder.layer.0.output.dense", lambda m: m.abs() >= m.abs().median())
    assert all(
        isinstance(m.layout, Free)
        for m in snn.weights(model)["encoder.layer.0.output.dense"].spec.matrices.values()
    )


def test_sparsify_in_groups():
    model = toys.bert_classifier()
    id_ = "encoder.layer.0.intermediate.dense"
    first_half = lambda matrix: (torch.arange(matrix.shape[1]) % 4 < 2).expand_as(matrix)  # noqa: E731
    snn.sparsify(model, id_, first_half, groups=(2, 4))
    spec = snn.weights(model)[id_].spec.matrices["weight"]
    assert spec.layout == Fixed(block=4, nonzeros=2)
    assert torch.equal(snn.weights(model)[id_].modules[0].weight.mask(), first_half(torch.empty(32, 16)))


def test_quantize_reaches_every_matrix_with_scales_on_the_output_side():
    model = toys.bert_classifier()
    low_rank(model, "encoder.layer.0.attention.self.query", 4, transposed=True)
    low_rank(model, "encoder.layer.0.attention.self.key", 4)
    for id_, axis in (("query", 1), ("key", 0), ("value", 0)):
        id_ = f"encoder.layer.0.attention.self.{id_}"
        before = snn.weights(model)[id_].dense()
        snn.quantize(model, id_, dynamic=True)
        handle = snn.weights(model)[id_]
        assert {matrix.coding for matrix in handle.spec.matrices.values()} == {"int8"}
        assert {matrix.scale_axis for matrix in handle.spec.matrices.values()} == {axis}
        assert (handle.dense() - before).norm() <= 0.02 * before.norm()
        x = torch.randn(5, 16)
        layer = handle.modules[0]
        with torch.no_grad():
            exact = x @ before.t() + layer.bias
            assert (layer(x) - exact).norm() <= 0.04 * exact.norm()


def test_low_bits_reach_every_matrix_once():
    model = toys.bert_classifier()
    low_rank(model, "encoder.layer.0.attention.self.query", 4, transposed=True)
    for id_ in ("encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"):
        before = snn.weights(model)[id_].dense()
        snn.quantize(model, id_, coding="int4", group=16)
        rounded = snn.weights(model)[id_]
        assert {matrix.coding for matrix in rounded.spec.matrices.values()} == {"int4"}
        assert {matrix.scale_coding for matrix in rounded.spec.matrices.values()} == {"float16"}
        assert (rounded.dense() - before).norm() <= 0.15 * before.norm()
        snn.quantize(model, id_, coding="int2", group=16)  # what is rounded stays as it is
        assert torch.equal(snn.weights(model)[id_].dense(), rounded.dense())


def test_weights_on_the_grid_lose_nothing():
    model = toys.bert_classifier()
    id_ = "encoder.layer.0.output.dense"
    with torch.no_grad():
        weight = model.bert.encoder.layer[0].output.dense.weight
        weight.copy_(round_groups(weight, "int3", 12, tries=3))
    before = snn.weights(model)[id_].dense().clone()
    snn.quantize(model, id_, coding="int3", group=12)
    assert torch.equal(snn.weights(model)[id_].dense(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coding": "float32"}, "coding='float32'"),
        ({"coding": "int8", "group": 32}, "group=32 does not fit coding='int8'"),
        ({"coding": "ternary"}, "group=None"),
        ({"coding": "int4", "group": 32, "dynamic": True}, "dynamic=True"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        snn.quantize(toys.bert_classifier(), "classifier", **settings)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("change", ["quantize", "factorize", "sparsify"])
def test_tied_embeddings_stay_tied(family, change, inputs):
    model = toys.language_model(family)
    words = next(id_ for id_, handle in snn.weights(model).items() if len(handle.spec.paths) == 2)
    before = logits(model, inputs)
    match change:
        case "quantize":
            snn.quantize(model, words, dynamic=False)
        case "factorize":
            low_rank(model, words, 16)
        case _:
            snn.sparsify(model, words, lambda matrix: matrix.abs() > 0.01)
    handle = snn.weights(model)[words]
    assert len(handle.spec.paths) == 2
    assert handle.spec.kind == "embedding"
    embedding, head = handle.modules
    assert torch.equal(embedding.dense(), head.dense())
    assert (logits(model, inputs) - before).norm() <= 0.05 * before.norm()
    model.tie_weights()  # what transformers does now and then must change nothing
    with torch.no_grad():
        for matrix in handle.modules[0].matrices.values():
            matrix.get_parameter("values" if change != "quantize" else "scales").zero_()
    assert not head.dense().any()


class Twice(BertModel):
    """A model whose second layer is its first one."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder.layer[1] = self.encoder.layer[0]
        self.twin = nn.Linear(4, 4)
        self.twin.weight = nn.Parameter(torch.randn(4, 4))
        self.sibling = nn.Linear(4, 4)
        self.sibling.weight = self.twin.weight


def shared_model():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 23,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return Twice(BertConfig(**sizes)).eval()


def test_shared_layers_are_one_weight_and_stay_one():
    model = shared_model()
    handles = snn.weights(model)
    assert handles["encoder.layer.0.output.dense"].spec.paths == (
        "encoder.layer.0.output.dense",
        "encoder.layer.1.output.dense",
    )
    assert handles["twin"].spec.paths == ("twin", "sibling")
    for id_ in ("encoder.layer.0.output.dense", "twin"):
        snn.quantize(model, id_, dynamic=False)
    handles = snn.weights(model)
    assert handles["encoder.layer.0.output.dense"].spec.paths[1] == "encoder.layer.1.output.dense"
    assert handles["twin"].spec.paths == ("twin", "sibling")
    first, second = handles["encoder.layer.0.output.dense"].modules
    assert first is second
    twin, sibling = handles["twin"].modules
    assert twin.matrices["weight"] is sibling.matrices["weight"]
    assert not torch.equal(twin.bias, sibling.bias)


def test_what_else_a_layer_has_is_kept():
    model = toys.bert_classifier().train().to(torch.bfloat16)
    id_ = "encoder.layer.0.output.dense"
    bias = snn.weights(model)[id_].modules[0].bias
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    low_rank(model, id_, 4)
    snn.sparsify(model, id_, lambda matrix: matrix > 0)
    snn.quantize(model, id_, dynamic=True)
    layer = snn.weights(model)[id_].modules[0]
    assert layer.bias is bias
    assert layer.training
    assert not snn.weights(model)[id_].requires_grad
    assert bias.requires_grad
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert snn.weights(model)["encoder.layer.1.output.dense"].requires_grad
    words = model.bert.embeddings.word_embeddings
    snn.quantize(model, "embeddings.word_embeddings", dynamic=False)
    assert model.bert.embeddings.word_embeddings.padding_idx == words.padding_idx == toys.PAD


def test_a_copy_is_independent(inputs):
    model = toys.gpt2_lm()
    snn.quantize(model, "wte", dynamic=False)
    copied = copy.deepcopy(model)
    before = logits(model, inputs)
    snn.quantize(copied, "h.0.mlp.c_fc", dynamic=False)
    with torch.no_grad():
        copied.transformer.wte.matrices["weight"].scales.zero_()
    assert not copied.lm_head.dense().any()
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_found_and_named(bad):
    model = toys.bert_classifier()
    snn.check_finite(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = bad
    with pytest.raises(
        BadWeights, match=r"encoder\.layer\.1\.output\.dense: 1 of the 512 values of its weight"
    ):
        snn.check_finite(model)


def test_digest_sees_values_and_form():
    model = toys.bert_classifier()
    first = snn.weights_digest(model)
    assert snn.weights_digest(toys.bert_classifier()) == first
    snn.quantize(model, "classifier", dynamic=False)
    second = snn.weights_digest(model)
    assert second != first
    with torch.no_grad():
        model.classifier.weight.scales[0] *= 1.5
    assert snn.weights_digest(model) != second


def test_names_are_those_of_the_base_model():
    model = toys.bert_classifier()
    assert snn.relative(model, "bert.encoder.layer.0") == "encoder.layer.0"
    assert snn.relative(model, "classifier") == "classifier"
    assert snn.absolute(model, "encoder.layer.0") == "bert.encoder.layer.0"
    assert snn.absolute(model.bert, "encoder.layer.0") == "encoder.layer.0"
    assert snn.absolute(model, "nowhere") is None


def test_a_layer_that_computes_something_else_is_left_alone():
    model = toys.bert_classifier()

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.classifier = Scaled(16, 2)
    assert "classifier" not in snn.weights(model)


def test_a_model_that_another_library_quantized_is_refused():
    model = toys.bert_classifier()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModel, match="floating point"):
        snn.quantize(model, "classifier", dynamic=False)
