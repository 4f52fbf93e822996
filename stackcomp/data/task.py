"""A task: what a model is for, declared once: data, columns, kind, metric and splits.

Three splits have a role: "train" (training and calibration text), "selection" (what strengths and stacks are
chosen on) and "test" (evaluated once). Each is the name of a split of the source, or, for the last two, a
number of examples to carve from the training split: never more than a fifth of it, the same ones always,
and the training split is what is left.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import inf, isnan
from typing import TYPE_CHECKING, Any, Literal

from stackcomp.core.errors import DataError, SettingError
from stackcomp.core.settings import whole
from stackcomp.data.sources import Source, load_splits

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from stackcomp.data.question_answering import Question, Span, Windows

Kind = Literal["classification", "regression", "similarity", "language_modelling", "question_answering"]
Split = Literal["train", "selection", "test"]
ROLES: tuple[Split, ...] = ("train", "selection", "test")
METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "similarity": ("spearman", "pearson"),
    "language_modelling": ("perplexity",),
    "question_answering": ("f1", "exact_match"),
}
AUTO_CLASSES: Mapping[str, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "similarity": "AutoModel",
    "language_modelling": "AutoModelForCausalLM",
    "question_answering": "AutoModelForQuestionAnswering",
}
CARVE_SEED = 20231221  # the day DSFormer appeared; it only has to stay the same


@dataclass(frozen=True, kw_only=True, repr=False)
class Task:
    """A task, as pure description. Build one with the functions of this module; `repr` reads back.

    name: what tables call it. source: where the rows are. kind: what the model predicts. text: one column,
    or two for pairs (question and context). label: the column of targets, None where there are none. labels:
    names of the classes in order, when they are not to be read from the data. metric: see `METRICS`. train,
    selection, test: see the module. max_length: tokens a text (or a window of it) is cut to. deduplicate:
    drop rows whose text appeared before (spaces around it ignored) before carving.

    Of question answering alone: doc_stride: tokens that two neighbouring windows of a context share;
    max_answer_length: tokens of the longest answer looked for; unanswerable: whether a question may have no
    answer.
    """

    name: str
    source: Source
    kind: Kind
    text: tuple[str, ...]
    label: str | None = "label"
    labels: tuple[str, ...] | None = None
    metric: str = "accuracy"
    train: str = "train"
    selection: str | int = 5000
    test: str | int = "validation"
    max_length: int = 128
    deduplicate: bool = False
    doc_stride: int = 128
    max_answer_length: int = 30
    unanswerable: bool = False

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise SettingError(f"task {self.name!r}: kind={self.kind!r} is not one of {', '.join(METRICS)}")
        if self.metric not in METRICS[self.kind]:
            raise SettingError(
                f"task {self.name!r}: metric={self.metric!r} is not one of {', '.join(METRICS[self.kind])} "
                f"for {self.kind}"
            )
        wanted = {"language_modelling": (1,), "question_answering": (2,)}.get(self.kind, (1, 2))
        if len(self.text) not in wanted:
            raise SettingError(
                f"task {self.name!r}: text={self.text!r} must name one column, or two for a pair"
            )
        whole(f"task {self.name!r}: max_length", self.max_length, 2)
        if self.kind == "question_answering" and not 0 <= self.doc_stride < self.max_length:
            raise SettingError(
                f"task {self.name!r}: doc_stride={self.doc_stride} must be at least 0 and below "
                f"max_length={self.max_length}"
            )
        if self.max_answer_length < 1:
            raise SettingError(
                f"task {self.name!r}: max_answer_length={self.max_answer_length} must be at least 1 token"
            )
        if self.kind == "classification" and self.labels is not None:
            self._two_classes(self.labels)
        for role, value in (("selection", self.selection), ("test", self.test)):
            if isinstance(value, int) and value < 1:
                raise SettingError(
                    f"task {self.name!r}: {role}={value} must be a split's name or at least 1 example to "
                    f"carve from {self.train!r}"
                )

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        return f"Task({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def auto_class(self) -> str:
        """Name of the class of `transformers` that builds a model for this task."""
        return AUTO_CLASSES[self.kind]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in order of their numbers; read from the training split where the task
        does not declare them."""
        if self.kind != "classification":
            return ()
        return self.labels or self._two_classes(self._label_names())

    def _two_classes(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the classes, refused where there are more than the metric knows."""
        if self.metric in ("f1", "matthews") and len(names) > 2:
            raise SettingError(
                f"task {self.name!r}: metric={self.metric!r} is of two classes, and there are {len(names)}: give metric='accuracy'"
            )
        return names

    def _label_names(self) -> tuple[str, ...]:
        """The names of the classes in the training split."""
        import datasets

        part = self.dataset("train")
        (label,) = self._labelled(part, "train")
        feature = part.features[label]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        column = _column(part, label)
        if any(isinstance(value, list | dict) for value in column):
            raise DataError(
                f"task {self.name!r}: column {label!r} holds {column[0]!r}, which is no class: give a number or a name for each text"
            )
        values = set(column)
        if any(isinstance(value, str) for value in values):
            return tuple(sorted(map(str, values)))
        broken = next((value for value in values if value is not None and not _is_whole(value)), None)
        if broken is not None:
            raise DataError(
                f"task {self.name!r}: column {label!r} holds {broken!r}, which is no class: give whole numbers from 0, or names; "
                "for a score to predict, declare a regression task"
            )
        top = max((int(value) for value in values if value is not None), default=-1)
        return tuple(str(number) for number in range(top + 1))

    @property
    def label_range(self) -> tuple[float, float]:
        """The least and the greatest label of the training split, of regression and similarity. Raises DataError where all are the same."""
        targets = self._targets(self.dataset("train"), "train")
        low, high = min(targets), max(targets)
        if low == high:
            raise DataError(
                f"task {self.name!r}: every label of the training split is {low:g}, which teaches nothing: give rows that differ"
            )
        return low, high

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: classes, 1 for regression, 2 (first and last token) for question
        answering, 0 where there is no head of the task's own."""
        outputs = {"classification": len(self.label_names), "regression": 1, "question_answering": 2}
        return outputs.get(self.kind, 0)

    def dataset(self, split: str) -> "Dataset":
        """Rows of "train", "selection" or "test"; answers to questions as columns `answers.text` and
        `answers.answer_start`. Raises `DataError` for an unknown, missing or empty split or a missing column.
        """
        if split not in ROLES:
            raise DataError(f"task {self.name!r}: split {split!r} is not one of {', '.join(ROLES)}")
        loaded = load_splits(self.source)
        named = self.train if split == "train" else getattr(self, split)
        if isinstance(named, int):
            part = self._from_train(loaded, split)
        elif named not in loaded:
            carve = "" if split == "train" else ", or a number of examples to carve from the training split"
            raise DataError(
                f"task {self.name!r}: {split}={named!r} is no split of the data, which has "
                f"{', '.join(loaded) or 'none'}; name one of these{carve}"
            )
        else:
            part = self._from_train(loaded, "train") if named == self.train else self._unique(loaded[named])
        part = part.flatten() if self.kind == "question_answering" else part
        self._check(part, split)
        return part

    def texts(self, split: str = "train", limit: int | None = None) -> list[str] | list[tuple[str, str]]:
        """Text alone, without labels, for calibration: strings, or pairs where the model reads both texts
        together. `limit` keeps so many, a fixed random subset."""
        if self.kind == "language_modelling":
            return _subset(
                [text for text in _column(self.dataset(split), self.text[0]) if text.strip()], limit
            )
        apart = self.kind == "similarity"  # the texts of a pair are read one by one
        part = _subset(self.dataset(split), -(-limit // 2) if apart and limit is not None else limit)
        columns = [_column(part, column) for column in self.text]
        if len(columns) == 1:
            return columns[0]
        pairs = list(zip(*columns, strict=True))
        return [text for pair in pairs for text in pair][:limit] if apart else pairs

    def encode(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        split: str,
        limit: int | None = None,
        *,
        labelled: bool = True,
    ) -> "Dataset":
        """Tokens: columns input_ids, attention_mask, (token_type_ids,) and labels.

        `limit` keeps a fixed random subset.
        labels: class number, float for regression and similarity, the tokens themselves for language
        modelling, where a row is a window of max_length tokens cut from the concatenated texts. A
        similarity pair has its second text in columns `pair_input_ids` and so on. In question answering a row
        is a window of a context behind its question, and labels are the first and the last token of the first
        answer, or 0 and 0 where the window does not hold it. With labelled=False no labels are needed and
        none given. Raises `DataError` as `dataset` does, and where a label is missing.
        """
        import datasets

        if self.kind == "language_modelling":
            return datasets.Dataset.from_dict(self._windows(tokenizer, split, limit))
        part = _subset(self.dataset(split), limit)
        if self.kind == "question_answering":
            cuts = self._cut(tokenizer, part)
            columns = dict(cuts.columns)
            if labelled:
                columns["labels"] = cuts.positions(
                    [next(iter(found), None) for found in self._answers(part, split)]
                )
            return datasets.Dataset.from_dict(columns)
        options: dict[str, Any] = {
            "truncation": True,
            "max_length": self.max_length,
            "return_attention_mask": True,
        }
        texts = [_column(part, column) for column in self.text]
        if len(texts) == 1 or self.kind == "similarity":
            columns: dict[str, Any] = _tokens(tokenizer, texts[0], options)
        else:
            columns = dict(tokenizer(texts[0], texts[1], **options))
        if len(texts) == 2 and self.kind == "similarity":
            columns |= {f"pair_{key}": value for key, value in _tokens(tokenizer, texts[1], options).items()}
        if labelled:
            columns["labels"] = self._targets(part, split)
        return datasets.Dataset.from_dict(columns)

    def questions(
        self, tokenizer: "PreTrainedTokenizerBase", split: str, limit: int | None = None
    ) -> "tuple[Windows, list[Question]]":
        """What question answering is scored on: the windows that `encode` gives, and the questions they are
        of. Raises `DataError` as `encode` does."""
        from stackcomp.data.question_answering import Question

        part = _subset(self.dataset(split), limit)
        contexts = _column(part, self.text[1])
        return self._cut(tokenizer, part), [
            Question(context=context, answers=tuple(context[first:end] for first, end in found))
            for context, found in zip(contexts, self._answers(part, split), strict=True)
        ]

    def digest(self) -> str:
        """SHA-256 of what a run can see of the data: every text and label of every split there is, and
        how they are read."""
        read = (self.kind, self.metric, self.max_length, self.labels)
        if self.kind == "question_answering":
            read += (self.doc_stride, self.max_answer_length, self.unanswerable)
        whole = hashlib.sha256(repr(read).encode())
        loaded = load_splits(self.source)
        for split in ROLES:
            named = getattr(self, split)
            if isinstance(named, str) and named not in loaded:
                continue
            if isinstance(named, int) and not self._from_train(loaded, split).num_rows:
                continue
            part = self.dataset(split)
            whole.update(f"\n{split} {part.num_rows}\n".encode())
            labels = [column for column in self._label_columns if column in part.column_names]
            for column in (*self.text, *labels):
                whole.update(b"\0".join(repr(value).encode() for value in _column(part, column)))
        return whole.hexdigest()

    def _unique(self, part: "Dataset") -> "Dataset":
        if not self.deduplicate or any(column not in part.column_names for column in self.text):
            return part
        first: dict[tuple[str, ...], int] = {}
        for number, texts in enumerate(zip(*(_column(part, column) for column in self.text), strict=True)):
            first.setdefault(tuple(str(text).strip() for text in texts), number)
        return part.select(list(first.values()))

    def _from_train(self, loaded: "Mapping[str, Dataset]", split: str) -> "Dataset":
        import numpy as np

        if self.train not in loaded:
            raise DataError(
                f"task {self.name!r}: train={self.train!r} is no split of the data, which has "
                f"{', '.join(loaded) or 'none'}"
            )
        part = self._unique(loaded[self.train])
        order = np.random.default_rng(CARVE_SEED).permutation(part.num_rows)
        start = 0
        for role, asked in (("test", self.test), ("selection", self.selection)):
            size = min(asked, part.num_rows // 5) if isinstance(asked, int) else 0
            if split == role:
                return part.select(np.sort(order[start : start + size]))
            start += size
        return part.select(np.sort(order[start:]))

    def _check(self, part: "Dataset", split: str) -> None:
        if part.num_rows == 0:
            raise DataError(
                f"task {self.name!r}: split {split!r} is empty; a carved split needs at least 5 rows to "
                "carve from"
            )
        for column in self.text:
            if column not in part.column_names:
                raise DataError(
                    f"task {self.name!r}: split {split!r} has no column {column!r}; "
                    f"{_nearest(column, part.column_names)}"
                )
            wordless = self.kind == "question_answering"
            blank = next(
                (
                    i
                    for i, value in enumerate(_column(part, column))
                    if not isinstance(value, str) or (wordless and not value.strip())
                ),
                None,
            )
            if blank is not None:
                raise DataError(
                    f"task {self.name!r}: row {blank} of split {split!r} has no text in column {column!r}; "
                    "drop such rows"
                )

    @property
    def _label_columns(self) -> tuple[str, ...]:
        if self.label is None:
            return ()
        parts = (".text", ".answer_start") if self.kind == "question_answering" else ("",)
        return tuple(self.label + part for part in parts)

    def _cut(self, tokenizer: "PreTrainedTokenizerBase", part: "Dataset") -> "Windows":
        from stackcomp.data.question_answering import cut

        texts = (_column(part, column) for column in self.text)
        return cut(tokenizer, *texts, name=self.name, max_length=self.max_length, doc_stride=self.doc_stride)

    def _answers(self, part: "Dataset", split: str) -> "Iterator[list[Span]]":
        from stackcomp.data.question_answering import answers

        columns = self._labelled(part, split)
        texts, starts = (_column(part, column) for column in columns)
        return answers(
            _column(part, self.text[1]),
            texts,
            starts,
            where=f"task {self.name!r}, split {split!r}",
            columns=columns,
            unanswerable=self.unanswerable,
        )

    def _labelled(self, part: "Dataset", split: str) -> tuple[str, ...]:
        if self.label is None:
            raise DataError(
                f"task {self.name!r}: labels are needed, and the task declares none; give label=, the "
                "column that holds them"
            )
        for column in self._label_columns:
            if column not in part.column_names:
                raise DataError(
                    f"task {self.name!r}: split {split!r} has no column {column!r}; "
                    f"{_nearest(column, part.column_names)}"
                )
        return self._label_columns

    def _targets(self, part: "Dataset", split: str) -> list[int] | list[float]:
        (label,) = self._labelled(part, split)
        values = _column(part, label)
        way_out = f"labels are needed here: name a labelled split, as in {split}='validation'"
        if self.kind != "classification":
            odd = next(
                (value for value in values if isinstance(value, str | list | dict) or value in (inf, -inf)),
                None,
            )
            if odd is not None:
                raise DataError(
                    f"task {self.name!r}: column {label!r} of split {split!r} holds {odd!r}, which is no number: name the column of scores"
                )
            missing = [i for i, value in enumerate(values) if value is None or isnan(value)]
            # The hub marks hidden targets of a regression test split by -1 in every row: of a part, that says nothing.
            hidden = all(value == -1 for value in values) and all(
                value == -1 for value in _column(self.dataset(split), label)
            )
            if missing or hidden:
                raise DataError(
                    f"task {self.name!r}: row {missing[0] if missing else 0} of split {split!r} has no "
                    f"label; {way_out}"
                )
            return [float(value) for value in values]
        names = self.label_names
        numbers = {name: number for number, name in enumerate(names)}
        targets = [
            numbers.get(value, -1) if isinstance(value, str) else int(value) if _is_whole(value) else -1
            for value in values
        ]
        bad = next((i for i, target in enumerate(targets) if not 0 <= target < len(names)), None)
        if bad is not None:
            raise DataError(
                f"task {self.name!r}: row {bad} of split {split!r} has label {values[bad]!r}, and the "
                f"classes are {', '.join(names)}; {way_out}"
            )
        return targets

    def _windows(
        self, tokenizer: "PreTrainedTokenizerBase", split: str, limit: int | None
    ) -> dict[str, list[list[int]]]:
        import numpy as np

        # Documents keep a line break between them; tokens of one text never depend on the next, so long
        # data stay cheap to encode.
        documents = [
            text if text.endswith("\n") else text + "\n"
            for text in _column(self.dataset(split), self.text[0])
            if text.strip()
        ]
        encoded = (
            tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            if documents
            else []
        )
        tokens: np.ndarray = (
            np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
            if documents
            else np.zeros(0, dtype=np.int64)
        )
        cuts = [
            tokens[start : start + self.max_length].tolist()
            for start in range(0, len(tokens), self.max_length)
        ]
        windows = _subset([cut for cut in cuts if len(cut) > 1], limit)
        if not windows:
            raise DataError(
                f"task {self.name!r}: split {split!r} holds {len(tokens)} tokens, too few for one window "
                "to predict a token in"
            )
        return {
            "input_ids": windows,
            "attention_mask": [[1] * len(cut) for cut in windows],
            "labels": [list(cut) for cut in windows],
        }


def _column(part: "Dataset", name: str) -> list[Any]:
    """A whole column as a list; through arrow, since iterating over a carved `Dataset` looks up row after
    row."""
    table: Any = part.with_format("arrow")[:]
    return table.column(name).to_pylist()


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], options: dict[str, Any]
) -> dict[str, list[list[int]]]:
    """`tokenizer(texts)`, reading no more of a long text than its first max_length tokens need, where these are the ones that are kept."""
    if tokenizer.truncation_side != "right":
        return dict(tokenizer(texts, **options))
    ends = options["max_length"] * 8  # characters; words and their pieces are shorter nearly always
    encoded = dict(tokenizer([_head(text, ends) for text in texts], **options))
    short = [
        i
        for i, text in enumerate(texts)
        if len(text) > ends and len(encoded["input_ids"][i]) < options["max_length"]
    ]
    if short:
        whole = tokenizer([texts[i] for i in short], **options)
        for key, rows in encoded.items():
            for place, i in enumerate(short):
                rows[i] = whole[key][place]
    return encoded


def _is_whole(value: float | None) -> bool:
    """Whether a label can be the number of a class; one that is missing cannot."""
    return value is not None and float(value).is_integer()


def _head(text: str, characters: int) -> str:
    """No more of a text than so many characters, and no part of a word; all of it where it has no space by then."""
    stop = text.rfind(" ", 0, characters) if len(text) > characters else -1
    return text if stop < 0 else text[:stop]


def _nearest(column: str, columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.4)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}It has {', '.join(columns)}"


def _subset(items: Any, limit: int | None) -> Any:
    """A fixed random subset in the order of the data: sources are often sorted by label or by subject."""
    import numpy as np

    if limit is not None and limit < 1:
        raise SettingError(f"limit={limit} must be at least 1, or None for everything")
    if limit is None or limit >= len(items):
        return items
    kept = np.sort(np.random.default_rng(CARVE_SEED + 1).permutation(len(items))[:limit])
    return [items[i] for i in kept] if isinstance(items, list) else items.select(kept)
