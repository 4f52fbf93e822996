"""The manager on a toy model: what it refuses, what it leaves, and what survives a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import stackcomp as sc
from stackcomp import checkpoint, loading, metrics, nn
from stackcomp.core.context import quiet
from stackcomp.core.contract import Contract
from stackcomp.core.errors import (
    BadWeights,
    CheckpointError,
    ContractBroken,
    DataError,
    MissingNeed,
    NothingToCompress,
    OutputInUse,
    PipelineRefused,
    SelectionEmpty,
    SettingError,
    UnsupportedModel,
)
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Pass
from stackcomp.run import Measuring
from tests import toys
from tests.passes.test_conformance import manager

STACK = sc.Pipeline(sc.MagnitudePrune(sparsity=0.5), sc.Distill(steps=3, batch_size=4), sc.Int8Weights())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_leaves_a_checkpoint_a_recipe_and_a_ledger_that_adds_up(model, tokenizer, tmp_path):
    result = manager(tmp_path / "out", tokenizer).run(model, STACK)
    assert [row.name for row in result.ledger.rows] == ["dense", "MagnitudePrune", "Distill", "Int8Weights"]
    for row, folder in zip(result.ledger.rows, sorted((tmp_path / "out" / "steps").iterdir()), strict=True):
        assert row.size_bytes == (folder / "model.safetensors").stat().st_size
        assert row.measured.score is not None
    assert result.ledger.rows[1].size_bytes < result.ledger.rows[0].size_bytes
    assert (
        result.ledger.rows[3].layer_bytes
        < result.ledger.rows[2].layer_bytes
        < result.ledger.rows[0].layer_bytes
    )
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert sc.parse(recipe["pipeline"]) == STACK
    assert not (tmp_path / "out" / "scratch").exists()


def test_it_reloads_in_a_new_process_with_the_same_logits(model, tokenizer, tmp_path):
    result = manager(tmp_path / "out", tokenizer).run(model, STACK)
    torch.save(toys.batch(tokenizer), tmp_path / "batch.pt")
    code = (
        "import sys, torch, stackcomp\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"batch = torch.load({str(tmp_path / 'batch.pt')!r})\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"with torch.no_grad(): torch.save(model(**batch).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), result.model(**toys.batch(tokenizer)).logits)


def test_a_refused_pipeline_leaves_nothing(model, tokenizer, tmp_path):
    with pytest.raises(PipelineRefused, match="a legal order"):
        manager(tmp_path / "out", tokenizer).run(model, sc.Pipeline(sc.Int8Weights(), sc.MagnitudePrune()))
    assert not (tmp_path / "out").exists()


def test_bad_weights_are_named_before_any_compute(model, tokenizer, tmp_path):
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(BadWeights, match=r"encoder\.layer\.1\.output\.dense"):
        manager(tmp_path / "out", tokenizer).run(model, STACK)
    assert not (tmp_path / "out").exists()


def test_a_glob_that_matches_nothing_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(SelectionEmpty, match="nearest paths"):
        manager(tmp_path / "out", tokenizer).run(model, sc.Int8Weights(only="decoder.*"))


def test_a_model_that_does_not_fit_the_task_is_refused_before_anything_is_written(tokenizer, tmp_path):
    labelled = toys.classification_task()
    scored = sc.tasks.regression(
        {"train": [{"text": "a film", "label": 0.5}]}, name="scored", test="train", max_length=16
    )
    three = toys.classifier("bert", num_labels=3)
    three.save_pretrained(tmp_path / "three")
    for model, task, said in (
        (toys.make("bert"), labelled, "no head for task 'toy': load the model as AutoModelForSequence"),
        (toys.classifier("bert", num_labels=1), labelled, "has 1 outputs, and task 'toy' wants 2"),
        (three, scored, "has 3 outputs, and task 'scored' wants 1"),
        (tmp_path / "three", labelled, "three: its weights are of other shapes"),
        (tmp_path / "none", labelled, "none: transformers finds no model there"),
        (toys.classifier("roberta"), replace(labelled, max_length=40), "more than the 39 positions"),
    ):
        with pytest.raises(sc.errors.StackcompError, match=said):
            sc.PassManager(out=tmp_path / "out", task=task, tokenizer=tokenizer).run(model, sc.Int8Weights())
    assert not (tmp_path / "out").exists()
    for model, task in ((three, labelled), (toys.classifier("roberta"), replace(labelled, max_length=39))):
        loading.check_fits(model, task)


def test_resume_with_another_tokenizer_is_refused_and_with_other_texts_runs_again(model, tokenizer, tmp_path):
    def run(tokenizer, texts, out="out"):
        settings = {"task": toys.classification_task(), "tokenizer": tokenizer, "calibration": texts}
        made = sc.PassManager(out=tmp_path / out, **settings, progress=quiet)
        return made.run(model, sc.LowRank(ratio=1.5), resume=True).ledger.rows[-1].fingerprint

    same = [f"the film is good {i}" for i in range(5)]  # what a column of `datasets` shows of itself
    texts, others = (Dataset.from_dict({"text": [*same, *[word] * 20]})["text"] for word in ("fine", "bad"))
    first = run(tokenizer, texts)
    tokenizer(["the film"], padding=True, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    assert run(tokenizer, texts) == first
    assert run(tokenizer, others) != first
    other = toys.tokenizer()
    other.backend_tokenizer.post_processor = None
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(OutputInUse, match="another model or tokenizer"):
        run(other, texts)
    assert run(other, texts, out="other") != first


def test_resume_with_another_model_loses_nothing(model, tokenizer, tmp_path):
    manager(tmp_path / "out", tokenizer).run(model, STACK)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OutputInUse, match="give another folder"):
        manager(tmp_path / "out", tokenizer).run(toys.classifier("bert", seed=1), STACK, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("texts", [np.array(["the film is good " * 40] * 9), [("the film", "a plot")] * 9])
def test_calibration_texts_without_a_task_are_cut_to_what_the_model_reads(texts, model, tokenizer, tmp_path):
    run = sc.PassManager(out=tmp_path / "out", tokenizer=tokenizer, calibration=texts, progress=quiet)
    assert run.run(model, sc.GPTQ(samples=9, only="encoder")).ledger.rows[-1].name == "GPTQ"


def test_what_is_no_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(UnsupportedModel, match="Linear"):
        manager(tmp_path / "out", tokenizer).run(torch.nn.Linear(3, 3), STACK)


def test_a_model_without_a_linear_layer_is_refused():
    from transformers import PreTrainedConfig, PreTrainedModel

    class Bare(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.norm = torch.nn.LayerNorm(4)

    with pytest.raises(NothingToCompress, match="no linear layer"):
        sc.check(sc.Int8Weights(), Bare())


def test_needs_are_checked_first(model, tokenizer, tmp_path):
    with pytest.raises(MissingNeed, match="Distill needs a task"):
        sc.PassManager(out=tmp_path / "out", tokenizer=tokenizer).run(model, STACK)
    with pytest.raises(MissingNeed, match="tokenizer"):
        sc.PassManager(out=tmp_path / "out", task=toys.classification_task()).run(model, STACK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "pipeline", "said"),
    [
        ({"task": "sst2"}, sc.Int8Weights(), "task='sst2' is no task"),
        ({}, sc.Int8Weights, "is no pipeline"),
        ({"out": 3}, sc.Int8Weights(), "out=3 is no folder"),
        ({"calibration": []}, sc.Int8Weights(), "holds no text"),
        ({"calibration": np.array([])}, sc.Int8Weights(), "holds no text"),
        ({"calibration": "a film"}, sc.Int8Weights(), "is no list of texts"),
        ({"calibration": (text for text in "ab")}, sc.Int8Weights(), "is no list of texts"),
        ({"calibration": ["a film", 3]}, sc.Int8Weights(), r"calibration\[1\]=3 is no text"),
        ({"calibration": [("a", None)]}, sc.Int8Weights(), r"calibration\[0\]=\('a', None\) is no text"),
        ({"seed": -1}, sc.Int8Weights(), "seed=-1"),
        ({"seed": 2**32}, sc.Int8Weights(), "seed=4294967296"),
        ({"measuring": {}}, sc.Int8Weights(), r"measuring={}: build it, as in stackcomp\.Measuring"),
        ({"device": "gpu"}, sc.Int8Weights(), "device='gpu' cannot be used"),
        ({"tokenizer": 5}, sc.Int8Weights(), "tokenizer=5 is no tokenizer"),
        ({"tokenizer": "no/such/folder"}, sc.Int8Weights(), "holds no tokenizer"),
    ],
)
def test_wrong_types_are_refused_before_anything_is_written(settings, pipeline, said, model, tmp_path):
    assert sc.Measuring(latency=False)  # which a message names
    with pytest.raises(sc.errors.StackcompError, match=said):
        sc.PassManager(**{"out": tmp_path / "out", **settings}).run(model, pipeline)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"split": "dev"}, {"limit": 0}, {"batch_size": 1.5}, {"latency_repeats": 0}]
)
def test_what_is_to_be_measured_is_judged_where_it_is_written(settings):
    (name,) = settings
    with pytest.raises(SettingError, match=f"{name}="):
        Measuring(**settings)


def test_unlabelled_data_are_refused_before_the_first_pass(model, tokenizer, tmp_path):
    task = toys.classification_task(labelled=False)
    run = sc.PassManager(out=tmp_path / "out", task=task, tokenizer=tokenizer)
    with pytest.raises((DataError, MissingNeed), match="label"):
        run.run(model, sc.Pipeline(sc.MagnitudePrune(), sc.FineTune(steps=2)))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputInUse, match="something else"):
        manager(tmp_path / "mine", tokenizer).run(model, sc.Int8Weights(), resume=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    manager(tmp_path / "out", tokenizer).run(model, sc.Int8Weights())
    with pytest.raises(OutputInUse, match="resume"):
        manager(tmp_path / "out", tokenizer).run(model, sc.Int8Weights())


def test_resume_runs_only_what_is_not_there(model, tokenizer, tmp_path):
    manager(tmp_path / "out", tokenizer).run(model, sc.Pipeline(*STACK.steps[:2]))
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "steps").rglob("model.safetensors")
    }
    result = manager(tmp_path / "out", tokenizer).run(model, STACK, resume=True)
    assert len(result.ledger.rows) == 4
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    again = manager(tmp_path / "whole", tokenizer).run(model, STACK)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert again.ledger.rows[-1].fingerprint == result.ledger.rows[-1].fingerprint


def test_resume_with_other_settings_forgets_what_no_longer_holds(model, tokenizer, tmp_path):
    manager(tmp_path / "out", tokenizer).run(model, STACK)
    result = manager(tmp_path / "out", tokenizer).run(
        model, sc.Pipeline(sc.MagnitudePrune(sparsity=0.5), sc.Int8Dynamic()), resume=True
    )
    assert [row.name for row in result.ledger.rows] == ["dense", "MagnitudePrune", "Int8Dynamic"]
    assert len(list((tmp_path / "out" / "steps").iterdir())) == 3
    assert weights(tmp_path / "out") == weights(tmp_path / "out" / "steps" / "02-int8-dynamic")


def test_a_damaged_step_is_noticed_and_made_again(model, tokenizer, tmp_path):
    manager(tmp_path / "out", tokenizer).run(model, STACK)
    good = weights(tmp_path / "out")
    path = tmp_path / "out" / "steps" / "02-distill" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        checkpoint.verify(path.parent)
    manager(tmp_path / "out", tokenizer).run(model, STACK, resume=True)
    checkpoint.verify(path.parent)
    assert weights(tmp_path / "out") == good


@dataclass(frozen=True, kw_only=True, repr=False)
class Liar(Pass):
    """Says it rounds, and does nothing."""

    paper = "none"

    @property
    def contract(self):
        return Contract(
            requires=facts(Fact.FLOAT), adds=facts(Fact.INT8), removes=facts(Fact.FLOAT, Fact.TRAINABLE)
        )

    def apply(self, model, context):
        return {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Sneak(Liar):
    """Says it does nothing, and rounds."""

    @property
    def contract(self):
        return Contract()

    def apply(self, model, context):
        for id_ in context.targets:
            nn.quantize(model, id_, dynamic=False)
        return {}


@pytest.mark.parametrize("wrong", [Liar(), Sneak()])
def test_a_pass_that_breaks_its_contract_is_named(wrong, model, tokenizer, tmp_path):
    with pytest.raises(ContractBroken, match=f"{wrong.name} broke its contract at encoder"):
        manager(tmp_path / "out", tokenizer).run(model, wrong)
    assert not checkpoint.is_ours(tmp_path / "out")


def test_a_full_disk_leaves_nothing_half_written_and_resumes(model, tokenizer, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        manager(tmp_path / "out", tokenizer).run(model, STACK)
    monkeypatch.undo()
    for folder in (tmp_path / "out" / "steps").iterdir():
        checkpoint.verify(folder)
    assert not checkpoint.is_ours(tmp_path / "out")
    manager(tmp_path / "out", tokenizer).run(model, STACK, resume=True)
    manager(tmp_path / "whole", tokenizer).run(model, STACK)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


KILLED = """
import sys, torch
torch.set_num_threads(1)
import stackcomp as sc
from tests import toys
from tests.passes.test_conformance import manager
distill = sc.Distill(steps=12, batch_size=4, save_every=2, dropout=True)
stack = sc.Pipeline(sc.LowRank(ratio=1.5), distill, sc.Int8Weights())
manager(sys.argv[1], toys.tokenizer()).run(toys.bert_classifier(), stack, resume=True)
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder)], stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(tmp_path, seed, whole_run):
    """Kill at a random moment of what a whole run takes once it writes, then resume."""
    seconds, expected = whole_run
    process = start(tmp_path / "out")
    while not (tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if checkpoint.is_ours(tmp_path / "out"):
        checkpoint.verify(tmp_path / "out")
    assert start(tmp_path / "out").wait() == 0
    assert weights(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Seconds from the first write to the end of an uninterrupted run, and its weights."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(out)
    while not out.exists() and process.poll() is None:
        time.sleep(0.005)
    began = time.perf_counter()
    assert process.wait() == 0
    return time.perf_counter() - began, weights(out)


def test_questions_are_compressed_distilled_scored_and_reloaded(tokenizer, tmp_path):
    folder, task = tmp_path / "base", toys.question_task()
    toys.make("bert").save_pretrained(folder)  # no head for questions: one is drawn
    stack = sc.Pipeline(
        sc.DenseSparse(ratio=1.5, data_aware=True, samples=8),
        sc.Distill(steps=3, batch_size=4, labels=0.5),
        sc.Int8Weights(),
    )
    run = manager(tmp_path / "out", tokenizer, task=task)
    result = run.run(folder, stack)
    rows = result.ledger.rows
    assert [row.name for row in rows] == ["dense", "DenseSparse", "Distill", "Int8Weights"]
    assert rows[3].layer_bytes < rows[1].layer_bytes < rows[0].layer_bytes
    assert {(row.measured.metric, row.measured.examples) for row in rows} == {("f1", 8)}
    again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(again(**batch).end_logits, result.model(**batch).end_logits)
    assert metrics.evaluate(again, tokenizer, task, limit=8).value == rows[3].measured.score


def test_what_was_noted_of_questions_is_scored_as_it_was(tokenizer, tmp_path):
    """A second pipeline compares with what the first one noted of the model as it came, in exact matches too."""
    task = toys.question_task(metric="exact_match")
    model = toys.make("bert", "AutoModelForQuestionAnswering")
    first = manager(tmp_path / "out", tokenizer, task=task).run(model, sc.Pipeline(sc.MagnitudePrune()))
    more = sc.Pipeline(sc.MagnitudePrune(), sc.Int8Weights())
    second = manager(tmp_path / "out", tokenizer, task=task).run(model, more, resume=True)
    fresh = manager(tmp_path / "fresh", tokenizer, task=task).run(model, more)
    figures = [[row.measured.difference for row in run.ledger.rows] for run in (second, fresh)]
    assert figures[0] == figures[1]
    assert first.ledger.rows[0].measured.output_error is None
