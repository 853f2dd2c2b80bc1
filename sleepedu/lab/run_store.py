"""The run store: how a finished run is saved, found again, loaded and checked.

A run is a folder with two files. ``run.json`` has the experiment, its settings, the accuracy by depth, the history and
the provenance, with a checksum of all that and one of ``weights.pt``; ``load_run`` takes nothing that does not fit.
"""

import json
import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from sleepedu import checks, storage
from sleepedu._version import __version__
from sleepedu.checkpoint import Checkpoint
from sleepedu.fast import cpp_is_available, triton_is_available
from sleepedu.fast.muon import products_in
from sleepedu.intervals import Accuracy, Table
from sleepedu.lab.compute import training_operations
from sleepedu.lab.recipes import Experiment
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.tasks import TASKS, Task
from sleepedu.training import History, TrainConfig

VERSION = 1  # of the run format; a run of another version is refused
PACKAGE = Path(__file__).resolve().parent.parent
# An installed package brings the runs along, without their weights; in a checkout they lie with the book.
COMMITTED = PACKAGE / "runs" if (PACKAGE / "runs").is_dir() else PACKAGE.parent / "book" / "runs"
OWN = Path("own_runs")
WEIGHTS = "weights.pt"  # in a run's folder
FINE_TUNED = "finetuned"  # the folder with the committed runs of pretrained models


@dataclass(frozen=True)
class Run:
    """A finished run: its experiment, history, accuracy by depth, and where and how it was made."""

    path: Path
    experiment: Any  # an Experiment; of a ``FineTuned`` a FineTuning
    settings: dict[str, Any]  # those it was trained with, which today's recipe need no longer give; none of a FineTuned
    history: History
    table: Table
    provenance: dict[str, Any]
    weights_checksum: str  # the SHA-256 of its file of weights, "" for a run stored without

    @property
    def name(self) -> str:
        return self.path.name

    def make_task(self) -> Task:
        """Return the task as it was trained on."""
        settings = _tuples(self.settings["task"])
        return TASKS[str(settings.pop("name"))](**settings)

    @property
    def operations(self) -> int:
        """The floating-point operations of its training, and of what it went on from, as ``lab.compute`` counts."""
        training = TrainConfig(**_tuples(self.settings["train"]))
        own = training_operations(ModelConfig(**self.settings["model"]), self.make_task(), training)
        if not (start := self.experiment.trained_from):
            return own
        return own + load_run(path if (path := self.path.parent / start).exists() else start).operations

    def load_model(self, device: str = "cpu") -> SleepLM:
        """Return the trained model; FileNotFoundError or ValueError for weights that are missing or not its own."""
        file = weights_of(self.path, self.weights_checksum)
        model = SleepLM(ModelConfig(**self.settings["model"]))
        model.load_state_dict(storage.unpack(file.read_bytes()))
        return model.to(find_device(device)).eval()

    def row(self) -> dict[str, Any]:
        """Return the run as one row of ``results``."""
        return {
            "run": self.name,
            **asdict(self.experiment),
            "steps": self.settings["train"]["steps"],
            "operations": self.operations,
            **{name: self.provenance[name] for name in ("tokens", "seconds", "device")},
            "majority": round(sum(a.majority for a in self.table.values()) / len(self.table), 5),
            "depths": plain_table(self.table),
        }


def weights_of(run: Path, checksum: str, name: str = WEIGHTS) -> Path:
    """Return the file with a run's weights, fetched if need be; raises as ``Run.load_model`` does."""
    file = run / name
    if not file.exists() and run.parent in (COMMITTED, COMMITTED / FINE_TUNED):
        file = fetched(run.relative_to(COMMITTED).as_posix(), checksum, name)
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the run cannot be used without its weights; restore or train it")
    if storage.checksum(file.read_bytes()) != checksum:
        raise ValueError(f"{file} does not hold this run's weights, those with the checksum in run.json: restore it")
    return file


def fetched(run: str, checksum: str, file: str = WEIGHTS) -> Path:
    """Return the file with a stored run's weights: from the repository at this version's tag, or as it is now; once.

    The variable SLEEPEDU_RUNS names a folder to take them from instead. Raises FileNotFoundError where there are none.
    """
    if folder := os.environ.get("SLEEPEDU_RUNS"):
        return Path(folder, run, file)
    import pooch  # in here, as who has the weights does not need it

    cache, known = pooch.os_cache("sleepedu"), f"sha256:{checksum}"
    address = metadata("sleepedu")["Project-URL"].removeprefix("Repository, ")
    for tag in (f"v{__version__}", "HEAD"):
        with suppress(OSError, ValueError):  # not to be had, or not these
            url = f"{address}/raw/{tag}/book/runs/{run}/{file}"
            own = f"{run.replace('/', '-')}-{checksum[:8]}{Path(file).suffix}"
            return Path(pooch.retrieve(url, known, fname=own, path=cache))
    told = "check the network, or set SLEEPEDU_RUNS to a folder with the runs"
    raise FileNotFoundError(f"the weights of {run} are neither here nor at {address}: {told}")


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}


def load_run(run: Path | str) -> Run:
    """Return a finished run, named by its folder or, for a stored one, by its name alone.

    Raises FileNotFoundError for a run that is missing or unfinished, ValueError for one that is broken, changed, of
    another version or of a pretrained model.
    """
    path, stored = read_run(run)
    if "source" in (stored.get("experiment") or {}):
        raise ValueError(f"{path.name} is a pretrained model's: `evaluate` measures it, nothing else takes it")
    with storage.reading(path / "run.json"):
        found = Run(path, Experiment(**stored["experiment"]), **measured(stored))
        found.make_task()
        ModelConfig(**found.settings["model"])
        return found


def measured(stored: dict[str, Any]) -> dict[str, Any]:
    """Return what a run has besides its experiment, of what ``read_run`` found."""
    return {
        "settings": stored.get("settings"),
        "history": History(**stored["history"]),
        "table": {int(depth): Accuracy(**accuracy) for depth, accuracy in stored["table"].items()},
        "provenance": stored["provenance"],
        "weights_checksum": stored.get("weights", ""),
    }


def read_run(run: Path | str) -> tuple[Path, dict[str, Any]]:
    """Return a finished run's folder and what its run.json says; raises as ``load_run`` does."""
    stores = (COMMITTED, COMMITTED / FINE_TUNED, OWN)
    path = next((path for path in (Path(run), *(store / run for store in stores)) if path.exists()), None)
    if path is None or not path.is_dir():
        raise FileNotFoundError(f"there is no run {str(run)!r}: `python -m sleepedu results` lists those there are")
    file = path / "run.json"
    if not file.exists():
        more = "; interrupted, the same command resumes it" if (path / Checkpoint.FILE).exists() else ""
        raise FileNotFoundError(f"{path} holds no finished run (no run.json{more})")
    content = file.read_bytes()
    with storage.reading(file):
        stored = json.loads(content)
        if stored["version"] != VERSION:
            raise ValueError(f"it is of version {stored['version']}, this library reads version {VERSION}")
        if stored.pop("checksum", None) != json_checksum(stored):
            raise ValueError("it was changed: it does not have the checksum it states")
        return path, stored


def stored_runs(directory: Path | str | None = None) -> list[Run]:
    """Return every finished run of a store, by name; of the committed store when no directory is given.

    Raises FileNotFoundError for a directory that is not there, and what ``load_run`` raises.
    """
    store = COMMITTED if directory is None else Path(directory)
    if directory is not None and not store.is_dir():
        raise FileNotFoundError(f"there is no folder {str(store)!r} to list runs from")
    return [load_run(file.parent) for file in sorted(store.glob("*/run.json"))]


def save_run(
    path: Path, experiment: Any, settings: Any, model: SleepLM, history: History, table: Table, made: dict, *file: Any
) -> None:
    """Save a finished run in the folder ``path``; made: what else its provenance says; file: weights' name, bytes."""
    name, weights = file or (WEIGHTS, storage.pack(model.state_dict()))
    provenance = {
        **machine(model.head.weight.device),
        "seconds": history.seconds[-1],
        "tokens": history.step[-1] * history.tokens_per_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "muon": str(products_in(model.head.weight.device)).removeprefix("torch."),
        **made,
    }
    stored = {
        "version": VERSION,
        "weights": storage.checksum(weights),
        "experiment": asdict(experiment),
        "settings": settings,
        "table": plain_table(table),
        "provenance": provenance,
        "history": asdict(history),
    }
    storage.write(path / name, weights)
    storage.write(path / "run.json", readable_json({"checksum": json_checksum(stored), **stored}).encode())


def plain_table(table: Table) -> dict[str, dict[str, Any]]:
    """Return an accuracy by depth as it stands in JSON."""
    return {str(depth): asdict(accuracy) for depth, accuracy in table.items()}


def json_checksum(value: Any) -> str:
    """Return the SHA-256 of what stands in JSON, however it is laid out there."""
    return storage.checksum(json.dumps(value, sort_keys=True).encode())


def readable_json(value: Any) -> str:
    """Return JSON in which a list of numbers is one line, however long."""
    text = json.dumps(value, indent=1, allow_nan=False)
    # No line ends inside a string, so a bracket at the end of one begins a list.
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n"


def find_device(name: str) -> torch.device:
    """Return the device "cpu", "cuda" or "auto" (CUDA where there is one). Raises ValueError when it is not there."""
    checks.one_of("device", name, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device here: use cpu or auto")
    return torch.device("cuda" if name != "cpu" and there else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a measurement has to say about where and when it was made: machine, versions, commit, time."""
    processor, commit = platform.processor() or platform.machine(), ""
    with suppress(OSError, StopIteration):  # elsewhere than on Linux
        described = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in described if line.startswith("model name"))
    with suppress(OSError, subprocess.SubprocessError, ValueError):  # no git, no checkout, or that of another project
        command = ["git", "rev-parse", "HEAD", "--show-cdup"]  # and the way up to the top of the checkout, if any
        done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=10, check=True)
        (commit,) = done.stdout.split()
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "kernel": cpp_is_available() if device.type == "cpu" else triton_is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": commit,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
