"""`MagnitudePrune`: which entries stay, and what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stackcomp as sc
from stackcomp import checkpoint, nn, ops
from stackcomp.core.errors import SettingError
from stackcomp.core.matrices import Free, MatrixSpec
from stackcomp.nn.support import encode
from tests import toys
from tests.passes.test_conformance import apply


@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 5))
def test_the_largest_stay(rows, cols, share, seed):
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    mask = ops.largest(matrix, share)
    assert mask.sum() == max(1, round(rows * cols * share))
    if not mask.all():
        assert matrix[mask].abs().min() >= matrix[~mask].abs().max()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 8), st.data())
def test_every_group_keeps_its_largest(rows, groups, group, data):
    kept = data.draw(st.integers(1, group))
    matrix = torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(rows))
    mask = ops.largest_in_groups(matrix, kept, group).unflatten(1, (groups, group))
    assert (mask.sum(-1) == kept).all()
    sizes = matrix.abs().unflatten(1, (groups, group))
    lowest = torch.where(mask, sizes, torch.inf).amin(-1)
    assert (torch.where(mask, -torch.inf, sizes).amax(-1) <= lowest).all()


def test_ties_go_to_the_first():
    assert ops.largest(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    assert ops.largest_in_groups(torch.ones(1, 4), 1, 2).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("sparsity", [0.75, "2:4", "1:8"])
def test_values_are_kept_exactly_and_the_file_shrinks_as_promised(sparsity, tmp_path):
    model = toys.bert_classifier()
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    apply(sc.MagnitudePrune(sparsity=sparsity, only="encoder.layer.*"), model, toys.tokenizer(), tmp_path)
    for id_, handle in nn.weights(model).items():
        if not id_.startswith("encoder"):
            continue
        found = handle.dense()
        assert torch.equal(found[found != 0], before[id_][found != 0])
        share = {0.75: 0.25, "2:4": 0.5, "1:8": 0.125}[sparsity]
        index_bits = {0.75: 1.0, "2:4": 0.66, "1:8": 0.38}[sparsity]
        assert int((found != 0).sum()) == round(found.numel() * share)
        assert handle.spec.total_bytes <= found.numel() * (4 * share + index_bits / 8) + 8


def test_a_group_that_does_not_divide_names_the_layer():
    with pytest.raises(SettingError, match=r"3 does not divide the 16 inputs of encoder\.layer\.0"):
        sc.check(sc.MagnitudePrune(sparsity="1:3", only="encoder.layer.*"), toys.bert_classifier())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.floats(0.05, 1.0))
def test_the_largest_blocks_stay_whole(down, across, rows, cols, share):
    matrix = torch.randn(down * rows, across * cols, generator=torch.Generator().manual_seed(rows))
    blocks = (
        ops.largest(matrix, share, (down, across)).unflatten(1, (cols, across)).unflatten(0, (rows, down))
    )
    kept = blocks.any(3).any(1)
    assert torch.equal(kept, blocks.all(3).all(1))
    assert kept.sum() == max(1, round(rows * cols * share))
    sizes = matrix.abs().unflatten(1, (cols, across)).unflatten(0, (rows, down)).mean((1, 3))
    assert kept.all() or sizes[kept].min() >= sizes[~kept].max()


@pytest.mark.parametrize("then", [None, sc.Int8Weights(), sc.LowBitWeights(bits=4), sc.FineTune(steps=2)])
def test_blocks_are_stored_with_a_bit_each_and_survive_what_follows(then, tmp_path):
    model, tokenizer = toys.bert_classifier(), toys.tokenizer()
    step = sc.MagnitudePrune(sparsity=0.75, block=(4, 2), only="encoder.layer.*")
    told = sc.sizes(sc.Pipeline(step, *([then] if then else [])), model)[-1]
    apply(step, model, tokenizer, tmp_path)
    masks = {id_: handle.dense() != 0 for id_, handle in nn.weights(model).items() if "encoder" in id_}
    if then:
        apply(then, model, tokenizer, tmp_path)
    for id_, mask in masks.items():
        handle = nn.weights(model)[id_]
        assert not (handle.dense()[~mask] != 0).any()
        matrix = handle.spec.matrices["weight"]
        assert (matrix.count, matrix.index_bytes) == (mask.numel() // 4, -(-mask.numel() // 64))
    checkpoint.save(model, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved")
    assert all(
        torch.equal(nn.weights(again)[id_].dense(), handle.dense())
        for id_, handle in nn.weights(model).items()
    )
    assert told.size_bytes == (tmp_path / "saved" / checkpoint.WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block": 4}, "block=4 is no shape"),
        ({"block": (0, 2)}, "block=0"),
        ({"block": (3, 2)}, r"block=\(3, 2\) does not divide the 16 x 16 of encoder\.layer\.0"),
        ({"block": (2, 2), "sparsity": "2:4"}, "does not go with sparsity='2:4'"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.check(sc.MagnitudePrune(**settings, only="encoder.layer.*"), toys.bert_classifier())


def test_a_block_of_a_damaged_description_is_refused():
    for block in ((2, 3), (0, 1), (2,)):
        with pytest.raises(SettingError, match="block="):
            MatrixSpec(rows=4, cols=4, layout=Free(nonzeros=4, block=block))
    mask = torch.eye(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="kept whole"):
        encode(Free(nonzeros=4, block=(2, 2)), mask)
