"""What a task is: it makes episodes of tokens, windows and depth, and puts them into words. It knows no models."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sleepedu import checks

UNSCORED = -100  # the target where nothing is asked; what torch's cross-entropy ignores


@dataclass(frozen=True)
class Episode:
    """A batch of things to read and then be asked about; raises ValueError for shapes or dtypes that do not fit."""

    windows: Tensor  # (b, w, L) int64: slept on one after the other, never scored
    prompt: Tensor  # (b, p) int64: the prediction window
    targets: Tensor  # (b, p) int64: the right token at every position that asks something, -100 elsewhere
    depth: Tensor  # (b, p) int64: sequential steps that the answer needs (t, k, operations), 0 where nothing is asked

    def __post_init__(self):
        if self.windows.ndim != 3:
            raise ValueError(f"windows must be (batch, windows, length), got {tuple(self.windows.shape)}")
        for name, tensor in vars(self).items():
            wanted = (len(self.windows), *self.prompt.shape[1:2])
            if name != "windows" and (len(wanted) < 2 or tuple(tensor.shape) != wanted):
                raise ValueError(f"{name} must be (batch, prompt length) = {wanted}, got {tuple(tensor.shape)}")
            if tensor.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {tensor.dtype}: use .long()")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: slice) -> "Episode":
        """Return the episode of some of the examples."""
        return Episode(**{name: tensor[rows] for name, tensor in vars(self).items()})

    @property
    def asked(self) -> Tensor:
        """The positions that ask something, (b, p) bool."""
        return self.targets != UNSCORED

    def to(self, device: torch.device | str) -> "Episode":
        """Return the same episode on another device; a GPU fetches it from pinned memory while Python goes on."""
        away = torch.device(device).type == "cuda"  # on the way back one has to wait, or the numbers are not there yet
        return Episode(**{name: tensor.to(device, non_blocking=away) for name, tensor in vars(self).items()})

    def pin_memory(self) -> "Episode":
        """Return the same episode in memory that a GPU copies from by itself."""
        return Episode(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Task(ABC):
    """The interface of every task; a frozen dataclass whose fields are its settings.

    name: as on the command line. scoring: "each" when every question counts by itself, "all" when an example is
    right only if all its answers are. answer_tokens: how many scored tokens, one after the other, make up one answer;
    it is right when all of them are. ``words``: what every token id stands for. ``depths``: the depths it can ask.
    ``windows`` x ``window``: how many windows, of how many tokens. ``prompt_length``: tokens of the prompt. depth_name:
    what tables and figures call the depth.
    """

    name: ClassVar[str]
    scoring: ClassVar[str]
    depth_name: ClassVar[str]

    @property
    def answer_tokens(self) -> int:
        return 1

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def depths(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def windows(self) -> int: ...

    window = prompt_length = windows  # whole numbers, as abstract

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        """Draw examples, of one depth or, when it is None, of mixed ones; ValueError for a depth that there is not."""

    @property
    def tokens_per_example(self) -> int:
        """How many tokens a model reads in one example, windows and prompt."""
        return self.windows * self.window + self.prompt_length

    @property
    def floor(self) -> float | None:
        """The share right of the best guesser who has not read the text; None where only the best constant is known."""
        return None

    def text(self, episode: Episode, index: int = 0) -> str:
        """Return one example in words: its windows, then its prompt with the right answers in brackets."""
        lines = []
        for number, tokens in enumerate(episode.windows[index].tolist(), start=1):
            lines.append(f"window {number}: " + " ".join(self.words[token] for token in tokens))
        prompt = []
        for token, target in zip(episode.prompt[index].tolist(), episode.targets[index].tolist(), strict=True):
            prompt.append(self.words[token] + ("" if target == UNSCORED else f" [{self.words[target]}]"))
        return "\n".join([*lines, "prompt:   " + " ".join(prompt)])

    def _check_sample(self, batch: int, depth: int | None) -> None:
        checks.whole("batch", batch, least=1)
        if depth is not None and depth not in self.depths:
            raise ValueError(f"the {self.name} task has no depth {depth}: use one of {list(self.depths)}")


def check_task(task: Task, vocabulary: int) -> None:
    """Raise ValueError unless a vocabulary has as many words as the task, and it is known how the task is scored."""
    if vocabulary < len(task.words):
        raise ValueError(f"the task has {len(task.words)} words, the model a vocabulary of {vocabulary}")
    checks.one_of(f"the {task.name} task's scoring", task.scoring, ("each", "all"))
