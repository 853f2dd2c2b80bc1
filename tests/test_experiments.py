"""The run store: what is stored, found again, refused; and that the committed runs are what they say."""

import itertools
import json
import platform
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from soak import COUNTS, size

from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.intervals import differing
from sleepedu.lab import experiments, recipes, run_store
from sleepedu.lab.compute import training_operations
from sleepedu.lab.recipes import MODELS, RECIPES, SIZES, Experiment, Recipe
from sleepedu.lab.run_store import find_device, load_run, stored_runs
from sleepedu.model import CARRIES, RULES, SleepLM
from sleepedu.sleep_loop import run_episode
from sleepedu.tasks import TASKS, GraphRetrieval
from sleepedu.tasks.batches import Batches
from sleepedu.training import score


@pytest.fixture
def copy_of_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)


@pytest.fixture
def no_training(monkeypatch):
    def train(*arguments, **named):
        raise AssertionError("this must not train")

    monkeypatch.setattr(experiments, "train", train)


def rewrite(path, **changes):
    stored = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(stored | changes))


# Recipes and experiments


@pytest.mark.parametrize("task, size", RECIPES)
def test_every_recipe_makes_a_task_a_model_and_a_training_run(task, size):
    for model, passes in (("sleep", 1), ("sleep", 4), ("varied", 4), ("transformer", 1), ("longer", 1)):
        experiment = Experiment(task, size, model, passes)
        episode = experiment.make_task().sample(2, torch.Generator().manual_seed(0))
        assert experiment.make_task().text(episode)
        assert experiment.train_config.passes == ((1, passes) if model == "varied" else passes)
    config = Experiment(task, size).model_config
    with torch.device("meta"):
        SleepLM(config)
    if size != "paper":
        assert run_episode(SleepLM(config), episode, 1).isfinite().all()


@pytest.mark.parametrize("task, size", RECIPES)
def test_controls_get_the_operations_of_four_passes_where_the_recipe_does_not_say_how_many_steps(task, size):
    def cost(experiment):
        return training_operations(experiment.model_config, experiment.make_task(), experiment.train_config)

    told = RECIPES[task, size].control_steps  # of the stored runs
    for model in ("longer", "deeper"):
        control = Experiment(task, size, model)
        share = cost(control) / cost(Experiment(task, size, passes=4))
        if model in told:
            assert 1 <= share < 1.7 and control.times_the_steps == told[model]
        else:
            assert share == pytest.approx(1, rel=0.005)


@pytest.mark.parametrize("task, size", [pair for pair in itertools.product(TASKS, SIZES) if pair not in RECIPES])
def test_a_size_without_a_recipe_is_refused_by_name(task, size):
    with pytest.raises(ValueError, match=f"size '{size}' is unknown: use one of smoke, laptop"):
        Experiment(task, size)


def test_models_differ_in_what_they_say_they_differ_in():
    made = {model: Experiment("graph", "smoke", model) for model in MODELS if model != "varied"}
    sleep, transformer, longer, kept, deeper = (made[m] for m in ("sleep", "transformer", "longer", "kept", "deeper"))
    assert sleep.model_config.layout == "ag" and transformer.model_config.layout == "aa"
    assert replace(transformer.model_config, layout="ag") == sleep.model_config
    assert kept.model_config.layout == "AA" and deeper.model_config.layout == "ag" * 4
    assert kept.train_config == sleep.train_config
    assert replace(longer.train_config, steps=sleep.train_config.steps) == sleep.train_config
    assert replace(deeper.train_config, steps=sleep.train_config.steps) == sleep.train_config
    assert longer.model_config == sleep.model_config and transformer.train_config == sleep.train_config
    varied, four = (Experiment("graph", "smoke", model, passes=4) for model in ("varied", "sleep"))
    assert varied.model_config == four.model_config
    assert replace(varied.train_config, passes=4) == four.train_config


def test_a_recipe_may_tune_the_learning_rate_for_an_N(monkeypatch):
    recipe = replace(RECIPES["graph", "smoke"], learning_rates={4: 0.5})
    monkeypatch.setattr(recipes, "RECIPES", {("graph", "smoke"): recipe})
    rates = [Experiment("graph", "smoke", passes=n).train_config.learning_rate for n in (1, 4)]
    assert rates[1] == 0.5 != rates[0]


VARIANTS = (
    [{"passes": n} for n in (1, 2, 4)]
    + [{"model": "varied", "passes": n} for n in (2, 4)]
    + [{"seed": 1}, {"steps": 7}, {"learning_rate": 0.5}, {"model": "transformer"}, {"model": "longer"}]
    + [{"carry": carry} for carry in CARRIES if carry != "hidden"]
    + [{"rule": rule} for rule in RULES if rule != "gated_delta"]
    + [{"precision": precision} for precision in ("float32", "bfloat16")]
)


def test_every_experiment_has_its_own_name_and_settings():
    variants = [Experiment("graph", "smoke", **variant) for variant in VARIANTS]
    settings = {json.dumps(e.settings) for e in variants}
    assert len(settings) == len({e.name for e in variants}) == len(variants)


def test_settings_change_with_every_setting_of_a_recipe(monkeypatch):
    changed = {
        "task": {"nodes": 7, "hops": 2, "queries": 5, "windows": 2, "shortest": 4}
        | {"tested": (1, 2), "name_tokens": 2},
        "model": {"layout": "ga", "width": 16, "heads": 4, "key_size": 3, "value_size": 3, "mlp_ratio": 3.0}
        | {"convolution": 3, "write_range": 1.0, "positions": 12},
        "train": {"steps": 299, "batch": 63, "learning_rate": 0.02, "adam_learning_rate": 0.01, "warmup": 49}
        | {"decay": 0.2, "weight_decay": 0.0, "clip": 2.0, "precision": "bfloat16"},
    }
    base = RECIPES["graph", "smoke"]
    experiment = Experiment("graph", "smoke")
    covered = {part: set(settings) for part, settings in experiment.settings.items()}
    assert covered["task"] == set(changed["task"]) | {"name"}
    assert covered["model"] == set(changed["model"]) | {"vocabulary", "carry"}
    assert covered["train"] == set(changed["train"]) | {"passes", "seed"}
    seen = {json.dumps(experiment.settings)}
    for part, settings in changed.items():
        for name, value in settings.items():
            recipe: Recipe = replace(base, **{part: {**getattr(base, part), name: value}})
            monkeypatch.setattr(recipes, "RECIPES", {("graph", "smoke"): recipe})
            seen.add(json.dumps(experiment.settings))
    assert len(seen) == 1 + sum(len(settings) for settings in changed.values())


def test_a_field_that_came_later_is_told_only_where_it_is_not_at_its_default(monkeypatch):
    recipe = RECIPES["rule110", "smoke"]
    told = []
    for more in ({}, {"held_out": 0.0}, {"held_out": 0.25}):
        changed = replace(recipe, task={**recipe.task, **more})
        monkeypatch.setattr(recipes, "RECIPES", {("rule110", "smoke"): changed})
        told.append(Experiment("rule110", "smoke").settings["task"])
    before = {"name": "rule110", "cells": 6, "rows": 1, "steps": [1, 2], "ask": "every", "rule": 110}
    assert told == [before, before, {**before, "held_out": 0.25}]


def test_a_task_without_a_recipe_is_told_where_recipes_are(monkeypatch):
    monkeypatch.setitem(TASKS, "parity", GraphRetrieval)
    with pytest.raises(ValueError, match="task 'parity' has no recipe yet: add one to RECIPES in"):
        Experiment("parity")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "chess"}, "task 'chess' is unknown: use one of graph"),
        ({"size": "huge"}, "size 'huge' is unknown: use one of smoke"),
        ({"model": "mamba"}, "model 'mamba' is unknown: use one of sleep"),
        ({"carry": "nothing"}, "carry 'nothing' is unknown"),
        ({"rule": "oja"}, "rule 'oja' is unknown: use one of gated_delta, delta, gated, hebbian"),
        ({"trained_from": "math-smoke-sleep-N1-seed0"}, "trained_from must .* graph-smoke-..., got 'math-smoke-sleep"),
        ({"trained_from": "graph-laptop-sleep-N1-seed0"}, "trained_from must .* graph-smoke-..., got 'graph-laptop"),
        ({"passes": 0}, r"passes \(N\) .* got 0"),
        ({"model": "transformer", "passes": 2}, "model 'transformer' does not sleep: passes must be 1, got 2"),
        ({"model": "varied"}, "model 'varied' draws N from 1 to passes: passes must be above 1"),
        ({"model": "longer", "passes": 2}, "model 'longer' does not sleep"),
        ({"seed": -1}, "seed must lie in 0..4294967295, got -1"),
        ({"learning_rate": -0.1}, "learning_rate must be above 0.* got -0.1"),
        ({"precision": "half"}, "precision 'half' is unknown: use one of auto"),
        ({"steps": -5}, "steps must be at least 0, got -5"),
    ],
)
def test_wrong_experiments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**{"task": "graph", "size": "smoke"} | settings)


# The store


def test_a_finished_run_is_whole(tiny_run, tiny_experiment):
    assert sorted(file.name for file in tiny_run.path.iterdir()) == ["run.json", "weights.pt"]
    stored = json.loads((tiny_run.path / "run.json").read_text())
    assert stored["version"] == run_store.VERSION
    assert tiny_run.name == tiny_experiment.name == "graph-smoke-sleep-N2-4steps-seed0"
    assert tiny_run.experiment == tiny_experiment
    assert tiny_run.make_task() == tiny_experiment.make_task()
    assert list(tiny_run.table) == [1, 2, 3] and tiny_run.table[1].n == 20
    assert tiny_run.history.step == [1, 2, 3, 4]
    assert tiny_run.provenance["tokens"] == 4 * 64 * (12 + 12)
    for name in ("device", "processor", "python", "torch", "commit", "finished", "seconds", "parameters", "threads"):
        assert name in tiny_run.provenance


def test_a_recomputed_run_says_so_and_learns_the_same(tiny_run, tiny_experiment, tmp_path):
    frugal = experiments.run(tiny_experiment, "cpu", tmp_path, examples=20, recompute=True)
    assert frugal.provenance["recomputed"] and not tiny_run.provenance["recomputed"]
    assert frugal.history.loss == pytest.approx(tiny_run.history.loss, abs=1e-4)
    assert frugal.settings == tiny_run.settings  # how it was computed is no setting


def test_a_loaded_model_scores_what_its_run_says(tiny_run):
    model = tiny_run.load_model()
    assert not model.training
    table = experiments.accuracy_by_depth(model, tiny_run.make_task(), 2, examples=20, seed=0)
    assert table == tiny_run.table


def test_a_second_call_loads_without_training(tiny_run, tiny_experiment, no_training):
    again = experiments.run(tiny_experiment, "cpu", tiny_run.path.parent)
    assert again.table == tiny_run.table and again.history == tiny_run.history


def test_a_committed_run_is_found_first(tiny_run, tiny_experiment, no_training, tmp_path, monkeypatch):
    monkeypatch.setattr(run_store, "COMMITTED", tiny_run.path.parent)
    assert experiments.run(tiny_experiment, "cpu", tmp_path).path == tiny_run.path
    assert [run.name for run in stored_runs()] == [tiny_run.name]
    assert load_run(tiny_run.name).path == tiny_run.path


def test_a_stored_run_of_another_recipe_is_not_taken(tiny_experiment, copy_of_run, monkeypatch):
    recipe = RECIPES["graph", "smoke"]
    recipe = replace(recipe, train={**recipe.train, "batch": 8})
    monkeypatch.setattr(recipes, "RECIPES", {("graph", "smoke"): recipe})
    run = experiments.run(tiny_experiment, "cpu", copy_of_run.parent, examples=5)
    assert run.settings["train"]["batch"] == 8 and run.table[1].n == 5


def test_the_same_experiment_gives_the_same_run(tiny_run, tiny_experiment, tmp_path):
    again = experiments.run(tiny_experiment, "cpu", tmp_path, examples=20)
    assert again.history.loss == tiny_run.history.loss and again.table == tiny_run.table


# Going on from a stored run


@pytest.fixture
def going_on(tiny_experiment, copy_of_run):
    """An experiment that goes on from the tiny run, which is in the folder copy_of_run."""
    return replace(tiny_experiment, passes=3, carry="gate", seed=1, steps=1, trained_from=copy_of_run.name)


def test_a_run_goes_on_from_the_weights_of_another(going_on, tiny_run, copy_of_run):
    made = experiments.run(going_on, "cpu", copy_of_run.parent, examples=5)
    assert made.name == "graph-smoke-sleep-N3-gate-1steps-from-sleep-N2-4steps-seed0-seed1"
    assert made.settings == going_on.settings | {"trained_from": tiny_run.weights_checksum}
    assert made.row()["trained_from"] == tiny_run.name and tiny_run.row()["trained_from"] == ""
    assert made.operations > tiny_run.operations > made.operations / 2, "with what it went on from"
    model = SleepLM(going_on.model_config)  # its gate is 0
    assert model.load_state_dict(tiny_run.load_model().state_dict(), strict=False).missing_keys == ["gate"]
    episode, passes = Batches(going_on.make_task(), going_on.train_config)[0]
    assert passes == 3 and made.history.loss == [
        pytest.approx(score(run_episode(model, episode, 3), episode)[0].item())
    ]
    assert experiments.reproduce(made)[1]


def test_from_another_start_it_is_another_run(going_on, tiny_experiment, copy_of_run, tmp_path):
    made = experiments.run(going_on, "cpu", copy_of_run.parent, examples=5)
    other = experiments.run(replace(tiny_experiment, seed=5), "cpu", tmp_path, examples=5)
    shutil.rmtree(copy_of_run)
    other.path.rename(copy_of_run)
    with pytest.raises(ValueError, match=r"the recipe of .*, or its start, has changed since"):
        experiments.reproduce(made)
    again = experiments.run(going_on, "cpu", copy_of_run.parent, examples=5)
    assert again.settings["trained_from"] == other.weights_checksum != made.settings["trained_from"]
    assert again.history.loss != made.history.loss


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trained_from": "graph-smoke-sleep-N9-seed0"}, "there is no run 'graph-smoke-sleep-N9-seed0'"),
        ({"rule": "hebbian"}, "seed0 was trained with rule 'gated_delta': it cannot go on with 'hebbian'"),
        ({"model": "deeper", "passes": 1}, "seed0 was trained with layout 'ag': it cannot go on with 'agagagag'"),
    ],
    ids=str,
)
def test_a_start_that_does_not_fit_is_refused_before_any_work(changes, message, going_on, copy_of_run, no_training):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiments.run(replace(going_on, **changes), "cpu", copy_of_run.parent)
    assert list(copy_of_run.parent.iterdir()) == [copy_of_run]


def test_a_start_of_an_earlier_form_of_the_task_is_refused(going_on, copy_of_run, no_training, monkeypatch):
    recipe = RECIPES["graph", "smoke"]
    monkeypatch.setattr(recipes, "RECIPES", {("graph", "smoke"): replace(recipe, task={**recipe.task, "queries": 5})})
    with pytest.raises(ValueError, match="seed0 was trained with queries 6: it cannot go on with 5"):
        experiments.run(going_on, "cpu", copy_of_run.parent)


def test_stored_runs_are_those_that_finished_in_order(copy_of_run):
    (copy_of_run.parent / "unfinished").mkdir()
    shutil.copytree(copy_of_run, copy_of_run.parent / "a")
    assert [run.name for run in stored_runs(copy_of_run.parent)] == ["a", copy_of_run.name]


def test_a_row_of_results_has_the_documented_keys(tiny_run):
    row = json.loads(json.dumps(tiny_run.row(), allow_nan=False))
    documented = {"run", "task", "model", "passes", "size", "seed", "steps", "tokens", "seconds", "device", "majority"}
    assert documented | {"depths"} <= set(row)
    assert {"accuracy", "low", "high", "n"} <= set(row["depths"]["1"])
    assert (row["task"], row["model"], row["passes"], row["steps"]) == ("graph", "sleep", 2, 4)


def test_a_missing_run_is_refused():
    with pytest.raises(FileNotFoundError, match="there is no run 'graph-of-nobody'"):
        load_run("graph-of-nobody")


def test_an_unfinished_run_is_refused(copy_of_run):
    (copy_of_run / "run.json").rename(copy_of_run / Checkpoint.FILE)
    with pytest.raises(FileNotFoundError, match=r"holds no finished run .*interrupted, the same command resumes it"):
        load_run(copy_of_run)


def test_an_empty_folder_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no finished run \(no run.json\)"):
        load_run(tmp_path)


def test_a_run_of_another_version_is_refused(copy_of_run):
    rewrite(copy_of_run, version=99)
    with pytest.raises(ValueError, match="is of version 99, this library reads version 1"):
        load_run(copy_of_run)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe\x00", b'{"table": 1}'], ids=repr)
def test_a_broken_run_is_refused(content, copy_of_run):
    (copy_of_run / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json cannot be used \(\w+Error: "):
        load_run(copy_of_run)


@pytest.mark.parametrize("part", ["settings", "table", "history", "experiment", "provenance", "checksum"])
def test_a_run_without_one_of_its_parts_is_refused(part, copy_of_run):
    stored = json.loads((copy_of_run / "run.json").read_text())
    del stored[part]
    (copy_of_run / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"run.json cannot be used .*changed: it does not have the checksum it states"):
        load_run(copy_of_run)


def test_missing_weights_are_refused(copy_of_run):
    (copy_of_run / "weights.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights.pt is missing"):
        load_run(copy_of_run).load_model()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_weights_are_refused(keep, copy_of_run):
    file = copy_of_run / "weights.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"weights.pt does not hold this run's weights"):
        load_run(copy_of_run).load_model()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("cpu") == find_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="device 'tpu' is unknown: use one of auto, cpu, cuda"):
        find_device("tpu")


# The committed runs


COMMITTED = stored_runs()


@pytest.mark.parametrize("run", COMMITTED, ids=lambda run: run.name)
def test_a_committed_run_loads_and_is_of_todays_recipe(run):
    run.load_model()
    assert run.settings == experiments.settings_and_weights(run.experiment, run.path.parent)[0]
    assert run.name == run.experiment.name


MEASURED_AGAIN = random.Random(0).sample(COMMITTED, min(size(6, 10**6), len(COMMITTED)))


@pytest.mark.parametrize("run", MEASURED_AGAIN, ids=lambda run: run.name)
def test_a_committed_run_scores_the_same_on_other_examples(run):
    again = accuracy_by_depth(run.load_model(), run.make_task(), run.experiment.passes, size(400, 2000), seed=12_345)
    assert list(again) == list(run.table)
    comparisons = sum(len(run.table) for run in MEASURED_AGAIN)
    assert differing(again, run.table, comparisons) == []
    COUNTS["accuracies measured again"] += len(again)


def test_who_evicts_what_it_read_knows_no_more_than_the_best_guess():
    outside = total = 0
    for run in COMMITTED:
        if run.experiment.model == "transformer":
            floor = run.make_task().floor
            for measured in run.table.values():
                total += 1
                known = measured.majority if floor is None else floor
                outside += not measured.low - 1e-9 <= known <= measured.high
    assert total >= 4 * 3 * 3 and outside <= total // 20, f"{outside} of {total} intervals do not hold the floor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_even_where_a_stored_run_needs_none():
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        experiments.run(Experiment("graph", passes=1), "cuda")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_the_commit_is_that_of_the_library_and_of_no_project_around_it(tmp_path, monkeypatch):
    project, link = tmp_path / "project", tmp_path / "link"
    installed = project / ".venv" / "lib"
    for folder in (project, installed, tmp_path):
        (folder / "sleepedu").mkdir(parents=True)
    link.symlink_to(project)

    def git(*command):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *author, *command], cwd=project, capture_output=True, text=True, check=True)

    def commit(folder):
        monkeypatch.setattr(run_store, "PACKAGE", folder / "sleepedu")
        return run_store.machine(torch.device("cpu"))["commit"]

    git("init")
    assert commit(project) == "", "there is none yet"
    git("commit", "--allow-empty", "-m", "one")
    assert commit(project) == commit(link) == git("rev-parse", "HEAD").stdout.strip()
    assert commit(installed) == commit(tmp_path) == ""


def test_a_machine_that_tells_nothing_of_itself_has_a_provenance_too(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("not on this system")

    def take_long(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(run_store.Path, "read_text", refuse)
    for run in (refuse, take_long):
        monkeypatch.setattr(run_store.subprocess, "run", run)
        made = run_store.machine(torch.device("cpu"))
        assert made["processor"] == (platform.processor() or platform.machine()) and made["commit"] == ""
