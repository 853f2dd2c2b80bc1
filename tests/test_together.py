"""Runs that are trained at once are those that are trained one by one."""

import copy
from dataclasses import replace

import pytest
import torch

from sleepedu import SleepLM, train
from sleepedu.__main__ import main
from sleepedu.lab import experiments, run_store
from sleepedu.lab.recipes import Experiment
from sleepedu.lab.together import batches_of, run_together, train_together
from sleepedu.tasks.batches import Batches

KINDS = {
    "automaton": {"task": "rule110", "passes": 2},
    "all in sight": {"task": "rule110", "model": "kept"},
    "varied": {"task": "graph", "model": "varied", "passes": 3},
    "inject": {"task": "math", "passes": 2, "carry": "inject"},
    "inject, which one pass does not use": {"task": "math", "carry": "inject"},
    "gate": {"task": "graph", "passes": 2, "carry": "gate", "rule": "gated"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_run_is_the_one_that_train_gives(kind):
    chosen = [Experiment(size="smoke", seed=seed, **KINDS[kind]) for seed in (0, 1)]
    rates = ({"learning_rate": 0.01}, {"learning_rate": 0.005, "adam_learning_rate": 0.01})
    configs = [replace(e.train_config, steps=12, batch=8, **more) for e, more in zip(chosen, rates, strict=True)]
    task, models = chosen[0].make_task(), []
    for seed, experiment in enumerate(chosen):
        torch.manual_seed(seed)
        models.append(SleepLM(experiment.model_config))
    alone, before = copy.deepcopy(models), models[0].head.weight.detach().clone()
    batches = [batches_of(Batches(task, config)) for config in configs]
    data = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    histories = train_together(models, configs, data, [0, 1])
    for model, single, config, history in zip(models, alone, configs, histories, strict=True):
        found = train(single, task, config)
        assert found.step == history.step
        torch.testing.assert_close(torch.tensor(history.loss), torch.tensor(found.loss), atol=1e-4, rtol=0)
        for (name, one), other in zip(model.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert (models[0].head.weight.detach() - before).abs().max() > 0.002  # far more than what rounding explains


def test_they_are_stored_as_runs_and_not_trained_again(tmp_path):
    chosen = [Experiment("graph", "smoke", passes=2, seed=seed, steps=6) for seed in (3, 4)]
    runs = run_together(chosen, "cpu", tmp_path, examples=20)
    assert [run.experiment for run in runs] == chosen
    assert all(run.settings == experiment.settings for run, experiment in zip(runs, chosen, strict=True))
    assert runs[0].provenance["together"] == 2 and runs[0].provenance["tokens"] == 6 * runs[0].history.tokens_per_step
    assert runs[0].history.loss != runs[1].history.loss and runs[0].history.step == [1, 2, 3, 4, 5, 6]
    assert runs[0].load_model().embed(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 32)
    again = run_together([*chosen, replace(chosen[0], seed=5)], "cpu", tmp_path, examples=20)
    assert [run.provenance.get("together") for run in again] == [2, 2, 1]
    assert again[0] == runs[0] and len(run_store.stored_runs(tmp_path)) == 3


def test_each_goes_on_from_a_run_of_its_own(tmp_path):
    first = [Experiment("graph", "smoke", seed=seed, steps=4) for seed in (0, 1)]
    started = run_together(first, "cpu", tmp_path, examples=10)
    more = [
        Experiment("graph", "smoke", passes=2, carry="gate", seed=e.seed, steps=3, trained_from=e.name) for e in first
    ]
    for run, start, experiment in zip(run_together(more, "cpu", tmp_path, examples=10), started, more, strict=True):
        assert run.settings["trained_from"] == start.weights_checksum and run.experiment == experiment
        alone = experiments.run(experiment, "cpu", tmp_path / "alone", examples=10, starts=tmp_path)
        assert alone.settings == run.settings and run.operations > start.operations
        assert run.history.loss == pytest.approx(alone.history.loss, abs=1e-3)


@pytest.mark.parametrize("other", [{"passes": 2}, {"task": "math"}, {"precision": "float32"}, {"steps": 2}])
def test_what_differs_otherwise_is_refused_before_anything_is_trained(other, tmp_path):
    first = Experiment("graph", "smoke", steps=1)
    with pytest.raises(ValueError, match="cannot be trained together with graph-smoke-sleep-N1-1steps-seed0"):
        run_together([first, replace(first, **other)], "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


def test_halves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="precision 'bfloat16' is for single runs"):
        run_together([Experiment("graph", "smoke", precision="bfloat16")], "cpu", tmp_path)


def test_the_command_line_trains_a_seed_and_those_after_it(tmp_path, capsys):
    words = ["train", "graph", "--size", "smoke", "--steps", "2", "--seed", "7", "--together", "2", "--quiet"]
    assert main([*words, "--runs", str(tmp_path), "--examples", "10"]) == 0
    assert "seed7" in (told := capsys.readouterr().out) and "seed8" in told
    assert sorted(path.name[-5:] for path in tmp_path.iterdir()) == ["seed7", "seed8"]
    assert main([*words[:-3], "--together", "0"]) == 2
    assert "together must lie in 1..1000, got 0" in capsys.readouterr().err


def test_what_single_runs_alone_can_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="carry 'inject' with a varied N is for single runs"):
        run_together([Experiment("math", "smoke", model="varied", passes=2, carry="inject")], "cpu", tmp_path)
    with pytest.raises(ValueError, match="precision 'tf32' is a GPU's"):
        run_together([Experiment("graph", "smoke", precision="tf32")], "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_does_not_take_the_others_with_it(tmp_path):
    good, bad = (Experiment("graph", "smoke", steps=3, learning_rate=rate) for rate in (0.01, 1e30))
    with pytest.raises(FloatingPointError, match="seed0 is no number: lower learning_rate or clip") as told:
        run_together([bad, good], "cpu", tmp_path, examples=10)
    assert bad.name in str(told.value) and [run.name for run in run_store.stored_runs(tmp_path)] == [good.name]


def test_together_is_another_way_to_make_a_run(tmp_path):
    run = run_together([Experiment("graph", "smoke", seed=seed, steps=6) for seed in (0, 1)], "cpu", tmp_path)[0]
    lines, reproduced = experiments.reproduce(run)
    assert reproduced and "differently: together 2, now False" in lines[0]
