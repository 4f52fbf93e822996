"""`LowRank` and `DenseSparse` share their flow: budget, calibration, bias; what differs is which factors come out."""

from math import inf

import pytest
import torch

import stackcomp as sc
from stackcomp import data, layerwise, nn, ops
from stackcomp.core.errors import SettingError, UnreachableRatio
from stackcomp.manager import plan_of
from stackcomp.ops.whiten import Whitener
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"
BOTH = [sc.LowRank, sc.DenseSparse]


def bytes_of(model, ids):
    return sum(handle.spec.total_bytes for id_, handle in nn.weights(model).items() if id_ in ids)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("ratio", [1.2, 1.5, 2.5])
@pytest.mark.parametrize("data_aware", [True, False])
def test_the_ratio_is_kept_with_indices_counted(cls, ratio, data_aware, model, tokenizer, tmp_path):
    step = cls(ratio=ratio, only=BLOCKS, data_aware=data_aware)
    ids = plan_of(model).select(only=BLOCKS, skip=None)
    dense = bytes_of(model, ids)
    findings = apply(step, model, tokenizer, tmp_path)
    assert bytes_of(model, ids) <= dense / ratio
    assert bytes_of(model, ids) >= 0.7 * dense / ratio  # toy layers leave few choices
    assert set(findings["layers"]) == set(ids)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("ratio", [1.2, 2.0])
def test_the_ratio_can_count_values_as_a_later_pass_rounds_them(cls, ratio, tokenizer, tmp_path):
    """With a scale for every value, 4 bits are 20, whatever the shape."""
    model = toys.make("bert", "AutoModelForSequenceClassification", hidden_size=64, intermediate_size=128)
    ids = plan_of(model).select(only=BLOCKS, skip=None)
    entries = sum(nn.weights(model)[id_].spec.dense_count for id_ in ids)
    apply(cls(ratio=ratio, only=BLOCKS, value_bits=20, data_aware=False), model, tokenizer, tmp_path)
    apply(sc.LowBitWeights(bits=4, group=1, only=BLOCKS), model, tokenizer, tmp_path)
    assert 0.9 * 20 * entries / ratio <= 8 * bytes_of(model, ids) <= 20 * entries / ratio
    sparse = [id_ for id_ in ids if nn.weights(model)[id_].spec.matrices.get("coefficients")]
    assert sparse
    with pytest.raises(SettingError, match=r"value_bits=0"):
        cls(value_bits=0)


@pytest.mark.parametrize("cls", BOTH)
def test_a_ratio_out_of_reach_says_the_largest_before_any_weight_is_read(cls, model):
    with pytest.raises(UnreachableRatio, match=r"ratio=50 cannot be reached.*the largest is \d") as caught:
        sc.check(cls(ratio=50.0, only=BLOCKS), model)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    sc.check(cls(ratio=largest - 0.01, only=BLOCKS), model)


@pytest.mark.parametrize("cls", BOTH)
def test_the_largest_ratio_of_wide_layers_can_be_had(cls, tokenizer, tmp_path):
    """The candidates of wide layers end before rank 1."""
    model = toys.make("bert", num_hidden_layers=1, hidden_size=256, intermediate_size=512)
    with pytest.raises(UnreachableRatio) as caught:
        sc.check(cls(ratio=1000.0, only=BLOCKS), model)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    ids = plan_of(model).select(only=BLOCKS, skip=None)
    dense = bytes_of(model, ids)
    apply(cls(ratio=largest - 0.01, only=BLOCKS, data_aware=False), model, tokenizer, tmp_path)
    assert bytes_of(model, ids) <= dense / (largest - 0.01)


@pytest.mark.parametrize("cls", BOTH)
def test_the_largest_ratio_can_really_be_reached(cls, model, tokenizer, tmp_path):
    ids = plan_of(model).select(only=BLOCKS, skip=None)
    dense = bytes_of(model, ids)
    with pytest.raises(UnreachableRatio) as caught:
        sc.check(cls(ratio=50.0, only=BLOCKS), model)
    largest = float(str(caught.value).rsplit(" ", 1)[1]) - 0.01
    apply(cls(ratio=largest, only=BLOCKS), model, tokenizer, tmp_path)
    assert bytes_of(model, ids) <= dense / largest


@pytest.mark.parametrize("ratio", [0.5, 0, float("nan"), "2"])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(SettingError, match="ratio="):
        sc.DenseSparse(ratio=ratio)


def test_blocks_that_do_not_divide_name_the_layer(model):
    with pytest.raises(SettingError, match=r"blocks=5 does not divide the 16 columns of encoder\.layer\.0"):
        sc.check(sc.DenseSparse(blocks=5, only=BLOCKS), model)


@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_and_orientation_are_what_is_stored(orientation, blocks, tokenizer, tmp_path):
    model = toys.make("bert", "AutoModelForSequenceClassification", hidden_size=64, intermediate_size=128)
    apply(
        sc.DenseSparse(atoms=16, nonzeros=4, only=BLOCKS, orientation=orientation, blocks=blocks),
        model,
        tokenizer,
        tmp_path,
    )
    sparse = [
        handle
        for handle in nn.weights(model).values()
        if handle.spec.factored and handle.spec.matrices["coefficients"].layout.kind == "fixed"
    ]
    assert sparse
    for handle in sparse:
        assert handle.spec.transposed is (orientation == "columns")
        assert handle.modules[0].blocks == blocks


def test_low_rank_is_the_best_of_its_rank_on_the_outputs(model, tokenizer, tmp_path):
    """No other matrix of the same rank may give a smaller output error on the calibration text than the data-aware one."""
    id_ = "encoder.layer.0.intermediate.dense"
    task = toys.classification_task()
    text = data.Calibration(task.texts("train"), tokenizer, max_length=task.max_length)
    dense = nn.weights(model)[id_]
    moment = text.second_moments(model, {id_: dense.modules[0]})[id_]
    centred = moment.average - torch.outer(moment.mean, moment.mean)
    weight = dense.dense().clone()
    apply(
        sc.LowRank(ratio=1.7, only=id_, sensitivity=False, samples=1000, damping=1e-6),
        model,
        tokenizer,
        tmp_path,
    )
    handle = nn.weights(model)[id_]
    rank = handle.spec.matrices["basis"].rows
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]

    def error(other):
        difference = weight - other
        return float(torch.trace(difference @ centred @ difference.T))

    best = ops.rank_errors(weight, inputs=ops.whitener(centred, damping=1e-6))[rank]
    assert error(handle.dense()) == pytest.approx(float(best), rel=1e-2)
    assert error(handle.dense()) < error(plain)


def test_dense_sparse_is_never_worse_than_low_rank_of_as_many_bytes(tokenizer, tmp_path, monkeypatch):
    """A weight of few singular values, which sparse rows cannot follow, is stored as what it is, though sparse ones were expected to
    be better."""
    monkeypatch.setattr("stackcomp.passes.dense_sparse._interpolated", lambda gains, ratio: 0.01)
    id_ = "encoder.layer.0.intermediate.dense"
    settings = {"ratio": 2.0, "only": id_, "data_aware": False}

    def factorized(singular: int) -> tuple[str, float]:
        model = toys.make("bert", hidden_size=64, intermediate_size=128)
        drawn = torch.Generator().manual_seed(0)
        weight = nn.weights(model)[id_].modules[0].weight
        with torch.no_grad():
            weight.copy_(
                torch.randn(128, singular, generator=drawn) @ torch.randn(singular, 64, generator=drawn)
            )
        wanted = weight.detach().clone()
        findings = apply(sc.DenseSparse(**settings), model, tokenizer, tmp_path)
        left = float((nn.weights(model)[id_].dense() - wanted).norm() / wanted.norm())
        return findings["layers"][id_], left

    found, left = factorized(12)
    assert "rank" in found
    assert left < 1e-4
    assert "nonzeros" in factorized(64)[0]


def test_a_layer_may_be_as_small_as_its_errors_allow_where_they_reach_the_output(
    tokenizer, tmp_path, monkeypatch
):
    """A layer that hardly matters to the model's output is made much smaller where the metric is sharp, some where it tells at all, and
    little where errors are its own."""
    id_ = "encoder.layer.0.intermediate.dense"

    def smaller(**settings: object) -> float:
        model = toys.bert_classifier()
        with torch.no_grad():
            nn.weights(model)["encoder.layer.0.output.dense"].modules[0].weight.mul_(1e-3)
        findings = apply(sc.LowRank(ratio=2.0, only=BLOCKS, **settings), model, tokenizer, tmp_path)
        return float(findings["layers"][id_].rpartition(", ")[2].rstrip("x"))

    assert smaller() > 4.0
    assert smaller(spread=1.5) <= 3.0
    assert smaller(sensitivity=False) <= 2.6
    monkeypatch.setattr("stackcomp.layerwise.FEW_DIRECTIONS", 0.0)
    assert 2.6 < smaller() <= 4.0
    assert smaller(spread=100.0) > 4.0


@pytest.mark.parametrize(("ranks", "limit"), [((1, 2, 99), inf), ((1, 99, 99), 2.0), ((None, None), 1.3)])
def test_all_layers_of_a_model_have_the_limit_of_most(ranks, limit):
    """A layer whose gradients span many directions is as free as the rest of a classifier, and the other way round."""

    def layer(rank):
        size = torch.eye(2)
        metric = None if rank is None else Whitener(moment=size, root=size, damping=0.0, effective_rank=rank)
        return layerwise.Layer(weight=size, value_bytes=4, outputs=metric)

    assert layerwise._spread([layer(rank) for rank in ranks]) == limit


@pytest.mark.parametrize("cls", BOTH)
def test_a_layer_that_nothing_reads_has_no_share_of_the_budget(cls, tokenizer, tmp_path):
    """The pooler of an embedding model, and a layer whose outputs are multiplied by zeros, end at their smallest."""
    model = toys.make("bert", hidden_size=32, intermediate_size=64)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.zero_()
    told = apply(cls(ratio=2.0, spread=100.0, samples=64), model, tokenizer, tmp_path)["layers"]
    note = "; nothing that the model says depends on it"
    unread = {id_: words.removesuffix(note) for id_, words in told.items() if words.endswith(note)}
    assert set(unread) == {"pooler.dense", "encoder.layer.0.intermediate.dense"}
    for id_, words in unread.items():
        assert float(words.rpartition(" ")[2].removesuffix("x")) > 6, (id_, words)


def test_square_weights_take_one_basis_where_gradients_span_few_directions(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("stackcomp.passes.dense_sparse._interpolated", lambda gains, ratio: 0.01)
    id_ = "encoder.layer.0.attention.self.query"

    def shape(**settings: object) -> str:
        model = toys.make("bert", hidden_size=64, intermediate_size=128)
        step = sc.DenseSparse(ratio=1.6, only=id_, sweeps=1, value_bits=32, **settings)
        return apply(step, model, tokenizer, tmp_path)["layers"][id_]

    assert "'blocks': 1" in shape()
    assert "'blocks': 2" in shape(blocks=2)
    assert "'blocks': 4" in shape(sensitivity=False)
    monkeypatch.setattr("stackcomp.layerwise.FEW_DIRECTIONS", 0.0)
    assert "'blocks': 4" in shape()


def test_the_bias_takes_up_the_mean_error(model, tokenizer, tmp_path):
    """On the calibration text the mean output of a compressed layer is that of the dense one."""
    id_ = "encoder.layer.0.intermediate.dense"
    task = toys.classification_task()
    text = data.Calibration(task.texts("train"), tokenizer, max_length=task.max_length)
    before = nn.weights(model)[id_]
    mean = text.second_moments(model, {id_: before.modules[0]})[id_].mean
    wanted = before.dense() @ mean + before.modules[0].bias.detach()
    apply(sc.LowRank(ratio=2.0, only=id_, samples=1000), model, tokenizer, tmp_path)
    after = nn.weights(model)[id_]
    torch.testing.assert_close(
        after.dense() @ mean + after.modules[0].bias.detach(), wanted, atol=1e-4, rtol=1e-4
    )


def test_data_aware_beats_plain_on_the_model_output(tokenizer, tmp_path):
    errors = {}
    batch = toys.batch(tokenizer)
    for aware in (True, False):
        model = toys.bert_classifier()
        with torch.no_grad():
            wanted = model(**batch).logits
            apply(sc.DenseSparse(ratio=1.5, only=BLOCKS, data_aware=aware), model, tokenizer, tmp_path)
            errors[aware] = float((model(**batch).logits - wanted).square().sum())
    assert errors[True] < errors[False]


def test_a_layer_too_small_to_gain_is_left_dense_and_the_findings_say_so(model, tokenizer, tmp_path):
    findings = apply(sc.LowRank(ratio=1.3, only=(BLOCKS, "classifier")), model, tokenizer, tmp_path)
    assert "too small to gain" in findings["layers"]["classifier"]
    assert not nn.weights(model)["classifier"].spec.factored


@pytest.mark.parametrize(("groups", "nonzeros"), [(1, 2), (2, 1), (4, 1)])
def test_the_papers_shape_can_be_asked_for(groups, nonzeros, tokenizer, tmp_path):
    model = toys.make("bert", "AutoModelForSequenceClassification", hidden_size=32, intermediate_size=64)
    step = sc.DenseSparse(
        atoms=8, nonzeros=nonzeros, groups=groups, blocks=4, only=BLOCKS, data_aware=False, sweeps=1
    )
    findings = apply(step, model, tokenizer, tmp_path)
    for id_ in plan_of(model).select(only=BLOCKS, skip=None):
        matrix = nn.weights(model)[id_].matrices["coefficients"]
        assert (matrix.spec.layout.block, matrix.spec.layout.nonzeros) == (8 // groups, nonzeros)
        kept = matrix.mask().unflatten(1, (-1, 8 // groups)).sum(-1)
        assert (kept == nonzeros).all()
        assert "'atoms': 8" in findings["layers"][id_]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"atoms": 8}, "atoms=8, nonzeros=None: give both"),
        ({"atoms": 8, "nonzeros": 2, "ratio": 1.0}, "atoms=8 does not go with ratio=1.0"),
        ({"atoms": 4, "nonzeros": 5}, "nonzeros=5"),
        ({"atoms": 4, "nonzeros": 0}, "nonzeros=0"),
        ({"groups": 2}, "groups=2 needs a shape"),
        ({"atoms": 8, "nonzeros": 1, "groups": 3}, "groups=3 does not divide atoms=8"),
        ({"atoms": 8, "nonzeros": 3, "groups": 4}, "nonzeros=3"),
        ({"atoms": 33, "nonzeros": 2}, r"atoms=33 exceeds the 16 rows .*encoder\.layer\.0"),
    ],
)
def test_a_shape_out_of_range_is_refused_before_any_weight_is_read(settings, said, model):
    with pytest.raises(SettingError, match=said):
        sc.check(sc.DenseSparse(only=BLOCKS, data_aware=False, **settings), model)


def test_inputs_that_span_too_little_are_damped_visibly(model, tokenizer, tmp_path, monkeypatch):
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.zero_()  # every token the same: a moment of rank one
    monkeypatch.setattr(ops.whiten, "ATTEMPTS", 12)
    step = sc.LowRank(ratio=1.3, only="encoder.layer.0.attention.self.*", damping=1e-12)
    findings = apply(step, model, tokenizer, tmp_path)
    assert any("damping raised to" in said for said in findings["layers"].values())
