"""`FineTune` and `Distill`: they learn, and what earlier passes fixed stays fixed."""

import pytest
import torch

import stackcomp as sc
from stackcomp import metrics, nn
from stackcomp.core.context import Context, quiet
from stackcomp.core.errors import SelectionEmpty, SettingError
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"


def logits(model, tokenizer):
    model.eval()
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def test_fine_tuning_learns_the_toy_task(tokenizer, tmp_path):
    model, task = toys.bert_classifier(), toys.classification_task()
    apply(sc.FineTune(epochs=12, learning_rate=5e-3, batch_size=8), model, tokenizer, tmp_path)
    assert metrics.evaluate(model, tokenizer, task).value > 85


def test_distillation_brings_the_student_nearer_to_its_teacher(tokenizer, tmp_path):
    teacher = toys.bert_classifier()
    wanted = logits(teacher, tokenizer)
    student = toys.bert_classifier()
    apply(sc.MagnitudePrune(sparsity=0.7, only=BLOCKS), student, tokenizer, tmp_path)
    before = (logits(student, tokenizer) - wanted).square().mean()

    context = Context(
        targets=(),
        seed=0,
        scratch=tmp_path,
        task=toys.classification_task(),
        tokenizer=tokenizer,
        teacher=lambda: teacher,
    )
    sc.Distill(epochs=10, learning_rate=3e-3, batch_size=8).apply(student, context)
    assert (logits(student, tokenizer) - wanted).square().mean() < 0.5 * before


@pytest.mark.parametrize(
    "first", [sc.Int8Weights(only=BLOCKS), sc.LowBitWeights(bits=4, only=BLOCKS), sc.NF4(only=BLOCKS)]
)
def test_scales_move_values_no_further_than_a_rate_of_values_would(first, tokenizer, tmp_path):
    model, rate, steps = toys.bert_classifier(), 1e-3, 5
    apply(first, model, tokenizer, tmp_path)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items() if "layer" in id_}
    settings = {"steps": steps, "learning_rate": rate, "schedule": "constant", "warmup": 0.0}
    apply(sc.FineTune(**settings), model, tokenizer, tmp_path)
    for id_, old in before.items():
        moved = (nn.weights(model)[id_].dense() - old).square().mean().sqrt()
        assert 0 < moved < 2 * steps * rate


@pytest.mark.parametrize(
    ("training", "setting"),
    [
        (sc.FineTune(skip="embedings"), "skip"),
        (sc.Distill(only=("classifier", "embedings")), "only"),
        (sc.QuantizationAware(only=BLOCKS, frozen="embedings"), "frozen"),
        (sc.STF(frozen="embedings"), "frozen"),
    ],
)
def test_a_misspelt_glob_is_named_before_the_first_step(training, setting, tokenizer, tmp_path):
    model = toys.bert_classifier()
    if isinstance(training, sc.STF):
        apply(sc.DenseSparse(ratio=1.5, only=BLOCKS, data_aware=False), model, tokenizer, tmp_path)
    with pytest.raises(SelectionEmpty, match=rf"{setting}='embedings' matches no layer.*embeddings"):
        apply(training, model, tokenizer, tmp_path)
    with pytest.raises(SettingError, match="frozen=3 is no glob"):
        sc.STF(frozen=3)


def test_a_misspelt_glob_on_parameters_is_refused_before_the_first_pass(tokenizer, tmp_path):
    def run(frozen):
        learned = sc.QuantizationAware(bits=4, steps=1, only=BLOCKS, frozen=frozen)
        steps = sc.LowRank(ratio=1.5, only=BLOCKS, data_aware=False), learned
        manager = sc.PassManager(
            out=tmp_path / "out", task=toys.classification_task(), tokenizer=tokenizer, progress=quiet
        )
        return manager.run(toys.bert_classifier(), sc.Pipeline(*steps))

    with pytest.raises(SelectionEmpty, match=r"frozen='embedings' matches no layer"):
        run("embedings")
    assert not (tmp_path / "out").exists()
    assert run(("*LayerNorm", "encoder.layer.0.*.basis")).ledger.rows[-1].name == "QuantizationAware"


@pytest.mark.parametrize(
    "training", [sc.FineTune(steps=3, learning_rate=1e-2), sc.Distill(steps=3, learning_rate=1e-2)]
)
@pytest.mark.parametrize(
    "first",
    [
        sc.MagnitudePrune(sparsity=0.6, only=BLOCKS),
        sc.MagnitudePrune(sparsity="2:4", only=BLOCKS),
        sc.DenseSparse(ratio=1.5, only=BLOCKS),
        sc.Int8Weights(only=BLOCKS),
        sc.Int8Dynamic(only=BLOCKS),
    ],
)
def test_masks_supports_and_grids_survive(first, training, tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(first, model, tokenizer, tmp_path)

    def fixed():
        found = {}
        for name, buffer in model.named_buffers():
            if name.endswith((".support", ".values")):
                found[name] = buffer.clone()
        return found

    before, values = fixed(), {name: part.detach().clone() for name, part in model.named_parameters()}
    specs = {id_: handle.spec for id_, handle in nn.weights(model).items()}
    findings = apply(training, model, tokenizer, tmp_path)
    assert before
    assert all(torch.equal(buffer, fixed()[name]) for name, buffer in before.items())
    assert {id_: handle.spec for id_, handle in nn.weights(model).items()} == specs
    trained = [name for name, part in model.named_parameters() if not torch.equal(part, values[name])]
    assert any(name.endswith(("values", "scales")) for name in trained)
    assert ("rounded_weights" in findings) == isinstance(first, sc.Int8Weights | sc.Int8Dynamic)


def test_only_and_skip_say_what_learns(tokenizer, tmp_path):
    model = toys.bert_classifier()
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    apply(sc.FineTune(steps=2, learning_rate=1e-2, skip="embeddings"), model, tokenizer, tmp_path)
    changed = {name for name, part in model.named_parameters() if not torch.equal(part, before[name])}
    assert changed
    assert not any(".embeddings." in name for name in changed)
    assert any(".encoder." in name for name in changed)


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (sc.Distill, {"temperature": 0.0}, "temperature="),
        (sc.Distill, {"hidden": -1.0}, "hidden="),
        (sc.Distill, {"logits": 0.0, "hidden": 0.0}, "one weight must be above 0"),
        (sc.FineTune, {"steps": 0}, "steps="),
        (sc.FineTune, {"batch_size": 0}, "batch_size="),
        (sc.FineTune, {"learning_rate": -1e-3}, "learning_rate="),
        (sc.FineTune, {"schedule": "square"}, "schedule="),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, said):
    with pytest.raises(SettingError, match=said):
        cls(**settings)
