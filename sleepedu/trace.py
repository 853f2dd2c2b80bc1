"""What happened in every pass of a sleep: the fast weights, the hidden states and the gates, kept for looking at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleepedu.model import FastWeights, SleepLM


@dataclass
class SleepTrace:
    """What happened in every pass of every sleep: hand one to ``sleep`` or ``run_episode`` and read it afterwards.

    S[window][n] is the fast weights after pass n, a tuple over fast-weight layers of (b, heads, d_v, d_k); n = 0 is
    before the sleep. h[window][n - 1] is (layers, b, l, w), the hidden states after every block in pass n.
    a and b, both [window][n - 1], are what every token kept of S and how strongly it wrote in pass n, (fast-weight
    layers, b, heads, l).
    """

    S: list[list[FastWeights]] = field(default_factory=list)
    h: list[list[Tensor]] = field(default_factory=list)
    a: list[list[Tensor]] = field(default_factory=list)
    b: list[list[Tensor]] = field(default_factory=list)

    def begin(self, S: FastWeights) -> None:
        """Begin with another window, which finds these fast weights."""
        self.S.append([tuple(matrix.detach() for matrix in S)])
        for kept in (self.h, self.a, self.b):
            kept.append([])

    @contextmanager
    def watch(self, model: SleepLM) -> Iterator[None]:
        """Keep what the model's blocks do meanwhile, as one pass over the present window."""
        seen: list = []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call)) for block in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.h[-1].append(torch.stack([h.detach() for *_, (h, _) in seen]))
        self.S[-1].append(tuple(S.detach() for *_, (_, S) in seen if S is not None))
        with torch.no_grad():
            given = [
                block.mixer.rule_inputs(block.mixer_norm(entering[0]), S.dtype)
                for block, entering, (_, S) in seen
                if S is not None
            ]
        self.a[-1].append(torch.stack([inputs.log_a.exp() for inputs in given]) if given else torch.empty(0))
        self.b[-1].append(torch.stack([inputs.b for inputs in given]) if given else torch.empty(0))

    def stack(self, window: int = -1) -> Tensor:
        """Return S before and after every pass as one tensor, (passes + 1, fast-weight layers, b, heads, d_v, d_k).

        Raises ValueError for the trace of a model without fast weights.
        """
        if not self.S[window][0]:
            raise ValueError("there is no S in this trace: trace a model that has 'g' in its layout")
        return torch.stack([torch.stack(S) for S in self.S[window]])

    def norms(self, window: int = -1) -> Tensor:
        """Return the Frobenius norm of S, mean over the batch: (passes + 1, fast-weight layers)."""
        return self.stack(window).flatten(3).norm(dim=-1).mean(dim=2)

    def changes(self, window: int = -1, by_head: bool = False) -> Tensor:
        """Return ``|S_n - S_(n-1)| / |S_n|``, 0 without a change, mean over the batch: (passes, layers[, heads])."""
        S = self.stack(window).flatten(-2 if by_head else 3)
        change, size = (S[1:] - S[:-1]).norm(dim=-1), S[1:].norm(dim=-1)
        return (change / size.where(change > 0, 1)).mean(dim=2)

    def hidden_norms(self, window: int = -1) -> Tensor:
        """Return the root mean square of h after every block and pass: (passes, layers)."""
        return torch.stack([h.float().square().mean(dim=(1, 2, 3)).sqrt() for h in self.h[window]])
