"""Questions and contexts as tokens: positions that point at the answer, windows that miss nothing, and data that are refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import DataError, SettingError
from stackcomp.data import tasks
from stackcomp.data.batches import Collator
from tests import toys

CONTEXT = "the film was very good, and the plot was bad"
ROW = {"id": "1", "title": "t", "context": CONTEXT, "question": "the film"}
GOOD = ROW | {"answers": {"text": ["very good", "good"], "answer_start": [13, 18]}}


def task(*rows: dict, test=(GOOD,), **settings) -> tasks.Task:
    splits = {"train": list(rows or [GOOD]), "test": list(test)}
    return tasks.question_answering(
        splits, **{"test": "test", "selection": "test", "max_length": 32, "doc_stride": 4} | settings
    )


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(
        st.tuples(st.sampled_from([*toys.WORDS, "odd"]), st.sampled_from([" ", "  ", ", ", "\n"])),
        min_size=1,
        max_size=40,
    ),
    question=st.lists(st.sampled_from(toys.WORDS), min_size=1, max_size=3),
    max_length=st.integers(11, 30),
    stride=st.integers(0, 4),
    data=st.data(),
)
def test_positions_point_at_the_answer(words, question, max_length, stride, data) -> None:
    tokenizer = toys.tokenizer()
    begins, context = [], "  "
    for word, gap in words:
        begins.append(len(context))
        context += word + gap
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    text = context[begins[first] : begins[last] + len(words[last][0])]
    row = {
        "context": context,
        "question": " ".join(question),
        "answers": {"text": [text], "answer_start": [begins[first]]},
    }
    found = task(row, max_length=max_length, doc_stride=stride)
    windows, (asked,) = found.questions(tokenizer, "train")
    rows = found.encode(tokenizer, "train")
    assert asked.answers == (text,)
    assert rows["input_ids"][:] == windows.columns["input_ids"]
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    seen, held = set(), 0
    for ids, (start, end), offsets in zip(rows["input_ids"], rows["labels"], windows.offsets, strict=True):
        here = [tuple(span) for span in offsets.tolist() if span[0] >= 0]
        seen |= set(here)
        assert len(ids) <= max_length
        if (start, end) == (0, 0):
            assert here[0][0] > begins[first] or here[-1][1] < begins[first] + len(text)
        else:
            held += 1
            assert context[offsets[start, 0] : offsets[end, 1]] == text
            assert ids[start : end + 1] == wanted
    assert seen == set(
        tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )
    assert held or len(wanted) > stride


def test_an_answer_inside_a_word_points_at_the_word_and_spaces_around_it_do_not_count(tokenizer) -> None:
    inside = ROW | {"answers": {"text": ["oo"], "answer_start": [19]}}
    around = ROW | {"answers": {"text": [" very good"], "answer_start": [12]}}
    rows = task(inside, around).encode(tokenizer, "train")
    assert [
        tokenizer.decode(ids[a : b + 1])
        for ids, (a, b) in zip(rows["input_ids"], rows["labels"], strict=True)
    ] == [
        "good",
        "very good",
    ]


def test_windows_are_rows_to_batches_and_calibration(tokenizer) -> None:
    few = toys.question_task()
    rows = few.encode(tokenizer, "train", limit=3, labelled=False)
    assert len(rows) > 3
    assert set(rows.column_names) == {"input_ids", "attention_mask"}
    labelled = few.encode(tokenizer, "train", limit=3)
    batch = Collator(tokenizer)([{"index": i, **labelled[i]} for i in range(len(labelled))])
    assert batch["labels"].shape == (len(rows), 2)
    everything = few.dataset("train")
    assert few.texts("train") == list(zip(everything["question"], everything["context"], strict=True))
    assert (few.num_labels, few.auto_class) == (2, "AutoModelForQuestionAnswering")


def test_every_format_reads_alike(tmp_path: Path, tokenizer) -> None:
    import datasets

    rows = toys.questions(6)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    nested = [
        {"title": "", "paragraphs": [{"context": row["context"], "qas": [asked(row)]} for row in part]}
        for part in (rows[:2], rows[2:])
    ]
    (tmp_path / "train.json").write_text(json.dumps({"version": "1.1", "data": nested}))
    sources = [
        {"train": rows},
        tmp_path / "train.parquet",
        tmp_path / "train.jsonl",
        tasks.Files(format="squad", paths=(("train", str(tmp_path / "train.json")),)),
    ]
    found = [
        tasks.question_answering(source, selection="train", test="train", max_length=20, doc_stride=2)
        for source in sources
    ]
    assert len({one.digest() for one in found}) == 1
    assert found[0].encode(tokenizer, "train")[:] == found[3].encode(tokenizer, "train")[:]
    assert found[0].dataset("train").to_dict() == found[3].dataset("train").to_dict()
    (tmp_path / "bad.json").write_text(json.dumps({"data": [{"title": "t"}]}))
    bad = tasks.Files(format="squad", paths=(("train", str(tmp_path / "bad.json")),))
    with pytest.raises(DataError, match=r"is not JSON as SQuAD is published \(KeyError: 'paragraphs'\)"):
        tasks.question_answering(bad).dataset("train")


def asked(row: dict) -> dict:
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    return {
        "id": row["id"],
        "question": row["question"],
        "answers": [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)],
    }


def test_squad_is_read_from_the_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer
) -> None:
    import datasets

    for name in ("squad", "squad_v2"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            datasets.Dataset.from_list(toys.questions(10)).to_parquet(tmp_path / name / f"{split}.parquet")
    monkeypatch.setenv("STACKCOMP_DATA", str(tmp_path))
    for found in (tasks.squad(), tasks.squad(2)):
        assert [found.dataset(split).num_rows for split in ("train", "selection", "test")] == [8, 2, 10]
        assert len(found.encode(tokenizer, "test")) == 10
    assert tasks.squad(2).unanswerable
    with pytest.raises(SettingError, match="version=3"):
        tasks.squad(3)  # pyright: ignore[reportArgumentType]


def test_a_question_without_an_answer_points_nowhere(tokenizer) -> None:
    none = ROW | {"answers": {"text": [], "answer_start": []}}
    rows = task(none, GOOD, unanswerable=True).encode(tokenizer, "train")
    assert rows["labels"][0] == [0, 0] != rows["labels"][1]
    with pytest.raises(DataError, match=r"row 0 has no answer in 'answers\.text'.*unanswerable=True"):
        task(none, GOOD).encode(tokenizer, "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": " \n"}, "row 1 of split 'train' has no text in column 'context'"),
        ({"question": None}, "row 1 of split 'train' has no text in column 'question'"),
        (
            {"answers": {"text": ["plot"], "answer_start": [3]}},
            r"row 1: the answer 'plot' is not at answers\.answer_start=3.*' fil'",
        ),
        ({"answers": {"text": ["good"], "answer_start": [-26]}}, "answer_start=-26"),
        ({"answers": {"text": [" "], "answer_start": [3]}}, r"row 1 has a blank answer in 'answers\.text'"),
        (
            {"answers": {"text": ["good"], "answer_start": []}},
            r"row 1: answers\.text=.* must be lists of one length",
        ),
        ({"answers": None}, r"row 1: answers\.text=None"),
        ({"question": "the " * 30}, "the question of row 1 has 30 tokens, which leaves -1 of max_length=32"),
    ],
)
def test_bad_rows_are_refused(tokenizer, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(GOOD, GOOD | row).encode(tokenizer, "train")


@pytest.mark.parametrize("column", ["context", "question", "answers"])
def test_missing_columns_are_refused(tokenizer, column: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != column}
    with pytest.raises(DataError, match=f"split 'train' has no column '{column}"):
        task(row, test=[row]).encode(tokenizer, "train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"doc_stride": 32}, "doc_stride=32 must be at least 0 and below max_length=32"),
        ({"max_answer_length": 0}, "max_answer_length=0"),
        ({"metric": "accuracy"}, "metric='accuracy' is not one of f1, exact_match"),
        ({"text": ("context",)}, "must name"),
    ],
)
def test_bad_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        task(**given)


def test_digest_sees_answers_and_how_contexts_are_cut() -> None:
    other = GOOD | {"answers": {"text": ["good"], "answer_start": [18]}}
    assert task().digest() == task().digest()
    assert (
        len({one.digest() for one in (task(), task(other), task(doc_stride=5), task(max_answer_length=3))})
        == 4
    )
