"""The small table of model families: what a checkpoint's header alone does not tell.

A family is named by `model_type` of config.json. A model of another family still compresses: its layers are
found by their types when it is loaded; the table only serves to describe a checkpoint without loading it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from stackcomp.core.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The feed-forward part of a layer: the weights `into` its neurons, the one `out_of` them (paths inside the layer), and what the
    config calls their number."""

    into: tuple[str, ...]
    out_of: str
    size: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: the base model's attribute in a model with a head, its embeddings, and its output heads
    tied to the first of them.

    blocks is the glob of the repeated layers; stored_transposed are globs of weights kept as (input, output)
    in the file (`Conv1D`); readers are, of one layer, modules whose output channels reach only these weights, and each of them
    linearly: a norm that no residual reads, values before their output projection, the linear half of a gated product. Paths are
    relative to the base model, in readers to the layer.
    """

    prefix: str
    blocks: str
    embeddings: tuple[str, ...]
    tied_heads: tuple[str, ...]
    feed_forward: FeedForward
    stored_transposed: tuple[str, ...] = ()
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


_BERT_EMBEDDINGS = ("embeddings.*_embeddings",)
_BERT_FEED_FORWARD = FeedForward(
    into=("intermediate.dense",), out_of="output.dense", size="intermediate_size"
)
_BERT_READERS = {"attention.self.value": ("attention.output.dense",)}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        prefix="bert",
        blocks="encoder.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("cls.predictions.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        readers=_BERT_READERS,
    ),
    "distilbert": Family(
        prefix="distilbert",
        blocks="transformer.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("vocab_projector",),
        feed_forward=FeedForward(into=("ffn.lin1",), out_of="ffn.lin2", size="hidden_dim"),
        readers={"attention.v_lin": ("attention.out_lin",)},
    ),
    "roberta": Family(
        prefix="roberta",
        blocks="encoder.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("lm_head.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        readers=_BERT_READERS,
    ),
    "mpnet": Family(
        prefix="mpnet",
        blocks="encoder.layer.*",
        embeddings=(*_BERT_EMBEDDINGS, "encoder.relative_attention_bias"),
        tied_heads=("lm_head.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        readers={"attention.attn.v": ("attention.attn.o",)},
    ),
    "gpt2": Family(
        prefix="transformer",
        blocks="h.*",
        embeddings=("wte", "wpe"),
        tied_heads=("lm_head",),
        feed_forward=FeedForward(into=("mlp.c_fc",), out_of="mlp.c_proj", size="n_inner"),
        stored_transposed=("h.*.c_attn", "h.*.c_proj", "h.*.c_fc", "h.*.q_attn"),
        readers={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    ),
    "llama": Family(
        prefix="model",
        blocks="layers.*",
        embeddings=("embed_tokens",),
        tied_heads=("lm_head",),
        feed_forward=FeedForward(
            into=("mlp.gate_proj", "mlp.up_proj"), out_of="mlp.down_proj", size="intermediate_size"
        ),
        readers={
            "self_attn.v_proj": ("self_attn.o_proj",),
            "mlp.up_proj": ("mlp.down_proj",),
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
}

for _like in ("mistral", "qwen2", "qwen3"):  # Llama-like: the same names
    FAMILIES[_like] = FAMILIES["llama"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The repeated layers of a model: the path of their list, and how many there are."""

    path: str
    count: int

    def split(self, path: str) -> tuple[int, str] | None:
        """The layer that `path` is in and the rest of the path; None outside the stack."""
        if not path.startswith(f"{self.path}."):
            return None
        number, _, rest = path.removeprefix(f"{self.path}.").partition(".")
        return int(number), rest


def stack_of(paths: Iterable[str]) -> Stack:
    """The stack that these paths of weights are in. Raises UnsupportedModel where no family has such paths."""
    known = [*paths]
    for path in dict.fromkeys(family.blocks.removesuffix(".*") for family in FAMILIES.values()):
        found = [place[0] for name in known if (place := Stack(path=path, count=0).split(name))]
        if found:
            return Stack(path=path, count=max(found) + 1)
    raise UnsupportedModel(
        f"no layers are at {', '.join(sorted({family.blocks for family in FAMILIES.values()}))}: "
        "add the model's family to stackcomp/core/families.py"
    )


def feed_forward_of(paths: Iterable[str]) -> tuple[Stack, FeedForward]:
    """The stack that these paths of weights are in, and the feed-forward part of its layers. Raises UnsupportedModel where no family has
    such paths."""
    known = [*paths]
    stack = stack_of(known)
    inside = {place[1] for path in known if (place := stack.split(path))}
    for family in FAMILIES.values():
        if {*family.feed_forward.into, family.feed_forward.out_of} <= inside:
            return stack, family.feed_forward
    raise UnsupportedModel(
        f"the layers at {stack.path} have no feed-forward part of a known family: add it to stackcomp/core/families.py"
    )


def readings(family: Family, paths: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, weights that alone read it), by the family's `readers`, in every layer where all of these weights are among `paths`."""
    stack = family.blocks.removesuffix(".*")
    layers = [place[0] for path in paths if (place := Stack(path=stack, count=0).split(path))]
    for layer in range(max(layers, default=-1) + 1):
        for source, readers in family.readers.items():
            found = tuple(f"{stack}.{layer}.{reader}" for reader in readers)
            if all(path in paths for path in found):
                yield f"{stack}.{layer}.{source}", found


def word_embedding(family: Family, paths: list[str]) -> str | None:
    """The path of the word embedding, to which output heads are tied."""
    wanted = [glob.replace("*_embeddings", "word_embeddings") for glob in family.embeddings[:1]]
    return next((path for path in paths if any(fnmatchcase(path, glob) for glob in wanted)), None)


def vocabulary(paths: Iterable[str]) -> list[str]:
    """Of these paths of weights the word embedding and the output heads beside it. Raises UnsupportedModel where no family has such a
    word embedding."""
    known = [*paths]
    words = next((path for family in FAMILIES.values() if (path := word_embedding(family, known))), None)
    if words is None:
        raise UnsupportedModel(
            "the model has no word embedding under a name that is known: add its family to stackcomp/core/families.py"
        )
    heads = {head for family in FAMILIES.values() for head in family.tied_heads}
    return [words, *(path for path in known if path in heads)]


def ties_heads(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config ties its output head to the word embedding."""
    heads: list[str] = config.get("architectures") or []
    has_head = any(
        name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")) for name in heads
    )
    return has_head and bool(config.get("tie_word_embeddings", True))
