import sys

import pytest

import stackcomp as sc
from stackcomp.core import fingerprint

BASE = {"seed": 0, "data": "d", "machine": {"threads": 2}}


def test_everything_a_result_depends_on_changes_it():
    first = fingerprint.link("start", sc.Int8Weights(), **BASE)
    assert first == fingerprint.link("start", sc.Int8Weights(), **BASE)
    others = [
        fingerprint.link("other", sc.Int8Weights(), **BASE),
        fingerprint.link("start", sc.Int8Weights(only="a"), **BASE),
        fingerprint.link("start", sc.Int8Dynamic(), **BASE),
        fingerprint.link("start", sc.Int8Weights(), **{**BASE, "seed": 1}),
        fingerprint.link("start", sc.Int8Weights(), **{**BASE, "data": "e"}),
        fingerprint.link("start", sc.Int8Weights(), **{**BASE, "machine": {"threads": 1}}),
    ]
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "text",
    [
        "def go():\n    from madeup.b import x\n",
        "import madeup.b\n",
        "from madeup import b\n",
        "from .b import x\n",
        "from . import b\n",
        "from .inner import z\n",
    ],
)
def test_the_source_digest_follows_imports(tmp_path, monkeypatch, text):
    package = tmp_path / "madeup"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(text)
    (package / "b.py").write_text("x = 1\n")
    (package / "c.py").write_text("y = 1\n")
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").write_text("from ..b import x as z\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def digest():
        fingerprint.source_digest.cache_clear()
        return fingerprint.source_digest("madeup.a")

    before = digest()
    (package / "c.py").write_text("y = 2\n")
    assert digest() == before
    (package / "b.py").write_text("x = 2\n")
    assert digest() != before
    assert "madeup.b" not in sys.modules
    fingerprint.source_digest.cache_clear()


@pytest.mark.parametrize("text", ["from stackcomp.core.settings import within\n", "import stackcomp as sc\n"])
def test_a_pass_of_another_package_follows_what_it_imports_of_ours(tmp_path, monkeypatch, text):
    (tmp_path / "outsider.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found, other = fingerprint._file, tmp_path / "other.py"
    other.write_text("within = print\n")

    def digest():
        fingerprint.source_digest.cache_clear()
        return fingerprint.source_digest("outsider")

    before = digest()
    monkeypatch.setattr(
        fingerprint, "_file", lambda name: other if name == "stackcomp.core.settings" else found(name)
    )
    assert digest() != before
    fingerprint.source_digest.cache_clear()
