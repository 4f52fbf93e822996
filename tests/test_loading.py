"""Models from folders: the head of the task, and what does not fit it."""

from dataclasses import replace

import pytest
import torch

from stackcomp import checkpoint, loading
from stackcomp.core.errors import CheckpointError, SettingError, UnsupportedModel
from tests import toys


def test_a_model_whose_files_lack_a_layer_is_refused_and_one_without_a_head_is_not(tmp_path):
    toys.make("bert").save_pretrained(tmp_path / "bare")
    assert loading.load_model(tmp_path / "bare", toys.classification_task()).classifier
    config = tmp_path / "bare" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"16 tensors .*encoder\.layer\.2\.attention"):
        loading.load_model(tmp_path / "bare", toys.classification_task())


def test_the_size_is_predicted_in_the_dtype_that_is_loaded(tmp_path):
    toys.bert_classifier().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16",', ""))
    assert loading.outline(tmp_path / "model").dtype == torch.bfloat16


def test_what_cannot_be_run_has_no_outline_either(tmp_path):
    task = toys.classification_task()
    toys.classifier("bert", num_labels=3).save_pretrained(tmp_path / "three")
    checkpoint.save(toys.make("bert"), tmp_path / "ours")
    for source in ("three", "ours"):
        with pytest.raises(UnsupportedModel, match="of other shapes" if source == "three" else "no head"):
            loading.outline(tmp_path / source, task)
    toys.make("roberta").save_pretrained(tmp_path / "short")
    loading.outline(tmp_path / "short", replace(task, max_length=39))
    with pytest.raises(SettingError, match="more than the 39 positions"):
        loading.outline(tmp_path / "short", replace(task, max_length=40))


def test_classes_in_another_order_are_refused():
    task = replace(toys.classification_task(), labels=("no", "yes"))
    model = toys.bert_classifier()
    loading.check_fits(model, task)  # whose config names none
    for order in (("No", "Yes"), ("bad", "good")):
        model.config.id2label = dict(enumerate(order))
        loading.check_fits(model, task)
    model.config.id2label = {0: "yes", 1: "no"}
    with pytest.raises(
        SettingError, match=r"the model's are \('yes', 'no'\) .*give labels= in the model's order"
    ):
        loading.check_fits(model, task)


@pytest.mark.parametrize("padding", [None, -1, toys.VOCABULARY])
def test_a_head_that_cannot_tell_padding_is_refused_with_the_way_out(padding):
    task = toys.classification_task()
    for family in ("gpt2", "llama"):
        model = toys.classifier(family)
        loading.check_fits(model, task)
        model.config.pad_token_id = padding
        with pytest.raises(UnsupportedModel, match=r"set model\.config\.pad_token_id"):
            loading.check_fits(model, task)
    model = toys.bert_classifier()
    model.config.pad_token_id = None
    loading.check_fits(model, task)
