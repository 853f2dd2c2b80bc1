"""A sleep that ends by itself: for as long as a pass still changes the fast weights, N passes at most.

Not in the paper. Every sequence of a batch leaves when its own S has settled, and the others go on without it.
"""

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.model import FastWeights, SleepLM
from sleepedu.sleep_loop import check_passes, check_sleeps


@torch.no_grad()
def sleep_until_settled(
    model: SleepLM, tokens: Tensor, S: FastWeights | None = None, passes: int = 16, tolerance: float = 0.1
) -> tuple[FastWeights, Tensor]:
    """Sleep on one full window for as long as S changes: return S, and how many passes each sequence took, (b,).

    tokens, S: as in ``sleep``. passes: the most to take. tolerance: as in ``settle``. There is no gradient. Raises
    ValueError as ``sleep`` does, for a tolerance that is not above 0, and for a model without fast weights or whose
    windows slide.
    """
    check_passes(passes)
    check_settles(model, tolerance)
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    embedding, S = model.prelude(model.embed(tokens), S)
    h, S = model.loop(embedding, S)
    return settle(model, h, embedding, S, passes, tolerance)


def settle(
    model: SleepLM, h: Tensor, embedding: Tensor, S: FastWeights, passes: int, tolerance: float
) -> tuple[FastWeights, Tensor]:
    """Go on from the h and S that the first pass left, until S has settled: the last S, and all passes taken, (b,).

    A sequence has settled when a pass has changed the S of every layer by no more than ``tolerance`` of its norm,
    ``|S_n - S_(n-1)| <= tolerance |S_n|``; that pass is its last, and the others go on without it.
    """
    final = tuple(tensor.clone() for tensor in (h, *S))
    taken = torch.ones(len(h), dtype=torch.long, device=h.device)  # (b,)
    going = torch.arange(len(h), device=h.device)  # the sequences that go on
    for _ in range(1, passes):
        if not len(going):
            break
        h, after = model.loop(model.carry(h, embedding), S)
        taken[going] += 1
        settled = torch.ones_like(going, dtype=torch.bool)
        for whole, new in zip(final, (h, *after), strict=True):
            whole[going] = new
        for new, old in zip(after, S, strict=True):
            settled &= (new - old).flatten(1).norm(dim=1) <= tolerance * new.flatten(1).norm(dim=1)
        going, h, embedding = going[~settled], h[~settled], embedding[~settled]
        S = tuple(matrix[~settled] for matrix in after)
    return model.coda(final[0], final[1:])[1], taken


def check_settles(model: SleepLM, tolerance: float) -> None:
    """Raise ValueError for a tolerance that is not finite and above 0, or a model without S, or whose windows slide."""
    check_sleeps(model)
    checks.has_numbers(model.head.weight.device)
    checks.finite("tolerance", tolerance, above=0)
    if model.config.eviction == "sliding":
        raise ValueError("a sleep that ends when S has settled needs hard eviction: this model's windows slide")
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights that could settle: use sleep")
