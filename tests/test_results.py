"""The table of all stored runs, in a terminal and on the book's page."""

from dataclasses import replace

import pytest

from sleepedu.intervals import Accuracy
from sleepedu.lab import experiments, results, run_store

results_page = pytest.importorskip("results_page", reason="the page of results needs Sphinx, which is not here")

STORED = run_store.stored_runs()


def test_runs_that_differ_in_their_seed_alone_stand_together():
    groups = results.grouped(STORED)
    assert [task for task, _ in groups] == sorted(task for task, _ in groups)
    shown = [run.name for models in groups.values() for group in models.values() for run in group]
    assert sorted(shown) == [run.name for run in STORED], "a run is lost or shown twice"
    for models in groups.values():
        for group in models.values():
            assert len({replace(run.experiment, seed=0, trained_from="") for run in group}) == 1


def test_a_label_says_what_differs_from_the_recipe():
    def label(**settings) -> str:
        experiment = experiments.Experiment("graph", **settings)
        return results.label(replace(STORED[0], experiment=experiment))

    assert label(passes=4, seed=2) == "N=4"
    assert label(model="kept") == "keeps its cache"
    assert label(model="longer") == "N=1, 4x steps" and label(model="deeper") == "N=1, 4x layers"
    assert label(model="deeper", size="smoke") == "N=1, 4x layers, 0.615x steps", "for the operations of four passes"
    assert label(passes=2, precision="float32") == "N=2, float32"
    assert label(carry="inject", passes=2, steps=500, learning_rate=0.02) == "N=2, inject, 500 steps, rate 0.02"
    assert label(carry="gate", rule="delta", trained_from="graph-laptop-sleep-N1-seed2") == (
        "N=1, gate, delta, from sleep-N1"
    )


def test_words_say_at_which_depths_one_kind_is_ahead():
    def kind(*tables):
        shares = ({d: Accuracy(share, 0, 1, 9) for d, share in enumerate(table, 1)} for table in tables)
        experiments = (replace(STORED[0].experiment, seed=seed) for seed in range(9))
        return [replace(STORED[0], experiment=e, table=t) for e, t in zip(experiments, shares, strict=False)]

    one, other = kind((0.9, 0.1), (0.8, 0.9)), kind((0.5, 0.9), (0.41, 0.1), (0.9, 0.9))
    assert results.in_words(one, other) == {"ahead (2 seeds)": [1], "not told apart (2 seeds)": [2]}
    one = kind((0.1, 0.9, 0.1, 0.1), (0.9, 0.8, 0.9, 0.9))
    other = kind((0.9, 0.5, 0.9, 0.9), (0.1, 0.41, 0.1, 0.1))
    assert results.in_a_line(one, other) == "not told apart (2 seeds) at 1, 3–4; ahead (2 seeds) at 2"


@pytest.mark.parametrize("form", [results_page.results_table, lambda runs: "\n".join(results.in_lines(runs))])
def test_every_model_has_its_line_and_its_numbers(form):
    run = STORED[0]
    shown = form([run])
    for accuracy in run.table.values():
        assert f"{accuracy.accuracy:.3f}" in shown
    assert run.make_task().depth_name in shown


def test_runs_of_an_older_recipe_stand_in_a_line_of_their_own():
    run = next(run for run in STORED if run.settings["train"]["seed"] == 0)
    seed_1 = replace(run, settings={**run.settings, "train": {**run.settings["train"], "seed": 1}})
    older = replace(
        run, settings={**run.settings, "train": {**run.settings["train"], "steps": 7}}, table={1: run.table[1]}
    )
    assert len(results.in_lines([run, seed_1])) == 2, "a title, and both in one line"
    short, both = sorted(results.in_lines([run, seed_1, older])[1:], key=len)
    assert short.split() == [run.name, f"{run.table[1].accuracy:.3f}"] and both.startswith(run.name + ",")


def test_the_books_page_has_the_table_of_all_runs():
    page = (run_store.COMMITTED.parent / "results.md").read_text()
    source = [page]
    results_page.fill_page(None, "book/results", source)
    assert results_page.results_table(STORED) in source[0] and "RESULTS" in page and "RESULTS" not in source[0]
    other = [page]
    results_page.fill_page(None, "book/intro", other)
    assert other == [page]
