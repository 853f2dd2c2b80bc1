"""Algorithm 1: sleep on every full window, clear the cache, wake for one ordinary pass.

::

    S <- 0                                       once per sequence
    for each window:                             consolidation: no loss, no new input
        h <- Embed(window)
        repeat N times:  h, S <- Blocks(h, S)    h is dropped with the window; only S goes on
    h, S <- Blocks(Embed(prompt), S)             prediction: exactly one pass
    logits <- Out(h)

The first pass is the reading itself: N = 1 is the plain hybrid. Gradients flow through all of it. ``prelude`` and
``coda`` are for pretrained models. Where windows slide (``eviction="sliding"``) the cache keeps the last L - 1 tokens.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleepedu import checks
from sleepedu.layers import WindowCache
from sleepedu.model import FastWeights, SleepLM
from sleepedu.tasks.base import Episode


def sleep(
    model: SleepLM, tokens: Tensor, S: FastWeights | None = None, passes: int = 1, trace: Any = None, recompute=False,
    cache: list[WindowCache] | None = None,
) -> FastWeights:  # fmt: skip
    """Sleep on one full window: N recurrent passes over it, of which only the fast weights remain. Consolidation.

    tokens: (b, l) of the window. S: the fast weights so far, empty when None. passes: N. trace: a ``SleepTrace`` to
    keep what happens in every pass. recompute: for the gradient, keep only what enters each pass and compute the rest
    again when its turn comes; the gradient is the same, for much less memory and about a third more time. cache: where
    windows slide, what the last sleep left of its window; in it this one leaves its own.
    Raises ValueError for N < 1, tokens outside the vocabulary, an S or cache that does not fit, a model that keeps one.
    """
    check_passes(passes)
    check_sleeps(model)
    if cache is not None and model.config.eviction != "sliding":
        raise ValueError("a cache outlives its window only where windows slide: leave it out")
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    embedding, S = model.prelude(model.embed(tokens), S, cache)  # (b, l, w)
    before = cache and list(cache)

    def one_pass(h: Tensor, S: FastWeights) -> tuple[Tensor, FastWeights, Any]:
        # A copy for every pass, also for one that is computed again: it finds what was there before the window.
        seen = before and [replace(layer) for layer in before]
        return *model.loop(h, S, seen), seen

    if trace is not None:
        trace.begin(S)
    h = embedding
    for n in range(passes):
        given = (model.carry(h, embedding) if n else h, S)
        with nullcontext() if trace is None else trace.watch(model):
            h, S, seen = checkpoint(one_pass, *given, use_reentrant=False) if recompute else one_pass(*given)
    _, S = model.coda(h, S, seen)
    if cache is not None:
        cache[:] = [layer.slide() for layer in seen]
    return S


def wake(model: SleepLM, prompt: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> Tensor:
    """Answer with one ordinary pass over the prompt (b, p), given the fast weights S: logits (b, p, V). Prediction.

    cache: as in ``sleep``; the prompt ends up in it.
    Raises ValueError for tokens outside the vocabulary or an S that does not fit.
    """
    h, _ = model.blocks(model.embed(prompt), S, cache)
    return model.out(h)


def run_episode(model: SleepLM, episode: Episode, passes: int, trace: Any = None, recompute=False) -> Tensor:
    """Sleep on the episode's windows, one after the other, then answer its prompt: logits (b, p, V). Algorithm 1.

    trace, recompute: as in ``sleep``, and without use where a model keeps its cache. Raises ValueError for N < 1, N > 1
    with a model that keeps its cache, or tokens outside the vocabulary.
    """
    if model.config.keeps_cache:  # it reads windows and prompt in one pass, everything in sight
        if passes != 1:
            raise ValueError(f"a model that keeps its cache does not sleep: passes must be 1, got {passes}")
        pieces = (*episode.windows.unbind(1), episode.prompt)  # each by itself: learned places begin anew in each
        h, _ = model.blocks(torch.cat([model.embed(tokens) for tokens in pieces], dim=1), ())
        return model.out(h[:, -episode.prompt.shape[1] :])
    S = model.empty_fast_weights(len(episode))
    cache = model.empty_cache(episode.windows.shape[2]) if model.config.eviction == "sliding" else None
    for tokens in episode.windows.unbind(1):  # hard eviction: without a cache, a pass keeps nothing for the next
        S = sleep(model, tokens, S, passes, trace, recompute, cache)
    return wake(model, episode.prompt, S, cache)


def check_passes(passes: int) -> None:
    """Raise ValueError unless N, the number of sleep passes, is a whole number of at least 1."""
    checks.whole("passes (N)", passes, least=1)


def check_sleeps(model: SleepLM) -> None:
    """Raise ValueError for a model that keeps its cache, and so has no use for sleep."""
    if model.config.keeps_cache:
        raise ValueError(f"layout {model.config.layout!r} keeps its cache and cannot sleep: use run_episode")
