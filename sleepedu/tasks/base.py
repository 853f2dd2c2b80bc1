"""What a task is: it makes episodes, knows how deep each question is, and shows an episode to a person.

A task knows tokens, windows and depth; it knows nothing of models.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sleepedu import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNSCORED = -100  # the target where nothing is asked; what torch's cross-entropy ignores


@dataclass(frozen=True)
class Episode:
    """A batch of things to read and then be asked about.

    windows (b, w, L): slept on one after the other, never scored. prompt (b, p): the prediction window.
    targets (b, p): the right token at every position that asks something, -100 elsewhere. depth (b, p): how many
    sequential steps the answer needs (t, k, operations), 0 where nothing is asked or nothing is to be done. All int64.
    Raises ValueError for shapes that do not fit together, or another kind of number.
    """

    windows: Tensor
    prompt: Tensor
    targets: Tensor
    depth: Tensor

    def __post_init__(self):
        if self.windows.ndim != 3:
            raise ValueError(f"windows must be (batch, windows, length), got {tuple(self.windows.shape)}")
        for name in ("prompt", "targets", "depth"):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 2 or shape[0] != len(self.windows) or shape != tuple(self.prompt.shape):
                raise ValueError(f"{name} must be (batch, prompt length) = {tuple(self.prompt.shape)}, got {shape}")
        for name, tensor in vars(self).items():
            if tensor.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {tensor.dtype}: use .long()")

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def asked(self) -> Tensor:
        """(b, p) bool: the positions that ask something."""
        return self.targets != UNSCORED

    def to(self, device: torch.device | str) -> "Episode":
        """Return the same episode on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("windows", "prompt", "targets", "depth")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Task(ABC):
    """The interface of every task; a frozen dataclass whose fields are its settings.

    name: as on the command line. scoring: "each" when every question counts by itself, "all" when an example is
    right only if all its answers are. answer_tokens: how many scored tokens, one after the other, make up one answer;
    it is right when all of them are. ``words``: what every token id stands for. ``depths``: the depths it can ask.
    ``windows`` x ``window``: how many windows, of how many tokens.
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

    @property
    @abstractmethod
    def window(self) -> int: ...

    @property
    @abstractmethod
    def prompt_length(self) -> int: ...

    @abstractmethod
    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        """Draw ``batch`` fresh examples; all of one depth, or of mixed depths when it is None.

        Raises ValueError for a batch below 1 or a depth that the task does not have.
        """

    @property
    def floor(self) -> float | None:
        """The share of answers that the best guesser gets right who knows the task and the question but not the text.

        None where that is not known exactly; the best constant answer, measured, stands for it then.
        """
        return None

    def draw(self, episode: Episode, index: int = 0, answers: Tensor | None = None) -> "Figure":
        """Draw one example for a person, with given answers (p,) beside the right ones where there are any.

        Raises NotImplementedError for a task that has no picture; ``text`` always works.
        """
        raise NotImplementedError(f"the {self.name} task has no picture: use text()")

    def text(self, episode: Episode, index: int = 0) -> str:
        """Return one example in words: its windows, then its prompt with the right answers in brackets."""
        lines = []
        for number, tokens in enumerate(episode.windows[index].tolist(), start=1):
            lines.append(f"window {number}: " + " ".join(self.words[token] for token in tokens))
        prompt = []
        for token, target in zip(episode.prompt[index].tolist(), episode.targets[index].tolist(), strict=True):
            prompt.append(self.words[token] + ("" if target == UNSCORED else f" [{self.words[target]}]"))
        return "\n".join([*lines, "prompt:   " + " ".join(prompt)])

    def check(self, episode: Episode) -> None:
        """Raise ValueError unless the episode has this task's windows and prompt."""
        wanted = (self.windows, self.window)
        if tuple(episode.windows.shape[1:]) != wanted:
            raise ValueError(
                f"the {self.name} task reads {wanted[0]} windows of {wanted[1]} tokens, "
                f"the episode has {episode.windows.shape[1]} of {episode.windows.shape[2]}"
            )
        if episode.prompt.shape[1] != self.prompt_length:
            raise ValueError(
                f"the {self.name} task asks with {self.prompt_length} tokens, the episode with "
                f"{episode.prompt.shape[1]}"
            )

    def _check_sample(self, batch: int, depth: int | None) -> None:
        checks.whole("batch", batch, least=1)
        if depth is not None and depth not in self.depths:
            raise ValueError(f"the {self.name} task has no depth {depth}: use one of {list(self.depths)}")


def pad_left(tokens: Tensor, length: int, padding: int) -> Tensor:
    """Return the tokens of every row (b, any) that are no padding, at the right end of a row of ``length``."""
    kept = tokens != padding
    text = torch.full((len(tokens), length), padding)
    text[torch.arange(length) >= length - kept.sum(dim=1, keepdim=True)] = tokens[kept]
    return text
