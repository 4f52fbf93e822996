"""The word pieces of a tokenizer: which of them texts use, and how to make it know only these.

Pieces that stay keep their order, so that an id only moves down. What is read and rewritten is the tokenizer.json of fast tokenizers, with
any of its models: WordPiece, BPE, Unigram, WordLevel.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stackcomp.core.context import Progress, quiet
from stackcomp.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
TEXTS = 1000  # encoded at a time
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte, as tokenizers from SentencePiece write it


def count_pieces(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Any], *, progress: Progress = quiet
) -> Counter[str]:
    """How often each piece stands in `texts` (strings or pairs), which are not cut; special ones are counted too."""
    counts: Counter[int] = Counter()
    starts = range(0, len(texts), TEXTS)
    for start in progress(starts, label="counting pieces", total=len(starts)):
        part = list(texts[start : start + TEXTS])
        for ids in tokenizer(part, truncation=False, verbose=False)["input_ids"]:
            counts.update(ids)
    names = _by_id(tokenizer)
    return Counter({names[id_]: count for id_, count in counts.items()})


def identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What the ids of a text depend on, as JSON: of a fast tokenizer all of it but how the last call cut and padded."""
    settings = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "longest": tokenizer.model_max_length,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return {**settings, "vocabulary": tokenizer.get_vocab()}
    content = json.loads(inner.to_str())
    return {
        **settings,
        "pieces": {name: part for name, part in content.items() if name not in ("truncation", "padding")},
    }


def places(tokenizer: "PreTrainedTokenizerBase", whole: "PreTrainedTokenizerBase") -> list[int]:
    """The ids in `whole` of the pieces of `tokenizer`, which has no others, in the order of its own ids."""
    known = whole.get_vocab()
    return [known[piece] for piece in _by_id(tokenizer).values()]


def keep_pieces(tokenizer: "PreTrainedTokenizerBase", wanted: set[str]) -> list[int]:
    """Leave the pieces `wanted` of the tokenizer, in place, and what must stay; returns the ids that they had, by new id.

    What must stay: special and other added tokens, single characters and bytes, so that any text still has pieces, and of BPE the pieces of
    which wanted ones are merged. Of a text all of whose pieces are wanted the pieces are the same ones afterwards: WordPiece takes the
    longest piece that fits, BPE the first merge, Unigram the likeliest path, and each of these is still there, with fewer others. (One
    exception: a word that WordPiece could not read to its end may come to be read by shorter pieces.) Raises UnsupportedModel for a
    tokenizer that has no tokenizer.json, or numbers its pieces in a way of its own.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / FILE
        if not path.is_file():
            raise UnsupportedModel(
                f"tokenizer={type(tokenizer).__name__} writes no {FILE}: give a fast tokenizer, as AutoTokenizer does"
            )
        content = json.loads(path.read_text("utf8"))
        kept = _closed(content, wanted)
        before = _by_id(tokenizer)
        ids = {piece: new for new, piece in enumerate(piece for piece in before.values() if piece in kept)}
        _rewrite(content, ids)
        path.write_text(json.dumps(content, ensure_ascii=False), "utf8")
        smaller = type(tokenizer).from_pretrained(folder)
    if smaller.get_vocab() != ids:
        odd = sorted(smaller.get_vocab().items() ^ ids.items())[:3]
        raise UnsupportedModel(
            f"tokenizer={type(tokenizer).__name__} does not take another vocabulary ({odd}): leave this model its pieces"
        )
    vars(tokenizer).update(vars(smaller) | {"name_or_path": tokenizer.name_or_path})
    return [old for old, piece in before.items() if piece in kept]


def _by_id(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Pieces by ascending id."""
    return dict(sorted((id_, piece) for piece, id_ in tokenizer.get_vocab().items()))


def _closed(content: Mapping[str, Any], wanted: set[str]) -> set[str]:
    """`wanted` and what must stay."""
    model = content["model"]
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    listed = model["vocab"]
    pieces = [piece for piece, _ in listed] if isinstance(listed, list) else [*listed]
    kept = {piece for piece in pieces if piece in wanted}
    kept |= {
        piece
        for piece in pieces
        if len(piece.removeprefix(prefix).removesuffix(suffix)) == 1 or _BYTE.fullmatch(piece)
    }
    kept |= {token["content"] for token in content["added_tokens"]}
    if "unk_id" in model and model["unk_id"] is not None:
        kept.add(pieces[model["unk_id"]])
    if model.get("unk_token") in listed:
        kept.add(model["unk_token"])
    parts: dict[str, list[str]] = {}
    for merge in model.get("merges", ()):
        first, second, whole = _merge(merge, prefix)
        parts.setdefault(whole, []).extend((first, second))
    waiting = [*kept]
    while waiting:
        new = {*parts.get(waiting.pop(), ())} - kept
        kept |= new
        waiting += new
    return kept


def _merge(merge: str | Sequence[str], prefix: str) -> tuple[str, str, str]:
    """The two pieces of a merge of BPE, as older files write it or as newer ones do, and what they become."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second.removeprefix(prefix)


def _rewrite(content: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Leave in a tokenizer.json the pieces that have `ids`, under these."""
    model = content["model"]
    listed = model["vocab"]
    if isinstance(listed, list):  # Unigram: the place in the list is the id
        model["vocab"] = [entry for entry in listed if entry[0] in ids]
        if model["unk_id"] is not None:
            model["unk_id"] = ids[listed[model["unk_id"]][0]]
    else:
        model["vocab"] = {piece: ids[piece] for piece in listed if piece in ids}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if {*_merge(merge, prefix)} <= ids.keys()]
    for token in content["added_tokens"]:
        token["id"] = ids[token["content"]]
    if content["padding"]:
        content["padding"]["pad_id"] = ids[content["padding"]["pad_token"]]
    if content["post_processor"]:
        _renumber(content["post_processor"], ids)


def _renumber(processor: dict[str, Any], ids: Mapping[str, int]) -> None:
    """Give the pieces that a post-processor puts around texts their new ids."""
    match processor["type"]:
        case "Sequence":
            for inner in processor["processors"]:
                _renumber(inner, ids)
        case "TemplateProcessing":
            for entry in processor["special_tokens"].values():
                entry["ids"] = [ids[piece] for piece in entry["tokens"]]
        case "BertProcessing" | "RobertaProcessing":
            for name in ("sep", "cls"):
                processor[name] = [processor[name][0], ids[processor[name][0]]]
        case _:  # ByteLevel, which adds none
            pass
