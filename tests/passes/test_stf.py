"""`STF`: gradients pass straight through, supports move when the weight does, and what is exported is what was trained."""

from dataclasses import replace

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn, ops, training
from stackcomp.core.context import Context, quiet
from stackcomp.core.errors import NothingToCompress, PipelineRefused, SettingError
from stackcomp.manager import plan_of
from stackcomp.nn import CompressedLayer
from stackcomp.ops import Factorizer, dense_sparse
from stackcomp.training.straight_through import Latent, LatentLinear, Start
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"
START = sc.DenseSparse(ratio=1.6, only=BLOCKS, blocks=1, sensitivity=False, spread=100.0)
QUICK = {"steps": 6, "epochs": 9, "batch_size": 4, "only": BLOCKS}


def noise(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factorized(tokenizer, tmp_path):
    """A model whose first layers are dense-sparse, and their ids."""
    model = toys.bert_classifier()
    apply(START, model, tokenizer, tmp_path)
    ids = [id_ for id_, handle in nn.weights(model).items() if training.projects(handle)]
    assert ids
    return model, ids


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_projection_is_the_factorizers_and_in_between_the_weight_moves(transposed, blocks):
    factors = dense_sparse(noise(24, 16), atoms=6, nonzeros=2, blocks=blocks, transposed=transposed)
    latent = Latent(factors)
    torch.testing.assert_close(latent(), factors.product())
    with torch.no_grad():
        latent.weight += 0.1 * noise(24, 16, 1)
    torch.testing.assert_close(latent(), factors.product() + 0.1 * noise(24, 16, 1))
    latent.project()
    torch.testing.assert_close(latent(), latent.factors().product())


def test_the_gradient_passes_straight_through():
    latent = Latent(dense_sparse(noise(24, 16), atoms=6, nonzeros=2))
    with torch.no_grad():
        latent.weight += 0.1 * noise(24, 16, 1)
    latent.project()
    wanted = noise(24, 16, 2)
    (latent() * wanted).sum().backward()
    assert torch.equal(latent.weight.grad, wanted)


def test_the_support_follows_a_weight_that_moves_far_and_stays_when_it_does_not():
    factors = dense_sparse(noise(48, 16), atoms=8, nonzeros=2, sweeps=10)
    latent = Latent(factors)
    assert latent.project() == 0.0
    with torch.no_grad():
        latent.weight.copy_(noise(48, 16, 9))
    assert latent.project() > 0.2
    first = left_out(latent)
    for _ in range(8):
        latent.project()
    assert left_out(latent) < first


def test_a_latent_that_starts_dense_moves_the_support_before_anything_has_trained():
    weight = noise(48, 16)
    factors = dense_sparse(weight, atoms=8, nonzeros=2, sweeps=1)
    latent = Latent(factors, Start(dense=weight))
    torch.testing.assert_close(latent(), factors.product())
    assert torch.equal(latent.weight.detach(), weight)
    before = left_out(latent)
    assert latent.project() > 0.02
    assert left_out(latent) < before


def test_the_bias_takes_up_the_mean_of_what_a_projection_changes():
    weight, inputs = noise(24, 16), noise(500, 16, 1) + 3.0
    mean = inputs.mean(0)
    metric = ops.whitener((inputs - mean).T @ (inputs - mean) / 500, damping=1e-4)
    start = Start(inputs=metric, mean=mean, dense=weight)
    latent = Latent(dense_sparse(weight, atoms=6, nonzeros=2, sweeps=1), start)
    layer = LatentLinear(latent, torch.nn.Parameter(torch.ones(24)))
    before = layer(mean).detach()
    latent.project()
    assert float((latent().detach() @ mean + 1.0 - before).abs().max()) > 0.1
    torch.testing.assert_close(layer(mean).detach(), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(layer.bias, torch.ones(24))
    assert [name for name, _ in latent.named_parameters()] == ["weight"]


def test_a_projection_is_in_the_metric_of_gradients_where_there_is_one(tokenizer, tmp_path, monkeypatch):
    starts: dict[bool, dict[str, Start]] = {}

    def keep(step, found):
        starts[step.sensitivity] = found
        raise toys.Killed

    for sensitivity in (False, True):
        model = toys.bert_classifier()
        apply(START, model, tokenizer, tmp_path)
        step = sc.STF(**QUICK, latent="dense", sensitivity=sensitivity)
        monkeypatch.setattr(training, "straightened", lambda _, found, step=step: keep(step, found))
        with pytest.raises(toys.Killed):
            apply_to(model, step, tokenizer, tmp_path / f"scratch-{sensitivity}")
    assert all(start.inputs and start.outputs is None for start in starts[False].values())
    assert all(start.inputs and start.outputs for start in starts[True].values())

    id_, start = next(iter(starts[True].items()))
    weight = start.dense
    metrics = {"inputs": start.inputs, "outputs": start.outputs}
    factors = dense_sparse(weight, atoms=6, nonzeros=2, sweeps=1, inputs=start.inputs)
    errors = {}
    for sensitivity, found in starts.items():
        latent = Latent(factors, found[id_])
        for _ in range(3):
            latent.project()
        errors[sensitivity] = ops.metric_error((weight - latent()).detach(), **metrics)
    assert errors[True] < 0.95 * errors[False]


def left_out(latent: Latent) -> float:
    """The squared error of the last projection."""
    return float((latent() - latent.weight).square().sum().detach())


def test_a_warm_start_goes_on_where_it_was():
    weight = noise(40, 16)
    shape = {"atoms": 8, "nonzeros": 3}
    start = dense_sparse(weight, **shape, sweeps=3)
    went_on = Factorizer(weight, **shape, start=start)
    torch.testing.assert_close(went_on.product(), start.product())
    for _ in range(3):
        went_on.sweep()
    error = (weight - went_on.product()).square().sum()
    assert error < (weight - start.product()).square().sum()


def apply_to(model, step, tokenizer, scratch, progress=None):
    task = toys.classification_task()
    context = Context(
        targets=plan_of(model).select(only=step.only, skip=None),
        seed=0,
        scratch=scratch,
        task=task,
        tokenizer=tokenizer,
        teacher=toys.bert_classifier,
        calibration=lambda count: task.texts("train", count),
        **({"progress": progress} if progress else {}),
    )
    return step.apply(model, context)


def test_what_it_leaves_is_plain_factors_of_the_same_bytes_and_reloads(factorized, tokenizer, tmp_path):
    model, ids = factorized
    before = {id_: handle.spec for id_, handle in nn.weights(model).items()}
    masks = {id_: support(model, id_) for id_ in ids}
    found = apply_to(model, sc.STF(**QUICK, every=1, learning_rate=0.05), tokenizer, tmp_path / "scratch")
    assert {id_: handle.spec for id_, handle in nn.weights(model).items()} == before
    assert any((masks[id_] != support(model, id_)).any() for id_ in ids)
    assert max(found["changed"]) > 0
    model.eval()
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def test_factors_are_polished_after_the_last_projection_alone(factorized, tokenizer, tmp_path, monkeypatch):
    model, ids = factorized
    done = []
    for name in ("sweep", "polish"):
        real = getattr(Factorizer, name)

        def noted(self, *args, name=name, real=real, **settings):
            done.append(name)
            return real(self, *args, **settings)

        monkeypatch.setattr(Factorizer, name, noted)
    found = apply_to(model, sc.STF(**QUICK, every=1), tokenizer, tmp_path / "scratch")
    assert done == ["sweep"] * (len(found["changed"]) - 1) * len(ids) + ["sweep", "polish"] * len(ids)


def test_supports_move_where_the_weight_as_it_came_is_known_and_hardly_do_elsewhere(tokenizer, tmp_path):
    def changed(latent):
        model = toys.bert_classifier()
        apply(START, model, tokenizer, tmp_path)
        step = sc.STF(**QUICK, every=1, learning_rate=1e-9, latent=latent)
        return sum(apply_to(model, step, tokenizer, tmp_path / f"scratch-{latent}")["changed"])

    assert changed("dense") > 10 * changed("product")


def test_projections_are_made_to_be_rounded_where_that_is_said(tokenizer, tmp_path):
    def size(value_bits: float | None) -> float:
        model = toys.bert_classifier()
        apply(START, model, tokenizer, tmp_path)
        step = sc.STF(**QUICK, every=1, learning_rate=1e-9, latent="dense", value_bits=value_bits)
        apply_to(model, step, tokenizer, tmp_path / f"scratch-{value_bits}")
        layers = [handle.modules[0] for handle in nn.weights(model).values()]
        sparse = [layer.matrices for layer in layers if isinstance(layer, CompressedLayer)]
        with torch.no_grad():
            return sum(
                float(parts["basis"].values.norm() * parts["coefficients"].values.norm()) for parts in sparse
            )

    assert size(2.6) < 0.98 * size(None)
    with pytest.raises(SettingError, match=r"value_bits=0"):
        sc.STF(value_bits=0)


def test_a_dense_start_is_refused_where_the_model_as_it_came_has_no_such_weight(
    factorized, tokenizer, tmp_path, monkeypatch
):
    model, _ = factorized
    monkeypatch.setattr(toys, "bert_classifier", lambda: toys.make("bert", intermediate_size=24))
    with pytest.raises(
        SettingError, match=r"latent='dense': the model as it came has no .* give latent='product'"
    ):
        apply_to(model, sc.STF(**QUICK, latent="dense"), tokenizer, tmp_path / "scratch")


def support(model, id_) -> torch.Tensor:
    return nn.weights(model)[id_].modules[0].matrices["coefficients"].mask()


@pytest.mark.parametrize(
    ("stop", "latent", "sensitivity", "frozen"),
    [(2, "dense", False, None), (5, "product", False, "*.bias"), (8, "dense", True, None)],
)
def test_a_killed_run_resumes_to_the_same_weights(stop, latent, sensitivity, frozen, tokenizer, tmp_path):
    settings = {**QUICK, "steps": 10, "frozen": frozen}
    step = sc.STF(**settings, every=2, save_every=2, latent=latent, sensitivity=sensitivity)

    def run(scratch, progress):
        model = toys.bert_classifier()
        apply(START, model, tokenizer, tmp_path)
        apply_to(model, step, tokenizer, scratch, progress)
        return nn.weights_digest(model)

    wanted = run(tmp_path / "whole", quiet)
    with pytest.raises(toys.Killed):
        run(tmp_path / "killed", toys.killing(stop))
    assert run(tmp_path / "killed", quiet) == wanted


def test_a_failure_leaves_a_model_without_latent_weights(factorized):
    model, ids = factorized
    before = nn.weights_digest(model)
    with pytest.raises(toys.Killed), training.straightened(model, dict.fromkeys(ids, Start())):
        raise toys.Killed
    assert nn.weights_digest(model) == before


def test_it_is_refused_where_nothing_is_dense_sparse(factorized, tokenizer, tmp_path):
    with pytest.raises(PipelineRefused, match=r"no selected weight has one"):
        sc.check(sc.STF(only=BLOCKS), toys.bert_classifier())
    with pytest.raises(PipelineRefused, match=r"a legal order: DenseSparse"):
        sc.check(sc.Pipeline(sc.STF(only=BLOCKS), sc.DenseSparse(only=BLOCKS)), toys.bert_classifier())
    with pytest.raises(PipelineRefused):
        sc.check(
            sc.Pipeline(sc.DenseSparse(only=BLOCKS), sc.Int8Weights(only=BLOCKS), sc.STF(only=BLOCKS)),
            toys.bert_classifier(),
        )
    with pytest.raises(NothingToCompress, match="none of the"):
        apply_to(toys.bert_classifier(), sc.STF(**QUICK), tokenizer, tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "every=0"),
        ({"samples": 0}, "samples=0"),
        ({"damping": 0.0}, "damping="),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.STF(**settings)


def test_a_latent_of_another_shape_than_the_weight_that_came_is_refused_beforehand():
    model = toys.bert_classifier()
    steps = sc.PruneNeurons(keep=0.5), sc.DenseSparse(ratio=1.5), sc.STF(**QUICK, latent="dense")
    with pytest.raises(
        SettingError, match=r"latent='dense': .*intermediate\.dense came as 32 x 16, and is 16 x 16 by then"
    ):
        sc.check(sc.Pipeline(*steps), model)
    sc.check(sc.Pipeline(*steps[:2], replace(steps[2], latent="product")), model)
    elsewhere = replace(steps[1], only="encoder.layer.*.attention")
    sc.check(sc.Pipeline(steps[0], elsewhere, steps[2]), model)
