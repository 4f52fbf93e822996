"""README, docs and pipelines: every Python block runs, every pipeline is checked, every generated block is up to date."""

import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import transformers

import stackcomp as sc
from benchmarks import report
from stackcomp.cli import main
from stackcomp.core import contract, headers
from stackcomp.passes import registered
from tests import toys

ROOT = Path(__file__).resolve().parent.parent
HAND_WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="generate")


def pages():
    """Every page as (name, text): those written by hand and those generated."""
    yield from ((path.name, path.read_text("utf8")) for path in HAND_WRITTEN)
    yield from ((path, make()) for path, (_, make) in GENERATE["PAGES"].items())


@pytest.fixture(scope="module")
def texts():
    """Every page, made before anything is put in the place of anything."""
    return dict(pages())


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """Names that the hub would give are toys here; a folder is still read as it is."""

    def instead(cls, toy):
        real = cls.from_pretrained
        monkeypatch.setattr(
            cls,
            "from_pretrained",
            lambda name, **options: real(name, **options) if Path(name).is_dir() else toy(),
        )

    instead(transformers.AutoModelForSequenceClassification, toys.bert_classifier)
    instead(transformers.AutoTokenizer, toys.tokenizer)
    monkeypatch.setattr(sc.tasks, "glue", lambda name: toys.classification_task())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda path: path.name)
@pytest.mark.usefixtures("small_world")
def test_python_blocks_run_one_after_the_other(path):
    for code in PYTHON.findall(path.read_text("utf8")):
        run(code)


@pytest.mark.parametrize("page", GENERATE["PAGES"])
@pytest.mark.usefixtures("small_world")
def test_python_blocks_of_generated_pages_run(page, texts):
    for code in PYTHON.findall(texts[page]):
        run(code)


def run(code):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_there_are_blocks_in_every_page_that_should_have_them():
    found = {name for name, text in pages() if PYTHON.search(text)}
    assert {"README.md", "index.md", "concepts.md", "how_to.md", "refused.md"} <= found


def test_console_blocks_name_commands_that_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE)
    for name, text in pages():
        assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(_console(text)))) <= set(targets), name
        for command in re.findall(r"stackcomp (\w+)", "\n".join(_console(text))):
            with pytest.raises(SystemExit) as end:
                main([command, "--help"])
            assert end.value.code == 0, f"{name}: stackcomp {command}"


def _console(text):
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        line for block in blocks for line in block.splitlines() if line.startswith(("make", "stackcomp", "$"))
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.stem)
def test_pipelines_are_checked(path, capsys):
    status = main(["check", str(path)])
    found = capsys.readouterr()
    if path.stem == "refused":
        assert status == 2
        assert "a legal order: DenseSparse" in found.err
    else:
        assert (status, found.err) == (0, "")
        assert "legal on" in found.out


@pytest.mark.parametrize(
    "path",
    sorted({*(ROOT / "pipelines").glob("*.py")} - {ROOT / "pipelines" / "refused.py"}),
    ids=lambda path: path.stem,
)
def test_pipelines_define_what_run_needs(path):
    found = runpy.run_path(str(path))
    assert {"pipeline", "model", "task"} <= found.keys()


def test_relative_links_lead_to_files():
    for path in [*HAND_WRITTEN, ROOT / "CONTRIBUTING.md"]:
        made = GENERATE["PAGES"] if path.parent.name == "docs" else {}
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf8")):
            assert link in made or (path.parent / link).exists(), f"{path.name}: {link}"


def test_generated_blocks_are_up_to_date():
    assert report.Report(root=ROOT).stale() == []


def test_a_changed_row_is_noticed(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- generated: quickstart -->\nold\n<!-- end -->\n")
    found = report.Report(root=tmp_path)
    assert found.stale() == ["README.md"]
    found.write()
    assert found.stale() == []
    assert "Not run yet: `python -m benchmarks.quickstart`" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("<!-- generated: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        found.readme()


def test_the_page_of_passes_tells_every_setting_once(texts):
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", texts["passes.md"], re.DOTALL | re.MULTILINE))
    assert sections.keys() == registered().keys()
    for name, cls in registered().items():
        told = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", sections[name], re.MULTILINE)
        assert sorted(["only", "skip", *(setting for setting, _ in told)]) == sorted(
            field.name for field in fields(cls)
        )
        assert all(meaning for _, meaning in told)
        assert cls.paper in sections[name]
    assert texts["passes.md"].count("see above") < 15


def test_the_page_of_pairs_says_what_the_contracts_say():
    plan, known = headers.plain("bert"), {name: cls() for name, cls in registered().items()}
    (head, *lines) = [line for line in GENERATE["pairs"]().splitlines() if line.startswith("<tr>")]
    assert head.count("<th>") == len(known) + 2
    assert len(lines) == len(known)
    for line, (name, before) in zip(lines, known.items(), strict=True):
        assert f"<th>{name}</th>" in line
        said = [cell == "yes" for cell in re.findall(r"<td [^>]*>(.*?)</td>", line)]
        assert said == [contract.legal([before, after], plan) for after in known.values()]
    assert ">·<" in " ".join(lines)


def test_the_site_builds_strictly_and_quickly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path in GENERATE["PAGES"]:
        assert (tmp_path / path.removesuffix(".md") / "index.html").is_file()
