"""Algorithm 1: sleep on every full window, clear the cache, wake for one ordinary pass.

::

    S <- 0                                       once per sequence
    for each window:                             consolidation: no loss, no new input
        h <- Embed(window)
        repeat N times:  h, S <- Blocks(h, S)    h is dropped with the window; only S goes on
    h, S <- Blocks(Embed(prompt), S)             prediction: exactly one pass
    logits <- Out(h)

The first pass of a sleep is the reading itself, so N = 1 is the plain hybrid. Gradients flow through all of it.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleepedu import checks
from sleepedu.model import FastWeights, SleepLM
from sleepedu.tasks.base import Episode


def sleep(
    model: SleepLM, tokens: Tensor, S: FastWeights | None = None, passes: int = 1, trace: Any = None, recompute=False
) -> FastWeights:
    """Sleep on one full window: N recurrent passes over it, of which only the fast weights remain. Consolidation.

    tokens: (b, l) of the window. S: the fast weights so far, empty when None. passes: N. trace: a ``SleepTrace`` to
    keep what happens in every pass. recompute: for the gradient, keep only what enters each pass and compute the rest
    again when its turn comes; the gradient is the same, for much less memory and about a third more time.
    Raises ValueError for N < 1, tokens outside the vocabulary, an S that does not fit or a model that keeps its cache.
    """
    check_passes(passes)
    check_sleeps(model)
    loop = partial(checkpoint, model.loop, use_reentrant=False) if recompute else model.loop
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    embedding, S = model.prelude(model.embed(tokens), S)  # (b, l, w)
    if trace is not None:
        trace.begin(S)
    h = embedding
    for n in range(passes):
        with nullcontext() if trace is None else trace.watch(model):
            h, S = loop(model.carry(h, embedding) if n else h, S)
    return model.coda(h, S)[1]


def wake(model: SleepLM, prompt: Tensor, S: FastWeights) -> Tensor:
    """Answer with one ordinary pass over the prompt (b, p), given the fast weights S: logits (b, p, V). Prediction.

    Raises ValueError for tokens outside the vocabulary or an S that does not fit.
    """
    h, _ = model.blocks(model.embed(prompt), S)
    return model.out(h)


def run_episode(model: SleepLM, episode: Episode, passes: int, trace: Any = None, recompute=False) -> Tensor:
    """Sleep on the episode's windows, one after the other, then answer its prompt: logits (b, p, V). Algorithm 1.

    trace, recompute: as in ``sleep``. Raises ValueError for N < 1, N > 1 with a model that keeps its cache, or tokens
    outside the vocabulary.
    """
    if model.config.keeps_cache:  # it reads windows and prompt in one pass, everything in sight
        if passes != 1:
            raise ValueError(f"a model that keeps its cache does not sleep: passes must be 1, got {passes}")
        pieces = (*episode.windows.unbind(1), episode.prompt)
        h, _ = model.blocks(torch.cat([model.embed(tokens) for tokens in pieces], dim=1), ())
        return model.out(h[:, -episode.prompt.shape[1] :])
    S = model.empty_fast_weights(len(episode))
    for tokens in episode.windows.unbind(1):
        S = sleep(model, tokens, S, passes, trace, recompute)
    return wake(model, episode.prompt, S)


@torch.no_grad()
def sleep_until_settled(
    model: SleepLM, tokens: Tensor, S: FastWeights | None = None, passes: int = 16, tolerance: float = 0.1
) -> tuple[FastWeights, Tensor]:
    """Sleep on one full window for as long as S changes: return S, and how many passes each sequence took, (b,).

    tokens, S: as in ``sleep``. passes: the most to take. tolerance: as in ``settle``. There is no gradient. Raises
    ValueError as ``sleep`` does, for a tolerance that is not above 0, and for a model without fast weights.
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


def check_passes(passes: int) -> None:
    """Raise ValueError unless N, the number of sleep passes, is a whole number of at least 1."""
    checks.whole("passes (N)", passes, least=1)


def check_sleeps(model: SleepLM) -> None:
    """Raise ValueError for a model that keeps its cache, and so has no use for sleep."""
    if model.config.keeps_cache:
        raise ValueError(f"layout {model.config.layout!r} keeps its cache and cannot sleep: use run_episode")


def check_settles(model: SleepLM, tolerance: float) -> None:
    """Raise ValueError for a tolerance that is not finite and above 0, or a model that has no S to settle."""
    check_sleeps(model)
    checks.has_numbers(model.head.weight.device)
    checks.finite("tolerance", tolerance, above=0)
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights that could settle: use sleep")
