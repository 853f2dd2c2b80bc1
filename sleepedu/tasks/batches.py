"""The batches of a training run: batch i is drawn from the stream of (seed, i), and after it N, where that varies."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sleepedu.tasks.base import UNSCORED, Episode, Task
from sleepedu.tasks.random_streams import TESTING, TRAINING, stream


class Batches(Dataset):
    """The batch of every step of a run: (episode, N). config: a ``TrainConfig``."""

    def __init__(self, task: Task, config: Any):
        self.task, self.config = task, config

    def __getitem__(self, step: int) -> tuple[Episode, int]:
        generator = stream(self.config.seed, TRAINING, step)
        episode = self.task.sample(self.config.batch, generator)
        fewest, most = self.config.range_of_passes
        return episode, int(torch.randint(fewest, most + 1, (), generator=generator))


def prefetched(task: Task, config: Any, begin: int, device: torch.device) -> Iterable[tuple[Episode, int]]:
    """Return the batches from a step on: the same ones everywhere, for a GPU drawn ahead in processes of their own."""
    workers = min(4, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
    return DataLoader(
        Batches(task, config),
        batch_size=None,
        sampler=range(begin, config.steps),
        num_workers=workers,
        pin_memory=workers > 0,
        generator=torch.Generator(),  # its own, so that nobody else's is moved on
    )


def majority_loss(task: Task) -> float:
    """Return the loss of the best constant answer, in nats a scored token: the entropy of the answers to examples.

    There are 4,096, or fewer that have about a million tokens. Raises ValueError for episodes that ask nothing.
    """
    episode = task.sample(min(4096, 1 + 2**20 // task.tokens_per_example), stream(0, TESTING, 0))
    if not episode.asked.any():
        raise ValueError(f"the {task.name} task asks nothing: all its targets are {UNSCORED}")
    answers = episode.targets[episode.asked].view(-1, task.answer_tokens)
    share = answers.unique(dim=0, return_counts=True)[1].double() / len(answers)
    return round(float(-(share * share.log()).sum()) / task.answer_tokens, 5)
