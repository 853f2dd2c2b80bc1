"""Elementary cellular automata, Rule 110 first of all: read a row of bits, then say what it becomes after t steps.

What has to be stored is the same for every t; only the number of sequential steps grows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.tasks.base import Episode, Task


@dataclass(frozen=True)
class CellularAutomaton(Task):
    """Rows of ``cells`` random bits, one row a window, then questions about them after t steps.

    cells: bits in a row, on a ring. rows: independent rows. steps: the t that can be asked; the prompt's token says
    which. ask: "first" for the first bit of every row (the paper's form), "every" for all bits of a single row.
    rule: Wolfram's number, 0..255. Depth is t, and an example is right when all its bits are.
    Raises ValueError for settings outside these.
    """

    cells: int = 12
    rows: int = 1
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    ask: str = "every"
    rule: int = 110

    name = "rule110"
    scoring = "all"
    depth_name = "rollout steps t"

    def __post_init__(self):
        checks.whole("cells", self.cells, least=3)
        checks.whole("rows", self.rows, least=1)
        checks.different("steps", self.steps, least=1)
        if not self.steps:
            raise ValueError("steps must have a number at least, got ()")
        if self.ask not in ("first", "every"):
            raise ValueError(f"ask {self.ask!r} is unknown: use 'first' or 'every'")
        if self.ask == "every" and self.rows != 1:
            raise ValueError(f"ask 'every' is for a single row, got {self.rows} rows")
        checks.whole("rule", self.rule, least=0, most=255)

    @property
    def words(self) -> tuple[str, ...]:
        return ("0", "1", *(f"?{t}" for t in self.steps))

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self.steps)

    @property
    def windows(self) -> int:
        return self.rows

    @property
    def window(self) -> int:
        return self.cells

    @property
    def prompt_length(self) -> int:
        return self.cells if self.ask == "every" else self.rows

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        rows = torch.randint(2, (batch, self.rows, self.cells), generator=generator, dtype=torch.uint8)
        choice = torch.randint(len(self.steps), (batch,), generator=generator)
        if depth is not None:
            choice = torch.full_like(choice, self.steps.index(depth))
        t = torch.tensor(self.steps)[choice]
        after = state = rows
        for step in range(1, int(t.max()) + 1):
            state = next_row(state, self.rule)
            after = torch.where((t == step)[:, None, None], state, after)
        targets = after[:, 0, :] if self.ask == "every" else after[:, :, 0]
        prompt = (2 + choice)[:, None].repeat(1, self.prompt_length)
        return Episode(rows.long(), prompt, targets.long(), depth=t[:, None].expand_as(prompt))


def next_row(bits: Tensor, rule: int) -> Tensor:
    """Return the next row of an elementary cellular automaton on a ring: bits (..., cells) of uint8 -> the same."""
    neighbourhood = 4 * bits.roll(1, dims=-1) + 2 * bits + bits.roll(-1, dims=-1)  # left, centre and right: 0..7
    return torch.tensor(rule, dtype=torch.uint8) >> neighbourhood & 1


def space_time(bits: Tensor, rule: int, steps: int) -> Tensor:
    """Return the row and everything it becomes: bits (..., cells) -> (..., steps + 1, cells) of uint8."""
    rows = [bits.to(torch.uint8)]
    for _ in range(steps):
        rows.append(next_row(rows[-1], rule))
    return torch.stack(rows, dim=-2)
