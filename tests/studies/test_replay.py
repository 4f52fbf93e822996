"""A row run again: the same bytes, or what is not the same; into a fresh folder only."""

import json

import pytest
import torch

from stackcomp.cli import main
from stackcomp.core.errors import OutputInUse, SelectionEmpty, SettingError, StudyRefused
from stackcomp.studies import Rows, Runner
from stackcomp.studies.replay import replay
from tests.studies.counted import applied, study


@pytest.fixture
def ran(folder, tmp_path):
    """A study that has run, and its rows."""
    mine, rows = study(folder), Rows(name="toy", folder=tmp_path / "results")
    Runner(study=mine, rows=rows, out=tmp_path / "out").go()
    return mine, rows


def test_a_row_gives_the_same_bytes_again_with_all_that_leads_to_it(ran, tmp_path):
    before = applied()
    found = replay(*ran, "tuned/rounded", tmp_path / "again")
    assert found.same
    assert found.words.startswith("tuned/rounded: the same bytes (")
    assert applied()[len(before) :] == ["Train", "Prune", "Round"]
    assert found.new["score"] == found.old["score"]


def test_it_has_as_many_threads_as_the_row(ran, tmp_path, monkeypatch):
    mine, rows = ran
    (row,) = (row for row in rows.read() if row["key"] == "tuned")
    before, asked = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    rows.add({**row, "machine": {**row["machine"], "threads": 7}})
    replay(mine, rows, "tuned", tmp_path / "again")
    replay(mine, rows, "tuned", tmp_path / "other", threads=5)
    assert asked == [7, before, 5, before]
    with pytest.raises(SettingError, match="threads=0"):
        replay(mine, rows, "tuned", tmp_path / "none", threads=0)


def test_what_does_not_go_with_it_is_refused(ran, folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        f"from tests.studies.counted import study as made\nstudy = made({str(folder)!r})\n"
    )
    before = applied()
    command = ["study", str(tmp_path / "mine.py"), "--results", str(ran[1].folder), "--replay", "tuned"]
    for more in (["--list"], ["--only", "tuned"], ["--workers", "2"]):
        assert main([*command, *more]) == 2
        assert f"leave out {more[0]}" in capsys.readouterr().err
    assert applied() == before


def test_other_bytes_are_told_with_what_else_is_not_the_same(ran, folder, tmp_path, capsys):
    _, rows = ran
    text = rows.path.read_text("utf8")
    (row,) = (row for row in rows.read() if row["key"] == "tuned/pruned")
    rows.add({**row, "file_sha256": "0" * 64, "versions": {**row["versions"], "torch": "1.0"}})
    (tmp_path / "mine.py").write_text(
        f"from tests.studies.counted import study as made\nstudy = made({str(folder)!r})\n"
    )
    command = ["study", str(tmp_path / "mine.py"), "--results", str(rows.folder), "--replay", "tuned/pruned"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 1
    said = capsys.readouterr().out
    assert "tuned/pruned: other bytes" in said
    assert f"file_sha256: {'0' * 64} in the row" in said
    assert "'torch': '1.0'" in said
    assert "score" not in said.partition("other bytes")[2]
    rows.path.write_text(text)
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert json.loads(text.splitlines()[0])["key"] == "tuned"


def test_what_cannot_be_replayed_is_refused_before_anything_runs(ran, folder, tmp_path):
    mine, rows = ran
    before = applied()
    with pytest.raises(SelectionEmpty, match="the nearest keys are tuned"):
        replay(mine, rows, "tnued", tmp_path / "again")
    with pytest.raises(StudyRefused, match="no finished row"):
        replay(mine, Rows(name="other", folder=tmp_path), "tuned", tmp_path / "again")
    with pytest.raises(OutputInUse):
        replay(mine, rows, "tuned", folder)
    assert applied() == before
