"""A run in progress on disk: one file that is replaced as a whole, in a folder that one process has to itself."""

import json
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sleepedu import storage
from sleepedu.tasks.base import Task
from sleepedu.training import TrainConfig, TrainingState, rank_and_ranks

SAVE_EVERY = 20.0  # seconds of training between two saves
PLAIN = ("sums", "step", "seconds")  # of a TrainingState, what is stored as it is


class Checkpoint:
    """Keep an unfinished training in a folder, and go on from there: ``train(..., checkpoint=Checkpoint("my_run"))``.

    Ctrl-C and SIGTERM wait for the end of the step and a last save; a second one does not wait. A file that cannot be
    written is a warning, and training goes on. Of several ranks the first one saves, and no signal waits. Training
    raises ValueError for a file that is broken or of other settings, BlockingIOError for a folder that is in use.
    """

    FILE = "checkpoint.pt"

    def __init__(self, directory: Path | str):
        self.path = Path(directory) / self.FILE

    @contextmanager
    def running(self, state: TrainingState, task: Task, config: TrainConfig) -> Iterator[None]:
        """Bring a run to where it stood, if the folder has it, and have the folder to itself meanwhile."""
        rank, ranks = rank_and_ranks()
        self._saved = time.perf_counter()
        check_settings(task)
        settings = {"task": asdict(task), "model": asdict(state.model.config), "train": asdict(config)}
        self._settings = json.dumps(settings | {"name": task.name}, sort_keys=True)
        lock: AbstractContextManager = storage.sole_use(self.path.parent) if rank == 0 else nullcontext()
        signals: AbstractContextManager[list[int]] = held_signals() if ranks == 1 else nullcontext([])
        with lock, signals as self._signals:
            self._load(state)
            yield
        if self._signals:
            signal.raise_signal(self._signals[0])

    def _load(self, state: TrainingState) -> None:
        rank, ranks = rank_and_ranks()
        content: list[Any] = [self.path.read_bytes() if rank == 0 and self.path.exists() else None]
        if ranks > 1:  # the others may be on machines that have no such file
            dist.broadcast_object_list(content)
        if content[0] is None:
            return
        with storage.reading(self.path):
            stored = storage.unpack(content[0])
            if stored["settings"] != self._settings:
                raise ValueError("it is of a run with other settings")
            for name, part in stateful(state).items():
                if stored[name] or name != "scaler":  # one that had nothing to do has no state
                    part.load_state_dict(stored[name])
            vars(state.history).update(stored["history"])
            vars(state).update({name: stored[name] for name in PLAIN})
            state.sums = state.sums.to(state.model.head.weight.device)

    def save_when_due(self, state: TrainingState, config: TrainConfig) -> None:
        """Save after a while, and when a signal is held back, which is then delivered."""
        rank, ranks = rank_and_ranks()
        # Between two history entries every one of several ranks has sums of its own.
        if rank or (ranks > 1 and state.history.step[-1:] != [state.step]):
            return
        late = time.perf_counter() - self._saved > SAVE_EVERY and state.step < config.steps
        if (late or self._signals) and state.sums.isfinite().all():  # else the run fails, and what was good stays
            content = {"settings": self._settings, "history": vars(state.history)}
            content |= {name: part.state_dict() for name, part in stateful(state).items()}
            content |= {name: getattr(state, name) for name in PLAIN}
            try:
                storage.write(self.path, storage.pack(content))
            except OSError as error:
                warnings.warn(f"{error}; training goes on and tries again", stacklevel=3)
            self._saved = time.perf_counter()
        if self._signals:
            signal.raise_signal(self._signals.pop())  # whoever handles it may want to go on

    def remove(self) -> None:
        """Delete the file of a finished run, and what a kill in the middle of a save has left of the next."""
        for file in (self.path, self.path.with_suffix(".partial")):
            file.unlink(missing_ok=True)


def check_settings(task: Task) -> None:
    """Raise ValueError unless all that makes this task are fields of its class, of a kind that can be stored."""
    if "__dataclass_fields__" not in vars(type(task)):
        raise ValueError(f"the settings of {type(task).__name__} are not known: make it a @dataclass(frozen=True)")
    for name, value in asdict(task).items():
        try:
            json.dumps(value)
        except TypeError:
            told = f"{name} of the task is a {type(value).__name__}, which cannot be stored: use numbers, words, tuples"
            raise ValueError(told) from None


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back meanwhile: the first that comes is put into the list, the second is not held."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def release() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def hold(number: int, frame: object) -> None:
        came.append(number)
        release()

    if threading.current_thread() is threading.main_thread():  # no other may
        before |= {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        release()


def stateful(state: TrainingState) -> dict[str, Any]:
    """Return what changes while training and has a state_dict of its own, by name."""
    optimizers = {f"optimizer{number}": optimizer for number, optimizer in enumerate(state.optimizers)}
    return {"model": state.model, "scaler": state.scaler, **optimizers}
