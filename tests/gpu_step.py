"""A training step on the pretended GPU: prints its kernels as JSON, then finds three faults that are put back into it.

    PYTHONPATH=.:tests python tests/gpu_step.py > book/runs/benchmark/launches.json

What is launched does not depend on the batch, so there are two examples in it.
"""

# ruff: noqa: I001

import inspect
import json
import sys
import textwrap
from dataclasses import replace
from functools import partial

from pretended_gpu import pretended_gpu  # before torch

import torch

from sleepedu import layers, training
from sleepedu.lab.recipes import Experiment
from sleepedu.model import SleepLM
from sleepedu.tasks.random_streams import TRAINING, stream

STEPS = [("rule110", "paper", 1), ("rule110", "paper", 4), ("graph", "laptop", 4)]
PRECISIONS = ("float32", "bfloat16")
# Where, what stands there, and the fault: the host waits to hear how many are asked; a tensor is left on the CPU; each
# optimizer decides for itself whether a gradient is fit to follow.
FAULTS = {
    "wait": (training, "score", "logits.flatten(0, 1), episode.targets.flatten()",
             "logits[episode.asked], episode.targets[episode.asked]"),
    "device": (layers, "angles", "torch.arange(start, start + length, device=device)",
               "torch.arange(start, start + length)"),
    "nan": (training, "training_step", "not norm.isfinite()", "False"),
}  # fmt: skip


def prepare(task: str, size: str, passes: int, precision: str):
    """Return a model on the GPU and what takes a training step with it."""
    experiment = Experiment(task, size, passes=passes, precision=precision)
    config, questions = replace(experiment.train_config, batch=2), experiment.make_task()
    torch.manual_seed(0)
    model = SleepLM(experiment.model_config).to("cuda")
    state = training.begin_training(model, questions, config)
    gradients = partial(training.find_gradients, state, training.AnsweringEpisodes(model))
    episode = questions.sample(2, stream(0, TRAINING, 0)).to("cuda")
    return model, lambda: training.training_step(state, gradients, episode, passes, config.clip)


def launches(counts, task: str, size: str, passes: int, precision: str) -> int:
    """Return how many kernels a step launches. Raises AssertionError where the host waits for the GPU meanwhile."""
    _, step = prepare(task, size, passes, precision)
    step()  # the first one makes what the optimizers keep
    counts.clear()
    step()
    assert not counts.waits, counts.waits
    return counts.launches.total()


def check_nan(counts) -> None:
    """One gradient that is no number moves nothing, whichever optimizer it belongs to."""
    model, step = prepare("graph", "smoke", 2, "float16")
    before = [parameter.cpu().clone() for parameter in model.parameters()]
    model.layers[1].mlp.out.weight.register_hook(lambda gradient: gradient * torch.nan)
    step()
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.cpu(), was), "a weight has moved"


def put_back(module, name: str, right: str, wrong: str) -> None:
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(right) == 1, (name, right)
    exec(source.replace(right, wrong), vars(module))


def main() -> None:
    found = []
    with pretended_gpu() as counts:
        for task, size, passes in STEPS:
            row = {"task": task, "size": size, "passes": passes, "torch": torch.__version__}
            for precision in PRECISIONS:
                row[precision] = launches(counts, task, size, passes, precision)
            found.append(row)
        print(json.dumps(found, indent=1))
        check_nan(counts)
        for fault, (module, name, right, wrong) in FAULTS.items():
            original = getattr(module, name)
            put_back(module, name, right, wrong)
            try:
                check_nan(counts) if fault == "nan" else launches(counts, "graph", "smoke", 2, "float32")
            except (AssertionError, RuntimeError) as error:
                print(f"{fault}: {error}"[:200], file=sys.stderr)
            else:
                raise SystemExit(f"{fault}: nobody noticed")
            setattr(module, name, original)


if __name__ == "__main__":
    main()
