"""A document of headings, paragraphs, tables and pictures, written as one HTML file that needs no other, or as Markdown."""

import html as escaping
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """Begins a section."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first `left` columns are words, the others figures.

    shades: by (row, column), from -1 to 1: the colour of a cell in HTML, blue above 0 and orange below; code: columns of code.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    code: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A picture as HTML; Markdown leaves it out, the table below it says the same."""

    html: str


Part = str | Heading | Table | Picture  # a str is a paragraph


def markdown(title: str, parts: Sequence[Part]) -> str:
    """The document as Markdown, without its pictures."""
    return (
        "\n\n".join([f"# {title}", *(_markdown(part) for part in parts if not isinstance(part, Picture))])
        + "\n"
    )


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"## {part.text}"
    if isinstance(part, Table):
        marks = ["--:" if _side(part, column) == "figure" else "---" for column in range(len(part.titles))]
        words = [
            [" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [part.titles, *part.rows]
        ]
        rows = [
            [f"`{cell}`" if column in part.code else cell for column, cell in enumerate(row)]
            for row in words[1:]
        ]
        lines = [words[0], marks, *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    assert isinstance(part, str)
    return part


def html(title: str, parts: Sequence[Part]) -> str:
    """The document as one HTML file: no script, no font, no address in it."""
    body = "\n".join(map(_html, parts))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, Picture):
        return part.html
    if isinstance(part, Heading):
        return f"<h2>{escape(part.text)}</h2>"
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    head = "".join(
        f'<th class="{_side(part, column)}">{escape(one)}</th>' for column, one in enumerate(part.titles)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell(part, number, column, cell) for column, cell in enumerate(row))}</tr>"
        for number, row in enumerate(part.rows)
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'


def _cell(table: Table, row: int, column: int, text: str) -> str:
    words = f"<code>{escape(text)}</code>" if column in table.code else escape(text)
    shade = table.shades.get((row, column))
    colour = ""
    if shade is not None:
        name = "first" if shade >= 0 else "second"
        colour = (
            f' style="background: color-mix(in srgb, var(--{name}) {60 * abs(shade):.0f}%, var(--ground))"'
        )
    return f'<td class="{_side(table, column)}"{colour}>{words}</td>'


def _side(table: Table, column: int) -> str:
    if column in table.code:
        return "words long"
    return "words" if column < table.left else "figure"


def escape(text: str) -> str:
    """Text as it stands in HTML."""
    return escaping.escape(text)


# Okabe and Ito's colours, told apart with any colour vision; the lighter ones on a dark page
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --quiet: #595959; --line: #d4d4d4; --band: #ececec;
  --first: #0072b2; --second: #d55e00; --third: #009e73; --fourth: #56b4e9; --fifth: #cc79a7; --sixth: #8a8a8a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --ink: #e8e8e8; --quiet: #a8a8a8; --line: #3c4046; --band: #26292e;
    --first: #56b4e9; --second: #e69f00; --third: #2fc096; --fourth: #0072b2; --fifth: #cc79a7; --sixth: #7d7d7d; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p { max-width: 46rem; white-space: pre-line; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: left; color: var(--quiet); font-weight: 600; }
.words { min-width: 7rem; } .words:first-child { min-width: auto; } .long { min-width: 22rem; }
.figure { text-align: right; white-space: nowrap; }
code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); font-size: 0.875rem; }
svg { display: block; width: 100%; overflow: visible; }
svg text { fill: var(--ink); font-size: 13px; } svg .quiet { fill: var(--quiet); }
.plot { padding: 0.5rem 1rem 3rem 3.2rem; }
.bars { display: grid; grid-template-columns: minmax(5rem, auto) 1fr minmax(7rem, auto); gap: 0.35rem 0.75rem; align-items: center;
  font-size: 0.875rem; margin: 0.5rem 0 1rem; }
.track { position: relative; height: 1.3rem; background: var(--band); display: flex; }
.track > * { position: absolute; top: 0; bottom: 0; }
.zero { width: 1px; background: var(--ink); }
.whisker { height: 2px; top: calc(50% - 1px); bottom: auto; background: var(--ink); }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; margin: 0 0.3rem 0 0.8rem; vertical-align: -0.05rem; }
"""
