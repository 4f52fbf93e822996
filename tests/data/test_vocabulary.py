"""Tokenizers that know only some of their pieces: the same pieces for the texts they were chosen by, and still some for every other."""

import copy
import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stackcomp import data
from stackcomp.core.errors import UnsupportedModel

CORPUS = (
    "the film was a great surprise, and the actors greatly surprised the audience",
    "unbelievably bad plotting; an unwatchable, unbelievable scene",
    "she filmed the scenes nicely and he plotted awfully well",
    "who would have thought that watching actors act is watchable",
    "naïve façade, 12.5 stars out of 20",
)
TEXTS = CORPUS[:2]
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of each model, whose special ids are not its first."""
    train = {"vocab_size": 320, "special_tokens": list(SPECIAL), "show_progress": False}
    match kind:
        case "wordpiece":
            inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
            inner.normalizer = normalizers.BertNormalizer()
            inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(**train)
        case "byte bpe":
            inner = Tokenizer(models.BPE())
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **train)
        case "bpe":
            inner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
            inner.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **train)
        case "unigram":
            inner = Tokenizer(models.Unigram())
            inner.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **train)
    inner.train_from_iterator(CORPUS, trainer)
    ids = {name: inner.token_to_id(name) for name in SPECIAL}
    inner.post_processor = (
        processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
        if kind == "byte bpe"
        else processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", mask_token="<mask>"
    )


KINDS = ("wordpiece", "byte bpe", "bpe", "unigram")
WHOLE = {kind: trained(kind) for kind in KINDS}


def narrowed(kind, texts):
    """A tokenizer that knows the pieces of `texts`, and the ids that they had."""
    tokenizer = copy.deepcopy(WHOLE[kind])
    return tokenizer, data.keep_pieces(tokenizer, {*data.count_pieces(tokenizer, texts)})


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_same_pieces_as_before(kind):
    tokenizer, kept = narrowed(kind, TEXTS)
    assert kept == sorted(kept)
    assert len(kept) == len(tokenizer) < len(WHOLE[kind])
    for texts in (list(TEXTS), [TEXTS]):  # one by one, and as a pair
        now, before = tokenizer(texts), WHOLE[kind](texts)
        assert [[kept[id_] for id_ in ids] for ids in now["input_ids"]] == before["input_ids"]
        assert now["token_type_ids" if "token_type_ids" in now else "attention_mask"]
    assert data.places(tokenizer, WHOLE[kind]) == kept
    for name in ("pad_token", "unk_token", "bos_token", "mask_token"):
        assert kept[getattr(tokenizer, f"{name}_id")] == getattr(WHOLE[kind], f"{name}_id")


@given(words=st.lists(st.text("abcdehilnorstuw", min_size=1, max_size=9), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_any_words_keep_their_pieces(kind, words):
    text = " ".join(words)
    tokenizer, kept = narrowed(kind, [text])
    assert [kept[id_] for id_ in tokenizer(text)["input_ids"]] == WHOLE[kind](text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_can_still_be_read(kind):
    tokenizer, _ = narrowed(kind, TEXTS)
    unknown = tokenizer.unk_token_id
    found = tokenizer(list(CORPUS[2:]))["input_ids"]
    assert not any(unknown in ids for ids in found)
    assert sum(map(len, found)) > sum(map(len, WHOLE[kind](list(CORPUS[2:]))["input_ids"]))
    if kind == "byte bpe":
        assert tokenizer.decode(tokenizer("漢字 🙂", add_special_tokens=False)["input_ids"]) == "漢字 🙂"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_read_back(kind, tmp_path):
    tokenizer, kept = narrowed(kind, TEXTS)
    tokenizer.save_pretrained(tmp_path)
    for again in (type(tokenizer).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again(list(CORPUS), padding=True) == tokenizer(list(CORPUS), padding=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert len(content["model"]["vocab"]) == len(kept)


def test_what_a_merge_is_made_of_stays():
    tokenizer, _ = narrowed("byte bpe", ["surprise"])
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert len(tokenizer.tokenize("surprise")) < len("surprise")
    made = {"".join(merge) for merge in content["merges"]}
    assert {piece for piece in content["vocab"] if len(piece) > 1} - {*SPECIAL} == made


def test_pieces_are_counted():
    counts = data.count_pieces(WHOLE["wordpiece"], ["the film", ("the", "the film")])
    assert counts["the"] == 3
    assert counts["<s>"] == 2
    assert counts["</s>"] == 3


def test_a_class_that_builds_itself_from_its_files_takes_it(tmp_path):
    tokenizer = transformers.BertTokenizer(
        vocab={
            word: id_
            for id_, word in enumerate(("[PAD]", "x", "y", "##y", "yy", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
        }
    )
    kept = data.keep_pieces(tokenizer, {"yy"})
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert data.keep_pieces(tokenizer, {*data.count_pieces(tokenizer, ["xy"])}) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert tokenizer("xy yy z")["input_ids"] == [5, 1, 3, 2, 3, 4, 6]
    assert tokenizer.pad_token_id == 0


def test_a_tokenizer_without_its_file_is_refused():
    with pytest.raises(UnsupportedModel, match=r"tokenizer=ByT5Tokenizer writes no tokenizer\.json"):
        data.keep_pieces(transformers.ByT5Tokenizer(), set())
