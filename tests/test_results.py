"""The table of all stored runs, in a terminal and on the book's page."""

from dataclasses import replace

import pytest
from results_page import fill_page, results_table

from sleepedu.lab import experiments, results, run_store

STORED = run_store.stored_runs()


def test_runs_that_differ_in_their_seed_alone_stand_together():
    groups = results.grouped(STORED)
    assert [task for task, _ in groups] == sorted(task for task, _ in groups)
    shown = [run.name for models in groups.values() for group in models.values() for run in group]
    assert sorted(shown) == [run.name for run in STORED], "a run is lost or shown twice"
    for models in groups.values():
        for group in models.values():
            assert len({replace(run.experiment, seed=0) for run in group}) == 1


def test_a_label_says_what_differs_from_the_recipe():
    def label(**settings) -> str:
        experiment = experiments.Experiment("graph", **settings)
        return results.label(replace(STORED[0], experiment=experiment))

    assert label(passes=4, seed=2) == "N=4"
    assert label(model="kept") == "keeps its cache"
    assert label(passes=2, precision="float32") == "N=2, float32"
    assert label(carry="inject", passes=2, steps=500, learning_rate=0.02) == "N=2, inject, 500 steps, rate 0.02"


@pytest.mark.parametrize("form", [results_table, lambda runs: "\n".join(results.lines(runs))])
def test_every_model_has_its_line_and_its_numbers(form):
    run = STORED[0]
    shown = form([run])
    for accuracy in run.table.values():
        assert f"{accuracy.accuracy:.3f}" in shown
    assert run.make_task().depth_name in shown


def test_the_books_page_has_the_table_of_all_runs():
    page = (run_store.COMMITTED.parent / "results.md").read_text()
    source = [page]
    fill_page(None, "book/results", source)
    assert results_table(STORED) in source[0] and "RESULTS" in page and "RESULTS" not in source[0]
    other = [page]
    fill_page(None, "book/intro", other)
    assert other == [page]
