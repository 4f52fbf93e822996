"""`MovementPrune`: what the scores learn, which entries go when, and that it resumes to the same bytes."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn, ops, training
from stackcomp.core.context import Context, quiet
from stackcomp.core.contract import legal
from stackcomp.core.errors import SettingError
from stackcomp.manager import plan_of
from stackcomp.passes.movement_prune import rising
from tests import toys
from tests.passes.test_conformance import apply, apply_alone, manager

BLOCKS = "encoder.layer.*"


def fixed(model, ids, seed=0):
    """Any masks and scores."""
    chance = torch.Generator().manual_seed(seed)
    for mask in ids.values():
        mask.mask.copy_(torch.rand(mask.mask.shape, generator=chance) < 0.5)
        mask.scores.data.copy_(torch.randn(mask.scores.shape, generator=chance))


@pytest.mark.parametrize(
    ("make", "id_"),
    [(toys.bert_classifier, "encoder.layer.0.intermediate.dense"), (toys.gpt2_lm, "h.1.mlp.c_fc")],
)
def test_gradients_are_those_of_the_formula(make, id_, tokenizer):
    model, batch = make(), toys.batch(tokenizer)
    handle = nn.weights(model)[id_]
    weight = handle.parameter.detach().clone()
    with training.scored(model, [id_]) as masks:
        fixed(model, masks)
        mask = masks[id_].mask.clone()
        model(**batch).logits.square().sum().backward()
        found, moved = masks[id_].scores.grad, handle.modules[0].parametrizations.weight.original.grad
    assert type(handle.modules[0]) in (torch.nn.Linear, type(make().get_submodule(nn.absolute(model, id_))))
    assert torch.equal(handle.parameter, weight)

    with torch.no_grad():
        handle.parameter.mul_(mask)  # W' as a plain weight
    handle.parameter.grad = None
    model(**batch).logits.square().sum().backward()
    torch.testing.assert_close(found, handle.parameter.grad * weight)
    torch.testing.assert_close(moved, handle.parameter.grad * mask)


def test_the_schedule_is_cubic():
    assert [rising(step, 2, 6) for step in (0, 2, 3, 4, 6, 9)] == [
        0.0,
        0.0,
        1 - 0.75**3,
        1 - 0.5**3,
        1.0,
        1.0,
    ]
    assert rising(0, 0, 0) == 1.0
    assert [rising(step, 5, 5) for step in (3, 5)] == [0.0, 1.0]
    assert [rising(step, 9, 8) for step in (3, 8)] == [0.0, 1.0]


@pytest.mark.parametrize(("sparsity", "scope"), [(0.6, "layer"), (0.9, "global"), ("1:4", "layer")])
def test_the_share_falls_as_scheduled_and_stays(sparsity, scope, tokenizer, tmp_path, monkeypatch):
    seen, inside = [], sc.MovementPrune._choose
    monkeypatch.setattr(
        sc.MovementPrune,
        "_choose",
        lambda self, handles, masks, progress: (
            inside(self, handles, masks, progress),
            seen.append({id_: mask.mask.clone() for id_, mask in masks.items()}),
        ),
    )
    model = toys.bert_classifier()
    step = sc.MovementPrune(sparsity=sparsity, scope=scope, only=BLOCKS, steps=10, epochs=9, batch_size=4)
    findings = apply(step, model, tokenizer, tmp_path)
    shares = [float(torch.cat([mask.flatten() for mask in masks.values()]).float().mean()) for masks in seen]
    assert len(shares) == 8  # steps 0 to 7
    assert shares[:2] == [1.0, 1.0]
    assert shares == sorted(shares, reverse=True)
    kept = 0.25 if sparsity == "1:4" else 1 - sparsity
    assert shares[-1] == pytest.approx(kept, abs=2e-3)
    if sparsity != "1:4":
        assert shares[4] == pytest.approx(1 - sparsity * rising(4, 1, 7), abs=2e-3)
    for id_, mask in seen[-1].items():
        dense = nn.weights(model)[id_].dense()
        assert torch.equal(dense != 0, mask)
        assert findings["kept"][id_] == pytest.approx(float(mask.float().mean()), abs=1e-4)
        if sparsity == "1:4":
            assert (mask.unflatten(1, (-1, 4)).sum(-1) == 1).all()
            assert nn.weights(model)[id_].spec.matrices["weight"].layout.kind == "fixed"
    if scope == "global":
        assert len({round(float(mask.float().mean()), 3) for mask in seen[-1].values()}) > 1


def test_what_moves_away_from_zero_stays(tokenizer, tmp_path):
    """Scores are minus the sum of W dL/dW': an entry that every step enlarges is kept."""
    model, batch = toys.bert_classifier(), toys.batch(tokenizer)
    id_ = "encoder.layer.0.output.dense"
    weight = nn.weights(model)[id_].dense().clone()
    with training.scored(model, [id_]) as masks:
        optimizer = torch.optim.SGD([masks[id_].scores], lr=1.0)
        model(**batch).logits.square().sum().backward()
        grad = nn.weights(model)  # the layer is no plain one now
        assert id_ not in grad
        optimizer.step()
        scores = masks[id_].scores.detach().clone()
    model(**batch).logits.square().sum().backward()
    step = -nn.weights(model)[id_].parameter.grad
    assert torch.equal(ops.highest(scores, 50), ops.highest(weight * step, 50))


@pytest.mark.parametrize("start", ["zero", "magnitude"])
def test_scores_that_hardly_learn_keep_what_they_started_with(start, tokenizer, tmp_path):
    model = toys.bert_classifier()
    id_ = "encoder.layer.0.output.dense"
    weight = nn.weights(model)[id_].dense().clone()
    step = sc.MovementPrune(
        sparsity=0.5, start=start, only=BLOCKS, steps=4, batch_size=4, learning_rate=1e-12, distill=False
    )
    apply(step, model, tokenizer, tmp_path)
    kept = nn.weights(model)[id_].dense() != 0
    assert torch.equal(kept, ops.highest(weight.abs(), kept.sum().item())) is (start == "magnitude")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("distill", [True, False])
def test_zeros_stay_zero_through_the_run_and_a_reload(distill, scope, tokenizer, tmp_path):
    model = toys.bert_classifier()
    pipeline = sc.Pipeline(
        sc.MovementPrune(sparsity=0.8, scope=scope, only=BLOCKS, distill=distill, steps=8, batch_size=8),
        sc.FineTune(steps=2, learning_rate=1e-2),
    )
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    reloaded = checkpoint.load(tmp_path / "out")
    before = checkpoint.load(next((tmp_path / "out" / "steps").glob("01-*")))
    entries = zeros = 0
    for id_, handle in nn.weights(reloaded).items():
        if id_.startswith("encoder"):
            assert torch.equal(handle.dense() == 0, nn.weights(before)[id_].dense() == 0)
            entries, zeros = entries + handle.dense().numel(), zeros + int((handle.dense() == 0).sum())
    assert zeros == pytest.approx(0.8 * entries, abs=8)
    rows = result.ledger.rows
    assert rows[1].layer_bytes < rows[0].layer_bytes / 3.5
    assert rows[1].size_bytes < rows[0].size_bytes


@pytest.mark.parametrize("stop", [4, 11])
def test_a_killed_run_resumes_to_the_same_weights(stop, tokenizer, tmp_path):
    task, step = (
        toys.classification_task(),
        sc.MovementPrune(sparsity=0.7, only=BLOCKS, steps=12, batch_size=8, epochs=9, save_every=3),
    )

    def run(scratch, progress):
        model = toys.bert_classifier()
        scratch.mkdir(exist_ok=True)
        context = Context(
            targets=plan_of(model).select(only=BLOCKS, skip=None),
            seed=0,
            scratch=scratch,
            task=task,
            tokenizer=tokenizer,
            teacher=toys.bert_classifier,
            progress=progress,
        )
        return model, step.apply(model, context)

    wanted, _ = run(tmp_path / "whole", quiet)
    with pytest.raises(toys.Killed):
        run(tmp_path / "killed", toys.killing(stop))
    found, findings = run(tmp_path / "killed", quiet)
    assert findings["resumed_step"] == (stop - 1) // 3 * 3
    assert nn.weights_digest(found) == nn.weights_digest(wanted)
    again, findings = run(tmp_path / "killed", quiet)
    assert findings["resumed_step"] == 12
    assert nn.weights_digest(again) == nn.weights_digest(wanted)


def test_it_learns_the_task_sparse(tokenizer, tmp_path):
    from stackcomp import metrics

    model = toys.bert_classifier()
    step = sc.MovementPrune(
        sparsity=0.7, only=BLOCKS, distill=False, epochs=14, batch_size=8, learning_rate=5e-3
    )
    apply(step, model, tokenizer, tmp_path)
    assert metrics.evaluate(model, tokenizer, toys.classification_task()).value > 85


def test_a_failed_run_leaves_a_plain_model(tokenizer):
    model = toys.bert_classifier()
    before = nn.weights_digest(model)
    with pytest.raises(toys.Killed), training.scored(model, plan_of(model).select(only=BLOCKS, skip=None)):
        raise toys.Killed
    assert nn.weights_digest(model) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity": "4:2"}, "sparsity='4:2'"),
        ({"sparsity": "2:4", "scope": "global"}, "scope='global' does not go with"),
        ({"scope": "model"}, "scope='model'"),
        ({"begin": 0.8}, "end=0.7"),
        ({"start": "random"}, "start='random'"),
        ({"temperature": 0.0}, "temperature="),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.MovementPrune(**settings)


def test_weights_that_cannot_be_scored_are_refused_before_any_compute(model):
    with pytest.raises(SettingError, match="3 does not divide"):
        sc.check(sc.MovementPrune(sparsity="1:3", only=BLOCKS), model)


def test_a_weight_of_several_modules_is_scored_once_and_stays_one(tokenizer, tmp_path):
    model = toys.gpt2_lm()
    batch = toys.batch(tokenizer)
    with training.scored(model, ["wte"]) as masks:
        assert model.transformer.wte.weight.equal(model.lm_head.weight)
        masks["wte"].mask[:, 0] = False
        assert not model.lm_head.weight[:, 0].any()
        assert model(**batch).logits.isfinite().all()
    assert nn.weights(model)["wte"].spec.paths == ("wte", "lm_head")
    step = sc.MovementPrune(only="wte", steps=2, batch_size=4)
    apply_alone(step, model, toys.gpt2_lm(), tokenizer, tmp_path, toys.language_task())
    assert nn.weights(model)["wte"].spec.paths == ("wte", "lm_head")
    assert 0 < float((nn.weights(model)["wte"].dense() == 0).float().mean()) < 1


def test_it_trains_all_and_changes_the_facts_of_what_it_selects(model):
    plan = plan_of(model)
    step = sc.MovementPrune(only=BLOCKS)
    assert step.contract.trains
    after = sc.check(step, model)[-1]
    assert after["classifier"] == plan["classifier"]
    ((words,),) = [[words for _, words in parts] for parts in after["encoder.layer.0.output.dense"].forms]
    assert sc.Fact.SPARSE in words
    assert not legal((sc.MagnitudePrune(only=BLOCKS), step), plan)
    assert not legal((sc.Int8Weights(only=BLOCKS), step), plan)
    assert legal((sc.Int8Weights(only="classifier"), step, sc.Int8Weights(only=BLOCKS)), plan)
