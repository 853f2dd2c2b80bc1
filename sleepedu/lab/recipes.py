"""How every task is trained in every size, and the ``Experiment`` that names one such training in words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sleepedu import checks
from sleepedu.fast.precision import PRECISIONS
from sleepedu.lab.compute import example_operations
from sleepedu.model import CARRIES, EVICTIONS, RULES, ModelConfig, SleepLM
from sleepedu.tasks import TASKS, Task
from sleepedu.training import TrainConfig

SLEEPERS = ("sleep", "varied")  # the models that have an N
MODELS = {  # what tables call each kind of model, given N
    "sleep": "N={}",  # the hybrid of attention and fast weights, sleeping N passes on every window
    "varied": "N=1 to {}",  # the same, trained with N drawn anew for every batch, from 1 to N
    "transformer": "transformer",  # attention only, evicting every window: what is left of the past is nothing
    "kept": "keeps its cache",  # attention only, evicting nothing: it looks back at everything when it answers
    "longer": "N=1",  # the hybrid at N = 1, trained on more steps, at the operations of N = 4 or above
    "deeper": "N=1, 4x layers",  # the hybrid at N = 1, with four times the layers, likewise
}


@dataclass(frozen=True)
class Recipe:
    """How one task is trained in one size: settings of task, model and training, and what depends on N."""

    task: Mapping[str, Any]
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    carry: str = "hidden"  # from pass to pass; each task takes the one that learns it better
    learning_rates: Mapping[int, float] = field(default_factory=dict)  # N -> Muon's, where it differs, controls' too
    # Times the steps of the controls longer and deeper; unless it is said, as many as the operations of N = 4 pay for.
    control_steps: Mapping[str, float] = field(default_factory=dict)
    recompute: bool = False  # as in ``sleep``, where no GPU would have the memory otherwise


SMALL = {"layout": "ag", "width": 32, "heads": 2}
SHORT = {"steps": 300, "batch": 64}
RING = {"nodes": 8, "hops": 4, "queries": 8}
ON_RINGS = {"steps": 3000, "batch": 64, "adam_learning_rate": 0.005}
LONG = {"steps": 10_000, "batch": 64}
LONG_ROWS = {"cells": 20, "steps": (1, 2, 3, 4, 5, 6, 7, 8), "ask": "mixed", "held_out": 0.1}
PAPER = {"learning_rate": 0.002, "adam_learning_rate": 5e-5, "warmup": 1000}
AS_STORED = {"longer": 4, "deeper": 1}  # times the steps: at least what N = 4 costs, up to 1.6 times as much
WIDE = {"layout": "agag", "width": 128}
COLAB = {"learning_rate": 0.005, "adam_learning_rate": 0.005, "warmup": 200}
MANY_RINGS = {"nodes": 75, "hops": 16, "queries": 10, "windows": 4, "shortest": 3, "tested": (1, 2, 4, 8, 16)}
RECIPES = {
    ("graph", "smoke"): Recipe({"nodes": 6, "hops": 3, "queries": 6}, SMALL, SHORT),
    ("graph", "laptop"): Recipe(RING, {"layout": "ag"}, ON_RINGS, control_steps=AS_STORED),
    # As laptop, but what is to be joined lies in several windows.
    ("graph", "split"): Recipe({**RING, "windows": 2}, {"layout": "ag"}, ON_RINGS, control_steps=AS_STORED),
    # The colab sizes take by our estimate a quarter of an hour on a T4; that of rule110 was run, on an H100.
    ("graph", "colab"): Recipe({"nodes": 24, "hops": 8, "queries": 24}, WIDE, {"steps": 5000, "batch": 128, **COLAB}),
    ("graph", "paper"): Recipe(
        {**MANY_RINGS, "name_tokens": 2},
        {"layout": "gaga", "width": 512, "heads": 8},
        {"steps": 100_000, "batch": 128, **PAPER},
    ),
    ("rule110", "smoke"): Recipe({"cells": 6, "steps": (1, 2)}, {**SMALL, "positions": 6}, SHORT),
    ("rule110", "laptop"): Recipe(
        {"cells": 12, "steps": (1, 2, 3, 4, 5, 6, 7, 8)},
        {"layout": "ag", "positions": 12},
        {"steps": 2500, "batch": 64},
        learning_rates={4: 0.005},
        control_steps=AS_STORED,
    ),
    # More rows than anyone learns by heart, a tenth of them never shown; every cell is asked at a t of its own.
    ("rule110", "held_out"): Recipe(
        LONG_ROWS,
        {"layout": "ag", "positions": 20},
        LONG,
        learning_rates={1: 0.005, 2: 0.005, 8: 0.005},
        control_steps={"longer": 2.682},  # as stored: what N = 4 costs, and a hair more
    ),
    # The same in half the width, which has room for fewer steps that a block could look up at once.
    ("rule110", "narrow"): Recipe(LONG_ROWS, {**SMALL, "positions": 20}, LONG, learning_rates={1: 0.005}),
    ("rule110", "colab"): Recipe(
        {"cells": 24, "steps": tuple(range(1, 13)), "ask": "mixed", "held_out": 0.1},
        {**WIDE, "positions": 24},
        {"steps": 3500, "batch": 256, **COLAB},
    ),
    # The paper's form of the task in two hours of one core: four rows, a window each, the first bit of all four; but a
    # mixture of t, as t = 32 alone does not begin to learn, and the small model with the rates of held_out.
    ("rule110", "mixture"): Recipe(
        {"cells": 24, "rows": 4, "steps": (1, 2, 3, 4, 5, 6, 7, 8), "ask": "first"},
        {"layout": "ag", "positions": 24},
        {"steps": 8000, "batch": 64},
        learning_rates={1: 0.005},
    ),
    ("math", "smoke"): Recipe({"quantities": 4, "operations": 2}, SMALL, SHORT),
    ("math", "laptop"): Recipe(
        {"quantities": 8, "operations": 4, "digits": 5, "less": False},
        {"layout": "ag"},
        {"steps": 4500, "batch": 64, "adam_learning_rate": 0.005},
        carry="inject",
        control_steps=AS_STORED,
    ),
    ("math", "colab"): Recipe(
        {"quantities": 16, "operations": 8, "digits": 5, "less": False},
        WIDE,
        {"steps": 3000, "batch": 128, **COLAB},
        carry="inject",
    ),
    # About 2,900 tokens in two windows; the paper fine-tunes pretrained models on such problems, this starts anew.
    ("math", "paper"): Recipe(
        {"quantities": 360, "operations": 8, "ask": "one", "windows": 2, "sums": True, "name_words": 2},
        {"layout": "agag", "width": 512, "heads": 8},
        {"steps": 20_000, "batch": 256, **PAPER, "learning_rate": 0.001, "parts": 4},
        recompute=True,
    ),
    # 512 x 100 tokens a step: 5 billion tokens.
    ("rule110", "paper"): Recipe(
        {"cells": 24, "rows": 4, "steps": (32,), "ask": "first"},
        {"layout": "agag", "width": 256, "positions": 24},
        {"steps": 97_656, "batch": 512, **PAPER},
    ),
}
SIZES = tuple(dict.fromkeys(size for _, size in RECIPES))


def setting(default: Any, what: str) -> Any:
    """Return a field that the command line asks for, and what its help says of it."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Experiment:
    """One run in words: task x size x model x N x seed; the command line asks for the same fields.

    Raises ValueError for an unknown name, N < 1, N > 1 for a model that does not sleep, N = 1 for one of varied N, and
    whatever makes no model or training.
    """

    task: str = field(metadata={"help": f"one of {', '.join(TASKS)}"})
    size: str = setting("laptop", f"one of {', '.join(SIZES)}, if the task has it")
    model: str = setting("sleep", f"one of {', '.join(MODELS)}")
    passes: int = setting(1, "N, sleep passes over every window; of 'varied' the most, with which it is measured too")
    seed: int = setting(0, "of the first weights and of all examples")
    carry: str = setting("", f"from pass to pass, instead of the recipe's: one of {', '.join(CARRIES)}")
    steps: int = setting(0, "instead of the recipe's")
    learning_rate: float = setting(0.0, "Muon's, instead of the recipe's")
    rule: str = setting(RULES[0], f"how S is written: one of {', '.join(RULES)}")
    eviction: str = setting(EVICTIONS[0], f"what a sleep does to its window: one of {', '.join(EVICTIONS)}")
    trained_from: str = setting("", "stored run of this task and size to go on from; with its seed, on its examples")
    precision: str = setting("", f"of large products, instead of the recipe's: one of {', '.join(PRECISIONS)}")

    def __post_init__(self):
        sizes = [size for task, size in RECIPES if task == self.task]
        if self.task in TASKS and not sizes:
            raise ValueError(f"task {self.task!r} has no recipe yet: add one to RECIPES in sleepedu/lab/recipes.py")
        for name, allowed in (("task", TASKS), ("model", MODELS), ("size", sizes)):
            checks.one_of(name, getattr(self, name), allowed)
        if self.model == "varied" and self.passes == 1:
            raise ValueError("model 'varied' draws N from 1 to passes: passes must be above 1")
        if self.model not in SLEEPERS and self.passes != 1:
            raise ValueError(f"model {self.model!r} does not sleep: passes must be 1, got {self.passes}")
        if self.trained_from and not self.trained_from.startswith(alike := f"{self.task}-{self.size}-"):
            raise ValueError(f"trained_from must be the name of a stored run, {alike}..., got {self.trained_from!r}")
        checks.whole("steps", self.steps, least=0)
        checks.finite("learning_rate", self.learning_rate)
        object.__setattr__(self, "carry", self.carry or self.recipe.carry)
        _ = self.settings  # every wrong value is found at the door

    @property
    def name(self) -> str:
        """The run's name, and that of its folder."""
        parts = [
            f"{self.task}-{self.size}-{self.model}",
            f"N{self.passes}" if self.model in SLEEPERS else "",
            *self.departures,
            f"{self.steps}steps" if self.steps else "",
            f"lr{self.learning_rate:g}" if self.learning_rate else "",
            self.trained_from.replace(f"{self.task}-{self.size}", "from", 1),
            self.precision,
            f"seed{self.seed}",
        ]
        return "-".join(filter(None, parts))

    @property
    def departures(self) -> list[str]:
        """How the model is made otherwise than its recipe says."""
        usual = {"carry": self.recipe.carry, "rule": RULES[0], "eviction": EVICTIONS[0]}
        return [getattr(self, name) for name, value in usual.items() if getattr(self, name) != value]

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.task, self.size]

    def make_task(self) -> Task:
        return TASKS[self.task](**self.recipe.task)

    @property
    def model_config(self) -> ModelConfig:
        layout = self.recipe.model["layout"]
        others = {"transformer": "a" * len(layout), "kept": "A" * len(layout), "deeper": 4 * layout}
        made = {"layout": others.get(self.model, layout), "vocabulary": len(self.make_task().words)}
        own = {name: getattr(self, name) for name in ("carry", "rule", "eviction")}
        return ModelConfig(**{**self.recipe.model, **made, **own})

    def form(self) -> SleepLM:
        """Return the model on "meta", which has shapes and no numbers."""
        return SleepLM(self.model_config).to("meta")

    @property
    def train_config(self) -> TrainConfig:
        settings = {**self.recipe.train, "seed": self.seed}
        settings["passes"] = (1, self.passes) if self.model == "varied" else self.passes
        settings["steps"] = round((self.steps or settings["steps"]) * self.times_the_steps)
        if rate := self.learning_rate or self.recipe.learning_rates.get(self.passes):
            settings["learning_rate"] = rate
        if self.precision:
            settings["precision"] = self.precision
        return TrainConfig(**settings)

    @property
    def times_the_steps(self) -> float:
        """How many times the recipe's steps a control gets, by the recipe or for the operations of N = 4."""
        if self.model not in ("longer", "deeper") or self.model in self.recipe.control_steps:
            return self.recipe.control_steps.get(self.model, 1)
        four, task = replace(self, model="sleep", passes=4), self.make_task()
        asleep, awake = example_operations(four.model_config, task, 4), example_operations(self.model_config, task, 1)
        return round(asleep / awake, 3)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the result depends on besides the machine, as it stands in a stored run."""
        task = {"name": self.task, **_told(self.make_task())}
        settings = {"task": task, "model": _told(self.model_config), "train": _told(self.train_config)}
        return json.loads(json.dumps(settings))  # tuples become lists, as they do on disk


def _told(made: Any) -> dict[str, Any]:
    """Return a dataclass's fields, without those that came ``checks.LATER`` and have their default."""
    values = {f: getattr(made, f.name) for f in fields(made)}
    return {f.name: value for f, value in values.items() if value != f.default or not f.metadata.get("later")}
