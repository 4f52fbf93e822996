"""A toy model as a folder, and where the counted passes count."""

import pytest

from tests import toys


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A toy classifier with its tokenizer, as a folder."""
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    toys.bert_classifier().save_pretrained(tmp_path / "model")
    toys.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
