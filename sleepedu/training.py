"""Training through the sleep, end to end: Muon for hidden matrices, AdamW for the rest.

A run depends on its settings and seed alone (``tasks.batches``). So every N sees the same data in the same order, an
interrupted run goes on exactly where it stood, and processes that train together share each batch among them.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sleepedu import checks
from sleepedu.fast.compiling import compiled_blocks, keep_freed_memory
from sleepedu.fast.muon import Muon
from sleepedu.fast.precision import PRECISIONS, autocast, choose_precision, tf32
from sleepedu.fast.recording import Recorded
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import check_passes, run_episode
from sleepedu.tasks.base import UNSCORED, Episode, Task, check_task
from sleepedu.tasks.batches import majority_loss, prefetched


@dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes a training run besides the task and the model; ValueError for what cannot train."""

    passes: int | tuple[int, int] = 1  #: N, or (fewest, most) to draw N anew for every batch, all equally likely
    steps: int = 1000
    batch: int = 64
    seed: int = 0
    learning_rate: float = 0.01  #: Muon's, for hidden matrices
    adam_learning_rate: float = 0.002  #: for embeddings, head, gates and vectors
    warmup: int = 50  #: steps up to the full rate
    decay: float = 0.3  #: the last part of the run, over which it falls to zero
    weight_decay: float = 1e-4
    clip: float = 1.0
    precision: str = "auto"  #: of large products, as in ``fast.precision``; S stays float32
    parts: int = field(default=1, metadata=checks.LATER)  #: of a batch, one after the other, for less memory

    def __post_init__(self):
        for n in (given := self.range_of_passes):
            check_passes(n)
        if len(given) != 2 or given[0] > given[1]:
            raise ValueError(f"passes must be N or (fewest, most), got {self.passes}")
        checks.seed(self.seed)
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("parts", 1)):
            checks.whole(name, getattr(self, name), least)
        for name in ("learning_rate", "adam_learning_rate", "clip"):
            checks.finite(name, getattr(self, name), above=0)
        for name in ("weight_decay", "decay"):
            checks.finite(name, getattr(self, name))
        if not 0 <= self.decay <= 1 or self.weight_decay < 0:
            given = f"{self.decay}, {self.weight_decay}"
            raise ValueError(f"decay must lie in 0..1 and weight_decay not be negative, got {given}")
        checks.one_of("precision", self.precision, PRECISIONS)

    @property
    def range_of_passes(self) -> tuple[int, int]:
        """The fewest and the most passes that a batch may get, both N where N is fixed."""
        return self.passes if isinstance(self.passes, tuple) else (self.passes, self.passes)

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step (from 0): warm-up, stable, linear decay."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        down = self.decay * self.steps
        return min(up, (self.steps - step) / down) if down else up


@dataclass
class History:
    """What was measured while training: one entry every few steps, averages over the steps since the last one."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # nats a scored token
    accuracy: list[float] = field(default_factory=list)  # share of scored tokens right
    seconds: list[float] = field(default_factory=list)  # training time so far, over all interruptions
    tokens_per_step: int = 0
    majority_loss: float = 0.0  # the loss of the best constant answer

    def add(self, step: int, loss: float, accuracy: float, seconds: float) -> None:
        """Make an entry."""
        self.step.append(step)
        self.loss.append(round(loss, 5))
        self.accuracy.append(round(accuracy, 5))
        self.seconds.append(round(seconds, 2))


@dataclass
class TrainingState:
    """Everything that changes while a model is trained, and so what a checkpoint has to hold."""

    model: SleepLM
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    precision: str  # as chosen for the device
    history: History
    sums: Tensor  # (4,) since the last history entry: loss, share right, gradient norm, and how many steps they are of
    step: int = 0
    seconds: float = 0.0


def train(
    model: SleepLM,
    task: Task,
    config: TrainConfig,
    watch: Callable[[History, TrainConfig], None] | None = None,
    checkpoint: Any = None,
    *,
    compile: bool = False,
    recompute: bool = False,
) -> History:
    """Train a model on a task, end to end through its sleep, and return the history of the run.

    watch: called after every history entry (``ProgressBar()`` shows a line). checkpoint: a ``Checkpoint``, to go on
    from what it holds and to save there meanwhile. compile: as ``compiled_blocks``, which costs up to a minute at the
    beginning. recompute: as in ``sleep``. In a process group the ranks train together; the first one watches and saves.
    Raises ValueError for a task that does not fit or asks nothing, a model on meta, a batch that does not divide among
    the ranks, or a checkpoint that is broken or of other settings; FloatingPointError when the loss is no number.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile returned
    check_task(task, model.config.vocabulary)
    device, (rank, ranks) = model.head.weight.device, rank_and_ranks()
    checks.has_numbers(device)
    if config.batch % ranks:
        raise ValueError(f"a batch of {config.batch} does not divide into equal shares for {ranks} ranks")
    keep_freed_memory()
    state = begin_training(model, task, config)
    varies = len(set(config.range_of_passes)) > 1
    answering: nn.Module = AnsweringEpisodes(model, recompute)
    if ranks > 1:  # a parameter without gradient (inject, at N = 1) never has one, unless N varies
        answering = DistributedDataParallel(answering, static_graph=not varies, find_unused_parameters=varies)
    gradients: Callable = partial(find_gradients, state, answering, parts=config.parts)
    if compile and device.type == "cuda" and ranks == 1:
        gradients = Recorded(gradients, model.parameters())
    saved = nullcontext() if checkpoint is None else checkpoint.running(state, task, config)
    with saved, tf32(state.precision, device), compiled_blocks(model) if compile else nullcontext():
        started = time.perf_counter() - state.seconds
        model.train()
        for step, (batch, passes) in enumerate(prefetched(task, config, state.step, device), state.step):
            for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * config.rate(step)
            share = batch[rank::ranks].to(device)
            state.sums += training_step(state, gradients, share, passes, config.clip)
            state.step = step + 1
            if not state.step % max(1, config.steps // 200) or state.step == config.steps:
                if ranks > 1:
                    dist.all_reduce(state.sums)
                loss, accuracy, norm, _ = (state.sums / state.sums[-1]).tolist()
                if not math.isfinite(loss + norm):
                    found = f"the loss is {loss} and the norm of its gradient {norm} by step {state.step}"
                    raise FloatingPointError(f"{found}: lower learning_rate (now {config.learning_rate}) or clip")
                state.history.add(state.step, loss, accuracy, time.perf_counter() - started)
                state.sums.zero_()
                if watch is not None and rank == 0:
                    watch(state.history, config)
            if checkpoint is not None:
                state.seconds = time.perf_counter() - started
                checkpoint.save_when_due(state, config)
    model.eval()
    return state.history


def begin_training(model: SleepLM, task: Task, config: TrainConfig) -> TrainingState:
    """Return the state of a run before its first step."""
    device = model.head.weight.device
    scale = 2.0**16 / rank_and_ranks()[1]  # a rank's gradients are so many times larger before they are averaged
    precision = choose_precision(config.precision, device)
    scaler = torch.amp.GradScaler(device.type, scale, enabled=precision == "float16")
    history = History(tokens_per_step=config.batch * task.tokens_per_example, majority_loss=majority_loss(task))
    sums = torch.zeros(4, device=device)
    return TrainingState(model, make_optimizers(model, config), scaler, precision, history, sums)


def training_step(state: TrainingState, gradients: Callable, episode: Episode, passes: int, clip: float) -> Tensor:
    """Take one step on an episode: sleep N passes, answer, score, follow the gradient back, clip it, move.

    gradients: ``find_gradients`` of the state, or what stands for it. Return loss (nats a scored token), share right,
    the gradient's norm, and 1, for a step, (4,).
    """
    scaler = state.scaler
    loss, accuracy = gradients(episode, passes)
    for optimizer in state.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip)
    if scaler.is_enabled() and not norm.isfinite():  # one decision for all: without gradients none moves
        state.model.zero_grad(set_to_none=True)
    for optimizer in state.optimizers:
        scaler.step(optimizer)
    scaler.update()
    # The scaler of float16 meets infinite gradients on purpose and skips them; anywhere else they end the run.
    norm = torch.zeros_like(norm) if scaler.is_enabled() else norm
    return torch.stack((loss, accuracy, norm, torch.ones_like(norm)))


def find_gradients(state: TrainingState, answering: nn.Module, episode: Episode, passes: int, parts: int = 1) -> Any:
    """Let ``AnsweringEpisodes`` answer, a part of the episode after the other; leave gradients; return as ``score``."""
    state.model.zero_grad(set_to_none=True)
    found = torch.zeros(2, device=episode.prompt.device)
    for part in (episode[first::parts] for first in range(parts)):
        with autocast(state.precision, part.prompt.device):
            logits = answering(part, passes)
        loss, accuracy = score(logits.float(), part, episode)
        state.scaler.scale(loss).backward()
        found += torch.stack((loss.detach(), accuracy))
    return found.unbind()


class AnsweringEpisodes(nn.Module):
    """``run_episode`` as a module's forward: the one call whose gradients DistributedDataParallel averages."""

    def __init__(self, model: SleepLM, recompute: bool = False):
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, episode: Episode, passes: int) -> Tensor:
        return run_episode(self.model, episode, passes, recompute=self.recompute)


def score(logits: Tensor, episode: Episode, whole: Episode | None = None) -> tuple[Tensor, Tensor]:
    """Return the masked cross-entropy (nats a scored token) and the share of scored tokens that are right.

    logits: (b, p, V) for the episode's prompt. Of a part of a whole, or of a rank's batch, both are shares in the mean.
    """
    # Sums over all positions: a GPU's host need not wait to hear how many are scored, and a rank may have none.
    count, ranks = (episode if whole is None else whole).asked.sum(), rank_and_ranks()[1]
    if ranks > 1:
        dist.all_reduce(count)
    count = count.clamp(min=1) / ranks  # who asks nothing adds nothing
    right = (logits.detach().argmax(-1) == episode.targets).sum()
    loss = F.cross_entropy(logits.flatten(0, 1), episode.targets.flatten(), ignore_index=UNSCORED, reduction="sum")
    return loss / count, right / count


def make_optimizers(model: SleepLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices in the blocks and of carry "inject", and AdamW, betas 0.9 and 0.95, for the rest.

    Gates are of the rest: they are a few rows, not a hidden matrix.
    """
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and name.endswith("weight") and name.startswith(("layers.", "inject."))
        (hidden if matrix and not any(part in name for part in model.not_for_muon) else rest).append(parameter)
    decay = config.weight_decay
    muon = Muon(hidden, lr=config.learning_rate, weight_decay=decay, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=config.adam_learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    for group in (*muon.param_groups, *adam.param_groups):
        group["initial_lr"] = group["lr"]
    return [muon, adam]


def rank_and_ranks() -> tuple[int, int]:
    """Return which of the processes that train together this is, and how many there are: 0 of 1 without a group."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
