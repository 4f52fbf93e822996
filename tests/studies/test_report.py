"""The report: what it says of hand-made rows, that it opens offline, and the command that writes it."""

import re
from html.parser import HTMLParser

import pytest

import stackcomp as sc
from stackcomp.cli import main
from stackcomp.core.errors import StudyRefused
from stackcomp.studies.report import write
from stackcomp.studies.report.document import Table, html, markdown
from stackcomp.studies.study import Skipped
from tests.studies.analysis.made import row
from tests.studies.counted import Broken, applied

SAID = {
    "date": "2026-11-22",
    "examples": 100,
    "machine": {"processor": "any", "threads": 1},
    "versions": {"torch": "2", "transformers": "5"},
}
ROWS = [
    {**one, **SAID}
    for one in (
        row("half", size=500_000, score=79.5, noise=0.2),
        row("rest", size=750_000, score=79.9, noise=0.2),
        row("half", "rest", size=300_000, score=79.4, noise=0.2),
        row("rest", "half", size=300_000, score=77.0, noise=0.2),
    )
]
for one in ROWS:  # the made rows are of a model of 1,000 bytes
    one["steps"] = [
        {**one["steps"][0], "size_bytes": 1_000_000, "components": one["components"] | {"dense": 999_900}},
        one["steps"][1],
    ]
    one["examples"] = one["steps"][0]["examples"] = 100


def texts(tmp_path, rows=ROWS, skipped=(), **settings):
    """Both files of a report."""
    study = sc.Study(name="toy", entries=(), skipped=tuple(skipped))
    return [path.read_text("utf8") for path in write(study, rows, tmp_path, **settings)]


class Tags(HTMLParser):
    """Refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    page, _ = texts(tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert tags.seen.count("svg") == 1 + 5  # the plot, and a mark for the dense model and every pipeline


def test_both_files_say_the_same_figures(tmp_path):
    for text in texts(tmp_path):
        assert "at a score of at least 79.00: 67% more compression" in text
        assert "alone give 2.67x when multiplied; together they give 3.33x, 25% more" in text
        assert "changes the score by +2.40 ± 0.28 points against the other order" in text
        assert "3.33x in all, the mean of 2 orders" in text
        for one in ROWS:
            assert one["fingerprint"] in text
            assert one["declaration"] in text


def test_tables_in_markdown_are_tables(tmp_path):
    _, text = texts(tmp_path)
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_words_from_outside_cannot_become_tags():
    table = Table(titles=["<b>"], rows=[["a | <script>x\ny"]], code=frozenset({0}))
    assert "<script>" not in html("<i>", ["1 < 2", table])
    assert "| `a \\| <script>x y` |" in markdown("t", [table])


def test_a_floor_out_of_reach_names_the_best_and_the_gap(tmp_path):
    for text in texts(tmp_path, floor=79.45):
        assert "The smallest single technique that reaches it is half" in text
        assert re.search(
            r"No stack reaches it: the best, half (>|&gt;) rest \(0\.30 MB, 79\.40\), misses it by 0\.05 points",
            text,
        )


def test_failed_and_illegal_pipelines_are_in_it_with_their_words(tmp_path):
    failed = {
        **ROWS[0],
        "key": "odd/0",
        "labels": {"passes": ["odd"], "strengths": [""]},
        "error": {"type": "BadWeights", "message": "NaN in layer 3"},
    }
    illegal = Skipped(
        passes=("rest", "odd"),
        strengths=("", ""),
        refused="odd",
        why="requires 'float', which is missing on the weight of x",
    )
    for text in texts(tmp_path, [*ROWS, failed], [illegal]):
        assert "BadWeights: NaN in layer 3" in text
        assert "attribution is undefined: odd: failed with BadWeights" in text
        assert re.search("odd requires ('|&#x27;)float", text)
        assert "4 have finished, 1 failed" in text


FILE = """
import stackcomp as sc
from tests import toys
from tests.studies.counted import Broken, Prune, Round

study = sc.combinations(
    name="toy", model={folder!r}, task=toys.classification_task(), limit=8,
    passes={{"prune": Prune(sparsity=0.5), "round": Round(), "broken": Broken()}},
)
"""


@pytest.mark.usefixtures("folder")
def test_from_the_declaration_to_the_report(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FILE.format(folder=str(folder)))
    places = ["--results", str(tmp_path / "results")]
    assert main(["study", str(tmp_path / "mine.py"), *places, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "left out" in said
    assert "times: prune requires 'float'" in said
    assert applied() == ["Prune", "Round", "Round"]
    command = ["report", str(tmp_path / "mine.py"), *places, "--out", str(tmp_path / "report")]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "report" / f"toy.{end}") for end in ("html", "md")
    ]
    text = (tmp_path / "report" / "toy.md").read_text("utf8")
    assert "RuntimeError: no luck" in text
    assert "Only prune before round is legal" in text
    assert main([*command, "--floor", "200"]) == 0
    assert "No stack reaches it" in (tmp_path / "report" / "toy.md").read_text("utf8")


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(StudyRefused, match="run it first"):
        texts(tmp_path, [])
    assert Broken.paper
