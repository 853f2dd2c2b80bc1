"""Training on several devices: one process for each, a rank, started by ``torchrun``; nothing here without it.

Every rank draws the same batch and learns from its own rows of it; DistributedDataParallel averages the gradients.
Rank 0, the first, is the only one that writes and shows anything.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sleepedu.tasks.base import Episode

T = TypeVar("T")
_groups = itertools.count()


def launched() -> bool:
    """Return whether torchrun started this process: whether its environment variables are there."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def is_first() -> bool:
    """Return whether this is the rank that writes and shows: rank 0, or the only process there is."""
    return not launched() or os.environ["RANK"] == "0"


def ranks() -> int:
    """Return how many ranks train together: 1 outside ``process_group``."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Bring the ranks together meanwhile, over NCCL for "cuda" and Gloo otherwise; without torchrun do nothing.

    On CUDA every rank gets a device of its own, which "cuda" then means. Raises ValueError when there are too few.
    """
    if not launched():
        yield
        return
    own = None
    if device.type == "cuda":
        own, there = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if own.index >= there:
            raise ValueError(f"every rank needs a CUDA device: this machine has {there}, none for rank {own.index}")
        torch.cuda.set_device(own)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A process may train several times, and must not take what a former group left in the store for its own.
    store = torch.distributed.PrefixStore(f"group{next(_groups)}", _store())
    backend = "nccl" if own else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=own)
    yield
    # After an error the group is left to the end of the process: to take it down can mean to wait for the others.
    torch.distributed.destroy_process_group()


def share(episode: Episode) -> Episode:
    """Return this rank's rows of a batch: every K-th one of K ranks. Raises ValueError unless K divides the batch."""
    check_batch(len(episode))
    if ranks() == 1:
        return episode
    rank = torch.distributed.get_rank()
    return Episode(**{field.name: getattr(episode, field.name)[rank :: ranks()] for field in fields(episode)})


def check_batch(batch: int) -> None:
    """Raise ValueError unless a batch divides into equal shares for all ranks."""
    if batch % ranks():
        raise ValueError(f"a batch of {batch} does not divide into equal shares for {ranks()} ranks")


def mean(numbers: Tensor) -> Tensor:
    """Return the mean over all ranks, on every one of them; all have to ask."""
    if ranks() == 1:
        return numbers
    numbers = numbers.clone()
    torch.distributed.all_reduce(numbers)
    return numbers / ranks()


def from_first(read: Callable[[], T]) -> T:
    """Return what the first rank reads, on every rank; all have to ask. Tensors have to be on the CPU."""
    if ranks() == 1:
        return read()
    box: list[Any] = [read() if is_first() else None]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def first_to_fail() -> bool:
    """Return whether this process is the first that fails, and so has to say why.

    Other ranks fail of the same wrong input or, left waiting, of the first one's silence.
    """
    if not launched():
        return True
    try:
        return _store().add("failed", 1) == 1
    except (RuntimeError, ValueError):  # there is nobody to ask
        return True


@cache
def _store() -> "torch.distributed.Store":
    """Return the table of names and values that all ranks share, kept by torchrun."""
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(minutes=5)))
    return torch.distributed.PrefixStore("sleepedu" + os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
