"""What every pass must do. A new pass joins by existing: the list is the registry."""

import copy
import shutil
from dataclasses import fields

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.context import Context, quiet
from stackcomp.core.contract import legal, predict
from stackcomp.core.errors import UnknownSetting
from stackcomp.manager import Measuring, plan_of
from stackcomp.passes import registered
from tests import toys

PASSES = registered()


def quick(cls, **settings):
    """The pass with its defaults, two steps where it trains."""
    known = {field.name for field in fields(cls)}
    return cls(**({"steps": 2, "batch_size": 4} if "steps" in known else {}), **settings)


def manager(out, tokenizer, **settings):
    return sc.PassManager(
        out=out,
        tokenizer=tokenizer,
        measuring=Measuring(limit=8, latency=False),
        progress=quiet,
        **{"task": toys.classification_task(), **settings},
    )


def led(step, model):
    """The pass behind whatever it cannot do without: a pipeline that is legal on the model."""
    plan = plan_of(model)
    if legal((step,), plan):
        return sc.Pipeline(step)
    return next(sc.Pipeline(quick(cls), step) for cls in PASSES.values() if legal((quick(cls), step), plan))


def apply(step, model, tokenizer, tmp_path, task=None):
    """The pass, and what it cannot do without, on a model in memory."""
    original = copy.deepcopy(model)
    for item in led(step, model).flat():
        found = apply_alone(item, model, original, tokenizer, tmp_path, task)
    return found


def apply_alone(step, model, original, tokenizer, tmp_path, task):
    plan = plan_of(model)
    chosen = step.selected(plan) if step.contract.selects else tuple(w.id for w in plan.weights)
    task = task or toys.classification_task()
    context = Context(
        targets=chosen,
        seed=0,
        scratch=tmp_path / "scratch",
        task=task,
        tokenizer=tokenizer,
        teacher=lambda: original,
        calibration=lambda count: task.texts("train", count),
    )
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
    (tmp_path / "scratch").mkdir()
    return step.apply(model, context)


@pytest.fixture(params=sorted(PASSES))
def step(request):
    return quick(PASSES[request.param])


def test_settings_round_trip(step):
    assert sc.parse(repr(step)).flat() == (step,)
    assert hash(sc.parse(repr(step)).flat()[0]) == hash(step)


def test_a_misspelt_setting_is_refused(step):
    with pytest.raises(UnknownSetting, match="did you mean only"):
        type(step)(onyl="encoder.*")


def test_docstring_and_paper_are_there(step):
    assert (type(step).__doc__ or "").strip()
    assert "arXiv" in step.paper
    for field in fields(step):
        if field.name not in ("only", "skip"):  # explained once, on Pass
            assert field.name in type(step).__doc__, f"{step.name} does not explain {field.name}"


def test_the_input_is_untouched_and_the_result_is_what_reloads(step, model, tokenizer, tmp_path):
    before = nn.weights_digest(model)
    training = model.training
    result = manager(tmp_path / "out", tokenizer).run(model, led(step, model))
    assert nn.weights_digest(model) == before
    assert model.training == training
    batch = toys.batch(result.tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "out")(**batch).logits, result.model(**batch).logits)
        assert torch.isfinite(result.model(**batch).logits).all()
    row = result.ledger.rows[-1]
    assert row.size_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_same_seed_same_weights(step, model, tokenizer, tmp_path):
    files = []
    for name in ("one", "two"):
        manager(tmp_path / name, tokenizer, seed=3).run(model, led(step, model))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_save_then_load_gives_the_same_logits(step, model, tokenizer, tmp_path):
    apply(step, model, tokenizer, tmp_path)
    batch = toys.batch(tokenizer)
    model.eval()
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def test_dtype_and_device_are_kept(step, model, tokenizer, tmp_path):
    model = model.to(torch.bfloat16)
    apply(step, model, tokenizer, tmp_path)
    model.eval()
    floats = {part.dtype for part in model.parameters() if part.is_floating_point()}
    assert floats == {torch.bfloat16}
    assert {part.device.type for part in model.parameters()} == {"cpu"}
    assert model(**toys.batch(tokenizer)).logits.dtype == torch.bfloat16


def test_tied_weights_stay_tied(step, tokenizer, tmp_path):
    model = toys.gpt2_lm()
    apply(step, model, tokenizer, tmp_path, task=toys.language_task())
    (words,) = [handle for handle in nn.weights(model).values() if "lm_head" in handle.spec.paths]
    assert set(words.spec.paths) == {"wte", "lm_head"}
    checkpoint.save(model, tmp_path / "saved")
    reloaded = checkpoint.load(tmp_path / "saved")
    (words,) = [handle for handle in nn.weights(reloaded).values() if "lm_head" in handle.spec.paths]
    assert set(words.spec.paths) == {"wte", "lm_head"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_generates_the_same_after_it_reloads(step, family, tokenizer, tmp_path):
    model = toys.language_model(family)
    apply(step, model, tokenizer, tmp_path, task=toys.language_task())
    ids = toys.batch(tokenizer)["input_ids"][:1] % model.get_input_embeddings().num_embeddings
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.eval()
    with torch.no_grad():
        wanted = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, use_cache=False, **settings), wanted)
        checkpoint.save(model, tmp_path / "saved")
        again = checkpoint.load(tmp_path / "saved")
        assert torch.equal(again.generate(ids, **settings), wanted)
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", sorted(name for name, cls in PASSES.items() if cls.idle is not None))
def test_settings_that_ask_for_nothing_do_nothing(name, model, tokenizer, tmp_path):
    before = nn.weights_digest(model)
    step = PASSES[name](**PASSES[name].idle)
    plan = plan_of(model)
    if legal((step,), plan):  # STF finds nothing here
        assert predict([step], plan)[-1] == plan
    apply_alone(step, model, model, tokenizer, tmp_path, None)
    assert nn.weights_digest(model) == before
