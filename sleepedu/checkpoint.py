"""A run in progress: how far it is, what was measured so far, and the file that keeps both and the weights."""

import contextlib
import json
import signal
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sleepedu import distributed, files

SAVE_EVERY = 20.0  # seconds of training between two checkpoints


@dataclass
class History:
    """What was measured while training: one entry every few steps, averages over the steps since the last one.

    step, loss (nats a scored token), accuracy (share of scored tokens right), seconds (training time so far, over all
    interruptions); tokens_per_step; majority_loss: the loss of the best constant answer.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens_per_step: int = 0
    majority_loss: float = 0.0


@dataclass
class Progress:
    """How far a run is: steps done, seconds so far, and the sums over the ``counted`` steps since the last entry."""

    sums: Tensor
    step: int = 0
    counted: int = 0
    seconds: float = 0.0


class Checkpoint:
    """The state of a run in progress, one file that is replaced as a whole, in a folder it has to itself meanwhile.

    Used in a ``with``. A single process holds Ctrl-C and SIGTERM back until the next save.
    """

    FILE = "checkpoint.pt"

    def __init__(self, directory: Path, model, optimizers, scaler, settings: dict[str, Any], task: str):
        self.path = directory / self.FILE
        self.model, self.optimizers, self.scaler = model, optimizers, scaler
        self.settings, self.task = json.dumps(settings, sort_keys=True), task
        self.saved = time.perf_counter()
        self.handlers: dict[int, Any] = {}  # of the signals that are held back
        self.signal = 0  # the one that came

    def __enter__(self) -> "Checkpoint":
        self._stack = contextlib.ExitStack()
        if distributed.is_first():
            self._stack.enter_context(files.sole_use(self.path.parent))
        if distributed.ranks() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._hold)
            self._stack.callback(self._release)
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        self._stack.close()
        if self.signal and error is None:
            signal.raise_signal(self.signal)

    def _hold(self, number: int, frame: object) -> None:
        self.signal = number
        self._release()

    def _release(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def is_due(self, progress: Progress, steps: int) -> bool:
        """Return whether to save now. Several ranks do so at an entry alone, where none has sums of its own."""
        if not distributed.is_first() or (distributed.ranks() > 1 and progress.counted):
            return False
        return bool(self.signal) or (time.perf_counter() - self.saved > SAVE_EVERY and progress.step < steps)

    def save(self, history: History, progress: Progress) -> None:
        """Replace the file, or warn that it could not be; then deliver the signal that was held back."""
        if progress.sums.isfinite().all():  # else the run is about to fail, and what was good stays
            state = {
                "settings": self.settings,
                "task": self.task,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "history": asdict(history),
                **vars(progress),
            }
            try:
                files.write(self.path, files.pack(state))
            except OSError as error:
                warnings.warn(f"{error}; training goes on and tries again", stacklevel=3)
        self.saved = time.perf_counter()
        if self.signal:
            signal.raise_signal(self.signal)
            self.signal = 0  # whoever handles it wants to go on

    def resume(self, history: History, progress: Progress) -> None:
        """Load what is there into model, optimizers, history and progress."""
        state = distributed.from_first(self._read)
        if state is None:
            return
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.scaler.load_state_dict(state["scaler"])
            for name, value in state["history"].items():
                setattr(history, name, value)
            # Earlier versions saved at an entry alone.
            progress.step, progress.counted = state["step"], state.get("counted", 0)
            progress.sums = state.get("sums", progress.sums)
            progress.seconds = state.get("seconds", history.seconds[-1] if history.seconds else 0.0)
        except Exception as error:  # of another version of the library, or not of this library at all
            raise self._broken(error) from error

    @classmethod
    def remove(cls, directory: Path) -> None:
        """Delete a finished run's checkpoint, and what a kill in the middle of a save has left of the next."""
        for file in (directory / cls.FILE, (directory / cls.FILE).with_suffix(".partial")):
            file.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        try:
            state = files.unpack(content)
            others = (state["settings"], state.get("task", self.task)) != (self.settings, self.task)
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            raise self._broken(error) from error
        if others:
            raise ValueError(f"{self.path} is of a run with other settings: delete it or use another directory")
        return state

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} is not a whole checkpoint ({files.first_line(error)}): delete it to start anew")
