"""`ShareLayers`: one weight at several paths, stored once, after reloading too, and acted on once by whatever follows."""

from dataclasses import replace

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, data, nn, size, training
from stackcomp.core import headers
from stackcomp.core.contract import predict
from stackcomp.core.errors import NothingToCompress, PipelineRefused, SettingError
from stackcomp.core.plan import Plan
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, apply_alone, manager

BLOCKS = "encoder.layer.*"
QUERY = "attention.self.query"
DEPTH = 4
TRAINED = {"epochs": 9, "steps": 4, "batch_size": 4}
SPARSE = sc.DenseSparse(ratio=1.6, only=BLOCKS, blocks=1, sensitivity=False, spread=100.0)


def deep(family="bert", depth=DEPTH):
    name = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
    settings = toys._config(family).to_dict() | {name: depth}
    model = toys.transformers.AutoModelForSequenceClassification.from_config(
        type(toys._config(family)).from_dict(settings)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def found(plan):
    """The plan as one would find it in a model: names have no history."""
    return replace(plan, weights=tuple(replace(weight, origin=weight.id) for weight in plan.weights))


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def shared(model):
    """The weights of the layers that have several paths, by id."""
    return {
        id_: handle
        for id_, handle in nn.weights(model).items()
        if len(handle.spec.paths) > 1 and handle.spec.kind == "linear"
    }


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_family_shares_as_planned_and_reloads_as_it_was(family, tokenizer, tmp_path):
    model, step = deep(family), sc.ShareLayers(group=2, start="mean")
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    predicted = predict((step,), plan_of(model))[-1]
    apply(step, model, tokenizer, tmp_path)
    assert found(predicted) == plan_of(model)
    assert shared(model)
    for handle in shared(model).values():
        one, other = handle.spec.paths
        assert torch.allclose(handle.dense(), (before[one] + before[other]) / 2, atol=1e-6)
    for round_ in ("one", "two"):  # saved, and saved again as it was loaded
        checkpoint.save(model, tmp_path / round_)
        again = checkpoint.load(tmp_path / round_)
        assert plan_of(again) == plan_of(model)
        assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
        assert {weight.id: weight for weight in headers.plan_of(tmp_path / round_).weights} == {
            weight.id: weight for weight in plan_of(model).weights
        }
        model = again
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    tensors, _ = headers.read_header(tmp_path / "one" / "model.safetensors")
    stored = sum(weight.rows * weight.cols for weight in plan_of(model).weights)
    two_dimensional = [entry["shape"] for entry in tensors.values() if len(entry["shape"]) == 2]
    assert sum(rows * cols for rows, cols in two_dimensional) == stored


def test_the_base_model_of_a_saved_one_shares_too(tokenizer, tmp_path):
    model = deep()
    apply(sc.ShareLayers(), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    base = checkpoint.load(tmp_path / "saved", "AutoModel")
    assert shared(base).keys() == shared(model).keys()
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(base(**batch)[0], model.bert(**batch)[0])


def test_groups_starts_and_what_stays_each_layers_own(tokenizer, tmp_path):
    model = deep(depth=5)
    first = nn.weights(model)[f"encoder.layer.0.{QUERY}"].dense().clone()
    biases = [layer.attention.self.query.bias.clone() for layer in model.bert.encoder.layer]
    classifier = model.classifier.weight.clone()
    apply_alone(sc.ShareLayers(group=3), model, model, tokenizer, tmp_path, None)
    paths = [handle.spec.paths for id_, handle in nn.weights(model).items() if id_.endswith(QUERY)]
    assert paths == [
        tuple(f"encoder.layer.{layer}.{QUERY}" for layer in layers) for layers in ((0, 1, 2), (3, 4))
    ]
    assert torch.equal(nn.weights(model)[f"encoder.layer.0.{QUERY}"].dense(), first)
    assert torch.equal(model.classifier.weight, classifier)
    for layer, bias in zip(model.bert.encoder.layer, biases, strict=True):
        assert torch.equal(layer.attention.self.query.bias, bias)
    assert len({layer.output.LayerNorm.weight for layer in model.bert.encoder.layer}) == 5


def test_only_some_weights_are_shared_where_globs_say_so(tokenizer, tmp_path):
    model = deep()
    apply(sc.ShareLayers(only="encoder.layer.*.attention"), model, tokenizer, tmp_path)
    assert shared(model)
    assert all(".attention." in id_ for id_ in shared(model))


def test_sharing_again_in_larger_groups_merges_what_is_shared(tokenizer, tmp_path):
    model = deep()
    once, more = sc.ShareLayers(group=2), sc.ShareLayers(group=4)
    predicted = predict((once, more), plan_of(model))[-1]
    apply(once, model, tokenizer, tmp_path)
    apply_alone(more, model, model, tokenizer, tmp_path, None)
    assert found(predicted) == plan_of(model)
    assert len(shared(model)[f"encoder.layer.0.{QUERY}"].spec.paths) == 4


def test_the_ledger_counts_all_layers_of_the_dense_model(tokenizer, tmp_path):
    model = deep()
    whole = sum(
        handle.spec.total_bytes
        for id_, handle in nn.weights(model).items()
        if id_.startswith("encoder.layer")
    )
    pipeline = sc.Pipeline(sc.ShareLayers(group=2), sc.Int8Weights(only="encoder.layer.3"))
    rows = manager(tmp_path / "out", tokenizer).run(model, pipeline).ledger.rows
    assert [row.layer_bytes for row in rows[:2]] == [whole, whole // 2]
    assert rows[2].layer_bytes < 0.7 * rows[1].layer_bytes
    assert rows[0].size_bytes - rows[1].size_bytes == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.parametrize(
    "later",
    [
        sc.Distill(**TRAINED),
        SPARSE,
        sc.Int8Weights(only=BLOCKS),
        sc.LowBitWeights(only=BLOCKS),
        sc.MagnitudePrune(only=BLOCKS),
        sc.LowRank(ratio=1.5, only=BLOCKS),
        sc.Pipeline(SPARSE, sc.STF(**TRAINED, only=BLOCKS), sc.Int8Weights(only=BLOCKS)),
    ],
    ids=lambda item: item.flat()[-1].name if len(item.flat()) == 1 else "STF",
)
def test_later_passes_act_once_and_it_stays_shared(later, tokenizer, tmp_path):
    model = deep()
    pipeline = sc.Pipeline(sc.ShareLayers(group=2), *later.flat())
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    ids = {f"encoder.layer.{layer}.{QUERY}" for layer in (0, 2)}
    assert {id_ for id_ in shared(result.model) if id_.endswith(QUERY)} == ids
    handles = nn.weights(result.model)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == sum(checkpoint.components(tmp_path / "out").values())
    linear = sum(handle.spec.total_bytes for handle in handles.values())
    small = sum(part.nbytes for part in result.model.parameters() if part.dim() == 1)
    assert linear <= size <= linear + small + 60_000  # a header and what else there is, but no weight twice
    assert result.ledger.rows[-1].layer_bytes <= result.ledger.rows[1].layer_bytes


@pytest.mark.parametrize("cls", [sc.LowRank, sc.DenseSparse])
def test_factors_are_those_for_the_inputs_of_all_layers(cls, tokenizer, tmp_path):
    """A second layer that reads twenty times as much decides what is kept; with the first one's inputs alone it could not."""
    step = cls(ratio=1.5, only="encoder.layer.*.output.dense", spread=1.0, sensitivity=False)
    errors = []
    for seen in (2, 1):
        model = toys.bert_classifier()
        apply_alone(sc.ShareLayers(), model, model, tokenizer, tmp_path, None)
        with torch.no_grad():
            model.bert.encoder.layer[1].intermediate.dense.bias += 20 * torch.randn(32)
        texts = data.Calibration(toys.SENTENCES, tokenizer)
        (handle,) = [handle for id_, handle in shared(model).items() if id_.endswith("0.output.dense")]
        inputs = texts.second_moments(model, {"x": handle.modules})["x"].average
        before = handle.dense().clone()
        if seen == 1:  # as if the weight were the first layer's alone
            model.bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(before.clone())
        apply_alone(step, model, model, tokenizer, tmp_path, None)
        error = nn.weights(model)[handle.spec.id].dense() - before
        errors.append(float((error @ inputs @ error.T).trace()))
    assert errors[0] < 0.5 * errors[1]


def test_a_support_is_learned_through_all_layers_that_share_it(tokenizer, tmp_path):
    model = deep()
    apply_alone(sc.ShareLayers(group=4), model, model, tokenizer, tmp_path, None)
    apply_alone(SPARSE, model, model, tokenizer, tmp_path, None)
    (id_, *_) = [id_ for id_, handle in nn.weights(model).items() if training.projects(handle)]
    paths = nn.weights(model)[id_].spec.paths
    assert len(paths) == 4
    batch = toys.batch(tokenizer)
    before = model(**batch).logits
    with training.straightened(model, {id_: training.Start()}) as latents:
        modules = [model.get_submodule(f"bert.{path}") for path in paths]
        assert {module.latent for module in modules} == {latents[id_]}
        assert len({module.bias for module in modules}) == 4
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-4, rtol=1e-4)
        model(**batch).logits.square().sum().backward()
        assert latents[id_].weight.grad.abs().sum() > 0
        with torch.no_grad():
            latents[id_].weight += 0.5 * torch.randn_like(latents[id_].weight)
        latents[id_].project()
    assert nn.weights(model)[id_].spec.paths == paths
    matrices = [module.matrices["coefficients"] for module in nn.weights(model)[id_].modules]
    assert all(matrix is matrices[0] for matrix in matrices)


def test_dropping_the_layer_that_holds_a_compressed_weight_leaves_it_to_the_others(tokenizer, tmp_path):
    model = deep()
    pipeline = sc.Pipeline(
        sc.ShareLayers(group=2), sc.Int8Weights(only=BLOCKS), sc.DropLayers(which=(1, 2, 3))
    )
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    start = checkpoint.load(next((tmp_path / "out" / "steps").glob("02-*")))
    for new, old in enumerate((1, 2, 3)):
        ours, theirs = (
            found.bert.encoder.layer[place].output.dense.dense()
            for found, place in ((result.model, new), (start, old))
        )
        assert torch.equal(ours, theirs)
    assert nn.weights(result.model)[f"encoder.layer.1.{QUERY}"].spec.paths == (
        f"encoder.layer.1.{QUERY}",
        f"encoder.layer.2.{QUERY}",
    )


def test_training_moves_every_use_of_a_shared_weight(tokenizer, tmp_path):
    model = deep()
    apply(sc.ShareLayers(start="mean"), model, tokenizer, tmp_path)
    teacher = deep()
    wanted = logits(teacher, tokenizer)
    before = (logits(model, tokenizer) - wanted).norm()
    distill = sc.Distill(epochs=8, learning_rate=3e-3, batch_size=8, only=BLOCKS)
    apply_alone(distill, model, teacher, tokenizer, tmp_path, None)
    assert len(shared(model)) == 12
    assert (logits(model.eval(), tokenizer) - wanted).norm() < before


DELTAS = sc.ShareLayers(group=2, delta_rank=3)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_layers_keep_the_best_product_beside_what_they_share(family, tokenizer, tmp_path):
    model = deep(family)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    predicted = predict((DELTAS,), plan_of(model))[-1]
    expected = size_of(DELTAS, model)
    apply(DELTAS, model, tokenizer, tmp_path)
    assert shared(model)
    for weight in found(predicted).weights:
        assert plan_of(model)[weight.id].forms <= weight.forms
    for id_, handle in shared(model).items():
        one, other = handle.spec.paths
        assert handle.spec.branched
        assert torch.allclose(handle.modules[0].dense(), before[one], atol=1e-5)
        left = torch.linalg.svdvals(handle.modules[1].dense().detach() - before[other])
        wanted = torch.linalg.svdvals(before[id_] - before[other])[3:]
        assert torch.allclose(left[: len(wanted)], wanted, atol=1e-4)
        assert float(left[len(wanted) :].abs().max()) < 1e-4
    checkpoint.save(model, tmp_path / "one")
    again = checkpoint.load(tmp_path / "one")
    assert plan_of(again) == plan_of(model)
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    assert (tmp_path / "one" / "model.safetensors").stat().st_size == expected
    checkpoint.save(again, tmp_path / "two")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    plain = sc.unpack(again)
    assert torch.allclose(logits(plain, tokenizer), logits(model, tokenizer), atol=1e-4)
    assert not shared(plain)


def size_of(pipeline, model):
    """The predicted bytes of the file, which must be exact."""
    (*_, last) = size.sizes(pipeline, model)
    assert not last.reasons
    return last.size_bytes


def test_a_layer_computes_with_its_own_product_alone(tokenizer, tmp_path):
    model = deep()
    apply(DELTAS, model, tokenizer, tmp_path)
    (handle, *_) = shared(model).values()
    x = torch.randn(1, 3, handle.spec.cols)
    for tokens, composed in ((x, False), (torch.cat([x] * 30), True)):
        for module in handle.modules:
            assert module._composes(tokens) is composed
            wanted = torch.nn.functional.linear(tokens, module.dense(), module.bias)
            torch.testing.assert_close(module(tokens), wanted, atol=1e-5, rtol=1e-4)
    one, other = (module.dense().detach() for module in handle.modules)
    assert float((one - other).norm()) > 0.1 * float(one.norm())
    handle.modules[1](x).sum().backward()
    grads = handle.modules[0].matrices["coefficients"].values.grad.chunk(2, 1)
    assert not grads[0].any()
    assert grads[1].any()


@pytest.mark.parametrize("start", ["first", "mean"])
def test_all_products_learn_even_those_that_start_at_nothing(start, tokenizer, tmp_path):
    def products(handle):
        sides = (handle.matrices[part].dense().detach() for part in ("coefficients", "basis"))
        first, second = (side.chunk(2, axis) for axis, side in zip((1, 0), sides, strict=True))
        return [one @ other for one, other in zip(first, second, strict=True)]

    model = deep()
    apply(replace(DELTAS, start=start), model, tokenizer, tmp_path)
    before = {id_: products(handle) for id_, handle in shared(model).items()}
    if start == "first":
        assert not any(found[0].any() for found in before.values())
    distill = sc.Distill(epochs=8, learning_rate=3e-3, batch_size=8, only=BLOCKS)
    apply_alone(distill, model, deep(), tokenizer, tmp_path, None)
    for id_, handle in shared(model).items():
        for was, now in zip(before[id_], products(handle), strict=True):
            assert float((now - was).norm()) > 1e-3


def test_products_beside_a_shared_weight_bring_layers_nearer_and_cost_what_is_said(tokenizer, tmp_path):
    errors = []
    for rank in (0, 1, 3):
        model = deep()
        before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
        apply(replace(DELTAS, delta_rank=rank), model, tokenizer, tmp_path)
        (handle, *_) = shared(model).values()
        rows, cols, other = handle.spec.rows, handle.spec.cols, handle.spec.paths[1]
        assert handle.spec.total_bytes == 4 * (rows * cols + 2 * rank * (rows + cols))
        now = handle.modules[1].dense() if rank else handle.dense()
        errors.append(float((now.detach() - before[other]).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_the_last_smaller_group_and_weights_that_are_shared_already(tokenizer, tmp_path):
    model, steps = deep(depth=5), (sc.ShareLayers(group=2, only="*.query"), replace(DELTAS, only="*.query"))
    expected = size_of(sc.Pipeline(*steps), model)
    result = manager(tmp_path / "out", tokenizer).run(model, sc.Pipeline(*steps))
    forms = {id_: handle.spec for id_, handle in nn.weights(result.model).items() if id_.endswith(QUERY)}
    assert [spec.branched for spec in forms.values()] == [True, True, False]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == expected


def test_second_moments_between_factors_are_those_of_one_layer_at_a_time(tokenizer, tmp_path):
    model = deep()
    apply(DELTAS, model, tokenizer, tmp_path)
    (handle, *_) = shared(model).values()
    *_, last = nn.products(handle.spec, handle.matrices, torch.eye(handle.spec.cols))
    (moment,) = last.moments
    assert moment[:3, :3].any()
    assert not moment[:3, 3:].any()


@pytest.mark.parametrize(
    "later",
    [
        sc.GPTQ(bits=4, only=BLOCKS),
        sc.Int8Dynamic(only=BLOCKS),
        sc.MagnitudePrune(only=BLOCKS),
        sc.Pipeline(sc.QuantizationAware(**TRAINED, only=BLOCKS), sc.EntropyCode()),
    ],
    ids=lambda item: item.flat()[0].name,
)
def test_later_passes_reach_all_parts_of_a_branched_weight(later, tokenizer, tmp_path):
    model = deep()
    pipeline = sc.Pipeline(DELTAS, *later.flat())
    rows = manager(tmp_path / "out", tokenizer).run(model, pipeline).ledger.rows
    assert rows[2].layer_bytes < 0.7 * rows[1].layer_bytes < 0.7 * rows[0].layer_bytes
    again = checkpoint.load(tmp_path / "out")
    assert all(handle.spec.branched for handle in shared(again).values())
    assert torch.isfinite(logits(again, tokenizer)).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group": 0}, "group=0"),
        ({"delta_rank": -1}, "delta_rank=-1"),
        ({"start": "last"}, "start='last'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.ShareLayers(**settings)


def test_what_does_not_fit_the_model_is_refused_before_any_compute(model):
    with pytest.raises(SettingError, match="group=3 of 2 layers: give at most 2"):
        sc.check(sc.ShareLayers(group=3), model)
    with pytest.raises(NothingToCompress, match="widen only="):
        sc.check(sc.ShareLayers(only="encoder.layer.1"), model)
    with pytest.raises(SettingError, match=r"delta_rank=9 costs encoder.* saves: give at most \d, or skip="):
        sc.check(sc.ShareLayers(delta_rank=9), model)
    with pytest.raises(PipelineRefused, match=r"a legal order: DropLayers.* -> ShareLayers"):
        sc.check(sc.Pipeline(sc.ShareLayers(delta_rank=1), sc.DropLayers(keep=2)), deep())
    with pytest.raises(PipelineRefused, match="a legal order: ShareLayers"):
        sc.check(sc.Pipeline(sc.Int8Weights(), sc.ShareLayers()), model)
    plan = plan_of(model)
    wider = tuple(
        replace(weight, rows=99) if weight.id == f"encoder.layer.1.{QUERY}" else weight
        for weight in plan.weights
    )
    with pytest.raises(SettingError, match=f"give skip='encoder.layer.1.{QUERY}'"):
        predict((sc.ShareLayers(),), Plan(wider))
