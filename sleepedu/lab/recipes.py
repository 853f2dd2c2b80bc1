"""How every task is trained in every size: the settings that the stored runs were made with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

SIZES = ("smoke", "laptop", "split", "paper")  # split: as laptop, but what is to be joined lies in several windows
MODELS = {
    "sleep": "the hybrid of attention and fast weights, sleeping N passes on every window",
    "varied": "the same, trained with N drawn anew for every batch, from 1 to the N that is asked for",
    "transformer": "attention only, evicting every window: what is left of the past is nothing",
    "kept": "attention only, evicting nothing: it looks back at everything when it answers",
    "longer": "the hybrid at N = 1, trained on four times the steps",
    "deeper": "the hybrid at N = 1, with four times the layers",
}


@dataclass(frozen=True)
class Recipe:
    """How one task is trained in one size: settings of task, model and training, and what depends on N."""

    task: Mapping[str, Any]
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    carry: str = "hidden"  # from pass to pass; each task takes the one that learns it better
    learning_rates: Mapping[int, float] = field(default_factory=dict)  # N -> Muon's, where the tuned one differs


SMALL = {"layout": "ag", "width": 32, "heads": 2}
RING = {"nodes": 8, "hops": 4, "queries": 8}
ON_RINGS: Mapping[str, Any] = {
    "model": {"layout": "ag"},
    "train": {"steps": 3000, "batch": 64, "adam_learning_rate": 0.005},
}
PAPER = {"learning_rate": 0.002, "adam_learning_rate": 5e-5, "warmup": 1000}
RECIPES: Mapping[tuple[str, str], Recipe] = MappingProxyType(
    {
        ("graph", "smoke"): Recipe(
            task={"nodes": 6, "hops": 3, "queries": 6}, model=SMALL, train={"steps": 300, "batch": 64}
        ),
        ("graph", "laptop"): Recipe(task=RING, **ON_RINGS),
        ("graph", "split"): Recipe(task={**RING, "windows": 2}, **ON_RINGS),
        ("graph", "paper"): Recipe(
            task={
                **{"nodes": 75, "hops": 16, "queries": 10, "windows": 4, "shortest": 3},
                **{"tested": (1, 2, 4, 8, 16), "name_tokens": 2},
            },
            model={"layout": "gaga", "width": 512, "heads": 8},
            train={"steps": 100_000, "batch": 128, **PAPER},
        ),
        ("rule110", "smoke"): Recipe(
            task={"cells": 6, "steps": (1, 2)}, model={**SMALL, "positions": 6}, train={"steps": 300, "batch": 64}
        ),
        ("rule110", "laptop"): Recipe(
            task={"cells": 12, "steps": (1, 2, 3, 4, 5, 6, 7, 8)},
            model={"layout": "ag", "positions": 12},
            train={"steps": 2500, "batch": 64},
            learning_rates={4: 0.005},
        ),
        ("math", "smoke"): Recipe(
            task={"quantities": 4, "operations": 2}, model=SMALL, train={"steps": 300, "batch": 64}
        ),
        ("math", "laptop"): Recipe(
            task={"quantities": 8, "operations": 4, "digits": 5, "less": False},
            model={"layout": "ag"},
            train={"steps": 4500, "batch": 64, "adam_learning_rate": 0.005},
            carry="inject",
        ),
        # About 2,900 tokens in two windows; the paper fine-tunes pretrained models on such problems, this starts anew.
        ("math", "paper"): Recipe(
            task={"quantities": 360, "operations": 8, "ask": "one", "windows": 2, "sums": True, "name_words": 2},
            model={"layout": "agag", "width": 512, "heads": 8},
            train={"steps": 20_000, "batch": 256, **PAPER, "learning_rate": 0.001},
        ),
        # 512 x 100 tokens a step: 5 billion tokens.
        ("rule110", "paper"): Recipe(
            task={"cells": 24, "rows": 4, "steps": (32,), "ask": "first"},
            model={"layout": "agag", "width": 256, "positions": 24},
            train={"steps": 97_656, "batch": 512, **PAPER},
        ),
    }
)
