"""`QuantizationAware`: what runs in training is what is stored, for every stored form; gradients pass straight through."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn, training
from stackcomp.core.context import Context, quiet
from stackcomp.core.contract import legal
from stackcomp.core.errors import PipelineRefused, SettingError
from stackcomp.core.matrices import ROUNDED
from stackcomp.manager import plan_of
from tests import toys
from tests.nn.rounding import to_int8
from tests.passes.test_conformance import apply, manager

BLOCKS = "encoder.layer.*"
WORDS = "embeddings.word_embeddings"
WIDTHS = [(8, None), (4, 8), (3, 7), (2, 8), (1.6, 8), (1, 7)]
FIRST = [
    None,
    sc.DenseSparse(ratio=1.3, only=BLOCKS),
    sc.DenseSparse(ratio=1.3, only=BLOCKS, orientation="columns"),
    sc.LowRank(ratio=1.3, only=BLOCKS),
    sc.MagnitudePrune(sparsity=0.6, only=BLOCKS),
    sc.MagnitudePrune(sparsity="2:4", only=BLOCKS),
]
QUICK = {"steps": 6, "epochs": 9, "batch_size": 4, "only": BLOCKS, "every": 2, "learning_rate": 1e-2}
LAYER = "encoder.layer.0.output.dense"


@cache
def compressed(first):
    """The toy, compressed by `first`; not to be changed."""
    model = toys.bert_classifier()
    if first is not None:
        with TemporaryDirectory() as scratch:
            apply(first, model, toys.tokenizer(), Path(scratch))
    return model


def begun(first):
    """A toy of one's own, compressed by `first`, and the weights that are to be rounded."""
    model = deepcopy(compressed(first))
    return model, plan_of(model).select(only=(BLOCKS, WORDS), skip=None)


def plain_rounding(bits, group, only):
    return (
        sc.Int8Weights(only=only) if bits == 8 else sc.LowBitWeights(bits=bits, group=group or 32, only=only)
    )


def drift(matrices):
    """Move all values as training would."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in matrices:
            moved = torch.randn(matrix.values.shape, generator=chance).to(matrix.values.dtype)
            matrix.values += 0.3 * matrix.values.std() * moved


@pytest.mark.parametrize(("bits", "group"), WIDTHS)
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_what_runs_in_training_is_what_is_stored(first, bits, group, tokenizer, tmp_path):
    model, ids = begun(first)
    batch = toys.batch(tokenizer)
    with torch.no_grad(), training.rounded(model, ids, coding=ROUNDED[bits], group=group) as matrices:
        drift(matrices)
        stale = model(**batch).logits
        for matrix in matrices:
            matrix.refit()
        drift(matrices)
        trained = {id_: nn.weights(model)[id_].dense().clone() for id_ in ids}
        logits = model(**batch).logits
    assert (stale - logits).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-6)
    for id_, weight in trained.items():
        torch.testing.assert_close(nn.weights(model)[id_].dense(), weight, rtol=1e-6, atol=1e-7)
    checkpoint.save(model, tmp_path / "saved")
    reloaded = checkpoint.load(tmp_path / "saved")
    assert torch.equal(reloaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("bits", "group"), WIDTHS)
@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_is_plain_rounding(first, bits, group, dtype, tokenizer, tmp_path):
    model, ids = begun(first)
    other, _ = begun(first)
    model, other = model.to(dtype), other.to(dtype)
    with training.rounded(model, ids, coding=ROUNDED[bits], group=group):
        pass
    apply(plain_rounding(bits, group, (BLOCKS, WORDS)), other, tokenizer, tmp_path)
    assert nn.weights_digest(model) == nn.weights_digest(other)


@pytest.mark.parametrize(("bits", "group"), WIDTHS)
@pytest.mark.parametrize("make", [toys.bert_classifier, toys.gpt2_lm])
def test_the_gradient_passes_straight_through(make, bits, group, tokenizer):
    model, batch = make(), toys.batch(tokenizer)
    id_ = LAYER if make is toys.bert_classifier else "h.1.mlp.c_fc"
    with training.rounded(model, [id_], coding=ROUNDED[bits], group=group) as (matrix,):
        model(**batch).logits.square().sum().backward()
        found, rounded = matrix.values.grad, matrix.dense().detach()
    plain = make()
    handle = nn.weights(plain)[id_]
    assert (rounded - handle.dense()).abs().max() > 1e-3
    with torch.no_grad():
        handle.parameter.copy_(handle.oriented(rounded))
    plain(**batch).logits.square().sum().backward()
    torch.testing.assert_close(found, handle.oriented(handle.parameter.grad))


@pytest.mark.parametrize(("bits", "group"), WIDTHS)
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_scales_follow_values_that_move(first, bits, group):
    model, ids = begun(first)

    def error():
        return float((matrix.values.flatten() - matrix._flat()).square().sum().detach())

    with training.rounded(model, ids, coding=ROUNDED[bits], group=group) as matrices:
        with torch.no_grad():
            for matrix in matrices:
                matrix.values *= 1.5
        for matrix in matrices:
            before = error()
            matrix.refit()
            assert error() < before
            if bits == 8:  # as if it had been rounded now
                steps = matrix.steps.clone()
                again = to_int8(
                    nn.storing.store(
                        matrix.values.new_zeros(matrix.shape).masked_scatter(matrix.mask(), matrix.values),
                        matrix.spec.layout,
                        matrix.mask(),
                    ),
                    axis=matrix._form_to_be.scale_axis,
                    dynamic=False,
                )
                assert torch.equal(again.scales, steps)


@pytest.mark.parametrize("coding", ["ternary", "binary"])
def test_scales_follow_values_that_have_all_come_to_round_to_zero(coding):
    with training.rounded(toys.bert_classifier(), [LAYER], coding=coding, group=8) as (matrix,):
        with torch.no_grad():
            matrix.values *= 0.01
        matrix.refit()
        error = matrix.values.flatten() - matrix._flat()
        assert error.norm() < 0.7 * matrix.values.norm()


@pytest.mark.parametrize(("bits", "group"), [(8, None), (3, 7), (1.6, 7), (1, 8)])
@pytest.mark.parametrize("first", [FIRST[0], FIRST[2], FIRST[4]], ids=str)
def test_it_trains_and_leaves_the_bytes_of_plain_rounding(first, bits, group, tokenizer, tmp_path):
    sizes = {}
    for step in (sc.QuantizationAware(bits=bits, group=group, **QUICK), plain_rounding(bits, group, BLOCKS)):
        model, _ = begun(first)
        before = {id_: handle.spec for id_, handle in nn.weights(model).items()}
        start = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
        apply_to(model, step, tokenizer, tmp_path / step.slug)
        checkpoint.save(model, tmp_path / f"saved-{step.slug}")
        sizes[step.slug] = checkpoint.components(tmp_path / f"saved-{step.slug}")
        for id_, handle in nn.weights(model).items():
            if id_.startswith("encoder"):
                assert all(ROUNDED[bits] in words for words in handle.spec.parts().values())
                for part, matrix in handle.spec.matrices.items():
                    assert matrix.layout == before[id_].matrices[part].layout
            elif isinstance(step, sc.QuantizationAware) and id_ == "classifier":
                assert not torch.equal(handle.dense(), start[id_])
    assert sizes["quantization-aware"] == sizes[plain_rounding(bits, group, BLOCKS).slug]


def apply_to(model, step, tokenizer, scratch, progress=None):
    task = toys.classification_task()
    scratch.mkdir(exist_ok=True)
    context = Context(
        targets=plan_of(model).select(only=step.only, skip=None),
        seed=0,
        scratch=scratch,
        task=task,
        tokenizer=tokenizer,
        teacher=toys.bert_classifier,
        **({"progress": progress} if progress else {}),
    )
    return step.apply(model, context)


@pytest.mark.parametrize("bits", [2, 1.6, 1])
def test_training_makes_up_for_rounding(bits, tokenizer, tmp_path):
    """Its model is nearer to the one that came than the rounded one that was trained no further."""
    batch, wanted = toys.batch(tokenizer), toys.bert_classifier()
    found = {}
    for step in (
        sc.QuantizationAware(
            bits=bits,
            group=8,
            **(QUICK | {"steps": 120, "epochs": 30, "batch_size": 8, "learning_rate": 3e-3}),
        ),
        plain_rounding(bits, 8, BLOCKS),
    ):
        model = toys.bert_classifier()
        apply_to(model, step, tokenizer, tmp_path / step.slug)
        with torch.no_grad():
            found[step.slug] = float((model(**batch).logits - wanted(**batch).logits).square().mean())
    assert found["quantization-aware"] < 0.3 * found["low-bit-weights"]


@pytest.mark.parametrize(("bits", "at"), [(1.6, [1, 2, 3, 4, 5, 6, 7]), (1, [3, 6]), (8, [3, 6])])
def test_ternary_scales_are_found_at_every_step_and_others_where_it_is_asked(
    bits, at, tokenizer, tmp_path, monkeypatch
):
    steps, fitted = [], []
    before, refit = sc.QuantizationAware._train, nn.RoundedMatrix.refit

    def noting(self, model, context, loss, on_step):
        def each(step):
            steps.append(step)
            on_step(step)

        return before(self, model, context, loss, each)

    monkeypatch.setattr(sc.QuantizationAware, "_train", noting)
    monkeypatch.setattr(nn.RoundedMatrix, "refit", lambda matrix: (fitted.append(steps[-1]), refit(matrix)))
    step = sc.QuantizationAware(bits=bits, **(QUICK | {"steps": 8, "every": 3, "only": LAYER}))
    apply_to(toys.bert_classifier(), step, tokenizer, tmp_path)
    assert steps == list(range(8))
    assert fitted == at


def test_a_model_of_16_bits_learns_as_many_codes_as_one_of_32(tokenizer, tmp_path):
    settings = {"epochs": 5, "batch_size": 8, "learning_rate": 2e-4, "bf16": False, "distill": False}
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        model = toys.bert_classifier().to(torch.bfloat16).to(dtype)
        passes = (sc.LowBitWeights(bits=4), sc.QuantizationAware(bits=4, **settings))
        plain, learned = (
            nn.weights(manager(tmp_path / f"{dtype}{item.name}", tokenizer).run(model, item).model)
            for item in passes
        )
        moved.append(
            sum(
                int((plain[id_].matrices["weight"].values != handle.matrices["weight"].values).sum())
                for id_, handle in learned.items()
                if handle.matrices["weight"].spec.packed
            )
        )
    assert moved[1] > 0.8 * moved[0] > 20


@pytest.mark.parametrize(("bits", "stop"), [(8, 7), (2, 4), (2, 11), (1.6, 7)])
def test_a_killed_run_resumes_to_the_same_weights(stop, bits, tokenizer, tmp_path):
    step = sc.QuantizationAware(bits=bits, **(QUICK | {"steps": 12}), save_every=3)

    def run(scratch, progress):
        model = toys.bert_classifier()
        apply(sc.DenseSparse(ratio=1.3, only=BLOCKS), model, tokenizer, tmp_path)
        return apply_to(model, step, tokenizer, scratch, progress), nn.weights_digest(model)

    _, wanted = run(tmp_path / "whole", quiet)
    with pytest.raises(toys.Killed):
        run(tmp_path / "killed", toys.killing(stop))
    report, found = run(tmp_path / "killed", quiet)
    assert report["resumed_step"] == (stop - 1) // 3 * 3
    assert found == wanted


def test_a_failure_leaves_stored_weights(tokenizer):
    model = toys.bert_classifier()
    with pytest.raises(toys.Killed), training.rounded(model, [LAYER], coding="int4", group=8):
        raise toys.Killed
    assert not [module for module in model.modules() if isinstance(module, nn.RoundedMatrix)]
    assert nn.weights(model)[LAYER].spec.matrices["weight"].coding == "int4"


def test_tied_weights_learn_as_one(tokenizer, tmp_path):
    model = toys.gpt2_lm()
    with training.rounded(model, ["wte"], coding="int4", group=8) as (matrix,):
        model(**toys.batch(tokenizer)).logits.sum().backward()
        assert matrix.values.grad is not None
    (words,) = [handle for handle in nn.weights(model).values() if "lm_head" in handle.spec.paths]
    assert set(words.spec.paths) == {"wte", "lm_head"}
    assert words.spec.matrices["weight"].coding == "int4"


def test_it_runs_behind_all_that_leaves_floats(tokenizer, tmp_path):
    model = toys.bert_classifier()
    step = sc.QuantizationAware(bits=4, group=8, steps=2, batch_size=4, only=BLOCKS)
    for first in (*FIRST[1:], sc.Pipeline(sc.DenseSparse(only=BLOCKS), sc.STF(only=BLOCKS))):
        sc.check(sc.Pipeline(first, step), model)
    sc.check(sc.Pipeline(step, sc.Int8Weights(only="classifier")), model)
    for after in (sc.Int8Weights(only=BLOCKS), step, sc.DenseSparse(only=BLOCKS)):
        assert not legal((step, after), plan_of(model))
    with pytest.raises(PipelineRefused, match="requires 'float'"):
        sc.check(sc.Pipeline(sc.LowBitWeights(only=BLOCKS), step), model)
    result = manager(tmp_path / "out", tokenizer).run(model, sc.Pipeline(FIRST[1], step))
    assert result.ledger.rows[-1].layer_bytes < result.ledger.rows[0].layer_bytes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group": 0}, "group=0"),
        ({"bits": 8, "group": 32}, "group=32 does not go with bits=8"),
        ({"every": 0}, "every=0"),
        ({"temperature": 0.0}, "temperature="),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.QuantizationAware(**settings)
