"""A program that starts a training run, kills it, starts it again, and holds what comes out to the run left in peace.

``python tests/kills.py anywhere | in_a_write FOLDER KILLS SEED``: kill at random moments, by SIGKILL and SIGTERM in
turn, or by SIGKILL at every operation of the disk, one after the other. It prints how many kills were survived, or says
what went wrong and exits with 1. The runs are forks of this process, so that none has to wait for torch to be loaded.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from sleepedu import checkpoint, storage
from sleepedu.__main__ import main
from sleepedu.lab import run_store

NAME = "graph-smoke-sleep-N2-{steps}steps-seed0"
COMMAND = ["train", "graph", "--size", "smoke", "--passes", "2", "--examples", "20", "--device", "cpu", "--quiet"]


def start(folder: Path, steps: int, first: Callable[[], object] = lambda: None) -> int:
    """Start the run in a process of its own, which saves after every step; return its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        torch.set_num_threads(1)
        checkpoint.SAVE_EVERY = 0
        os.dup2(os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        first()
        code = main([*COMMAND, "--steps", str(steps), "--runs", str(folder)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process; return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_in_a_write(operation: int) -> None:
    """Kill this process just before its n-th operation of those that bring a file to the disk and to its place."""
    operations = itertools.count()

    def dying(real: Callable) -> Callable:
        def call(*arguments):
            if next(operations) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def result(run: run_store.Run) -> dict:
    weights = {name: tensor.tolist() for name, tensor in run.load_model().state_dict().items()}
    return {"history": {**asdict(run.history), "seconds": None}, "table": run.table, "weights": weights}


def check_files(path: Path) -> None:
    """Assert that whatever stands under its final name is whole."""
    for file in (path / "checkpoint.pt", path / "weights.pt"):
        if file.exists():
            storage.unpack(file.read_bytes())
    if (path / "run.json").exists():
        run_store.load_run(path)


def anywhere(folder: Path, kills: int, seed: int) -> int:
    steps, dice, survived = 8, random.Random(seed), 0
    started = time.monotonic()
    assert end(start(folder / "whole", steps)) == 0
    lasts = time.monotonic() - started
    whole = result(run_store.load_run(folder / "whole" / NAME.format(steps=steps)))
    for number in itertools.count():
        path = folder / f"killed{number}"
        for _ in range(4):
            child = start(path, steps)
            time.sleep(dice.uniform(0, lasts))
            deadly = signal.SIGTERM if survived % 2 else signal.SIGKILL
            os.kill(child, deadly)
            code = end(child)
            assert code in (0, -deadly), f"exit code {code} after signal {deadly}"
            check_files(path / NAME.format(steps=steps))
            survived += code < 0
            if code == 0 or survived >= kills:
                break
        assert end(start(path, steps)) == 0, "the same command did not go on"
        finished = path / NAME.format(steps=steps)
        assert result(run_store.load_run(finished)) == whole, f"{finished} is another run than the one left in peace"
        assert {file.name for file in finished.iterdir()} - {".lock"} == {"run.json", "weights.pt"}
        shutil.rmtree(path)
        if survived >= kills:
            return survived


def in_a_write(folder: Path, kills: int, seed: int) -> int:
    steps, survived = 3, 0
    assert end(start(folder / "whole", steps)) == 0
    whole = result(run_store.load_run(folder / "whole" / NAME.format(steps=steps)))
    operations = list(range(2 * (steps - 1) + 2 * 2))  # fsync and replace, of two checkpoints, the weights and run.json
    for operation in random.Random(seed).sample(operations, min(kills, len(operations))):
        path = folder / f"operation{operation}"
        code = end(start(path, steps, lambda operation=operation: die_in_a_write(operation)))
        assert code == -signal.SIGKILL, f"there was no operation {operation}: exit code {code}"
        check_files(path / NAME.format(steps=steps))
        assert end(start(path, steps)) == 0, f"killed at operation {operation}, the same command did not go on"
        finished = path / NAME.format(steps=steps)
        assert result(run_store.load_run(finished)) == whole, f"{finished} is another run than the one left in peace"
        assert {file.name for file in finished.iterdir()} - {".lock"} == {"run.json", "weights.pt"}
        survived += 1
    return survived


if __name__ == "__main__":
    campaign, folder, kills, seed = sys.argv[1:]
    Path(folder).mkdir(parents=True)
    print({"anywhere": anywhere, "in_a_write": in_a_write}[campaign](Path(folder), int(kills), int(seed)))
