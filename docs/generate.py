"""Makes the pages that must not be written by hand: from recorded results, and (registry_pages.py) from the registry and contracts.

Run by mkdocs-gen-files at each build. A study that has not run yet is said so, with the command that runs it.
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# mkdocs runs this file, and neither of these is an installed package.
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from registry_pages import pairs, passes  # noqa: E402

from benchmarks import combined, dsformer, dsformer_more, low_bit, smallest, stacked, tables  # noqa: E402
from benchmarks.report import PICTURES, Report, refusal  # noqa: E402
from stackcomp.core.contract import Need  # noqa: E402
from stackcomp.core.facts import Fact  # noqa: E402
from stackcomp.core.families import FAMILIES  # noqa: E402
from stackcomp.core.pipeline_file import read_file  # noqa: E402
from stackcomp.passes import registered  # noqa: E402

REPORT = Report(root=ROOT)
CATALOGUE = ROOT / "pipelines" / "studies" / "catalogue.py"
PUBLIC = {
    "Running": ["stackcomp.manager.PassManager", "stackcomp.manager.Measuring", "stackcomp.manager.Result"],
    "Checking and loading": [
        "stackcomp.manager.check",
        "stackcomp.size.sizes",
        "stackcomp.checkpoint.load",
        "stackcomp.parse",
    ],
    "Pipelines and passes": [
        "stackcomp.core.pipeline.Pipeline",
        "stackcomp.core.passes.Pass",
        "stackcomp.core.context.Context",
        "stackcomp.core.contract.Contract",
        "stackcomp.core.contract.Need",
        "stackcomp.core.facts.Fact",
    ],
    "Studies": [
        "stackcomp.studies.Study",
        "stackcomp.studies.Entry",
        "stackcomp.studies.combinations",
        "stackcomp.studies.Search",
        "stackcomp.studies.search.search",
        "stackcomp.studies.Rung",
    ],
    "The ledger": [
        "stackcomp.core.ledger.Ledger",
        "stackcomp.core.ledger.Row",
        "stackcomp.core.ledger.Measured",
    ],
    "Tasks": ["stackcomp.data.tasks"],
    "Errors": ["stackcomp.core.errors"],
}


def picture(name: str, depth: int = 0) -> str:
    """A picture, where its study has run; `depth` is how many folders deep the page is."""
    return f"![{PICTURES[name]}]({'../' * depth}assets/{name}.svg)" if name in REPORT.pictures() else ""


def quickstart() -> str:
    """The tutorial: the recorded run of pipelines/quickstart.py."""
    head = (
        "# Quickstart\n\nIn a clone, with Python 3.11 or newer:\n\n```console\nmake demo\n```\n\nIt installs into `.venv`, and "
        "takes 10 to 25 minutes on two cores. This page is a recorded run of the file behind it, `pipelines/quickstart.py`."
    )
    rows = REPORT.rows("quickstart")
    declared = tables.ledgers(rows, "declared")
    if not declared:
        return f"{head}\n\n{tables.not_run('quickstart')}"
    row, ledger = declared[0]
    parts = [
        head,
        "A classifier of film reviews is made by fine-tuning all-MiniLM-L6-v2. Then three passes are stacked on it:",
        f"```python\nimport stackcomp as sc\n\npipeline = {_as_written(row)}\nsc.check(pipeline)\n```",
        "`check` has judged the order before a weight is read. `run` then leaves one row a pass:",
        picture("quickstart", 1),
        "## What each pass brought",
        tables.brought(ledger),
        "A recovery pass saves no bytes: it gives score back. A rounding pass gives bytes. Compare both columns with "
        "the noise in the table above. What the words mean: [the ledger](../concepts.md#the-ledger).",
        *_pipelines(rows, "other order", "## The same passes in another order", _ORDER),
        *_pipelines(rows, "alone", "## Each pass alone", "What the combination has to beat."),
        "## Everything side by side",
        tables.quickstart(rows),
        "## Load it, and go on",
        "```text\nimport stackcomp\nmodel = stackcomp.load('out/quickstart')\n```",
        "[How do I ...](../how_to.md) predict with it, use my own model and data, make it smaller or faster?",
    ]
    return "\n\n".join(part for part in parts if part)


_ORDER = (
    "The contracts allow these too. Training after rounding can move the scales only, training before compressing follows "
    "a teacher that is the model itself: the figures say what that costs."
)


def _as_written(row: tables.Row) -> str:
    """The declaration as a user writes it after `import stackcomp as sc`."""
    names = "|".join(["Pipeline", *registered()])
    return re.sub(rf"\b({names})\(", r"sc.\1(", row["declaration"])


def _pipelines(rows: list[tables.Row], role: str, title: str, words: str) -> list[str]:
    found = tables.ledgers(rows, role)
    if not found:
        return []
    parts = [title, words]
    for row, ledger in found:
        parts += [f"```text\n{row['declaration']}\n```", tables.ledger(ledger)]
    return parts


def refused() -> str:
    """What the command line says of pipelines/refused.py, run now."""
    code = (ROOT / "pipelines" / "refused.py").read_text("utf8")
    code = code[code.index("import stackcomp") :].rstrip()
    return "\n\n".join(
        [
            "# A refused pipeline",
            "Factorizing needs floating-point values. Rounding takes them away. So this order cannot run:",
            f"```python\n{code}\n```",
            "It is refused before a weight is read, with exit status 2. This is what the command line answered while this "
            "page was built:",
            refusal(),
            "The answer names the step, the fact, the layers, the earlier step that took the fact away, and a legal order "
            "if there is one, found by search over the contracts.",
        ]
    )


def vocabulary() -> str:
    """The closed vocabularies: facts, needs and families, each with the comment or the globs that stand beside it in the code."""
    words = [
        (Fact, "A word true of one stored part of a weight."),
        (Need, "What a pass cannot work without."),
    ]
    parts = ["# Words and families"]
    for kind, title in words:
        cells = re.findall(r'= "(\w+)"  # (.+)', inspect.getsource(kind))
        assert len(cells) == len(kind), f"{kind.__name__}: a word without its line"
        parts += [f"## {kind.__name__}s", title, tables.table([kind.__name__, "meaning"], cells, left=2)]
    families = [
        [f"`{name}`", f"`{family.blocks}`", ", ".join(f"`{glob}`" for glob in family.embeddings)]
        for name, family in FAMILIES.items()
    ]
    return "\n\n".join(
        [
            *parts,
            "## Families",
            "Models whose weights are known from their headers alone, by the `model_type` in config.json. Others are read in memory: give "
            "the model itself. `DropLayers`, `ShareLayers`, `PruneHeads`, `PruneNeurons` and `SmoothQuant` work on these families.",
            tables.table(["model_type", "layers", "embeddings"], families, left=3),
        ]
    )


def results() -> str:
    """All tables and the plot."""
    return "\n\n".join(
        part
        for part in [
            "# Results",
            "From `docs/results/*.jsonl`, by the commands named below. Every row there holds the exact declaration, seed, "
            "versions and machine. Numbers that are worse or slower than hoped stand as they are.",
            "## Sentence similarity, post-training",
            "All-MiniLM-L6-v2 on the test set of the STS benchmark. No labels, no training; calibration text from the "
            "training split. Published for this model: 82.03. *encoder* counts the factorized layers, indices and scales "
            "included; *file* is the whole file, half of which is word embeddings that no pass touches here. "
            "For both factorizations, gradients of the model's own output on the calibration text say which errors matter.",
            picture("stsb"),
            tables.stsb(REPORT.rows("stsb")),
            "## Every pass alone, and stacks",
            "The same model and pairs. Passes that train take 100 steps, all others none. *Latency* is one batch of 8 x 128 tokens on one "
            "thread, beside the model as it came in the same process: above 1.00x is slower. Declarations are in "
            "`pipelines/studies/catalogue.py`.",
            tables.catalogue(
                "catalogue",
                REPORT.rows("catalogue"),
                [entry.key for entry in read_file(CATALOGUE)["study"].entries],
            ),
            "## A decoder",
            "SmolLM2-135M, perplexity on windows of WikiText-2 (lower is better). Only the distilled one is trained, for 50 steps. "
            "Factorizations of it are [with DSFormer](dsformer.md).",
            tables.catalogue("decoder_catalogue", REPORT.rows("decoder_catalogue")),
            "## A stack of three, in every order",
            tables.quickstart(REPORT.rows("quickstart")),
            "## What each technique gives in a stack",
            "All-MiniLM-L6-v2, STS-B, post-training: every legal subset of four techniques in every legal order. *file* and *encoder* are "
            "Shapley values: these factors multiply to the compression of the whole stack, and points add up. "
            "[The whole report](combinations.md).",
            combined.headline(REPORT.rows(combined.NAME)),
            "## DSFormer in short",
            "One model fine-tuned on four tasks, then every method with the same steps (300: a short budget, which favours methods that "
            "start near the model), batches, teacher and losses. *vs dense* is the mean difference to the dense model, with a 95% interval "
            "over seeds. [Everything](dsformer.md).",
            dsformer.headline(REPORT.dsformer()),
            "**In few bits**: the same encoder at an equal number of bits a weight, all bytes counted; figures are points against dense.",
            low_bit.headline(REPORT.low_bit()),
            "**On top of other techniques**: how much further DSFormer shrinks an encoder that another technique has compressed already, "
            "at a loss of at most one point.",
            stacked.headline(REPORT.rows("stacked")),
            "## A small classifier of SST-2",
            "All-MiniLM-L6-v2 fine-tuned on SST-2, and the best scores that searches over pipelines found in 1/24 and in 1/40 of its "
            "bytes. The dense score is that of the fine-tuned model in float32; the whole file counts, word embeddings included.",
            smallest.headline(REPORT.rows(smallest.NAME), smallest.singles(REPORT.rows(smallest.SINGLE))),
            "## Speed",
            "all-MiniLM-L6-v2 in the form in which a file stores it, and decoded once by `stackcomp.unpack`: *unpacked* into whole "
            "weights, *factors* where products of two matrices stay products. Passes ran without calibration, as only time is looked at.",
            tables.speed(REPORT.rows("speed")),
            "## Reloading",
            "Logits in the process that made the model, before it was written, against those of a new process.",
            tables.reload(REPORT.rows("reload")),
            "## Killing and resuming",
            tables.kill(REPORT.rows("kill")),
            tables.kill_study(REPORT.rows("kill_study")),
            "## Speed of factorizing",
            tables.factorizing(REPORT.rows("factorizing")),
            "## Cost of a straight-through step",
            tables.step_cost(REPORT.rows("step_cost")),
        ]
        if part
    )


def dsformer_study() -> str:
    """DSFormer against everything it is compared with, on top of it, in few bits, its options, its metrics, and on a decoder."""
    return "\n\n".join(
        [
            dsformer.page(REPORT.dsformer(), picture("dsformer")),
            "## On top of other techniques",
            stacked.section(REPORT.rows("stacked")),
            "## In few bits",
            low_bit.section(REPORT.low_bit(), picture("low_bit")),
            "## Options of STF",
            dsformer_more.options(REPORT.rows("options")),
            "## The metric of errors",
            dsformer_more.metrics(REPORT.rows("metrics")),
            "## A decoder",
            dsformer_more.decoder(REPORT.rows("decoder")),
        ]
    )


def combination_study(name: str) -> str:
    """What four techniques give together: the study's own report."""
    title = f"# {combined.NAMES[name]}"
    made = combined.report(name, REPORT.rows(name))
    if not made:
        return f"{title}\n\n{tables.not_run(name)}"
    body = made[f"{name}.md"].partition("\n")[2]
    told = inspect.cleandoc((ROOT / combined.file(name)).read_text("utf8").split('"""')[1]).split("\n\n")
    return "\n\n".join(
        [
            title,
            told[0],
            "```console\n" + inspect.cleandoc(told[1]) + "\n```",
            *told[2:],
            f"The same with pictures, as one page that opens offline: [{name}.html]({name}.html).",
            body,
        ]
    )


def reference() -> str:
    """The API, from docstrings."""
    parts = ["# API"]
    for title, names in PUBLIC.items():
        parts += [f"## {title}", *(f"::: {name}\n    options:\n      heading_level: 3" for name in names)]
    return "\n\n".join(parts)


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "tutorials/quickstart.md": ("Quickstart", quickstart),
    "passes.md": ("Passes", passes),
    "pairs.md": ("Pairs", pairs),
    "refused.md": ("A refused pipeline", refused),
    "vocabulary.md": ("Words and families", vocabulary),
    "results.md": ("Results", results),
    "dsformer.md": ("DSFormer", dsformer_study),
    **{
        f"{'combinations' if name == combined.NAME else name}.md": (title, partial(combination_study, name))
        for name, title in combined.NAMES.items()
    },
    "reference.md": ("API", reference),
}


def summary() -> str:
    """The order of the pages."""
    written = {
        "index.md": "Home",
        "how_to.md": "How do I ...",
        "concepts.md": "Concepts",
        "studies.md": "Studies",
        "own_pass.md": "A pass of your own",
    }
    order = ["index.md", "tutorials/quickstart.md", "how_to.md", "concepts.md", *list(PAGES)[1:]]
    order.insert(order.index("combinations.md"), "studies.md")
    order.insert(order.index("reference.md"), "own_pass.md")
    titles = {**written, **{path: title for path, (title, _) in PAGES.items()}}
    return "\n".join(f"- [{titles[path]}]({path})" for path in order)


def write() -> None:
    """Hand every page to mkdocs."""
    import mkdocs_gen_files

    for path, (_, make) in PAGES.items():
        with mkdocs_gen_files.open(path, "w") as file:
            print(make(), file=file)
    for study in combined.NAMES:
        for name, text in combined.report(study, REPORT.rows(study)).items():
            if name.endswith(".html"):
                with mkdocs_gen_files.open(name, "w") as file:
                    file.write(text)
    with mkdocs_gen_files.open("SUMMARY.md", "w") as file:
        print(summary(), file=file)


if __name__ == "<run_path>" or __name__ == "__main__":
    write()
