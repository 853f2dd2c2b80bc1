"""What happened in every pass of a sleep: the fast weights and the hidden states, kept for looking at."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleepedu.model import FastWeights, SleepLM


@dataclass
class SleepTrace:
    """What happened in every pass of every sleep: hand one to ``sleep`` or ``run_episode`` and read it afterwards.

    S[window][n] is the fast weights after pass n, a tuple over fast-weight layers of (b, heads, d_v, d_k); n = 0 is
    before the first. h[window][n - 1] is (layers, b, l, w), the hidden states after every block in pass n. Of a model
    that loops some of its blocks, the passes are these blocks'.
    """

    S: list[list[FastWeights]] = field(default_factory=list)
    h: list[list[Tensor]] = field(default_factory=list)

    def begin(self, S: FastWeights) -> None:
        """Begin with another window, which finds these fast weights."""
        self.S.append([tuple(matrix.detach() for matrix in S)])
        self.h.append([])

    @contextmanager
    def watch(self, model: SleepLM) -> Iterator[None]:
        """Keep what the model's blocks do meanwhile, as one pass over the present window."""
        seen: dict = {}  # what every block returned, by its place in the model
        with ExitStack() as hooks:
            for place, block in enumerate(model.layers):
                hook = block.register_forward_hook(lambda *call, place=place: seen.update({place: call[-1]}))
                hooks.enter_context(hook)
            yield
        self.h[-1].append(torch.stack([h.detach() for h, _ in seen.values()]))
        before = zip(model.fast_layers, self.S[-1][-1], strict=True)
        self.S[-1].append(tuple(seen[place][1].detach() if place in seen else S for place, S in before))

    def stack(self, window: int = -1) -> Tensor:
        """Return S before and after every pass as one tensor, (passes + 1, fast-weight layers, b, heads, d_v, d_k).

        Raises ValueError for the trace of a model without fast weights.
        """
        if not self.S[window][0]:
            raise ValueError("there is no S in this trace: trace a model that has 'g' in its layout")
        return torch.stack([torch.stack(S) for S in self.S[window]])

    def changes(self, window: int = -1, by_head: bool = False) -> Tensor:
        """Return ``|S_n - S_(n-1)| / |S_n|``, 0 without a change, mean over the batch: (passes, layers[, heads])."""
        S = self.stack(window).flatten(-2 if by_head else 3)
        change, size = (S[1:] - S[:-1]).norm(dim=-1), S[1:].norm(dim=-1)
        return (change / size.where(change > 0, 1)).mean(dim=2)
