"""Attention scores and relations: what models of every family really attend with, the formulas, and students of every shape."""

import copy
import math

import pytest
import torch
import transformers
from torch.nn import functional

import stackcomp as sc
from stackcomp.core.errors import SettingError, UnsupportedModel
from stackcomp.core.families import FAMILIES
from stackcomp.manager import plan_of
from stackcomp.training import DistillationLoss
from stackcomp.training.attention import caught, depth
from tests import toys
from tests.passes.test_conformance import apply

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
TASK = toys.classification_task()


def normed(seed=0):
    """Qwen3: queries and keys are normalised, keys and values shared."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 8, **GROUPED}
    config = transformers.Qwen3Config(vocab_size=toys.VOCABULARY, pad_token_id=toys.PAD, **sizes)
    model = transformers.Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


MODELS = {
    **{family: lambda seed=0, family=family: toys.classifier(family, seed=seed) for family in toys.FAMILIES},
    "llama-grouped": lambda seed=0: toys.classifier("llama", seed=seed, **GROUPED),
    "qwen3": normed,
}


@pytest.fixture
def tokenizer():
    return toys.tokenizer()


families = pytest.mark.parametrize("family", MODELS)


def inner(teacher, **weights):
    return DistillationLoss(teacher=teacher, task=TASK, **{"logits": 0, "hidden": 0, **weights})


def three_kinds(model, layer, batch):
    """Queries, keys and values of a BERT-like layer, from its weights and hidden states."""
    states = model(**batch, output_hidden_states=True).hidden_states[layer]
    attention = model.bert.encoder.layer[layer].attention.self
    return [part(states) for part in (attention.query, attention.key, attention.value)]


@families
def test_scores_are_those_that_the_model_attends_with(family, tokenizer):
    model, batch = MODELS[family](), toys.batch(tokenizer)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs, heads = caught(model, (0, 1), lambda: model(**batch, output_attentions=True))
    real = batch["attention_mask"].bool()
    for layer, maps in zip(heads, outputs.attentions, strict=True):
        scores = layer.scores(batch["attention_mask"]).masked_fill(~real[:, None, None, :], -1e9)
        if family in ("gpt2", "llama", "llama-grouped", "qwen3"):
            assert not (scores.triu(1) * real[:, None, None, :]).any()
            scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        torch.testing.assert_close(scores.softmax(-1).transpose(1, 2)[real], maps.transpose(1, 2)[real])


@families
@pytest.mark.parametrize("weight", ["attention", "relations"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_another_has_one(family, weight, tokenizer):
    teacher, batch = MODELS[family](), toys.batch(tokenizer)
    loss = inner(teacher, **{weight: 1.0})
    student = copy.deepcopy(teacher)
    assert loss(student, batch).item() == pytest.approx(0, abs=1e-6)
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())
    assert loss(MODELS[family](seed=1), batch).item() > 0.01


def test_the_formula_of_attention(tokenizer):
    teacher, student = toys.classifier("bert", num_hidden_layers=4), toys.classifier("bert", seed=1)
    batch, wanted = toys.batch(tokenizer), []
    for ours, theirs in ((0, 1), (1, 3)):  # layer 1 of 2 follows layer 2 of 4
        error = energy = 0.0
        pairs = (three_kinds(student, ours, batch)[:2], three_kinds(teacher, theirs, batch)[:2])
        for text, count in enumerate(batch["attention_mask"].sum(1)):
            for first in (0, 8):
                mine, given = (
                    q[text, :count, first : first + 8] @ k[text, :count, first : first + 8].T / math.sqrt(8)
                    for q, k in pairs
                )
                error, energy = error + ((mine - given) ** 2).sum(), energy + (given**2).sum()
        wanted.append(error / energy)
    found = inner(teacher, attention=3.0)(student, batch)
    torch.testing.assert_close(found, 3 * torch.stack(wanted).mean())


@pytest.mark.parametrize("heads", [None, 4])
def test_the_formula_of_relations(heads, tokenizer):
    teacher, student = toys.classifier("bert", num_hidden_layers=4), toys.classifier("bert", seed=1)
    batch, wanted = toys.batch(tokenizer), []
    pairs = zip(three_kinds(student, 1, batch), three_kinds(teacher, 3, batch), strict=True)
    width = 16 // (heads or 2)
    for mine, given in pairs:
        for text, count in enumerate(batch["attention_mask"].sum(1)):
            for first in range(0, 16, width):
                a, b = (part[text, :count, first : first + width] for part in (mine, given))
                p, q = ((x @ x.T / math.sqrt(width)).softmax(-1) for x in (b, a))
                wanted.append((p * (p / q).log()).sum(-1))
    found = inner(teacher, relations=0.5, relation_heads=heads)(student, batch)
    torch.testing.assert_close(found, 0.5 * torch.cat(wanted).mean())


@families
def test_padding_does_not_matter(family, tokenizer):
    teacher, student, batch = MODELS[family](), MODELS[family](seed=1), toys.batch(tokenizer)
    longer = {
        key: functional.pad(part, (0, 3), value=toys.PAD if key == "input_ids" else 0)
        for key, part in batch.items()
    }
    loss = inner(teacher, attention=1.0, relations=1.0)
    torch.testing.assert_close(loss(student, longer), loss(student, batch))


@families
def test_gradients_reach_what_is_compared_and_not_the_teacher(family, tokenizer):
    teacher, student, batch = MODELS[family](), MODELS[family](seed=1), toys.batch(tokenizer)
    part, stack = FAMILIES[family.partition("-")[0]].attention, FAMILIES[family.partition("-")[0]].blocks

    def reached(**weights):
        student.zero_grad()
        inner(teacher, **weights)(student, batch).backward()
        last = student.base_model.get_submodule(stack.replace("*", "1"))
        found = [last.get_submodule(path).weight.grad for path in part.into]
        return [gradient is not None and bool(gradient.any()) for gradient in found]

    assert all(reached(relations=1.0))
    assert reached(attention=1.0) == [True, True, False][: len(part.into)]  # its own values, scores know not
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "step",
    [
        sc.LowRank(ratio=1.5, only="*.attention", data_aware=False),
        sc.DenseSparse(ratio=1.4, only="*.attention"),
        sc.MagnitudePrune(only="*.attention"),
        sc.Int8Weights(),
        sc.LowBitWeights(),
        sc.ShareLayers(),
        sc.DropLayers(keep=1),
        sc.PruneNeurons(),
    ],
    ids=lambda step: step.name,
)
def test_students_of_every_form_come_nearer(step, tokenizer, tmp_path):
    teacher, student, batch = toys.bert_classifier(), toys.bert_classifier(), toys.batch(tokenizer)
    apply(step, student, tokenizer, tmp_path)
    loss = inner(teacher, attention=1.0, relations=1.0)
    before = loss(student, batch).item()
    assert before > 1e-6
    values = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss(student, batch), values, allow_unused=True)
    steps = [(value, found) for value, found in zip(values, gradients, strict=True) if found is not None]
    size = 0.02 * before / sum(found.square().sum() for _, found in steps)
    with torch.no_grad():
        for value, found in steps:
            value -= size * found
    assert loss(student, batch).item() < before


@pytest.mark.parametrize(
    ("family", "settings", "left"),
    [("bert", {"num_attention_heads": 4}, 0.75), ("gpt2", {}, 0.5), ("llama", GROUPED, 0.5)],
)
def test_fewer_heads_relate_and_do_not_attend_alike(family, settings, left, tokenizer, tmp_path):
    teacher, student = (toys.classifier(family, **settings) for _ in range(2))
    apply(sc.PruneHeads(keep=left), student, tokenizer, tmp_path)
    batch = toys.batch(tokenizer)
    assert inner(teacher, relations=1.0)(student, batch).item() > 1e-4
    with pytest.raises(UnsupportedModel, match=r"the student has \d heads and that of the teacher \d"):
        inner(teacher, attention=1.0)(student, batch)


def test_other_widths_relate(tokenizer):
    teacher = toys.classifier("bert", hidden_size=24, num_attention_heads=6)
    batch = toys.batch(tokenizer)
    student = toys.bert_classifier()
    assert (
        inner(teacher, relations=1.0)(student, batch).item() > 0.01
    )  # in two heads: what divides 6, 24 and 16
    with pytest.raises(
        SettingError, match="relation_heads=6 does not divide the 16 features that the student's"
    ):
        inner(teacher, relations=1.0, relation_heads=6)(student, batch)
    with pytest.raises(
        SettingError, match="relation_heads=16 does not divide the 24 features that the teacher's"
    ):
        inner(teacher, relations=1.0, relation_heads=16)(student, batch)


def test_plain_encoders_and_decoders_learn_by_relations_alone(tokenizer, tmp_path):
    for family, make, task in (
        ("bert", toys.make, sc.tasks.similarity({"train": PAIRS}, test=2, selection=2, label=None)),
        ("llama", toys.language_model, toys.language_task()),
    ):
        teacher, student = make(family), make(family, seed=1)
        loss = DistillationLoss(teacher=teacher, task=task, logits=0, hidden=0, relations=1.0)
        batch = toys.batch(tokenizer)
        before = loss(student, batch).item()
        step = sc.Distill(epochs=3, learning_rate=1e-2, batch_size=8, logits=0, hidden=0, relations=1.0)
        context = sc.core.context.Context(
            targets=(),
            seed=0,
            scratch=tmp_path / family,
            task=task,
            tokenizer=tokenizer,
            teacher=lambda t=teacher: t,
        )
        step.apply(student, context)
        assert loss(student, batch).item() < 0.9 * before, family


PAIRS = [
    {"sentence1": row["text"], "sentence2": other["text"]}
    for row, other in zip(toys.sentences(24), toys.sentences(24, 9), strict=True)
]


@pytest.mark.parametrize("weight", ["attention", "relations"])
def test_an_unknown_family_is_refused_before_any_compute(weight):
    plan = plan_of(toys.bert_classifier())
    step = sc.Distill(**{weight: 1.0})
    sc.check(step, plan)
    unknown = copy.copy(plan)
    object.__setattr__(unknown, "head_features", None)
    with pytest.raises(UnsupportedModel, match="Distill: how many heads the model has is not known"):
        sc.check(step, unknown)
    sc.check(sc.Distill(), unknown)
    model = transformers.ElectraModel(transformers.ElectraConfig(num_hidden_layers=1))
    with pytest.raises(UnsupportedModel, match="how many heads the model has is not known"):
        depth(model)


def test_a_layer_without_its_attention_is_refused(tokenizer):
    student = toys.bert_classifier()
    del student.bert.encoder.layer[1].attention.self.key
    with pytest.raises(UnsupportedModel, match=r"encoder\.layer\.1\.attention\.self\.key: BertFor"):
        inner(toys.bert_classifier(), relations=1.0)(student, toys.batch(tokenizer))
