"""The report: what it says of hand-made rows, that it opens offline, and the command that writes it."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest

import stackcomp as sc
from stackcomp.cli import main
from stackcomp.core.errors import SettingError, StudyRefused
from stackcomp.studies.report import write
from stackcomp.studies.report.document import Table, html, markdown
from stackcomp.studies.study import Skipped
from tests import toys
from tests.studies.analysis.made import row
from tests.studies.counted import Broken, applied

SAID = {
    "date": "2026-11-22",
    "examples": 100,
    "machine": {"processor": "any", "threads": 1},
    "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
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
    idle = sc.Entry(key="idle", model="toy", task=toys.classification_task(), pipeline=sc.Int8Weights())
    study = sc.Study(name="toy", entries=(idle,), skipped=tuple(skipped))
    return [path.read_text("utf8") for path in write(study, rows, tmp_path, **settings)]


def test_timed_pipelines_are_also_shown_by_latency(tmp_path):
    times = (0.5, 1.5, 0.9, 1.2)
    timed = [
        {**one, "latency_ratio": time, "latency_ms": time} for one, time in zip(ROWS, times, strict=True)
    ]
    page, text = texts(tmp_path, timed)
    assert "Score against latency" in page
    (front,) = re.findall(r"as fast and scores as well\..*?(\|.*?)\n\n", text, re.DOTALL)
    assert [line.split("|")[2].strip() for line in front.splitlines()[2:]] == ["dense", "half"]
    assert "| 0.50x |" in front
    assert "half: 79.50, 0.50 of dense latency" in page
    every = text.partition("## Every pipeline")[2]
    assert [line.split("|")[6].strip() for line in every.strip().splitlines()[2:]] == [
        "0.50x",
        "1.50x",
        "0.90x",
        "1.20x",
    ]
    untimed = texts(tmp_path, [*timed[1:], ROWS[0]])
    assert all("against latency" not in one for one in untimed)


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
        assert (
            "at a score of at least 79.00: 67% more compression (one seed; the same in every draw of the scores): the smallest stack"
            in text
        )
        assert "alone give 2.67x when multiplied; together they give 3.33x, 25% more" in text
        assert "changes the score by +2.40 ± 0.28 points against the other order" in text
        assert "3.33x in all, the mean of 2 orders" in text
        for one in ROWS:
            assert one["fingerprint"] in text
            assert one["declaration"] in text


def test_what_made_the_rows_is_told_of_all_of_them(tmp_path):
    other = {**ROWS[1], "machine": {"processor": "another", "threads": 2}}
    for text in texts(tmp_path, [ROWS[0], other, *ROWS[2:]]):
        assert "any, threads: 1, torch 2, transformers 5, stackcomp 1 (3 rows)" in text
        assert "another, threads: 2, torch 2, transformers 5, stackcomp 1 (1 rows)" in text


def test_orders_that_did_not_finish_are_told_where_they_count(tmp_path):
    failed = {**ROWS[3], "error": {"type": "BadWeights", "message": "NaN"}}
    for text in texts(tmp_path, [*ROWS[:3], failed]):
        assert "these subsets count as the mean of some: half with rest, 1 of 2." in text
    assert all("Not all orders" not in text for text in texts(tmp_path))


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
    assert "| a \\| b c |" in markdown("t", [Table(titles=["why"], rows=[["a | b\nc"]])])


def test_perplexity_is_told_in_words_and_colours_that_fit_it(tmp_path):
    rows = [
        {**one, "metric": "perplexity", "steps": [{**step, "metric": "perplexity"} for step in one["steps"]]}
        for one in ROWS
    ]
    page, text = texts(tmp_path, rows)
    assert "at a score of at most 81.00: 67% more" in text
    assert "above 0 they hinder each other" in text
    better = page.partition("Points of score: ")[2].partition("<table>")[0]
    assert better.count("var(--first)") == 2  # both techniques lower it
    assert "var(--second)" not in better


def test_several_seeds_have_an_interval_where_a_draw_changes_something(tmp_path):
    rows = [*ROWS, *({**one, "seed": 1, "key": f"{one['key']}1"} for one in ROWS)]
    same = "67% more compression (the same in every draw of the scores)"
    assert same in texts(tmp_path, rows)[1]
    near = {"score": 79.05, "difference": -0.95, "difference_noise": 2.0}
    rows = [{**one, **near} if one["key"].startswith("half/") else one for one in rows]
    assert "67% more compression (95% interval +67% to +150%)" in texts(tmp_path, rows)[1]


def test_seeds_that_only_some_pipelines_have_are_named(tmp_path):
    page, _ = texts(tmp_path, [*ROWS, {**ROWS[-1], "seed": 1}])
    assert "Seeds: 0; 1 of some pipelines." in page
    assert "(one seed; " in page
    assert "Seeds: 0. " in texts(tmp_path)[0]


def test_singles_without_a_finished_row_are_named_beside_the_figure(tmp_path):
    failed = {**ROWS[1], "error": {"type": "BadWeights", "message": "NaN"}}
    for text in texts(tmp_path, [ROWS[0], failed, *ROWS[2:]]):
        assert "Singles without a finished row, which do not count: rest." in text


def test_a_floor_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(SettingError, match="floor=inf is no score"):
        texts(tmp_path, floor=float("inf"))


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
    page = tmp_path / "out" / "report" / "toy.html"
    assert str(page) in said
    assert re.search(r"Of \d+ pipelines 3 have finished, \d+ failed", page.read_text("utf8"))
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
    with pytest.raises(StudyRefused, match="run the study first"):
        texts(tmp_path, [])
    assert Broken.paper


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """
<iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument, body = getComputedStyle(page.body)
  const plots = [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect()).filter(one => one.height > 100)
  document.body.innerText = JSON.stringify({{
    width: page.documentElement.scrollWidth, colours: [body.color, body.backgroundColor], plots: plots.map(one => one.width)
  }})
}}
</script>"""


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_it_fits_a_phone_and_a_desk_by_day_and_by_night(tmp_path, width, scheme):
    timed = [{**one, "latency_ratio": 0.5, "latency_ms": 1.0} for one in ROWS]
    page, _ = texts(tmp_path, timed)
    (tmp_path / "look.html").write_text(LOOK.format(width=width, page=escape(page)))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    command += ["--window-size=1400,1000", "--dump-dom", (tmp_path / "look.html").as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(re.search(r"\{.*\}", seen)[0])
    assert found["width"] <= width  # nothing sticks out
    assert len(found["plots"]) >= 2
    assert all(0.4 * min(width, 800) < plot <= width for plot in found["plots"])
    ink, paper = map(luminance, found["colours"])
    assert (ink > paper) == (scheme == "dark")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
