"""The small table of model families: what a checkpoint's header alone does not tell.

A family is named by `model_type` of config.json. A model of another family still compresses: its layers are
found by their types when it is loaded; the table only serves to describe a checkpoint without loading it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from stackcomp.core.errors import UnsupportedModel

PartT = TypeVar("PartT", bound="Part")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a layer that has a width of its own: the weights `into` it and the one `out_of` it (paths inside the layer). `fused`: how
    many matrices stand below each other in each of `into`."""

    into: tuple[str, ...]
    out_of: str
    fused: int = 1


@dataclass(frozen=True, kw_only=True)
class FeedForward(Part):
    """The feed-forward part: what lies between its weights are neurons. size: what the config calls their number."""

    size: str


@dataclass(frozen=True, kw_only=True)
class Attention(Part):
    """The attention part: what lies between its weights are heads, side by side.

    Into it go queries, keys and values, in this order. heads, width: what the config calls their number, and the width of the model;
    module: what computes with them (a path inside the layer); count, span: its attributes that hold the number of heads, and how wide they
    are together, where it has such; normed: norms of queries and of keys behind their weights, where there are such; causal: whether tokens
    attend to themselves and earlier ones alone; bias: a weight with a column a head, which all layers add to their scores; rotary: what
    gives cosines and sines by which queries and keys are turned (both paths relative to the base model).
    """

    heads: str = "num_attention_heads"
    width: str = "hidden_size"
    module: str
    count: str | None = None
    span: str | None = None
    normed: tuple[str, ...] = ()
    causal: bool = False
    bias: str | None = None
    rotary: str | None = None

    @property
    def computed(self) -> tuple[str, ...]:
        """Where what heads compute with comes out: queries, keys and values, or all of them `fused`."""
        return (*self.normed, *self.into[len(self.normed) :])


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
    attention: Attention
    stored_transposed: tuple[str, ...] = ()
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


_BERT_EMBEDDINGS = ("embeddings.*_embeddings",)
_BERT_FEED_FORWARD = FeedForward(
    into=("intermediate.dense",), out_of="output.dense", size="intermediate_size"
)
_BERT_ATTENTION = Attention(
    module="attention.self",
    into=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    out_of="attention.output.dense",
    count="num_attention_heads",
    span="all_head_size",
)
_BERT_READERS = {"attention.self.value": ("attention.output.dense",)}

FAMILIES: dict[str, Family] = {
    "bert": Family(
        prefix="bert",
        blocks="encoder.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("cls.predictions.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        attention=_BERT_ATTENTION,
        readers=_BERT_READERS,
    ),
    "distilbert": Family(
        prefix="distilbert",
        blocks="transformer.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("vocab_projector",),
        feed_forward=FeedForward(into=("ffn.lin1",), out_of="ffn.lin2", size="hidden_dim"),
        attention=Attention(
            heads="n_heads",
            width="dim",
            module="attention",
            into=tuple(f"attention.{name}_lin" for name in "qkv"),
            out_of="attention.out_lin",
            count="n_heads",
        ),
        readers={"attention.v_lin": ("attention.out_lin",)},
    ),
    "roberta": Family(
        prefix="roberta",
        blocks="encoder.layer.*",
        embeddings=_BERT_EMBEDDINGS,
        tied_heads=("lm_head.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        attention=_BERT_ATTENTION,
        readers=_BERT_READERS,
    ),
    "mpnet": Family(
        prefix="mpnet",
        blocks="encoder.layer.*",
        embeddings=(*_BERT_EMBEDDINGS, "encoder.relative_attention_bias"),
        tied_heads=("lm_head.decoder",),
        feed_forward=_BERT_FEED_FORWARD,
        attention=Attention(
            module="attention.attn",
            into=tuple(f"attention.attn.{name}" for name in "qkv"),
            out_of="attention.attn.o",
            count="num_attention_heads",
            span="all_head_size",
            bias="encoder.relative_attention_bias",
        ),
        readers={"attention.attn.v": ("attention.attn.o",)},
    ),
    "gpt2": Family(
        prefix="transformer",
        blocks="h.*",
        embeddings=("wte", "wpe"),
        tied_heads=("lm_head",),
        feed_forward=FeedForward(into=("mlp.c_fc",), out_of="mlp.c_proj", size="n_inner"),
        attention=Attention(
            heads="n_head",
            width="n_embd",
            module="attn",
            into=("attn.c_attn",),
            out_of="attn.c_proj",
            fused=3,
            count="num_heads",
            span="split_size",
            causal=True,
        ),
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
        attention=Attention(
            module="self_attn",
            into=tuple(f"self_attn.{name}_proj" for name in "qkv"),
            out_of="self_attn.o_proj",
            causal=True,
            rotary="rotary_emb",
        ),
        readers={
            "self_attn.v_proj": ("self_attn.o_proj",),
            "mlp.up_proj": ("mlp.down_proj",),
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
}

_LLAMA = FAMILIES["llama"]
for _like in ("mistral", "qwen2"):  # Llama-like: the same names
    FAMILIES[_like] = _LLAMA
_NORMED = replace(_LLAMA.attention, normed=("self_attn.q_norm", "self_attn.k_norm"))
FAMILIES["qwen3"] = replace(_LLAMA, attention=_NORMED)


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
    return _part_of(paths, "feed-forward", [family.feed_forward for family in FAMILIES.values()])


def attention_of(paths: Iterable[str]) -> tuple[Stack, Attention]:
    """The same with the attention part."""
    return _part_of(paths, "attention", [family.attention for family in FAMILIES.values()])


def _part_of(paths: Iterable[str], what: str, parts: Iterable[PartT]) -> tuple[Stack, PartT]:
    """The stack that these paths of weights are in, and the one of `parts` that its layers have."""
    known = [*paths]
    stack = stack_of(known)
    inside = {place[1] for path in known if (place := stack.split(path))}
    for part in parts:
        if {*part.into, part.out_of} <= inside:
            return stack, part
    raise UnsupportedModel(
        f"the layers at {stack.path} have no {what} part of a known family: add it to stackcomp/core/families.py"
    )


def between(stack: Stack, part: Part, paths: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The ids of the weights into the part, by the id of the one out of it, of weights with these `paths` by id. Raises UnsupportedModel
    where one is shared by layers that do not share the other."""
    layers: dict[str, dict[str, set[int]]] = {}  # by name in the layer and by id
    for id_, several in paths.items():
        for path in several:
            if place := stack.split(path):
                layers.setdefault(place[1], {}).setdefault(id_, set()).add(place[0])
    parts: dict[str, list[str]] = {}
    for out_of, used in layers[part.out_of].items():
        for name in part.into:
            into = next((id_ for id_, found in layers[name].items() if found == used), None)
            if into is None:
                raise UnsupportedModel(
                    f"{out_of}: layers {sorted(used)} share it and do not share their {name}: share both or neither"
                )
            parts.setdefault(out_of, []).append(into)
    return parts


def head_size(config: Mapping[str, Any]) -> int | None:
    """How many features an attention head of a model of this config has; None where the config or the table does not tell."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None or family.attention.heads not in config:
        return None
    return config.get("head_dim") or config[family.attention.width] // config[family.attention.heads]


def head_features(config: Mapping[str, Any]) -> int | None:
    """The same of all heads together that share keys and values."""
    size = head_size(config)
    if size is None:
        return None
    heads: int = config[FAMILIES[config["model_type"]].attention.heads]
    return size * heads // (config.get("num_key_value_heads") or heads)


def known_heads(features: int | None, who: str) -> int:
    """`features` of a head, where they are known. Raises UnsupportedModel in the name of the pass `who` where not."""
    if features is None:
        raise UnsupportedModel(
            f"{who}: how many heads the model has is not known: give one of the families {', '.join(FAMILIES)}, or add its own to "
            "stackcomp/core/families.py"
        )
    return features


def readings(family: Family, paths: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, weights that alone read it), by the family's `readers`, in every layer where all of these weights are among `paths`, and the
    module, too, where it is a weight."""
    weights = {*family.feed_forward.into, *family.attention.into}
    stack = family.blocks.removesuffix(".*")
    layers = [place[0] for path in paths if (place := Stack(path=stack, count=0).split(path))]
    for layer in range(max(layers, default=-1) + 1):
        for source, readers in family.readers.items():
            found = tuple(f"{stack}.{layer}.{reader}" for reader in readers)
            read = f"{stack}.{layer}.{source}"
            if all(path in paths for path in found) and (source not in weights or read in paths):
                yield read, found


POSITIONS = ("position_embeddings", "wpe")  # what tables of learned positions are called, whatever the family


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
