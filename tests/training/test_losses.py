"""Losses: their formulas, the cached teacher equal to the live one, and students that come nearer."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

from stackcomp.core.errors import SettingError, TrainingDiverged, UnsupportedModel
from stackcomp.data import tasks
from stackcomp.data.batches import Collator
from stackcomp.training import DistillationLoss, TaskLoss, TrainSettings
from tests import toys
from tests.training.toy import TASK, classifier, run

PAIRS = {
    "train": [
        {
            "sentence1": "the film was good",
            "sentence2": "a very bad plot and actor"[: 6 + i],
            "label": float(i % 6),
        }
        for i in range(20)
    ]
}


def batch_of(task, tokenizer, count: int = 6) -> dict[str, torch.Tensor]:
    rows = task.encode(tokenizer, "train")
    return Collator(tokenizer)([{"index": i, **rows[i]} for i in range(count)])


def encoder(seed: int = 0, **settings: int) -> BertModel:
    torch.manual_seed(seed)
    shape = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    return BertModel(BertConfig(**{**shape, "num_hidden_layers": 4, **settings})).eval()


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def test_task_losses_are_those_of_the_models(tokenizer) -> None:
    model = classifier().eval()
    batch = batch_of(TASK, tokenizer)
    index = batch.pop("index")
    assert len(index) == 6
    torch.testing.assert_close(TaskLoss(task=TASK)(model, batch), model(**batch).loss)
    pairs = tasks.regression(PAIRS, text=("sentence1", "sentence2"), test=2, selection=2)
    model, batch = classifier(num_labels=1).eval(), batch_of(pairs, tokenizer)
    batch.pop("index")
    torch.testing.assert_close(TaskLoss(task=pairs)(model, batch), model(**batch).loss)
    texts = {"train": [{"text": "the film was very bad and a good plot"}] * 9, "validation": [], "test": []}
    task = tasks.language_modelling(texts, max_length=7)
    model, batch = (
        GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval(),
        batch_of(task, tokenizer),
    )
    batch.pop("index")
    torch.testing.assert_close(TaskLoss(task=task)(model, batch), model(**batch).loss)


def test_distillation_formula(tokenizer) -> None:
    teacher, student = classifier().eval(), perturbed(classifier())
    batch = batch_of(TASK, tokenizer)
    tokens = {key: part for key, part in batch.items() if key not in ("labels", "index")}
    found = DistillationLoss(teacher=teacher, task=TASK, temperature=3.0, logits=0.5, hidden=2.0, labels=0.25)
    ours, theirs = (model(**tokens, output_hidden_states=True) for model in (student, teacher))
    soft = (theirs.logits / 3).softmax(-1)
    divergence = (soft * (soft.log() - (ours.logits / 3).log_softmax(-1))).sum(-1).mean()
    real = batch["attention_mask"].bool()
    hidden = sum(
        ((a - b)[real] ** 2).sum() / (b[real] ** 2).sum()
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)
    )
    labels = functional.cross_entropy(ours.logits, batch["labels"])
    wanted = 0.5 * 9 * divergence + 2.0 * hidden / 3 + 0.25 * labels
    torch.testing.assert_close(found(student, batch), wanted)
    assert found.labelled
    assert not DistillationLoss(teacher=teacher, task=TASK).labelled


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 5.0), (-1.0, 3.0)])
def test_cosines_are_held_against_labels_from_the_least_to_the_greatest(tokenizer, low, high) -> None:
    same = {"sentence1": "the film was good", "sentence2": "the film was good", "label": high}
    rows = [same] * 9 + [{**same, "sentence2": "a very bad plot", "label": low}]
    loss = TaskLoss(task=tasks.similarity({"train": rows, "test": rows}, selection="test"))
    same_texts = batch_of(tasks.similarity([same] * 9, test=1, selection=1), tokenizer)
    assert loss(encoder(), same_texts).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["classification", "regression", "similarity", "language_modelling"])
def test_a_student_equal_to_its_teacher_has_no_loss(tokenizer, kind: str) -> None:
    if kind == "classification":
        task, model = TASK, classifier().eval()
    elif kind == "regression":
        task, model = (
            tasks.regression(PAIRS, text=("sentence1", "sentence2"), test=2, selection=2),
            classifier(num_labels=1).eval(),
        )
    elif kind == "similarity":
        task, model = tasks.similarity(PAIRS, test=2, selection=2), encoder()
    else:
        texts = {"train": [{"text": "the film was very bad"}] * 9, "validation": [], "test": []}
        task = tasks.language_modelling(texts, max_length=7)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval()
    batch = batch_of(task, tokenizer)
    loss = DistillationLoss(teacher=model, task=task)
    assert loss(model, batch).item() == pytest.approx(0, abs=1e-5)
    assert loss(perturbed(type(model)(model.config)), batch).item() > 0.01


def test_fewer_layers_follow_evenly_spaced_ones(tokenizer) -> None:
    task = tasks.similarity(PAIRS, test=2, selection=2)
    teacher, student = encoder(), encoder(num_hidden_layers=2)
    batch = batch_of(task, tokenizer)
    tokens = {key: part for key, part in batch.items() if key not in ("labels", "index")}
    found = DistillationLoss(teacher=teacher, task=task, logits=0)(student, batch)
    ours, theirs = (model(**tokens, output_hidden_states=True).hidden_states for model in (student, teacher))
    real = batch["attention_mask"].bool()
    wanted = [
        ((ours[i] - theirs[2 * i])[real] ** 2).sum() / (theirs[2 * i][real] ** 2).sum() for i in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    with pytest.raises(UnsupportedModel, match="the teacher's width is 8 and the student's 4; set hidden=0"):
        DistillationLoss(teacher=teacher, task=task, logits=0)(encoder(hidden_size=4), batch)


@pytest.mark.parametrize("kind", ["classification", "similarity"])
def test_cached_teacher_trains_as_the_live_one(tokenizer, tmp_path: Path, kind: str) -> None:
    task = TASK if kind == "classification" else tasks.similarity(PAIRS, test=2, selection=2)
    build = classifier if kind == "classification" else encoder
    settings = TrainSettings(epochs=3, batch_size=4, learning_rate=1e-3, dropout=False)
    students = []
    for cache in (True, False):
        teacher = build()
        runs = []
        teacher.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        loss = DistillationLoss(teacher=teacher, task=task, hidden=0, cache=cache)
        student = perturbed(build())
        report = run(student, tokenizer, tmp_path / str(cache), task=task, loss=loss, settings=settings)
        assert len(runs) == (report.steps // 3 if cache else report.steps)
        assert loss._kept is None
        students.append(student)
    for ours, theirs in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_student_comes_nearer_and_the_teacher_stays(tokenizer, tmp_path: Path) -> None:
    task = tasks.similarity(PAIRS, test=2, selection=2, label=None)
    teacher, student = encoder(), perturbed(encoder()).train()
    teacher.train()
    before = [parameter.clone() for parameter in teacher.parameters()]
    loss = DistillationLoss(teacher=teacher, task=task)
    batch = batch_of(tasks.similarity(PAIRS, test=2, selection=2), tokenizer)
    start = loss(student.eval(), batch).item()
    settings = TrainSettings(epochs=20, batch_size=4, learning_rate=1e-2, dropout=False)
    run(student, tokenizer, tmp_path, task=task, loss=loss, settings=settings)
    assert loss(student, batch).item() < start / 2
    assert teacher.training
    assert all(torch.equal(now, then) for now, then in zip(teacher.parameters(), before, strict=True))


def test_wrong_weights_and_teachers_are_refused(tokenizer) -> None:
    teacher = classifier().eval()
    with pytest.raises(SettingError, match="there is nothing to learn"):
        DistillationLoss(teacher=teacher, task=TASK, logits=0, hidden=0)
    with pytest.raises(SettingError, match="hidden=-1"):
        DistillationLoss(teacher=teacher, task=TASK, hidden=-1)
    with pytest.raises(SettingError, match="temperature=0"):
        DistillationLoss(teacher=teacher, task=TASK, temperature=0)
    batch = batch_of(TASK, tokenizer)
    with pytest.raises(UnsupportedModel, match="both must have the same head"):
        DistillationLoss(teacher=classifier(num_labels=3), task=TASK, hidden=0)(teacher, batch)
    with torch.no_grad():
        teacher.classifier.bias[0] = torch.inf
    with pytest.raises(TrainingDiverged, match="teacher's outputs are not finite"):
        DistillationLoss(teacher=teacher, task=TASK)(classifier(), batch)


def questions() -> tuple[tasks.Task, PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    task, tokenizer = toys.question_task(), toys.tokenizer()
    return task, tokenizer, batch_of(task, tokenizer)


def test_answers_are_learned_as_the_model_itself_says_where_nothing_is_padded() -> None:
    task, tokenizer, _ = questions()
    model = toys.make("bert", "AutoModelForQuestionAnswering")
    rows = task.encode(tokenizer, "train")
    length = len(rows["input_ids"][0])
    rows = [{"index": i, **rows[i]} for i in range(40) if len(rows["input_ids"][i]) == length]
    batch = Collator(tokenizer)(rows)
    start, end = batch["labels"].unbind(1)
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    wanted = model(**tokens, start_positions=start, end_positions=end).loss
    torch.testing.assert_close(TaskLoss(task=task)(model, batch), wanted)


def test_distillation_of_answers() -> None:
    task, _, batch = questions()
    teacher, student = (toys.make("bert", "AutoModelForQuestionAnswering", seed=seed) for seed in (0, 1))
    found = DistillationLoss(teacher=teacher, task=task, temperature=2.0, hidden=0, labels=0.5)(
        student, batch
    )
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = student(**tokens), teacher(**tokens)
    wanted = []
    for side, key in enumerate(("start_logits", "end_logits")):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            soft = (theirs[key][row][mask] / 2).softmax(-1)
            divergence = (soft * (soft.log() - (ours[key][row][mask] / 2).log_softmax(-1))).sum()
            missed = -ours[key][row][mask].log_softmax(-1)[batch["labels"][row, side]]
            wanted.append(4 * divergence + 0.5 * missed)
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    assert DistillationLoss(teacher=teacher, task=task)(teacher, batch).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_answers_are_learned(tmp_path: Path, distilled: bool) -> None:
    task, tokenizer, batch = questions()
    model = toys.make("bert", "AutoModelForQuestionAnswering")
    teacher = toys.make("bert", "AutoModelForQuestionAnswering", seed=1)
    loss = DistillationLoss(teacher=teacher, task=task, hidden=0) if distilled else TaskLoss(task=task)
    before = loss(model, batch).item()
    settings = TrainSettings(epochs=2, batch_size=8, learning_rate=1e-2)
    run(model, tokenizer, tmp_path, task=task, loss=loss, settings=settings)
    assert loss(model.eval(), batch).item() < before


def test_hidden_states_of_two_parts_are_refused_with_the_way_out(tokenizer) -> None:
    sizes = {f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=30, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    model, batch = BartForSequenceClassification(config), batch_of(TASK, tokenizer)
    batch["input_ids"][:, -1] = config.eos_token_id
    with pytest.raises(UnsupportedModel, match="set hidden=0"):
        DistillationLoss(task=TASK, teacher=model)(model, batch)
