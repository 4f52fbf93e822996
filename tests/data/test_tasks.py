"""Tasks: declared without heavy imports, split the same way always, and loud about data they cannot use."""

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from stackcomp.core.errors import DataError, SettingError
from stackcomp.data import tasks

TRAIN = [{"text": f"the film was good {i}", "label": i % 2} for i in range(40)]
TEST = [{"text": f"very bad plot {i}", "label": i % 2} for i in range(7)]


def toy(**settings) -> tasks.Task:
    source = settings.pop("source", {"train": TRAIN, "test": TEST})
    return tasks.classification(source, **{"test": "test", "selection": 6, **settings})


def test_declaring_a_task_imports_nothing_heavy() -> None:
    code = (
        "import sys; from stackcomp.data import tasks; tasks.glue('sst2'); tasks.movie_reviews(); "
        "print([name for name in ('torch', 'datasets', 'transformers', 'pandas') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "task",
    [
        tasks.glue("sst2"),
        tasks.glue("stsb", max_length=32),
        tasks.stsb(),
        tasks.movie_reviews("imdb"),
        tasks.squad(2, doc_stride=64),
        tasks.language_modelling(),
        tasks.similarity("owner/name", config="x"),
        toy(),
    ],
    ids=lambda task: task.name,
)
def test_repr_reads_back(task: tasks.Task) -> None:
    again = eval(repr(task), vars(tasks))
    assert again == task
    assert hash(again) == hash(task)


def test_splits_are_disjoint_fixed_and_whole() -> None:
    task = toy()
    train, selection, test = (task.dataset(split)["text"][:] for split in ("train", "selection", "test"))
    assert len(selection) == 6
    assert sorted([*train, *selection]) == sorted(row["text"] for row in TRAIN)
    assert test == [row["text"] for row in TEST]
    assert toy().dataset("selection")["text"][:] == selection


def test_carving_takes_at_most_a_fifth_each() -> None:
    task = toy(source={"train": TRAIN}, selection=5000, test=5000)
    assert [task.dataset(split).num_rows for split in ("train", "selection", "test")] == [24, 8, 8]


def test_duplicates_go_before_the_split() -> None:
    doubled = [*TRAIN, *({**row, "text": f" {row['text']}\n"} for row in TRAIN)]
    assert toy(source={"train": doubled, "test": TEST}, deduplicate=True).dataset("train").num_rows == 34
    assert toy(source={"train": doubled, "test": TEST}).dataset("train").num_rows == 74


def test_encode_classification(tokenizer) -> None:
    rows = toy(max_length=4).encode(tokenizer, "test")
    assert rows["labels"][:] == [row["label"] for row in TEST]
    assert all(len(ids) <= 4 for ids in rows["input_ids"])
    assert rows["input_ids"][0] == tokenizer(TEST[0]["text"], truncation=True, max_length=4)["input_ids"]


def test_long_texts_are_cut_without_reading_them_whole(tokenizer) -> None:
    long = "the " * 500
    padded = "a" + " " * 300 + "film " * 20  # few tokens in its first characters
    source = {"train": TRAIN, "test": [{"text": long, "label": 0}, {"text": padded, "label": 1}]}
    rows = toy(source=source, max_length=10).encode(tokenizer, "test")
    assert rows["input_ids"][:] == tokenizer([long, padded], truncation=True, max_length=10)["input_ids"]


def test_no_word_is_cut_where_a_long_text_is(tokenizer) -> None:
    """The head of a text ends in half a word, which is another word."""
    text = "a " * 7 + " " * 50 + "very " + " " * 7 + "theatre " * 50
    text = text[: text.index("theatre")].ljust(77) + "theatre " * 50
    assert text[:80].endswith("the")
    task = toy(source={"train": TRAIN, "test": [{"text": text, "label": 0}]}, max_length=10)
    wanted = tokenizer([text], truncation=True, max_length=10)["input_ids"]
    assert task.encode(tokenizer, "test")["input_ids"][:] == wanted


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.txt", "a.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=rf"{name}: cannot be read as"):
        toy(source={"train": tmp_path / name}).dataset("train")


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(DataError, match="'a film' is no row"):
        toy(source={"train": ["a film"]})


def test_limit_is_a_fixed_random_subset(tokenizer) -> None:
    ordered = [{"text": "film", "label": int(i >= 50)} for i in range(100)]
    rows = toy(source={"train": TRAIN, "test": ordered}).encode(tokenizer, "test", limit=30)
    again = toy(source={"train": TRAIN, "test": ordered}).encode(tokenizer, "test", limit=30)
    assert len(rows) == 30
    assert 5 < sum(rows["labels"]) < 25
    assert rows["labels"][:] == again["labels"][:]
    with pytest.raises(SettingError, match="limit=0"):
        toy().encode(tokenizer, "test", limit=0)


def test_pairs_are_read_together_and_similarity_apart(tokenizer) -> None:
    pairs = {"train": [{"sentence1": "the film", "sentence2": "very good film", "label": 3.5}] * 5}
    together = tasks.regression(pairs, text=("sentence1", "sentence2"), test="train", selection=1)
    row = together.encode(tokenizer, "test")[0]
    assert row["input_ids"] == tokenizer("the film", "very good film")["input_ids"]
    assert row["labels"] == 3.5
    assert together.texts("train", 1) == [("the film", "very good film")]
    apart = tasks.similarity(pairs, test="train", selection=1)
    row = apart.encode(tokenizer, "test")[0]
    assert row["pair_input_ids"] == tokenizer("very good film")["input_ids"]
    assert apart.texts("train", 2) == ["the film", "very good film"]
    assert apart.texts("train", 1) == ["the film"]  # so many texts, from pairs of all of the split
    assert apart.auto_class == "AutoModel"


def test_language_modelling_windows_hold_every_token_once(tokenizer) -> None:
    texts = [{"text": "the film was very bad\n"}, {"text": ""}, {"text": "a good plot and actor"}]
    task = tasks.language_modelling({"train": texts, "validation": texts, "test": texts}, max_length=4)
    rows = task.encode(tokenizer, "test")
    flat = [token for row in rows["input_ids"] for token in row]
    wanted = [
        token for row in texts for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    ]
    assert flat == wanted
    assert [len(row) for row in rows["input_ids"]] == [4, 4, 2]
    assert rows["labels"][:] == rows["input_ids"][:]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_local_files(tmp_path: Path, tokenizer, suffix: str) -> None:
    import pandas

    path = tmp_path / f"train.{suffix}"
    table = pandas.DataFrame(TRAIN)
    {
        "csv": lambda: table.to_csv(path, index=False),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    task = tasks.classification(path, test=5, selection=5)
    assert [task.dataset(split).num_rows for split in ("train", "selection", "test")] == [30, 5, 5]
    assert task.label_names == ("0", "1")
    assert task.digest() == tasks.classification({"train": TRAIN}, test=5, selection=5).digest()


def test_named_folder_stands_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    rows = pandas.DataFrame([{"sentence": row["text"], "label": row["label"]} for row in TRAIN])
    rows.to_parquet(folder / "train.parquet")
    rows[:9].to_parquet(folder / "validation-00000-of-00001.parquet")
    monkeypatch.setenv("STACKCOMP_DATA", str(tmp_path))
    task = tasks.glue("sst2")
    assert task.dataset("test").num_rows == 9
    assert task.num_labels == 2


def test_movie_reviews_are_unique_and_split() -> None:
    task = tasks.movie_reviews("rotten_tomatoes")
    parts = [task.dataset(split)["text"][:] for split in ("train", "selection", "test")]
    flat = [text.strip() for part in parts for text in part]
    assert len(flat) == len(set(flat)) == 8530
    assert [len(part) for part in parts] == [5118, 1706, 1706]


def test_class_names_from_strings(tokenizer) -> None:
    named = [{"text": row["text"], "label": ("no", "yes")[row["label"]]} for row in TRAIN]
    task = toy(source={"train": named, "test": named})
    assert task.label_names == ("no", "yes")
    assert task.encode(tokenizer, "test")["labels"][:] == [row["label"] for row in TRAIN]


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        (toy(), "validation", "'validation' is not one of train, selection, test"),
        (toy(test="tset"), "test", "test='tset' is no split of the data, which has train, test"),
        (toy(text="txet"), "train", "no column 'txet'; did you mean 'text'"),
        (toy(label="lable"), "test", "no column 'lable'; did you mean 'label'"),
        (toy(label=None), "test", "labels are needed"),
        (toy(source={"train": TRAIN, "test": []}), "test", "'test' is empty"),
        (toy(source={"train": TRAIN[:4]}, test=1), "test", "'test' is empty"),
        (toy(source={"train": TRAIN, "test": [{"text": "film", "label": -1}]}), "test", "row 0 .* label -1"),
        (
            toy(source={"train": TRAIN, "test": [{"text": "film", "label": None}]}),
            "test",
            "row 0 .* label None",
        ),
        (toy(source={"train": TRAIN, "test": [{"text": "film", "label": 7}]}), "test", "label 7, and the"),
        (toy(source={"train": TRAIN, "test": [{"text": None, "label": 1}]}), "test", "row 0 .* has no text"),
        (toy(source="missing.csv"), "train", "no file 'missing.csv'"),
        (
            toy(source={"train": [{"text": "film", "label": 0.1 * i} for i in range(9)]}),
            "train",
            "which is no class",
        ),
        (
            toy(source={"train": TRAIN, "test": [{"text": "film", "label": 0.5}]}),
            "test",
            "row 0 .* label 0.5",
        ),
        (
            toy(source={"train": [{"text": "film", "label": i and "0"} for i in range(9)]}),
            "train",
            "one type",
        ),
        (
            toy(source={"train": TRAIN, "test": [{"text": "film", "label": float("nan")}]}),
            "test",
            "label nan",
        ),
        (toy(source={"train": [{"text": "film", "label": [i]} for i in range(9)]}), "train", "no class"),
    ],
)
def test_bad_data_is_refused(tokenizer, task: tasks.Task, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.encode(tokenizer, split)


def test_hidden_regression_labels_are_refused_and_their_text_still_serves(tokenizer) -> None:
    hidden = [{"text": "the film", "label": -1.0}] * 3
    task = tasks.regression({"train": TRAIN, "test": hidden}, test="test")
    with pytest.raises(DataError, match="row 0 of split 'test' has no label"):
        task.encode(tokenizer, "test")
    assert task.encode(tokenizer, "test", labelled=False).column_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tasks.glue("sst-2"), "did you mean 'sst2'"),
        (lambda: toy(metric="perplexity"), "metric='perplexity' is not one of accuracy, f1, matthews"),
        (lambda: toy(metric="f1", labels=("a", "b", "c")), "metric='f1' is of two classes, and there are 3"),
        (
            lambda: (
                tasks.classification(
                    {"train": [{"text": "a film", "label": label} for label in (0, 1, 2)] * 4},
                    test=2,
                    metric="matthews",
                ).num_labels
            ),
            "metric='matthews' is of two classes, and there are 3: give metric='accuracy'",
        ),
        (lambda: toy(max_length=1), "max_length=1"),
        (lambda: toy(max_length=16.5), "max_length=16.5"),
        (lambda: toy(selection=0), "selection=0"),
        (lambda: toy(text=("a", "b", "c")), "must name one column, or two"),
        (lambda: toy(text=5), "text=5 names no column"),
        (lambda: toy(source=None), "source=None is no data"),
        (lambda: tasks.movie_reviews("amazon"), "source='amazon'"),
        (lambda: tasks.classification({"train": "a.xls"}), "'.xls'"),
        (lambda: tasks.classification({"train": "a.csv", "test": "b.json"}), "must share one format"),
    ],
)
def test_bad_settings_are_refused(build, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()


@pytest.mark.parametrize("label", ["x", [1.0], inf])
def test_a_score_that_is_no_number_is_refused(tokenizer, label) -> None:
    task = tasks.regression([{"text": "the film", "label": label}] * 9, test=1)
    with pytest.raises(DataError, match="which is no number"):
        task.encode(tokenizer, "train")


def test_rows_alone_are_the_training_split_and_may_come_one_by_one(tokenizer) -> None:
    alone = tasks.classification(TRAIN, test=2)
    assert alone == tasks.classification({"train": (row for row in TRAIN)}, test=2)
    assert len(alone.encode(tokenizer, "train")) > 0
    with pytest.raises(DataError, match="split 'train': 5 holds no rows"):
        tasks.classification({"train": 5})
    with pytest.raises(DataError, match=r"column 'spans' holds .*leave the column out"):
        tasks.classification([{"text": "a", "label": 0, "spans": [{"start": 1}]}])


def test_a_digest_needs_no_split_that_nobody_can_carve() -> None:
    few = tasks.classification({"train": TRAIN[:3], "test": TEST}, test="test", selection=1)
    assert few.digest() != tasks.classification({"train": TRAIN[:2], "test": TEST}, test="test").digest()


def test_labels_have_a_range_and_must_differ() -> None:
    rows = [{"text": "good", "label": label} for label in (0.25, 0.0, 1.0)]
    assert tasks.regression(rows, test=1, selection=1).label_range == (0.0, 1.0)
    with pytest.raises(DataError, match="every label of the training split is 1"):
        _ = tasks.regression(rows[2:], test=1, selection=1).label_range


def test_digest_sees_texts_labels_and_settings() -> None:
    base = toy().digest()
    assert toy().digest() == base
    changed = json.loads(json.dumps(TEST))
    changed[3]["label"] = 1 - changed[3]["label"]
    assert toy(source={"train": TRAIN, "test": changed}).digest() != base
    assert toy(max_length=64).digest() != base
    assert toy(selection=5).digest() != base


def test_a_long_text_is_cut_on_the_side_of_the_tokenizer(tokenizer) -> None:
    rows = [{"text": "the film was good " * 60 + "bad", "label": 0}] * 5
    task = tasks.classification({"train": rows}, test="train", selection=1, max_length=8)
    tokenizer.truncation_side = "left"
    (found,) = {tuple(ids) for ids in task.encode(tokenizer, "train")["input_ids"]}
    assert list(found) == tokenizer(rows[0]["text"], truncation=True, max_length=8)["input_ids"]
    assert tokenizer.decode(found).split()[-2] == "bad"


def test_regression_targets_of_minus_one_count_where_others_differ(tokenizer) -> None:
    rows = [{"text": f"{'very ' * i}good", "label": -1.0} for i in range(9)] + [{"text": "bad", "label": 1.0}]
    task = tasks.regression({"train": rows, "test": rows}, test="test", selection=1)
    assert [task.encode(tokenizer, "test", count)["labels"][0] for count in (1, 3)] == [-1.0, -1.0]
