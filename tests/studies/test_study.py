"""What a study refuses before anything runs, and which steps its declaration says are one."""

from dataclasses import replace

import pytest

import stackcomp as sc
from stackcomp.core.errors import PipelineRefused, SelectionEmpty, SettingError, StudyRefused
from stackcomp.data import sources
from stackcomp.studies.forecast import duration, forecast
from stackcomp.studies.rows import RECIPE
from stackcomp.studies.study import _name
from tests import toys
from tests.studies.counted import Prune, Round, Train, entry, study


def test_two_entries_of_one_key_are_refused(folder):
    with pytest.raises(StudyRefused, match="two entries of key 'a'"):
        sc.Study(name="toy", entries=(entry("a", folder, Prune()), entry("a", folder, Round())))


def test_an_entry_that_starts_from_one_outside_the_study_is_refused(folder):
    outside = entry("outside", folder, Prune())
    with pytest.raises(StudyRefused, match="'inside' starts from 'outside'"):
        sc.Study(name="toy", entries=(entry("inside", outside, Round()),))


def test_an_illegal_pipeline_is_named_by_its_entry(folder):
    rounded = entry("rounded", folder, Round())
    mine = sc.Study(name="toy", entries=(rounded, entry("after", rounded, Prune())))
    with pytest.raises(PipelineRefused, match=r"entry 'after': step 1, Prune\(\), cannot run here"):
        mine.check()
    study(folder).check()


def test_a_model_without_a_head_is_judged_with_that_of_the_task(tmp_path):
    toys.make("bert").save_pretrained(tmp_path / "bare")
    rounded = entry("rounded", tmp_path / "bare", Round(skip="classifier"))
    tuned = entry("tuned", tmp_path / "bare", Train(steps=2))
    entries = (rounded, tuned, entry("child", tuned, Round(only="classifier")))
    sc.Study(name="toy", entries=entries).check()
    wrong = entry("wrong", tuned, Round(skip="classifer"))
    with pytest.raises(SelectionEmpty, match="classifer"):
        sc.Study(name="toy", entries=(tuned, wrong)).check()
    for model in (tmp_path / "bare", tuned):
        passes = {"int8": sc.Int8Weights(skip="classifier"), "prune": sc.MagnitudePrune()}
        made = sc.combinations(name="toy", model=model, task=tuned.task, passes=passes)
        assert "int8/0" in [one.key for one in made.entries]
    assert sc.check(rounded.pipeline, tmp_path / "bare", tuned.task)
    with pytest.raises(SelectionEmpty, match="classifier"):
        sc.check(rounded.pipeline, tmp_path / "bare")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": 3}, "neither a folder, a hub name nor an Entry"),
        ({"pipeline": sc.Int8Weights}, "is no pipeline"),
        ({"task": "sst2"}, "is no task"),
        ({"split": "tets"}, "is not one of train, selection, test"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"limit": 0}, "limit=0"),
        ({"labels": {"ratio": {1}}}, "no JSON"),
        ({"labels": {"ratio": float("nan")}}, "no JSON"),
        ({"labels": ["ratio"]}, "no mapping"),
        ({"latency": "no"}, "latency='no'"),
        ({"key": ""}, "is no name"),
    ],
)
def test_wrong_types_are_refused_where_they_are_written(settings, said):
    right = {
        "key": "a",
        "model": "some/model",
        "pipeline": sc.Int8Weights(),
        "task": toys.classification_task(),
    }
    with pytest.raises(SettingError, match=said):
        sc.Entry(**{**right, **settings})
    for name in ("a/b", "..", 3):
        with pytest.raises(SettingError, match="names a file"):
            sc.Study(name=name, entries=())
    with pytest.raises(SettingError, match="'a' is no entry"):
        sc.Study(name="a", entries=("a",))
    with pytest.raises(SettingError, match=r"study 'a': entries=Entry\(.*give a sequence"):
        sc.Study(name="a", entries=sc.Entry(**right))
    with pytest.raises(StudyRefused, match="has no entries"):
        sc.Study(name="a", entries=())


def test_a_row_is_an_entrys_when_all_of_the_declaration_agrees(folder):
    tuned, pruned, _ = study(folder).entries
    row = {"key": pruned.key, **pruned.asked}
    assert pruned.is_done(row)
    assert not pruned.is_done({**row, "error": {}})
    for changed in ({"seed": 1}, {"limit": 9}, {"pipeline": sc.Pipeline(Prune(sparsity=0.4))}):
        settings = {"key": pruned.key, "model": tuned, "pipeline": pruned.pipeline, "task": pruned.task}
        assert not sc.Entry(**{**settings, "limit": 8, **changed}).is_done(row)
    shorter = replace(pruned, task=replace(pruned.task, max_length=8))
    assert shorter.is_done(row)  # which does not say how its task was declared
    assert not shorter.is_done({**row, "task_digest": pruned.task_digest})
    other = sc.Entry(key="tuned", model=folder, pipeline=tuned.pipeline, task=tuned.task, seed=1)
    assert not entry(pruned.key, other, *pruned.passes).is_done(row)


def test_a_task_is_known_by_its_rows_or_the_names_of_its_files_wherever_they_lie(folder):
    pruned = study(folder).entries[1]

    def known(source):
        return replace(pruned, task=replace(pruned.task, source=source)).task_digest

    def files(path):
        return known(sources.files({"train": path}))

    assert files("/here/a.csv") == files("/there/a.csv") != files("/here/b.csv")
    assert known(sc.tasks.glue("sst2").source) == known(
        sc.tasks.glue("mrpc").source
    )  # the task's name stands for it
    rows = [{"text": f"a film {'very ' * i}good", "label": i % 2} for i in range(10)]
    assert known(sources.rows({"train": rows})) == known(sources.rows({"train": [*rows]}))
    assert known(sources.rows({"train": rows})) != known(sources.rows({"train": rows[1:]}))


def test_a_row_of_another_tokenizer_or_of_another_task_or_tokenizer_of_its_parent_is_not_the_entrys(
    folder, tmp_path
):
    tuned, pruned, _ = study(folder).entries
    row = {"key": pruned.key, **pruned.asked, **pruned.data}
    toys.tokenizer().save_pretrained(tmp_path / "words")
    words = replace(pruned, tokenizer=tmp_path / "words")
    told = {**row, **words.data}
    assert pruned.is_done(row)
    assert not words.is_done(row)
    assert words.is_done(told)
    vocabulary = tmp_path / "words" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"good"', '"fine"'))
    (tmp_path / "words").rename(tmp_path / "other")
    (tmp_path / "other").joinpath("ledger.json").write_text("{}")
    assert not replace(pruned, tokenizer=tmp_path / "other").is_done(told)
    for changed in (
        replace(tuned, task=replace(tuned.task, max_length=8)),
        replace(tuned, tokenizer=tmp_path / "other"),
    ):
        child = replace(pruned, model=changed)
        assert not child.is_done(row)
        assert child.slug != pruned.slug
        assert child.steps[0] != pruned.steps[0]
        assert child.is_done({"key": pruned.key, **pruned.asked})  # a row of before this was said


def test_a_row_of_another_tokenizer_beside_the_model_is_not_the_entrys(folder):
    tuned, pruned, _ = study(folder).entries
    rows = [{"key": one.key, **one.asked, **one.data} for one in (tuned, pruned)]
    older = [{**rows[0], "tokenizer": None}, {**rows[1], "before": [[tuned.task_digest, None]]}]
    assert tuned.is_done(rows[0])
    assert pruned.is_done(rows[1])
    vocabulary = folder / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"good"', '"fine"'))
    _name.cache_clear()  # a folder is read once
    tuned, pruned, _ = study(folder).entries
    assert not tuned.is_done(rows[0])
    assert not pruned.is_done(rows[1])
    assert tuned.is_done(older[0])  # of before this was said
    assert pruned.is_done(older[1])


def test_rows_stand_in_the_order_of_the_entries_and_those_of_other_declarations_are_left_out(folder):
    mine = study(folder)
    rows = [{"key": one.key, **one.asked, **one.data} for one in mine.entries]
    stale = {**rows[0], "declaration": "Pipeline(Old())"}
    assert mine.own([rows[2], {"key": "gone"}, stale, rows[1]]) == rows[1:]
    assert mine.own([stale, rows[1], rows[0]]) == rows[:2]  # of two rows of a key the last one counts


def test_a_folder_is_known_by_its_content_wherever_it_lies(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "model")
    (one,) = sc.Study(name="a", entries=(entry("a", moved, Prune()),)).entries
    assert one.asked["model"].startswith("model@")
    toys.classifier("bert", seed=1).save_pretrained(folder)
    assert entry("a", folder, Prune()).asked["model"] != one.asked["model"]


def test_shared_prefixes_are_counted_once_and_time_is_predicted_from_rows(folder):
    entries = study(folder).entries
    nothing = forecast(entries, (), [])
    assert (dict(nothing.passes), nothing.saved) == ({"Train": 1, "Prune": 1, "Round": 1}, 1)
    assert nothing.time == "unknown"
    steps = [
        {"fingerprint": mark, "name": name, "seconds": seconds}
        for mark, name, seconds in [("1", "Train", 60.0), ("2", "Prune", 30.0), ("3", "Prune", 50.0)]
    ]
    rows = [{"steps": steps}, {"steps": steps[:2]}, {"error": {}}]
    assert forecast(entries, (), rows).time == "about 2 min, and 1 passes of unknown time"
    assert forecast(entries[1:2], (), rows).time == "about 40 s"
    assert forecast(entries[1:2], (), rows, workers=2).time == "about 20 s"
    scored = [{"steps": [{**step, "measuring_seconds": 7.0} for step in steps]}]
    assert forecast(entries[1:2], (), scored).time == "about 47 s"
    assert forecast(entries[1:], entries[1].steps, rows).passes == {"Round": 1}
    assert duration(12000) == "3 h 20 min"


def test_steps_differ_by_seed_by_task_where_it_is_read_and_by_model(folder):
    tuned, pruned, rounded = study(folder).entries
    assert pruned.steps == rounded.steps[:2]
    assert entry("b", tuned, *pruned.passes, seed=1).steps[1] != pruned.steps[1]
    assert entry("b", folder, *pruned.passes).steps[0] != pruned.steps[0]


def test_rows_are_told_apart_by_all_that_an_entry_says(folder):
    one = entry("a", folder, Round())
    assert {*RECIPE} == {*one.asked, *one.data}
