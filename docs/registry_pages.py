"""The pages that the registry and the contracts write: every pass, and which of them may follow which. docs/generate.py makes the rest."""

import inspect
import re
from dataclasses import fields, is_dataclass

from benchmarks import tables
from stackcomp.core import contract, headers
from stackcomp.core.errors import NothingToCompress, PipelineRefused
from stackcomp.core.passes import Pass
from stackcomp.core.plan import Plan
from stackcomp.passes import registered
from stackcomp.training.settings import TrainSettings
from stackcomp.training.training_pass import TrainingPass

GROUPS = {
    "Round": "LowBitWeights NF4 GPTQ QuantizationAware Int8Weights Int8Dynamic SmoothQuant ClusterWeights",
    "Factorize": "DenseSparse STF LowRank FWSVD ASVD SparseLowRank Kronecker",
    "Prune": "MagnitudePrune Wanda SparseGPT MovementPrune",
    "Restructure": "DropLayers PruneNeurons PruneHeads ShareLayers",
    "Shrink embeddings": "PruneVocabulary FactorizeEmbeddings",
    "Train": "Distill FineTune",
    "Code the file": "EntropyCode",
}
TRAINING = re.compile(r"The (?:other )?settings are those of every training pass[^:]*:?[^.]*\.")
NAMED = r"(?:^|(?<=[;.] ))(\w+(?:, \w+)*): "  # `only, skip: ...`, at the start of a paragraph or after a part of one


def passes() -> str:
    """Every registered pass by what it is for: what it does, its settings, contract and paper."""
    known = registered()
    groups = {title: names.split() for title, names in GROUPS.items()}
    others = [name for name in known if not any(name in names for names in groups.values())]
    parts = [
        "# Passes",
        "From the registry. Every setting has a default and is given by name. Two of them all passes have, `only` and `skip`: "
        + f"{_meanings(Pass)['only']}.",
        "What training passes share:",
        *_prose(TrainingPass),
        *_prose(TrainSettings),
    ]
    for title, names in {**groups, "Others": others}.items():
        parts += [f"## {title}", *(_pass(name, known[name]) for name in names)] if names else []
    return "\n\n".join(parts)


def _pass(name: str, cls: type[Pass]) -> str:
    """The section of one pass; its own settings come first."""
    default, meanings = cls(), _meanings(cls)
    own = [field for field in fields(cls) if field.name in cls.__annotations__]
    shared = [field for field in fields(cls) if field not in own and field.name not in Pass.__annotations__]
    cells = [
        [
            f"`{field.name}`",
            f"`{_type(field.type)}`",
            f"`{getattr(default, field.name)!r}`",
            meanings.get(field.name, "see above"),
        ]
        for field in (*own, *shared)
    ]
    return "\n\n".join(
        [
            f"### {name}",
            *_prose(cls),
            *([tables.table(["setting", "type", "default", "meaning"], cells, left=4)] if cells else []),
            f"Contract: {str(default.contract) or 'asks nothing and keeps every fact'}.",
            f"Paper: {cls.paper}. Source: `{cls.__module__}`.",
        ]
    )


def _paragraphs(cls: type) -> list[str]:
    return [
        TRAINING.sub("", part.replace("\n", " ")).strip()
        for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    ]


def _settings(cls: type, paragraph: str) -> dict[str, str]:
    """What a paragraph that explains settings says of each; nothing of another."""
    known = {field.name for field in fields(cls)}
    pieces = re.split(NAMED, paragraph)
    if pieces[0] or len(pieces) < 3:
        return {}
    found: dict[str, str] = {}
    last: list[str] = []
    for names, text in zip(pieces[1::2], pieces[2::2], strict=True):
        listed = names.split(", ")
        if known.issuperset(listed):
            last = listed
            found |= dict.fromkeys(listed, text)
        else:  # no setting after all
            found |= {name: f"{found[name]}{names}: {text}" for name in last}
    return found


def _prose(cls: type) -> list[str]:
    """The paragraphs of a docstring that explain no settings."""
    said = [part for part in _paragraphs(cls) if part and not _settings(cls, part)]
    return [part.replace("table of families", "[table of families](vocabulary.md#families)") for part in said]


def _meanings(cls: type) -> dict[str, str]:
    """What every setting means: what the pass itself says, or a class above it."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        for paragraph in _paragraphs(base):
            for name, text in _settings(base, paragraph).items():
                if not (name in found and text.startswith("as in every")):
                    found[name] = text.strip().rstrip(";.")
    return {name: text.replace("|", "\\|") for name, text in found.items()}


def _type(annotation: object) -> str:
    """An annotation in words; a bar would end the cell of a table."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace(" | ", " or ")


PAIRS_STYLE = (
    "<style>.pairs { border-collapse: collapse; font-size: .62rem } .pairs th, .pairs td { padding: .2em .35em; text-align: center; "
    "border-bottom: 1px solid var(--md-default-fg-color--lightest) } .pairs th + th { text-align: left }</style>\n"
)


def pairs() -> str:
    """Which pass may follow which, by their contracts, on a plain dense BERT."""
    plan = headers.plain("bert")
    known = {name: cls() for name, cls in registered().items()}
    numbers = {name: number for number, name in enumerate(known, 1)}
    lines = ["<th></th><th></th>" + "".join(f"<th>{number}</th>" for number in numbers.values())]
    reasons: dict[tuple[str, str], list[str]] = {}
    for first, before in known.items():
        cells: list[str] = []
        for second, after in known.items():
            reason = _reason([before, after], plan)
            cells.append(f'<td title="{first}, then {second}">{"·" if reason else "yes"}</td>')
            if reason:
                reasons.setdefault((second, reason), []).append(first)
        lines.append(f"<th>{numbers[first]}</th><th>{first}</th>{''.join(cells)}")
    return "\n\n".join(
        [
            "# Pairs",
            "Which pass may follow which on the same weights, each with its default settings: worked out from the "
            "contracts, on a plain dense BERT. The row runs first; columns have the numbers of the rows. There is no "
            "such table in the code. Every pair that says yes is run by the tests on a small model.",
            PAIRS_STYLE
            + '<div style="overflow-x: auto"><table class="pairs">\n'
            + "\n".join(f"<tr>{line}</tr>" for line in lines)
            + "\n</table></div>",
            "## Why not",
            "\n".join(
                f"- **{second}** after {', '.join(firsts)}: {reason}."
                for (second, reason), firsts in reasons.items()
            ),
            "On *different* weights (`only=`, `skip=`) any two passes may follow each other.",
        ]
    )


def _reason(steps: list[Pass], plan: Plan) -> str:
    """Why one pass may not follow the other; nothing where it may."""
    try:
        contract.predict(steps, plan)
    except PipelineRefused as error:
        found = [line.strip() for line in str(error).splitlines() if line.startswith("  it ")]
        return "; ".join(dict.fromkeys(line.partition(" of ")[0] for line in found))
    except NothingToCompress as error:
        return str(error).partition("; ")[2]  # the way out
    return ""
