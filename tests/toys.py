"""Tiny models, a tokenizer and data, made on the spot: two layers of width 16, random weights from a fixed seed."""

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stackcomp.data import tasks
from stackcomp.data.task import Task

KIND = ("good", "fine", "great", "nice")
UNKIND = ("bad", "poor", "awful", "sad")
THINGS = ("film", "plot", "scene", "actor")
WORDS = (*KIND, *UNKIND, *THINGS, "the", "a", "is", "was", "and", "very")
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
VOCABULARY = len(SPECIAL) + len(WORDS)
PAD = 0

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}


def _config(family: str, **settings) -> transformers.PretrainedConfig:
    match family:
        case "bert":
            return transformers.BertConfig(**(_ENCODER | settings))
        case "roberta":
            return transformers.RobertaConfig(**_ENCODER, **settings)
        case "mpnet":
            return transformers.MPNetConfig(**_ENCODER, **settings)
        case "distilbert":
            sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
            shared = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": PAD}
            return transformers.DistilBertConfig(**shared, **sizes, **settings)
        case "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
            ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": PAD}
            return transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **ids, **settings)
        case "llama":
            sizes = {
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
                "bos_token_id": 2,
                "eos_token_id": 3,
            }
            return transformers.LlamaConfig(**(_ENCODER | sizes | settings))
    raise ValueError(family)


FAMILIES = ("bert", "distilbert", "roberta", "mpnet", "gpt2", "llama")


def make(family: str, head: str = "AutoModel", seed: int = 0, **settings) -> PreTrainedModel:
    """A model of the family with the head that the auto class names, in evaluation mode."""
    torch.manual_seed(seed)
    model = getattr(transformers, head).from_config(_config(family, **settings))
    with torch.no_grad():  # livelier than the small initial values, biases included
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def classifier(family: str, **settings) -> PreTrainedModel:
    """A sentence classifier."""
    return make(family, "AutoModelForSequenceClassification", **settings)


def bert_classifier() -> PreTrainedModel:
    """The model most tests use."""
    return classifier("bert")


def language_model(family: str, **settings) -> PreTrainedModel:
    """A model with its language-modelling head, tied to the embeddings."""
    head = "AutoModelForCausalLM" if family in ("gpt2", "llama") else "AutoModelForMaskedLM"
    return make(family, head, **settings)


def gpt2_lm() -> PreTrainedModel:
    """A language model with `Conv1D` layers and tied embeddings."""
    return language_model("gpt2")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer over WORDS."""
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


SENTENCES = ("the film is good", "a very bad plot", "the actor was great and the scene was nice", "awful")


def batch(tokenizer: Callable) -> dict[str, torch.Tensor]:
    """Four sentences of different lengths, padded."""
    return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))


def sentences(count: int, first: int = 0) -> list[dict]:
    """Labelled sentences, alternately kind and unkind."""
    found = []
    for i in range(first, first + count):
        words = (KIND, UNKIND)[i % 2]
        text = f"the {THINGS[i // 2 % 4]} is {words[i // 8 % 4]} and {'very ' * (i // 32 % 2)}{words[i % 4]}"
        found.append({"text": text, "label": i % 2})
    return found


def classification_task(*, labelled: bool = True) -> Task:
    """Kind or unkind, 48 sentences to train on and 16 to score; without labels where these are asked to be missing."""
    splits = {"train": sentences(48), "selection": sentences(16, 48), "test": sentences(16, 64)}
    if not labelled:  # as the test splits of GLUE come from the hub
        splits = {split: [row | {"label": -1} for row in rows] for split, rows in splits.items()}
    return tasks.classification(splits, name="toy", selection="selection", test="test", max_length=16)


def questions(count: int, first: int = 0) -> list[dict]:
    """How one of two things is: the word that the context says of it, in SQuAD's format."""
    found = []
    for i in range(first, first + count):
        things, words = (
            (THINGS[i % 4], THINGS[(i + 1 + i // 16 % 3) % 4]),
            (KIND[i // 4 % 4], UNKIND[i // 3 % 4]),
        )
        context = f"the {things[0]} is {words[0]} and the {things[1]} was very {words[1]}"
        answer = {"text": [words[i % 2]], "answer_start": [context.index(words[i % 2])]}
        question = f"the {things[i % 2]}"
        found.append({"id": str(i), "title": "", "context": context, "question": question, "answers": answer})
    return found


def question_task(**settings) -> Task:
    """48 questions to train on and 16 to score, their contexts read in two windows or three."""
    splits = {"train": questions(48), "selection": questions(16, 48), "test": questions(16, 64)}
    settings = {"name": "toy-questions", "selection": "selection", "test": "test"} | settings
    return tasks.question_answering(splits, max_length=12, doc_stride=3, **settings)


def language_task() -> Task:
    """The same sentences, as text to predict."""
    splits = {"train": sentences(48), "selection": sentences(16, 48), "test": sentences(16, 64)}
    texts = {split: [{"text": row["text"]} for row in rows] for split, rows in splits.items()}
    return tasks.language_modelling(texts, name="toy-text", selection="selection", test="test", max_length=16)


class Killed(Exception):
    """Stands for a kill inside the process."""


def killing(stop: int):
    """A progress that raises Killed at step `stop` of training."""

    def progress(items, /, label, total=None):
        for number, item in enumerate(items):
            if label == "training" and number == stop:
                raise Killed
            yield item

    return progress
