"""A run that is killed, stopped, or started twice: it goes on where it stood and ends as if nothing had happened."""

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from soak import COUNTS, size

from sleepedu import checkpoint, storage, training
from sleepedu.checkpoint import Checkpoint
from sleepedu.tasks import GraphRetrieval
from sleepedu.training import TrainConfig, begin_training, train

TASK = GraphRetrieval(nodes=4, hops=2, queries=3)
CONFIG = TrainConfig(passes=2, steps=6, batch=4, warmup=3)
TESTS = Path(__file__).parent


def kills(campaign, folder, number):
    command = [sys.executable, TESTS / "kills.py", campaign, folder / campaign, number, 0]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    COUNTS[f"kills survived ({campaign})"] += int(done.stdout)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_that_is_killed_anywhere_ends_as_the_one_left_in_peace(tmp_path):
    assert kills("anywhere", tmp_path, size(3, 20)) == size(3, 20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_run_that_is_killed_in_a_write_ends_as_the_one_left_in_peace(tmp_path):
    assert kills("in_a_write", tmp_path, size(3, 8)) == size(3, 8)


def assert_same(model, other):
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


@dataclass(frozen=True)
class Signalling(GraphRetrieval):
    """Graph retrieval whose third batch comes with a signal."""

    number = signal.SIGINT

    def sample(self, batch, generator, depth=None):
        if batch == CONFIG.batch and generator.initial_seed() == 2:  # which is the step, at seed 0
            signal.raise_signal(self.number)
        return super().sample(batch, generator, depth)


@pytest.mark.parametrize("entries", ["every step", "every second step"])
def test_ctrl_c_ends_the_step_and_saves(entries, make_model, tmp_path, handle_signal):
    config = CONFIG if entries == "every step" else TrainConfig(passes=2, steps=400, batch=4, warmup=3)
    task, rest = Signalling(nodes=4, hops=2, queries=3), []
    handle_signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), task, config, checkpoint=Checkpoint(tmp_path))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert torch.load(tmp_path / Checkpoint.FILE)["step"] == 3

    @dataclass(frozen=True)
    class Counting(GraphRetrieval):
        def sample(self, batch, generator, depth=None):
            rest.append(generator.initial_seed()) if batch == config.batch else None
            return super().sample(batch, generator, depth)

    whole, model = make_model(), make_model(seed=1)
    history = train(whole, TASK, config)
    resumed = train(model, Counting(nodes=4, hops=2, queries=3), config, checkpoint=Checkpoint(tmp_path))
    assert rest == list(range(3, config.steps)), "no step is trained twice"
    assert_same(model, whole)
    assert (resumed.step, resumed.loss, resumed.accuracy) == (history.step, history.loss, history.accuracy)


def test_who_handles_the_signal_may_go_on(make_model, tmp_path):
    came, before = [], signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        task = Signalling(nodes=4, hops=2, queries=3)
        object.__setattr__(task, "number", signal.SIGTERM)
        assert train(make_model(), task, CONFIG, checkpoint=Checkpoint(tmp_path)).step[-1] == CONFIG.steps
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_the_second_process_in_a_folder_is_refused_and_the_first_goes_on(make_model, tmp_path):
    first = "import sys, pathlib\nfrom sleepedu import storage\n"
    first += "with storage.sole_use(pathlib.Path(sys.argv[1])):\n    print('mine', flush=True)\n    sys.stdin.read()\n"
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", first, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "mine\n"
            with pytest.raises(BlockingIOError, match=f"{folder} is in use: another process is training there"):
                train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(folder))
            assert [file.name for file in folder.iterdir()] == [".lock"]
        finally:
            other.kill()
    history = train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(folder))
    assert history.step[-1] == CONFIG.steps, "a lock died with its process"


def test_a_folder_is_for_one_thread_and_that_may_ask_twice(tmp_path):
    refused = []

    def ask():
        try:
            with storage.sole_use(tmp_path):
                pass
        except BlockingIOError:
            refused.append(True)

    with storage.sole_use(tmp_path), storage.sole_use(tmp_path / "." / ""):
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    ask()
    assert refused == [True]


def test_a_thread_trains_without_signals(make_model, tmp_path):
    done = []
    checkpoint = Checkpoint(tmp_path)
    thread = threading.Thread(target=lambda: done.append(train(make_model(), TASK, CONFIG, checkpoint=checkpoint)))
    thread.start()
    thread.join()
    assert done[0].step[-1] == CONFIG.steps


def test_a_state_that_is_no_number_does_not_replace_a_good_one(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    score = training.score
    monkeypatch.setattr(training, "score", lambda *arguments: (score(*arguments)[0] * torch.nan, torch.tensor(0.0)))
    with pytest.raises(FloatingPointError):
        train(make_model(), TASK, TrainConfig(steps=400, batch=4), checkpoint=Checkpoint(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_task_with_the_same_settings_is_refused(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    other = GraphRetrieval(nodes=4, hops=2, queries=3)
    object.__setattr__(other, "name", "another")
    with pytest.raises(ValueError, match="is of a run with other settings"):
        train(make_model(), other, CONFIG, checkpoint=Checkpoint(tmp_path))


@pytest.mark.parametrize("precisions", [("float32", "float16"), ("float16", "float32")])
def test_a_run_goes_on_at_the_precision_of_another_device(precisions, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    taken, step = [], training.training_step
    monkeypatch.setattr(training, "training_step", lambda *given: taken.append(given[0].precision) or step(*given))
    for precision in precisions:
        monkeypatch.setattr(training, "choose_precision", lambda asked, device, own=precision: own)
        train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    assert taken == [precisions[0]] * CONFIG.steps + [precisions[1]]  # the last step is not saved


def test_memory_that_runs_out_is_not_the_files_fault(tmp_path):
    for full in (MemoryError, torch.OutOfMemoryError):
        with pytest.raises(full), storage.reading(tmp_path):
            raise full


def test_a_checkpoint_of_other_parameters_is_refused(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    file = tmp_path / Checkpoint.FILE
    state = storage.unpack(file.read_bytes())
    state["model"]["head.weight"] = state["model"]["head.weight"][:, 1:]
    storage.write(file, storage.pack(state))
    with pytest.raises(ValueError, match=f"{file} cannot be used .*: delete it"):
        train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path))


def test_where_there_are_no_locks_training_goes_on_without(make_model, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(storage.FileLock, "acquire", refuse)
    assert train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path)).step[-1] == CONFIG.steps


def test_a_signal_after_the_last_step_is_delivered_at_the_end(make_model, tmp_path):
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with Checkpoint(tmp_path).running(begin_training(make_model(), TASK, CONFIG), TASK, CONFIG):
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
