"""The memory of a training step of every recipe that is meant for a GPU, counted on no GPU: prints it as JSON.

python tests/gpu_memory.py > book/runs/benchmark/memory.json
"""

import json

from sleepedu.lab.experiments import step_bytes
from sleepedu.lab.recipes import RECIPES, Experiment

CARDS = {"colab": 16e9, "paper": 80e9}  # bytes: a T4; an A100 or H100
PASSES = 4


def row(task: str, size: str) -> dict:
    experiment = Experiment(task, size, passes=PASSES)
    config, chosen = experiment.train_config, experiment.recipe.recompute
    kept, recomputed = (step_bytes(experiment, config.batch, way) for way in (False, True))
    total = sum((recomputed if chosen else kept).values())
    return {
        **{"task": task, "size": size, "passes": PASSES, "batch": config.batch, "parts": config.parts},
        **{"parameters": kept["parameters"], "optimizers": kept["optimizers"]},
        **{"kept": kept["step"], "recomputed": recomputed["step"], "recompute": chosen, "total": total},
        "card": CARDS[size],
    }


if __name__ == "__main__":
    print(json.dumps([row(*key) for key in RECIPES if key[1] in CARDS], indent=1))
