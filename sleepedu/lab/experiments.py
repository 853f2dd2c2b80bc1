"""Experiments and the run store: what was trained, with which settings, on which machine, and what came out.

An ``Experiment`` names a run in words; its recipe turns that into settings; the fingerprint is the settings' hash.
``run`` returns the stored run with that fingerprint, or trains it now.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sleepedu import checks, distributed, files
from sleepedu.checkpoint import Checkpoint, History
from sleepedu.evaluation import Accuracy, Table, accuracy_by_depth, check_examples
from sleepedu.lab.provenance import machine
from sleepedu.lab.recipes import MODELS, RECIPES, SIZES, Recipe
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.tasks import TASKS, Task
from sleepedu.training import TrainConfig, can_compile, parameter_count, train

VERSION = 1  # of the run format; a run of another version is refused
PACKAGE = Path(__file__).resolve().parent.parent
# An installed package brings the runs along; in a checkout they lie with the book.
COMMITTED = PACKAGE / "runs" if (PACKAGE / "runs").is_dir() else PACKAGE.parent / "book" / "runs"
OWN = Path("own_runs")
SLEEPERS = ("sleep", "varied")  # the models that sleep more than one pass


@dataclass(frozen=True)
class Experiment:
    """One run in words: task x size x model x N x seed.

    task: a name in ``TASKS``. size: one of ``SIZES`` that the task has. model: a name in ``MODELS``. passes: N;
    of "varied", the most passes that it was trained with, which it is measured with too.
    carry: as in ``ModelConfig``; "" takes the recipe's. steps, learning_rate: override the recipe's, to try things out;
    0 keeps it.
    Raises ValueError for an unknown name, N < 1, N > 1 for a model that does not sleep, or N = 1 for one of varied N.
    """

    task: str
    size: str = "laptop"
    model: str = "sleep"
    passes: int = 1
    seed: int = 0
    carry: str = ""
    steps: int = 0
    learning_rate: float = 0.0

    def __post_init__(self):
        for name, value, allowed in (
            ("task", self.task, TASKS),
            ("size", self.size, SIZES),
            ("model", self.model, MODELS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
        if (self.task, self.size) not in RECIPES:
            sizes = ", ".join(size for size in SIZES if (self.task, size) in RECIPES)
            raise ValueError(f"task {self.task!r} has no size {self.size!r}: use one of {sizes}")
        if self.model == "varied" and self.passes == 1:
            raise ValueError("model 'varied' draws N from 1 to passes: passes must be above 1")
        if self.model not in SLEEPERS and self.passes != 1:
            raise ValueError(f"model {self.model!r} does not sleep: passes must be 1, got {self.passes}")
        checks.whole("steps", self.steps, least=0)
        checks.finite("learning_rate", self.learning_rate)
        object.__setattr__(self, "carry", self.carry or self.recipe.carry)
        _ = self.settings  # every wrong value is found at the door

    @property
    def name(self) -> str:
        """The run's name, and that of its folder."""
        parts = [self.task, self.size, self.model]
        if self.model in SLEEPERS:
            parts.append(f"N{self.passes}")
        if self.carry != self.recipe.carry:
            parts.append(self.carry)
        if self.steps:
            parts.append(f"{self.steps}steps")
        if self.learning_rate:
            parts.append(f"lr{self.learning_rate:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.task, self.size]

    def make_task(self) -> Task:
        return TASKS[self.task](**self.recipe.task)

    @property
    def model_config(self) -> ModelConfig:
        settings = dict(self.recipe.model, vocabulary=len(self.make_task().words), carry=self.carry)
        if self.model in ("transformer", "kept"):
            settings["layout"] = ("a" if self.model == "transformer" else "A") * len(settings["layout"])
        if self.model == "deeper":
            settings["layout"] *= 4
        return ModelConfig(**settings)

    @property
    def train_config(self) -> TrainConfig:
        passes = (1, self.passes) if self.model == "varied" else self.passes
        settings = dict(self.recipe.train, passes=passes, seed=self.seed)
        settings["steps"] = self.steps or settings["steps"]
        rate = self.learning_rate or self.recipe.learning_rates.get(self.passes)
        if rate:
            settings["learning_rate"] = rate
        if self.model == "longer":
            settings["steps"] *= 4
        return TrainConfig(**settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the result depends on besides the machine, as it stands in a stored run."""
        settings = {
            "task": {"name": self.task, **asdict(self.make_task())},
            "model": asdict(self.model_config),
            "train": asdict(self.train_config),
        }
        return json.loads(json.dumps(settings))  # tuples become lists, as they do on disk

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.settings)


def _fingerprint(settings: dict[str, Any]) -> str:
    return _json_checksum(settings)[:16]


def _json_checksum(value: Any) -> str:
    return files.checksum(json.dumps(value, sort_keys=True).encode())


@dataclass(frozen=True)
class Run:
    """A finished run: its experiment, history, accuracy by depth, and where and how it was made."""

    path: Path
    experiment: Experiment
    settings: dict[str, Any]
    history: History
    table: Table
    provenance: dict[str, Any]
    weights: str  # the SHA-256 of weights.pt, "" for a run stored without

    @property
    def name(self) -> str:
        return self.path.name

    def make_task(self) -> Task:
        """Return the task as it was trained on."""
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in self.settings["task"].items()}
        return TASKS[str(settings.pop("name"))](**settings)

    def load_model(self, device: str = "cpu") -> SleepLM:
        """Return the trained model.

        Raises FileNotFoundError or ValueError for missing or broken weights, ValueError for a device that is unknown
        or not there.
        """
        path = self.path / "weights.pt"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the run cannot be used without its weights")
        content = path.read_bytes()
        model = SleepLM(ModelConfig(**self.settings["model"]))
        try:
            if files.checksum(content) != self.weights:
                raise ValueError("they do not have the checksum in run.json")
            model.load_state_dict(files.unpack(content))
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            raise ValueError(
                f"{path} does not hold this run's weights ({files.first_line(error)}): "
                f"delete {path.parent} and train it again"
            ) from error
        return model.to(find_device(device)).eval()

    def row(self) -> dict[str, Any]:
        """Return the run as one row of ``results``."""
        e = self.experiment
        majority = sum(a.majority for a in self.table.values()) / len(self.table)
        return {
            "run": self.name,
            "task": e.task,
            "model": e.model,
            "passes": e.passes,
            "size": e.size,
            "seed": e.seed,
            "carry": e.carry,
            "steps": self.settings["train"]["steps"],
            "tokens": self.provenance["tokens"],
            "seconds": self.provenance["seconds"],
            "device": self.provenance["device"],
            "majority": round(majority, 5),
            "depths": {str(depth): asdict(accuracy) for depth, accuracy in self.table.items()},
        }


def run(
    experiment: Experiment,
    device: str = "auto",
    directory: Path | str = OWN,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 2000,
    *,
    compile: bool | None = None,
    recompute: bool = False,
) -> Run | None:
    """Return the stored run with this experiment's settings, or train, evaluate and store it now.

    Looks in the committed store, then in ``directory``, where a new run goes; an interrupted run is resumed.
    compile: as in ``train``; None means where it can and pays, in a run of 1,000 steps or more on a CPU.
    recompute: as in ``train``.
    Under ``torchrun`` all ranks train together; the first then evaluates and stores the run, the others return None.
    Raises ValueError for a device that is unknown or not there, or examples outside 1..5,000,000; BlockingIOError when
    another process is training the same run; OSError when it cannot be written.
    """
    check_examples(examples)
    where = find_device(device)  # a stored run needs none, but who asked for one in vain should know
    for store in (COMMITTED, Path(directory)):
        path = store / experiment.name
        if (path / "run.json").exists():
            found = load(path)
            if _fingerprint(found.settings) == experiment.fingerprint:
                if store != COMMITTED:
                    Checkpoint.remove(path)  # there is one when the run was killed as it finished
                return found
    return train_and_store(
        experiment, Path(directory) / experiment.name, where, watch, examples, compile=compile, recompute=recompute
    )


def train_and_store(
    experiment: Experiment,
    path: Path,
    device: torch.device,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 2000,
    *,
    compile: bool | None = None,
    recompute: bool = False,
) -> Run | None:
    """Train, evaluate and store a run in the folder ``path``, whatever the stores have; arguments as in ``run``."""
    task = experiment.make_task()
    if compile is None:
        compile = device.type == "cpu" and experiment.train_config.steps >= 1000 and can_compile(device)
    with ExitStack() as stack:
        with distributed.process_group(device):
            distributed.check_batch(experiment.train_config.batch)
            if distributed.is_first():
                stack.enter_context(files.sole_use(path))
            torch.manual_seed(experiment.seed)
            model = SleepLM(experiment.model_config).to(device)
            history = train(model, task, experiment.train_config, path, watch, compile=compile, recompute=recompute)
            ranks = distributed.ranks()
        if not distributed.is_first():
            return None
        weights = files.pack(model.state_dict())
        files.write(path / "weights.pt", weights)
        table = accuracy_by_depth(model, task, experiment.passes, examples, seed=experiment.seed)
        stored = {
            "version": VERSION,
            "fingerprint": experiment.fingerprint,
            "weights": files.checksum(weights),
            "experiment": asdict(experiment),
            "settings": experiment.settings,
            "table": {str(depth): asdict(accuracy) for depth, accuracy in table.items()},
            "provenance": _provenance(model, history, device)
            | {"compiled": compile and can_compile(device), "recomputed": recompute, "ranks": ranks},
            "history": asdict(history),
        }
        files.write(path / "run.json", _sealed(stored))
        Checkpoint.remove(path)
    return load(path)


def load(run: Path | str) -> Run:
    """Return a finished run, named by its folder or, for a stored one, by its name alone.

    Raises FileNotFoundError for a run that is missing or unfinished, ValueError for one that is broken, changed or of
    another version.
    """
    path = Path(run)
    if not path.exists():
        path = next((store / run for store in (COMMITTED, OWN) if (store / run).exists()), path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run {str(run)!r}: `python -m sleepedu results` lists those there are")
    file = path / "run.json"
    if not file.exists():
        unfinished = (
            "training was interrupted, the same command resumes it" if (path / Checkpoint.FILE).exists() else ""
        )
        raise FileNotFoundError(f"{path} holds no finished run (no run.json{'; ' + unfinished if unfinished else ''})")
    content = file.read_bytes()
    try:
        stored = json.loads(content)
        refusal = _refusal(stored)
        if not refusal:
            found = Run(
                path=path,
                experiment=Experiment(**stored["experiment"]),
                settings=stored["settings"],
                history=History(**stored["history"]),
                table={int(depth): Accuracy(**accuracy) for depth, accuracy in stored["table"].items()},
                provenance=stored["provenance"],
                weights=stored.get("weights", ""),
            )
            found.make_task()
            ModelConfig(**found.settings["model"])
            return found
    except Exception as error:  # broken bytes lead anywhere
        raise ValueError(
            f"{file} is broken ({type(error).__name__}: {files.first_line(error)}): delete {path} and train it again"
        ) from error
    raise ValueError(f"{file} {refusal}")


def _refusal(stored: dict[str, Any]) -> str:
    """Return why a stored run is not taken, "" when it is."""
    if stored["version"] != VERSION:
        return f"is of version {stored['version']}, this library reads version {VERSION}"
    if stored["fingerprint"] != _fingerprint(stored["settings"]):
        return "was changed: its settings do not have the fingerprint it states"
    parts = [part for part in ("experiment", "table", "provenance", "history") if part not in stored]
    if parts:
        raise KeyError(*parts)
    if "checksum" not in stored:
        return "has no checksum, as runs had none once: if you know that it is right, sleepedu.lab.experiments.seal adds it"
    if stored["checksum"] != _json_checksum({name: v for name, v in stored.items() if name != "checksum"}):
        return "was changed: it does not have the checksum it states"
    return ""


def seal(run: Path | str) -> None:
    """Add to a stored run from before there were checksums its own and that of its weights; nothing to one with both.

    Raises ValueError for a run that states a checksum and does not have it, or whose weights are damaged.
    """
    file, weights = Path(run) / "run.json", Path(run) / "weights.pt"
    stored = json.loads(file.read_bytes())
    if "checksum" not in stored:
        if weights.exists():
            content = weights.read_bytes()
            files.unpack(content)
            stored["weights"] = files.checksum(content)
        files.write(file, _sealed(stored))
    load(run)


def _sealed(stored: dict[str, Any]) -> bytes:
    """Return a run as the content of its run.json: readable, and with its checksum in front of everything long."""
    checksum = _json_checksum(json.loads(json.dumps(stored, allow_nan=False)))
    first = ("version", "fingerprint", "weights")
    head = {name: stored[name] for name in first if name in stored} | {"checksum": checksum}
    return _readable_json(head | stored).encode()


def stored_runs(directory: Path | str | None = None) -> list[Run]:
    """Return every finished run of a store, by name; of the committed store when no directory is given.

    Raises FileNotFoundError for a directory that is not there.
    """
    store = COMMITTED if directory is None else Path(directory)
    if directory is not None and not store.is_dir():
        raise FileNotFoundError(f"there is no folder {str(store)!r} to list runs from")
    return [load(file.parent) for file in sorted(store.glob("*/run.json"))]


def find_device(name: str) -> torch.device:
    """Return the device "cpu", "cuda" or "auto" (CUDA where there is one). Raises ValueError when it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device here: use cpu or auto")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _provenance(model: SleepLM, history: History, device: torch.device) -> dict[str, Any]:
    return {
        **machine(device),
        "seconds": history.seconds[-1],
        "tokens": history.step[-1] * history.tokens_per_step,
        "parameters": parameter_count(model.parameters()),
    }


def _readable_json(stored: dict[str, Any]) -> str:
    """Return JSON with one line per entry, and one per list however long."""
    lines = [f"  {json.dumps(name)}: {_block(value)}" for name, value in stored.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _block(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(str(k))}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
