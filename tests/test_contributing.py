"""The pass that CONTRIBUTING shows is a real one: it registers by entry point, keeps its contract and stacks."""

import re
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import stackcomp as sc
from stackcomp import passes
from stackcomp.core.errors import ContractBroken, PipelineRefused
from tests import toys
from tests.passes.test_conformance import manager

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """A package outside ours that holds the documented pass."""
    (code,) = re.findall(r"   ```python\n(.*?)   ```", PAGE.read_text("utf8"), re.DOTALL)
    (tmp_path / "outside.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "outside", raising=False)


def register(monkeypatch, value):
    point = EntryPoint(name="mine", value=value, group="stackcomp.passes")
    monkeypatch.setattr(passes, "entry_points", lambda group: [point])
    passes.registered.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    passes.registered.cache_clear()


def test_a_pass_of_another_package_joins_by_entry_point_and_stacks(outside, monkeypatch, tmp_path):
    register(monkeypatch, "outside:RandomPrune")
    pipeline = sc.Pipeline(sc.RandomPrune(sparsity=0.75), sc.Int8Weights())
    assert sc.parse(repr(pipeline)) == pipeline
    result = manager(tmp_path / "out", toys.tokenizer()).run(toys.bert_classifier(), pipeline)
    assert result.ledger.rows[1].layer_bytes < result.ledger.rows[0].layer_bytes / 2
    with pytest.raises(PipelineRefused, match="a legal order: RandomPrune"):
        sc.check(sc.Pipeline(sc.Int8Weights(), sc.RandomPrune()))


def test_an_entry_point_that_is_no_pass_is_refused_loudly(outside, monkeypatch):
    register(monkeypatch, "outside:within")
    with pytest.raises(ContractBroken, match="'mine'"):
        passes.registered()
