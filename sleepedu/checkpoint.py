"""A run in progress on disk: one file that is replaced as a whole, in a folder that one process has to itself."""

import json
import signal
import threading
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleepedu import files
from sleepedu.tasks.base import Task
from sleepedu.training import TrainConfig, TrainingState, rank_and_ranks

SAVE_EVERY = 20.0  # seconds of training between two saves


class Checkpoint:
    """Keep a training run in a folder, and go on from there: ``train(..., checkpoint=Checkpoint("my_run"))``.

    Ctrl-C and SIGTERM wait for the end of the step and a last save; a second one does not wait. A file that cannot be
    written, on a full disk say, is a warning: training goes on and the last one is kept. Of several ranks the first
    one saves, and signals are not held back. Training raises ValueError when the file is broken or of other settings,
    BlockingIOError when another process trains in the folder.
    """

    FILE = "checkpoint.pt"

    def __init__(self, directory: Path | str):
        self.path = Path(directory) / self.FILE

    def __enter__(self) -> "Checkpoint":
        rank, ranks = rank_and_ranks()
        self._saved = time.perf_counter()
        self._signal = 0  # the one that came
        self._handlers: dict[int, Any] = {}  # of the signals that are held back
        self._stack = ExitStack()
        if rank == 0:
            self._stack.enter_context(files.sole_use(self.path.parent))
        if ranks == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._hold)
            self._stack.callback(self._release)
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        self._stack.close()
        if self._signal and error is None:
            signal.raise_signal(self._signal)

    def _hold(self, number: int, frame: object) -> None:
        self._signal = number
        self._release()

    def _release(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def load(self, state: TrainingState, task: Task, config: TrainConfig) -> None:
        """Bring a run to where it stood, if the folder has it."""
        settings = {
            "name": task.name,
            "task": asdict(task),
            "model": asdict(state.model.config),
            "train": asdict(config),
        }
        self._settings = json.dumps(settings, sort_keys=True)
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        try:
            stored = files.unpack(content)
            other = stored.pop("settings") != self._settings
            if not other:
                restore(state, stored)
        except Exception as error:  # torch raises whatever broken bytes lead it to
            raise ValueError(
                f"{self.path} is not a whole checkpoint ({files.first_line(error)}): delete it to start anew"
            ) from error
        if other:
            raise ValueError(f"{self.path} is of a run with other settings: delete it or use another directory")

    def save_when_due(self, state: TrainingState, config: TrainConfig) -> None:
        """Save after a while, and when a signal is held back, which is then delivered."""
        rank, ranks = rank_and_ranks()
        if rank or (ranks > 1 and state.counted):  # several ranks have sums of their own between two history entries
            return
        if self._signal or (time.perf_counter() - self._saved > SAVE_EVERY and state.step < config.steps):
            self._save(state)
        if self._signal:
            number, self._signal = self._signal, 0  # whoever handles it may want to go on
            signal.raise_signal(number)

    def _save(self, state: TrainingState) -> None:
        if state.sums.isfinite().all():  # else the run is about to fail, and what was good stays
            try:
                files.write(self.path, files.pack({"settings": self._settings, **contents(state)}))
            except OSError as error:
                warnings.warn(f"{error}; training goes on and tries again", stacklevel=4)
        self._saved = time.perf_counter()

    def remove(self) -> None:
        """Delete the file of a finished run, and what a kill in the middle of a save has left of the next."""
        for file in (self.path, self.path.with_suffix(".partial")):
            file.unlink(missing_ok=True)


def contents(state: TrainingState) -> dict[str, Any]:
    """Return all that changes while training as plain values and tensors."""
    return {
        "model": state.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "scaler": state.scaler.state_dict(),
        "history": asdict(state.history),
        "sums": state.sums.cpu(),
        "progress": (state.counted, state.step, state.seconds),
    }


def restore(state: TrainingState, stored: dict[str, Any]) -> None:
    """Bring a state to what ``contents`` said of another."""
    state.model.load_state_dict(stored["model"])
    for optimizer, saved in zip(state.optimizers, stored["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    state.scaler.load_state_dict(stored["scaler"])
    vars(state.history).update(stored["history"])
    state.sums.copy_(stored["sums"])
    state.counted, state.step, state.seconds = stored["progress"]
