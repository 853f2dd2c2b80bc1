"""Training a stored run again: what is the same, what differs by chance, what by more."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from sleepedu.__main__ import main
from sleepedu.lab import experiments, run_store


def test_a_run_gives_itself(tiny_run, capsys, tmp_path):
    assert main(["reproduce", str(tiny_run.path), "--quiet", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    told = ["on the same machine and versions", "identical", "identical: bit for bit", "identical"]
    assert [line.split(maxsplit=1)[1] for line in shown[:4]] == told
    assert shown[4].startswith("hops k") and shown[-1] == "reproduced"
    again = run_store.load_run(tmp_path / tiny_run.name)
    assert again.weights_checksum == tiny_run.weights_checksum and again.path != tiny_run.path


def test_without_a_folder_nothing_is_left(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.tempfile, "tempdir", str(tmp_path))
    assert experiments.reproduce(tiny_run)[1]
    assert list(tmp_path.iterdir()) == []


def changed(run, accuracy=None, **provenance):
    """The run with an accuracy at depth 1 that is not its own, or as if it had been made elsewhere."""
    first = run.table[1]
    if accuracy is not None:
        first = replace(first, accuracy=accuracy, low=max(0, accuracy - 0.01), high=min(1, accuracy + 0.01))
    return replace(run, table={**run.table, 1: first}, provenance={**run.provenance, **provenance})


def test_one_number_that_differs_on_the_same_machine_is_not_reproduced(tiny_run):
    near = tiny_run.table[1].accuracy + 0.001
    lines, reproduced = experiments.compare(changed(tiny_run, near), tiny_run)
    assert not reproduced and lines[-1] == "NOT reproduced"
    assert lines[3] == "accuracy  differs by chance"


def test_another_machine_may_differ_by_no_more_than_chance(tiny_run):
    near = changed(tiny_run, tiny_run.table[1].accuracy + 0.001, processor="an abacus")
    lines, reproduced = experiments.compare(near, tiny_run)
    assert reproduced and "processor an abacus, now" in lines[0]
    lines, reproduced = experiments.compare(changed(tiny_run, 1.0, processor="an abacus"), tiny_run)
    assert not reproduced and lines[3] == "accuracy  differs by MORE than chance explains"
    assert [line.split()[0] for line in lines if line.endswith("1.000   differs")] == ["1"]


def test_a_run_from_before_muon_multiplied_in_float32_on_a_cpu_is_made_differently(tiny_run):
    assert tiny_run.provenance["muon"] == "float32"
    before = changed(tiny_run)
    del before.provenance["muon"]
    lines, reproduced = experiments.compare(before, tiny_run)
    assert reproduced and lines[0].endswith("differently: muon bfloat16, now float32")


def test_other_weights_and_another_history_are_told(tiny_run, tmp_path):
    other = experiments.run(replace(tiny_run.experiment, seed=1), "cpu", tmp_path, examples=20)
    lines, reproduced = experiments.compare(replace(tiny_run, settings=other.settings), other)
    assert not reproduced
    assert lines[1].startswith(f"history   differs: last loss {tiny_run.history.loss[-1]} stored")
    assert lines[2].startswith("weights   differ by up to ")


def test_a_run_stored_without_weights_is_compared_in_all_else(tiny_run):
    lines, reproduced = experiments.compare(replace(tiny_run, weights_checksum=""), tiny_run)
    assert reproduced and "weights   not stored, so not compared" in lines


def test_what_cannot_be_trained_again_is_refused(tiny_run, tmp_path, capsys):
    assert main(["reproduce", str(tiny_run.path), "--runs", str(tiny_run.path.parent)]) == 2
    assert "holds the stored run itself" in capsys.readouterr().err
    settings = json.loads(json.dumps(tiny_run.settings))
    settings["train"]["batch"] = 8
    with pytest.raises(ValueError, match=r"the recipe of .* has changed since"):
        experiments.reproduce(replace(tiny_run, settings=settings), tmp_path)
    shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        experiments.compare(replace(tiny_run, settings=settings), tiny_run)


@pytest.mark.parametrize("run", run_store.stored_runs(), ids=lambda run: run.name)
def test_every_committed_run_can_be_trained_again(run, monkeypatch):
    class Trained(Exception):
        pass

    def train(*arguments, **named):
        raise Trained

    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(experiments, "find_device", lambda name: torch.device("cpu"))  # what a GPU made, too
    with pytest.raises(Trained):
        experiments.reproduce(run)


def test_a_copy_beside_the_run_is_not_compared_with_it(tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)
    copy = run_store.load_run(shutil.copytree(tiny_run.path, tmp_path / "copy"))
    with pytest.raises(ValueError, match="holds the stored run itself"):
        experiments.reproduce(copy, tmp_path)


def test_another_run_of_its_name_is_not_trained_over(tiny_run, tmp_path, monkeypatch):
    other = experiments.run(replace(tiny_run.experiment, seed=1), "cpu", tmp_path, examples=20)
    other.path.rename(tmp_path / tiny_run.name)
    monkeypatch.setattr(experiments, "train", None)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        experiments.reproduce(tiny_run, tmp_path)


def test_what_was_trained_again_before_is_taken(tiny_run, tmp_path, monkeypatch):
    assert experiments.reproduce(tiny_run, tmp_path)[1]
    monkeypatch.setattr(experiments, "train", None)
    assert experiments.reproduce(tiny_run, tmp_path)[1]
