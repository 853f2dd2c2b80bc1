"""The command line: what it prints, and one line and exit code 2 for whatever is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sleepedu.__main__ import main
from sleepedu.lab import experiments, run_store

SMOKE = ["train", "graph", "--size", "smoke", "--steps", "4", "--quiet"]


def assert_fails(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    assert code == 2
    assert len(shown.err.splitlines()) == 1, shown.err
    assert shown.err.startswith("sleepedu: ") and message in shown.err
    return shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["dream"], "invalid choice: 'dream'"),
        (["train"], "task"),
        (["train", "chess"], "task 'chess' is unknown"),
        ([*SMOKE, "--size", "huge"], "size 'huge' is unknown"),
        ([*SMOKE, "--model", "mamba"], "model 'mamba' is unknown"),
        ([*SMOKE, "--carry", "nothing"], "carry 'nothing' is unknown"),
        ([*SMOKE, "--rule", "oja"], "rule 'oja' is unknown"),
        ([*SMOKE, "--trained-from", "graph-laptop-sleep-N1-seed0"], "trained_from must be the name of a stored run"),
        ([*SMOKE, "--trained-from", "graph-smoke-sleep-N9-seed0"], "there is no run 'graph-smoke-sleep-N9-seed0'"),
        ([*SMOKE, "--passes", "0"], "passes (N) must be at least 1, got 0"),
        ([*SMOKE, "--passes", "two"], "invalid int value: 'two'"),
        ([*SMOKE, "--passes", "1.5"], "invalid int value: '1.5'"),
        ([*SMOKE, "--model", "transformer", "--passes", "2"], "does not sleep"),
        ([*SMOKE, "--model", "varied"], "passes must be above 1"),
        ([*SMOKE, "--seed", "-1"], "seed"),
        ([*SMOKE, "--seed", "9" * 30], ""),
        ([*SMOKE, "--steps", "-1"], "steps"),
        ([*SMOKE, "--learning-rate", "-1"], "learning_rate must be above 0"),
        ([*SMOKE, "--precision", "half"], "precision 'half' is unknown: use one of auto, float32"),
        ([*SMOKE, "--device", "tpu"], "device 'tpu' is unknown"),
        ([*SMOKE, "--threads", "-1"], "threads"),
        ([*SMOKE, "--together", "2", "--no-compile"], "chosen for single runs"),
        ([*SMOKE, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["evaluate", "no-such-run"], "there is no run 'no-such-run'"),
        (["evaluate", "graph-laptop-sleep-N1-seed0", "no-such-run"], "there is no run 'no-such-run'"),
        (["evaluate", "graph-laptop-sleep-N1-seed1", "--seed", "1"], "seed 1 drew the examples of the stored table of"),
        (["results", "--runs", "/no/such/folder"], "/no/such/folder"),
        (["results", "--markdown"], "unrecognized arguments: --markdown"),
        (["results", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["bench", "--only", "speed"], "invalid choice: 'speed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    if arguments[:1] == ["train"]:
        arguments = [*arguments, "--runs", str(tmp_path)]
    assert_fails(capsys, arguments, message)
    assert list(tmp_path.iterdir()) == [], "nothing was trained"


def test_no_examples_are_refused_before_training(capsys, tmp_path):
    assert_fails(capsys, [*SMOKE, "--examples", "0", "--runs", str(tmp_path)], "examples must lie in 1..5000000, got 0")
    assert list(tmp_path.iterdir()) == []


def test_absent_cuda_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_fails(capsys, [*SMOKE, "--device", "cuda", "--runs", str(tmp_path)], "torch finds no CUDA device")


def test_a_folder_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert_fails(capsys, [*SMOKE, "--runs", str(tmp_path / "file")], str(tmp_path / "file"))


def test_a_broken_checkpoint_is_one_line(capsys, tmp_path):
    folder = tmp_path / "graph-smoke-sleep-N1-4steps-seed0"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint, whatever it looks like")
    assert_fails(capsys, [*SMOKE, "--runs", str(tmp_path)], "checkpoint.pt cannot be used")


def test_a_broken_run_is_one_line(capsys, tmp_path):
    (tmp_path / "run.json").write_text("{")
    assert_fails(capsys, ["evaluate", str(tmp_path)], "run.json cannot be used")


def test_a_stopped_run_says_that_it_can_go_on(capsys, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", interrupt)
    assert main([*SMOKE, "--runs", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("sleepedu.__main__.run_together", interrupt)
    assert main([*SMOKE, "--together", "2", "--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "sleepedu: stopped\n", "there is no checkpoint"


def test_train_evaluate_and_results(capsys, tmp_path):
    how = ["--examples", "10", "--device", "cpu", "--recompute"]
    assert main([*SMOKE, "--passes", "2", "--runs", str(tmp_path), *how]) == 0
    shown = capsys.readouterr()
    name = "graph-smoke-sleep-N2-4steps-seed0"
    assert name in shown.out and "hops k" in shown.out and "majority" in shown.out
    assert shown.err == ""

    assert main(["results", "--runs", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    measured = {"carry", "seconds", "device", "depths", "majority", "operations"}
    assert {key: value for key, value in row.items() if key not in measured} == {
        "run": name,
        "task": "graph",
        "model": "sleep",
        "passes": 2,
        "size": "smoke",
        "seed": 0,
        "learning_rate": 0.0,
        "rule": "gated_delta",
        "eviction": "hard",
        "trained_from": "",
        "precision": "",
        "steps": 4,
        "tokens": 4 * 64 * 24,
    }
    assert measured <= set(row) and row["device"] == "cpu" and 0 < row["majority"] < 1
    assert list(row["depths"]) == ["1", "2", "3"]
    for accuracy in row["depths"].values():
        assert {"accuracy", "low", "high", "n"} <= set(accuracy) and accuracy["n"] == 10
        assert 0 <= accuracy["low"] <= accuracy["accuracy"] <= accuracy["high"] <= 1

    assert main(["results", "--runs", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out

    command = ["evaluate", str(tmp_path / name), "--examples", "30", "--seed", "5", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    (evaluated,) = json.loads(capsys.readouterr().out)
    assert set(evaluated) == set(row) | {"seed_of_examples", "stored", "differs"}
    assert evaluated["stored"] == row["depths"] and evaluated["differs"] == []
    assert evaluated["seed_of_examples"] == 5 and evaluated["depths"]["3"]["n"] == 30

    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"{evaluated['depths']['3']['accuracy']:.3f}" in shown and "hops k" in shown
    assert "none of 3 accuracies on examples of seed 5 differs" in shown


def test_a_run_with_varied_passes_is_measured_with_the_most_of_them(capsys, tmp_path):
    settings = ["--model", "varied", "--passes", "3", "--examples", "20", "--runs", str(tmp_path)]
    assert main([*SMOKE, *settings]) == 0
    run = tmp_path / "graph-smoke-varied-N3-4steps-seed0"
    assert main(["reproduce", str(run), "--quiet"]) == 0
    assert "weights   identical" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--examples", "20", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["passes"] == 3 and row["run"] == run.name


def test_a_run_that_scores_otherwise_than_is_stored_is_told(capsys, monkeypatch):
    good, bad = (run_store.load_run(f"graph-laptop-sleep-N{passes}-seed0") for passes in (4, 1))
    bad = replace(bad, table={**bad.table, 2: replace(bad.table[2], accuracy=1.0)})
    monkeypatch.setattr("sleepedu.pretrained.finetuning.load_any", {"good": good, "bad": bad}.__getitem__)
    command = ["evaluate", "bad", "good", "--examples", "50"]
    assert main(command) == 1
    shown = capsys.readouterr().out
    (told,) = [line for line in shown.splitlines() if line.endswith("1.000   differs")]
    assert told.split()[0] == "2"
    assert "1 of 8 accuracies on examples of seed 7 differs from the stored" in shown

    assert main([*command, "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["differs"] == [2] and second["differs"] == [] and second["run"] == good.name


def test_evaluate_takes_the_committed_runs_when_none_is_named(capsys, monkeypatch):
    stored = run_store.stored_runs()[:2]
    monkeypatch.setattr(run_store, "stored_runs", lambda: stored)
    assert main(["evaluate", "--examples", "2", "--json"]) in (0, 1)  # of two examples nothing can be told
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == [run.name for run in stored]


def test_without_a_run_there_is_nothing_to_evaluate(capsys, monkeypatch):
    monkeypatch.setattr(run_store, "stored_runs", lambda: [])
    assert_fails(capsys, ["evaluate"], "there are no stored runs to measure")


@pytest.mark.parametrize(
    "error, told",
    [
        (MemoryError("there is no memory for S"), "there is no memory for S"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line(error, told, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(experiments, "run", fail)
    assert_fails(capsys, SMOKE, told)


def test_progress_is_shown_unless_quiet(capsys, tmp_path):
    command = ["train", "graph", "--size", "smoke", "--steps", "2", "--examples", "5", "--runs", str(tmp_path)]
    assert main(command) == 0
    assert "2/2" in capsys.readouterr().out


def test_results_of_the_committed_store(capsys):
    assert main(["results", "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)] == [r.name for r in run_store.stored_runs()]


def test_as_a_program():
    command = [sys.executable, "-m", "sleepedu", "evaluate", "no-such-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sleepedu: there is no run 'no-such-run'")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_reader_who_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sleepedu", "results"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a mistake in the library")

    monkeypatch.setattr(experiments, "run", fail)
    with pytest.raises(AssertionError, match="a mistake in the library"):
        main(SMOKE)


@pytest.mark.parametrize(
    "start, starts",
    [
        ("graph-smoke-sleep-N1-seed1", ["graph-smoke-sleep-N1-seed1", "graph-smoke-sleep-N1-seed2"]),
        ("graph-smoke-sleep-N1-seed10", ["graph-smoke-sleep-N1-seed10"] * 2),
    ],
)
def test_runs_together_go_on_from_the_runs_of_their_own_seeds(monkeypatch, start, starts):
    asked = []
    monkeypatch.setattr("sleepedu.__main__.run_together", lambda alike, *_: asked.extend(alike) or [])
    command = [*SMOKE, "--together", "2", "--seed", "1", "--passes", "4", "--trained-from", start]
    assert main(command) == 0
    assert [(one.seed, one.trained_from) for one in asked] == list(zip((1, 2), starts, strict=True))
