"""A search on a toy: it finds what trying everything finds, from the rows it goes on, and the test split is scored once."""

import shutil
import sys

import pytest

import stackcomp as sc
from stackcomp.cli import main
from stackcomp.core.errors import MissingNeed, SettingError, StudyRefused
from stackcomp.studies import Rows
from stackcomp.studies import search as searching
from stackcomp.studies.combinations import techniques
from stackcomp.studies.search import search
from tests import toys
from tests.studies.counted import Broken, Prune, Round, Train, applied

RUNGS = (sc.Rung(examples=6, steps=0.5), sc.Rung())
PASSES = {
    "prune": [Prune(sparsity=0.5), Prune(sparsity=0.75)],
    "tune": Train(steps=4, batch_size=4),
    "int8": Round(),
}


def asked(folder, **settings):
    said = {"loss": 30.0, "pipelines": 10, "rungs": RUNGS, "passes": PASSES, **settings}
    return sc.Search(**{"name": "toy", "model": folder, "task": toys.classification_task(), **said})


@pytest.fixture
def go(tmp_path):
    """Runs a search in `tmp_path`; gives what it found, and its rows by key."""

    def run(mine):
        rows = Rows(name=mine.name, folder=tmp_path / "results")
        found = search(mine, rows, tmp_path / "out", tell=lambda _: None)
        return found, {row["key"]: row for row in rows.read()}

    return run


def rung(rows, place):
    return [row for row in rows.values() if row["labels"]["rung"] == place]


def test_with_everything_tried_it_is_the_smallest_within_the_loss(go, folder):
    few = {"prune": PASSES["prune"], "tune": PASSES["tune"]}
    found, rows = go(asked(folder, passes=few, pipelines=100, keep=1.0))
    first, last = rung(rows, 1), rung(rows, 2)
    assert len(first) == len(last) == 3 * 2 - 1  # every choice but that of nothing; all orders here are legal
    best = min((row for row in last if -row["difference"] <= 30.0), key=lambda row: row["size_bytes"])
    assert found.reached
    assert found.searched["size_bytes"] == best["size_bytes"]
    assert found.chosen["declaration"] == found.searched["declaration"]
    assert [row["split"] for row in rows.values()].count("test") == 1
    assert found.chosen["split"] == "test"
    for one in found.front:
        assert not any(row["size_bytes"] <= one["size_bytes"] and row["score"] > one["score"] for row in last)
    assert {row["limit"] for row in first} == {6}
    assert {row["limit"] for row in last} == {None}
    assert all("steps=2" in row["declaration"] for row in first if "tune" in row["labels"]["passes"])
    assert all("steps=4" in row["declaration"] for row in last if "tune" in row["labels"]["passes"])
    assert found.chosen["declaration"] in str(found)


def test_the_best_of_a_rung_go_on_and_the_rows_are_enough_to_go_on_elsewhere(
    go, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(searching, "BATCH", 3)
    mine = asked(folder, pipelines=6, keep=0.34)
    found, rows = go(mine)
    assert [len(rung(rows, place)) for place in (1, 2, "chosen")] == [6, 2, 1]
    ranked = sorted(rung(rows, 1), key=mine.cost)
    kept = {row["key"].partition("/")[2] for row in rung(rows, 2)}
    assert kept == {row["key"].partition("/")[2] for row in ranked[:2]}
    count, path = len(applied()), tmp_path / "results" / "toy.jsonl"
    whole = path.read_text()
    shutil.rmtree(tmp_path / "out")
    assert go(mine)[0].chosen == found.chosen
    assert len(applied()) == count
    path.write_text("".join(whole.splitlines(keepends=True)[:5]))  # stopped within the second batch
    again, resumed = go(mine)
    assert resumed.keys() == rows.keys()
    assert again.chosen["fingerprint"] == found.chosen["fingerprint"]
    assert len(applied()) < 2 * count


def test_the_model_that_all_batches_and_rungs_start_from_is_made_once(go, folder, monkeypatch):
    monkeypatch.setattr(searching, "BATCH", 2)
    tuned = sc.Entry(
        key="tuned",
        model=folder,
        task=toys.classification_task(),
        pipeline=sc.Pipeline(Train(steps=3, batch_size=4)),
    )
    go(asked(tuned, passes={"prune": PASSES["prune"], "int8": Round()}, pipelines=5))
    assert sum("Train" in name for name in applied()) == 1


def test_what_is_chosen_is_not_made_again_for_its_score(go, folder):
    found, _ = go(asked(folder, passes={"prune": Prune(sparsity=0.5)}, pipelines=1, rungs=(sc.Rung(),)))
    assert found.chosen["split"] == "test"
    assert applied() == ["Prune"]


def test_a_rung_by_the_error_of_outputs_passes_on_what_none_beats_in_bytes_and_error(go, folder):
    rungs = (sc.Rung(examples=6, steps=0.25, by="output error"), sc.Rung())
    _, rows = go(asked(folder, pipelines=11, keep=0.3, rungs=rungs))
    first, last = rung(rows, 1), rung(rows, 2)
    kept = [row["key"].partition("/")[2] for row in last]
    assert len(kept) == round(0.3 * len(first))
    for one in first:
        if one["key"].partition("/")[2] in kept:
            assert not any(
                row["size_bytes"] <= one["size_bytes"] and row["output_error"] < one["output_error"]
                for row in first
            )


def test_fronts_are_ranked_one_after_the_other():
    costs = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 4.0), "d": (3.0, 9.0), "e": (9.0, 1.0)}
    failed = {"f": (float("inf"), float("inf")), "g": (float("inf"), float("inf"))}
    assert searching._ranked(costs | failed) == ["e", "b", "a", "c", "d", "f", "g"]
    assert searching._ranked({"a": (2.0,), "b": (1.0,)}) == ["b", "a"]


def test_within_a_size_it_is_the_best_score(go, folder):
    few = {"prune": PASSES["prune"], "int8": Round()}
    free, rows = go(asked(folder, passes=few, pipelines=100, rungs=(sc.Rung(),)))
    sizes = sorted(row["size_bytes"] for row in rung(rows, 1))
    assert free.searched["size_bytes"] == sizes[0]
    bound = sizes[len(sizes) // 2]
    found, _ = go(asked(folder, passes=few, loss=None, size_bytes=bound, rungs=(sc.Rung(),)))
    assert found.reached
    assert found.searched["score"] == max(row["score"] for row in rung(rows, 1) if row["size_bytes"] <= bound)


def test_what_is_too_large_goes_no_further(go, folder):
    few = {"prune": PASSES["prune"], "int8": Round()}
    _, rows = go(asked(folder, passes=few, pipelines=100, rungs=(sc.Rung(),)))
    first = sorted(row["size_bytes"] for row in rung(rows, 1))
    bound = first[len(first) // 2]
    rungs = (sc.Rung(examples=6), sc.Rung())
    found, rows = go(asked(folder, passes=few, loss=None, size_bytes=bound, rungs=rungs, keep=1.0))
    assert len(rung(rows, 2)) == sum(size <= bound for size in first) < len(first)
    assert found.reached
    found, rows = go(asked(folder, passes=few, loss=None, size_bytes=1, rungs=rungs, keep=1.0))
    assert len(rung(rows, 2)) == len(first)
    assert not found.reached


def test_what_no_contract_allows_is_not_tried_and_what_fails_costs_too_much(go, folder):
    order = {"int8": Round(), "prune": Prune(sparsity=0.5)}
    _, rows = go(asked(folder, passes=order, pipelines=50, rungs=(sc.Rung(examples=4),)))
    assert {tuple(row["labels"]["passes"]) for row in rung(rows, 1)} == {("int8",), ("prune",)}
    mine = asked(folder)
    assert mine.cost({"error": {}}) == float("inf")


def test_what_is_always_in_is_in_every_pipeline(go, folder):
    _, rows = go(asked(folder, pipelines=50, always=("prune", "int8"), rungs=(sc.Rung(examples=4),)))
    passes = {tuple(row["labels"]["passes"]) for row in rung(rows, 1)}
    assert passes == {("prune", "int8"), ("prune", "tune", "int8")}


def test_the_order_can_be_searched_too(go, folder):
    given = {"int8": Round(), "prune": Prune(sparsity=0.5), "tune": Train(steps=2, batch_size=4)}
    settings = {
        "passes": given,
        "pipelines": 30,
        "rungs": (sc.Rung(examples=4),),
        "always": ("int8", "prune"),
    }
    with pytest.raises(StudyRefused, match="no legal pipeline"):
        go(asked(folder, **settings))
    _, rows = go(asked(folder, **settings, orders=True))
    orders = [tuple(row["labels"]["passes"]) for row in rung(rows, 1)]
    assert len(set(orders)) == len(orders) > 2
    assert all(order.index("prune") < order.index("int8") for order in orders)


def test_a_rung_in_which_all_fail_ends_the_search(go, folder):
    broken = asked(folder, passes={"broken": Broken(sparsity=0.5)}, pipelines=1)
    with pytest.raises(StudyRefused, match=r"every pipeline of a rung failed, .*toy\.jsonl"):
        go(broken)
    assert applied() == []


def test_a_lower_perplexity_is_no_loss(folder):
    mine = asked(folder, loss=1.0)
    better, worse = (
        {"metric": "perplexity", "difference": change, "size_bytes": 10} for change in (-3.0, 3.0)
    )
    assert mine.reaches(better)
    assert not mine.reaches(worse)
    assert mine.cost(better) < mine.cost(worse)


def test_a_rung_by_the_error_of_outputs_prefers_what_fits_the_size(go, folder):
    passes = {"int8": Round(), "coding": sc.EntropyCode()}
    rungs = (sc.Rung(examples=6, by="output error"), sc.Rung())
    settings = {"passes": passes, "loss": None, "pipelines": 3, "keep": 0.34}
    free, rows = go(asked(folder, **settings | {"size_bytes": 10**9}, rungs=rungs))
    sizes = sorted(row["size_bytes"] for row in rung(rows, 1))
    assert free.searched["size_bytes"] > sizes[0]  # less error, and larger
    found, _ = go(asked(folder, **settings | {"size_bytes": sizes[0]}, rungs=rungs))
    assert found.reached


def test_what_is_chosen_and_fails_is_said_and_tried_again(go, folder):
    def made(*, labelled):
        splits = {
            "train": toys.sentences(48),
            "selection": toys.sentences(16, 48),
            "test": toys.sentences(16, 64),
        }
        if not labelled:
            splits["test"] = [row | {"label": -1} for row in splits["test"]]
        task = sc.tasks.classification(splits, name="toy", selection="selection", test="test", max_length=16)
        return asked(folder, passes={"int8": Round()}, task=task, pipelines=1, rungs=(sc.Rung(),))

    for _ in range(2):
        with pytest.raises(
            StudyRefused, match=r"chosen/int8 failed on the test split .DataError: .* label -1"
        ):
            go(made(labelled=False))
    assert go(made(labelled=True))[0].chosen["score"] > 0


def test_what_has_no_difference_is_no_result(folder):
    row = {"metric": "perplexity", "difference": None, "size_bytes": 10, "output_error": None}
    assert asked(folder).cost(row) == float("inf")
    assert asked(folder, loss=None, size_bytes=20).cost(row) == float("inf")


def test_a_goal_out_of_reach_is_said_with_what_comes_nearest(go, folder):
    found, _ = go(asked(folder, loss=None, size_bytes=10, pipelines=2, rungs=(sc.Rung(),)))
    assert not found.reached
    size = found.searched["size_bytes"]
    missed = (
        f"no pipeline reaches the goal, at most 10 bytes; the nearest one misses it by {size - 10:,} bytes: "
    )
    assert str(found).startswith(missed)
    found, _ = go(asked(folder, loss=None, floor=101.0, pipelines=2, rungs=(sc.Rung(),)))
    gap = 101.0 - found.searched["score"]
    assert str(found).startswith(
        f"no pipeline reaches the goal, a score of 101; the nearest one misses it by {gap:.2f} points"
    )


def test_where_no_pipeline_keeps_to_the_bound_the_nearest_one_is_chosen(folder):
    def row(size, difference):
        return {"metric": "accuracy", "difference": difference, "size_bytes": size, "output_error": 0.1}

    near, small = row(8_000_000, -2.0), row(1_000_000, -3.5)
    mine = asked(folder, loss=1.0)
    assert mine.cost(small) < mine.cost(near)  # on the way, bytes count
    assert mine.place(near) < mine.place(small)
    kept, kept_smaller = row(9_000_000, 0.0), row(8_500_000, -0.5)
    assert mine.place(kept_smaller) < mine.place(kept) < mine.place(near)


def test_a_floor_is_a_score_and_not_a_loss(folder):
    mine = asked(folder, loss=None, floor=80.0)
    for metric, better, worse in (("accuracy", 81.0, 79.0), ("perplexity", 79.0, 81.0)):
        row = {"metric": metric, "difference": -50.0, "size_bytes": 10}
        assert mine.reaches({**row, "score": better})
        assert not mine.reaches({**row, "score": worse})
        assert mine.cost({**row, "score": better}) < mine.cost({**row, "score": worse})


def test_a_rung_runs_its_share_of_steps_and_of_samples(folder):
    passes = {"tune": Train(steps=4, batch_size=4), "prune": sc.Wanda(sparsity=0.5, samples=64)}
    mine = asked(folder, passes=passes, rungs=(sc.Rung(steps=0.5, samples=0.25), sc.Rung()))
    choice = tuple(techniques(passes))
    cheap, full = (mine.entry(choice, place).passes for place in (1, 2))
    assert (cheap[0].steps, cheap[1].samples) == (2, 16)
    assert list(full) == list(passes.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size_bytes": 10}, "give one of them"),
        ({"floor": 80.0}, "give one of them"),
        ({"loss": None}, "give one of them"),
        ({"loss": -1.0}, "loss=-1.0 is out of range"),
        ({"loss": None, "floor": "high"}, "floor='high' is out of range"),
        ({"model": 3}, "model=3 is neither"),
        ({"task": "sst2"}, "task='sst2' is no task"),
        ({"orders": "no"}, "orders='no' is neither on nor off"),
        ({"rungs": (sc.Rung(samples=0.5),)}, r"on all samples \(samples=1.0\)"),
        ({"passes": [Round()]}, "give a mapping of names to passes"),
        ({"loss": None, "size_bytes": 0}, "size_bytes=0"),
        ({"rungs": ()}, "the last one must run all steps"),
        ({"rungs": (sc.Rung(steps=0.5),)}, "the last one must run all steps"),
        ({"rungs": (sc.Rung(by="output error"),)}, "and go by the score"),
        ({"task": toys.question_task()}, "which answers have none of"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"pipelines": 0}, "pipelines=0"),
        ({"passes": {}}, "holds no technique"),
        ({"always": ("prun",)}, "always='prun' is not known"),
        ({"always": "prun"}, "always='prun' is not known"),
        ({"rungs": sc.Rung()}, r"rungs=Rung\(.*give a sequence"),
        ({"rungs": (1, 2)}, r"rungs=\(1, 2\): give a sequence"),
        ({"name": "../x"}, "names a file"),
    ],
)
def test_bad_settings_are_refused_at_once(folder, settings, said):
    if "task" in settings:
        settings = {"rungs": (sc.Rung(by="output error"), sc.Rung()), **settings}
    with pytest.raises(SettingError, match=said):
        asked(folder, **settings)


def test_no_legal_pipeline_and_no_optuna_are_said_before_anything_runs(go, folder, monkeypatch):
    two = {"words": sc.Int8Weights(only="no.such.weight")}
    with pytest.raises(
        StudyRefused, match=r"no legal pipeline; the first one that was tried: .*no\.such\.weight"
    ):
        go(asked(folder, passes=two))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingNeed, match=r"stackcomp\[search\]"):
        go(asked(folder))
    assert applied() == []


def test_the_command_prints_what_it_found(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import stackcomp as sc\nfrom tests.studies.test_search import asked\n"
        f"search = asked({str(folder)!r}, pipelines=2, rungs=(sc.Rung(),))\n"
    )
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert main(["search", str(tmp_path / "mine.py"), *places]) == 0
    assert "test split:" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text("search = 3\n")
    assert main(["search", str(tmp_path / "mine.py"), *places]) == 2
    assert "defines no `search`" in capsys.readouterr().err
