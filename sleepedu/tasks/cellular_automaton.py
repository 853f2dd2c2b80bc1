"""Elementary cellular automata, Rule 110 first of all: read a row of bits, then say what it becomes after t steps.

What has to be stored is the same for every t; only the number of sequential steps grows.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.tasks.base import Episode, Task


@dataclass(frozen=True)
class CellularAutomaton(Task):
    """Rows of ``cells`` random bits, one row a window, then questions about them after t steps.

    cells: bits in a row, on a ring. rows: independent rows. steps: the t that can be asked; the prompt's token says
    which. ask: "first" for the first bit of every row (the paper's form), "every" for all bits of a single row, "mixed"
    for all of them, each after a t of its own, unless episodes of one depth are drawn. rule: Wolfram's number, 0..255.
    held_out: the share of all rows that training, which draws mixed depths, never sees; a hash of a row's bits decides.
    Episodes of one depth have these rows alone.
    Depth is t, and an example is right when all its bits are. Raises ValueError for settings outside these.
    """

    cells: int = 12
    rows: int = 1
    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    ask: str = "every"
    rule: int = 110
    held_out: float = field(default=0.0, metadata=checks.LATER)

    name = "rule110"
    scoring = "all"
    depth_name = "rollout steps t"

    def __post_init__(self):
        checks.whole("cells", self.cells, least=3)
        checks.whole("rows", self.rows, least=1)
        checks.different("steps", self.steps)
        if not self.steps:
            raise ValueError("steps must have a number at least, got ()")
        checks.one_of("ask", self.ask, ("first", "every", "mixed"))
        if self.ask != "first" and self.rows != 1:
            raise ValueError(f"ask {self.ask!r} is for a single row, got {self.rows} rows")
        checks.whole("rule", self.rule, least=0, most=255)
        checks.finite("held_out", self.held_out)
        if self.held_out and not 0.01 <= self.held_out <= 0.99:
            raise ValueError(f"held_out must be 0 or lie in 0.01..0.99, got {self.held_out}")
        if self.held_out and self.cells <= 10:  # of more rows a hundredth is never empty
            rows = torch.arange(2**self.cells)[:, None] >> torch.arange(self.cells) & 1  # all there are
            kept = len(rows) - int(self.is_held_out(rows).sum())
            if kept in (0, len(rows)):
                raise ValueError(f"held_out {self.held_out} leaves {kept} of {len(rows)} rows to train on")

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
        return self.rows if self.ask == "first" else self.cells

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        rows = torch.randint(2, (batch, self.rows, self.cells), generator=generator, dtype=torch.uint8)
        while self.held_out and (other := self.is_held_out(rows) != (depth is not None)).any():
            rows[other] = torch.randint(2, (int(other.sum()), self.cells), generator=generator, dtype=torch.uint8)
        different = self.cells if self.ask == "mixed" else 1
        choice = torch.randint(len(self.steps), (batch, different), generator=generator)
        if depth is not None:
            choice = torch.full_like(choice, self.steps.index(depth))
        t = torch.tensor(self.steps)[choice]  # (b, 1 or cells)
        after = state = rows
        for step in range(1, int(t.max()) + 1):
            state = next_row(state, self.rule)
            after = torch.where((t == step)[:, None], state, after)
        targets = after[:, :, 0] if self.ask == "first" else after[:, 0, :]
        prompt, depths = (asked.repeat(1, self.prompt_length // different) for asked in (2 + choice, t))
        return Episode(rows.long(), prompt, targets.long(), depths)

    def is_held_out(self, rows: Tensor) -> Tensor:
        """Return which rows (..., cells) of uint8 are held out, (...) bool: the same in every process, for any seed."""
        hashes = [hashlib.sha256(bytes(row)).digest()[:4] for row in rows.flatten(0, -2).tolist()]
        numbers = torch.tensor([int.from_bytes(digits) for digits in hashes])
        return (numbers < self.held_out * 2**32).view(rows.shape[:-1])


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
