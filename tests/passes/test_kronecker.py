"""`Kronecker` against sums of `np.kron`, and what may follow it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import PipelineRefused, SettingError, UnreachableRatio, UnsupportedModel
from stackcomp.core.matrices import MatrixSpec
from stackcomp.core.spec import WeightSpec
from tests import toys
from tests.passes.test_conformance import apply, manager

ID = "encoder.layer.1.intermediate.dense"  # 32 x 16
BLOCKS = "encoder.layer.*"
WORDS = "embeddings.word_embeddings"


def nearest(weight, tile, terms):
    """The nearest sum of Kronecker products, tile by tile."""
    (c, d), (n, m) = tile, weight.shape
    rows = [weight[i : i + c, j : j + d].flatten() for i in range(0, n, c) for j in range(0, m, d)]
    u, s, v = np.linalg.svd(torch.stack(rows).double().numpy(), full_matrices=False)
    sides = zip(u.T[:terms], s[:terms], v[:terms], strict=True)
    return sum(np.kron(sigma * a.reshape(n // c, m // d), b.reshape(c, d)) for a, sigma, b in sides)


def put(model, weight):
    """Put a weight in the place of the one at ID."""
    with torch.no_grad():
        nn.weights(model)[ID].parameter.copy_(weight)


@pytest.mark.parametrize(("tile", "terms"), [((4, 2), 3), ((2, 16), 5), ((32, 1), 5), ((8, 1), 3)])
def test_weights_are_those_of_the_formula(tile, terms, model, tokenizer, tmp_path):
    weight = nn.weights(model)[ID].dense().clone()
    findings = apply(sc.Kronecker(ratio=2.0, tile=tile, only=ID), model, tokenizer, tmp_path)
    assert findings == {"layers": {ID: f"{terms} terms, tiles of {tile[0]} x {tile[1]}"}}
    handle = nn.weights(model)[ID]
    np.testing.assert_allclose(handle.dense(), nearest(weight, tile, terms), rtol=1e-4, atol=1e-5)
    assert handle.spec.total_bytes == 4 * terms * (32 * 16 // np.prod(tile) + np.prod(tile))


@pytest.mark.parametrize("tile", [None, (2, 16)])
def test_a_weight_that_is_such_a_sum_is_kept(tile, model, tokenizer, tmp_path):
    weight = torch.kron(torch.randn(16, 1), torch.randn(2, 16)) + torch.kron(
        torch.randn(16, 1), torch.randn(2, 16)
    )
    put(model, weight)
    findings = apply(sc.Kronecker(ratio=3.0, tile=tile, only=ID), model, tokenizer, tmp_path)
    assert findings["layers"][ID].endswith("tiles of 2 x 16")
    torch.testing.assert_close(nn.weights(model)[ID].dense(), weight, rtol=1e-4, atol=1e-4)


def test_no_other_tile_of_those_tried_does_better(model, tokenizer, tmp_path):
    weight = nn.weights(model)[ID].dense().clone()
    apply(sc.Kronecker(ratio=2.5, only=ID), model, tokenizer, tmp_path)
    error = float((nn.weights(model)[ID].dense() - weight).square().sum())
    tried = [(c, d) for c in (2, 4, 8, 16) for d in (1, 16)] + [(c, d) for c in (1, 32) for d in (2, 4, 8)]
    others = {}
    for tile in tried:
        terms = int(512 / (2.5 * (512 // np.prod(tile) + np.prod(tile))))
        if terms:
            others[tile] = float(np.square(weight.numpy() - nearest(weight, tile, terms)).sum())
    assert len(others) > 6
    assert error == pytest.approx(min(others.values()), rel=1e-4)
    assert error < 0.9 * max(others.values())


@given(
    rows=st.integers(1, 48),
    cols=st.integers(1, 48),
    ratio=st.floats(1.01, 20.0),
    bits=st.sampled_from([16, 32]),
)
def test_every_way_keeps_the_ratio_and_one_term_more_would_not(rows, cols, ratio, bits):
    coding = {16: "bfloat16", 32: "float32"}[bits]
    whole = MatrixSpec(rows=rows, cols=cols, coding=coding)
    spec = WeightSpec(id="w", kind="linear", rows=rows, cols=cols, paths=("w",), matrices={"weight": whole})
    for way in sc.Kronecker(ratio=ratio).stores(spec):
        if way == spec:
            continue
        assert way.tile not in ((1, cols), (rows, 1))
        assert rows % way.tile[0] == cols % way.tile[1] == 0
        assert way.total_bytes * ratio <= spec.total_bytes * (1 + 1e-9)
        terms = way.matrices["basis"].rows
        assert way.total_bytes / terms * (terms + 1) * ratio >= spec.total_bytes * (1 - 1e-9)


@pytest.mark.parametrize("then", [None, sc.LowBitWeights(bits=3, group=8), sc.MagnitudePrune(sparsity=0.3)])
def test_sizes_of_a_given_tile_are_exact(then, tmp_path):
    model = toys.classifier("bert", hidden_size=64, intermediate_size=128)
    pipeline = sc.Pipeline(sc.Kronecker(ratio=3.0, tile=(2, 8)), *([then] if then else []))
    told = sc.sizes(pipeline, model)
    assert not told[-1].reasons
    rows = manager(tmp_path / "out", toys.tokenizer()).run(model, pipeline).ledger.rows
    assert [size.size_bytes for size in told] == [row.size_bytes for row in rows]
    assert "the tile of the least error" in sc.sizes(sc.Kronecker(), model)[-1].reasons[0]


@pytest.mark.parametrize(
    ("then", "far"),
    [
        (sc.Int8Weights(), 0.02),
        (sc.LowBitWeights(bits=4, group=4), 0.2),
        (sc.NF4(group=4), 0.2),
        (sc.ClusterWeights(bits=4), 0.2),
        (sc.MagnitudePrune(sparsity=0.1), 0.2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_values_are_rounded_and_pruned_side_by_side(then, far, model, tokenizer, tmp_path):
    apply(sc.Kronecker(ratio=1.5), model, tokenizer, tmp_path)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    apply(then, model, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        if handle.spec.tile:
            moved = (handle.dense() - before[id_]).norm() / before[id_].norm()
            assert 0 < moved < far, id_
    assert sum(handle.spec.tile is not None for handle in nn.weights(model).values()) == 14


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_trains_and_reloads(family, tokenizer, tmp_path):
    model = toys.classifier(family)
    blocks = sc.core.families.FAMILIES[family].blocks
    apply(sc.Kronecker(ratio=1.5, only=blocks), model, tokenizer, tmp_path)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items() if handle.spec.tile}
    for step in (sc.FineTune(steps=2, batch_size=4), sc.LowBitWeights(group=4, only=blocks)):
        apply(step, model, tokenizer, tmp_path)
    found = nn.weights(model)
    assert all(not torch.equal(found[id_].dense(), weight) for id_, weight in before.items())
    checkpoint.save(model.eval(), tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def test_a_tied_embedding_is_one_sum_for_both(tokenizer, tmp_path):
    model = toys.gpt2_lm()
    weight = nn.weights(model)["wte"].dense().clone()
    rows = len(weight)
    tile = (max(c for c in range(1, rows) if rows % c == 0), 4)
    apply(sc.Kronecker(ratio=1.2, tile=tile, only="wte"), model, tokenizer, tmp_path)
    found = nn.weights(model)["wte"]
    assert set(found.spec.paths) == {"wte", "lm_head"}
    np.testing.assert_allclose(
        found.dense(), nearest(weight, tile, found.spec.matrices["basis"].rows), rtol=1e-4, atol=1e-5
    )
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)
    with pytest.raises(UnsupportedModel, match="Kronecker products, are not stored side by side"):
        nn.keep_words(model, range(10))


def test_small_layers_are_left_dense(model, tokenizer, tmp_path):
    findings = apply(sc.Kronecker(ratio=5.0), model, tokenizer, tmp_path)
    assert findings["layers"]["classifier"] == "left dense: too small to gain"
    assert not nn.weights(model)["classifier"].spec.factored
    assert nn.weights(model)[ID].spec.tile


@pytest.mark.parametrize(
    "then",
    [sc.GPTQ(), sc.Wanda(), sc.SparseGPT(), sc.Int8Dynamic(), sc.PruneVocabulary()],
    ids=lambda step: step.name,
)
def test_what_works_on_products_of_vectors_is_refused(then):
    first = sc.Kronecker(ratio=1.5, tile=(1, 2), only=(BLOCKS, WORDS))
    with pytest.raises(PipelineRefused, match=r"forbids 'kronecker'.*since step 1, Kronecker, brought it"):
        sc.check(sc.Pipeline(first, then), toys.bert_classifier())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tile": (3, 2)}, r"tile=\(3, 2\) does not divide the 16 x 16 of encoder\.layer\.0.*skip="),
        ({"tile": (2, 5)}, r"tile=\(2, 5\) does not divide the 16 x 16 of encoder\.layer\.0"),
        ({"tile": (2, 2, 2)}, r"tile=\(2, 2, 2\) is no shape"),
        ({"tile": 4}, r"tile=4 is no shape"),
        ({"tile": (0, 4)}, r"tile=0"),
        ({"tile": (2.0, 4)}, r"tile=2\.0"),
        ({"ratio": 0.5}, r"ratio=0\.5"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_compute(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.check(sc.Kronecker(**settings, only=BLOCKS), toys.bert_classifier())


@pytest.mark.parametrize(("tile", "largest"), [(None, r"10\.66"), ((1, 1), r"0\.99"), ((2, 2), r"3\.87")])
def test_a_ratio_out_of_reach_says_the_largest(tile, largest):
    with pytest.raises(UnreachableRatio, match=rf"ratio=50 leaves no term.*the largest is {largest}$"):
        sc.check(sc.Kronecker(ratio=50.0, tile=tile, only=BLOCKS), toys.bert_classifier())


def test_a_list_is_a_tile():
    assert hash(sc.Kronecker(tile=[2, 4])) == hash(sc.Kronecker(tile=(2, 4)))
