"""The model card of a run: what it says is true, and what a person writes over it stays."""

import re
import subprocess
import sys

import pytest

import stackcomp as sc
from stackcomp import card
from tests import toys
from tests.passes.test_conformance import manager

ROUNDED = sc.Pipeline(sc.MagnitudePrune(sparsity=0.5), sc.LowBitWeights(bits=4))


@pytest.fixture
def tokenizer():
    return toys.tokenizer()


def made(folder, tokenizer, pipeline, **settings):
    result = manager(folder, tokenizer).run(toys.bert_classifier(), pipeline, **settings)
    return result, (folder / card.NAME).read_text()


def test_it_says_how_to_load_what_was_done_and_what_came_of_it(tokenizer, tmp_path):
    result, text = made(tmp_path / "out", tokenizer, ROUNDED)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in text
    (declared,) = re.findall(r"```text\n(.+?)\n```", text, re.DOTALL)
    assert sc.parse(declared) == ROUNDED
    last = result.ledger.rows[-1]
    assert f"{result.ledger.compression(last):.2f}x smaller" in text
    assert f"{last.measured.score:.2f} ± {last.measured.noise:.2f}" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(result.ledger.rows)
    (code,) = re.findall(r"```python\n(.+?)\n```", text, re.DOTALL)
    told = f"folder = {str(tmp_path / 'out')!r}\n{code}\nprint(type(model).__name__)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == type(result.model).__name__


def test_an_ordinary_result_is_called_so(tokenizer, tmp_path):
    _, text = made(tmp_path / "out", tokenizer, sc.Pipeline(sc.DropLayers(keep=1)))
    assert "ordinary checkpoint" in text
    assert "import stackcomp" not in text


def test_without_a_task_nothing_is_said_of_quality(tokenizer, tmp_path):
    sc.PassManager(out=tmp_path / "out").run(toys.bert_classifier(), ROUNDED)
    assert "quality was not measured" in (tmp_path / "out" / card.NAME).read_text()


def test_it_names_a_model_of_a_hub(tokenizer, tmp_path):
    model = toys.bert_classifier()
    model.config._name_or_path = "someone/a-model"
    sc.PassManager(out=tmp_path / "out").run(model, ROUNDED)
    assert "\nbase_model: someone/a-model\n" in (tmp_path / "out" / card.NAME).read_text()


@pytest.mark.parametrize("edited", [True, False])
def test_what_a_person_made_of_it_stays_and_the_checkpoint_is_whole(edited, tokenizer, tmp_path):
    _, text = made(tmp_path / "out", tokenizer, ROUNDED)
    path = tmp_path / "out" / card.NAME
    mine = "# Mod\u00e8le\n" if edited else f"{card.OURS}\nold"
    path.write_text(mine, "latin-1")
    sc.load(tmp_path / "out")
    manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), ROUNDED, resume=True)
    assert path.read_bytes() == (mine.encode("latin-1") if edited else text.encode())
