"""Streaming use of a sleeping model: read a text of any length in pieces of any size, and ask."""

from dataclasses import replace

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.layers import WindowCache
from sleepedu.model import SleepLM
from sleepedu.settling import check_settles, settle
from sleepedu.sleep_loop import check_passes, check_sleeps


class Session:
    """Read tokens in pieces of any size, sleep when the window is full, answer; keep no more than one window and S.

    window: L, tokens that attention can hold. passes: N. batch: sequences read side by side. tolerance: None, or to end
    a sleep before N passes as ``sleep_until_settled`` does. ``S`` is the fast weights; ``tokens_read`` and ``sleeps``
    count; ``passes_taken`` (batch,) is of the last sleep. Raises ValueError for a window, N or batch below 1, a window
    longer than the model has positions, a model that keeps its cache, or a tolerance that means nothing. (Windows that
    slide keep the last one too, and count positions on: after some ten million tokens rounding shows in the logits.)
    """

    def __init__(self, model: SleepLM, window: int, passes: int, batch: int = 1, tolerance: float | None = None):
        check_passes(passes)
        check_sleeps(model)
        checks.whole("window", window, least=1)
        checks.whole("batch", batch, least=1)
        if tolerance is not None:
            check_settles(model, tolerance)
        if 0 < model.config.positions < window:
            raise ValueError(f"a window of {window} tokens does not fit the model's {model.config.positions} positions")
        self.model, self.window, self.passes, self.batch, self.tolerance = model, window, passes, batch, tolerance
        self.S = model.empty_fast_weights(batch)
        self.tokens_read = self.sleeps = self._filled = 0
        self.passes_taken = torch.zeros(batch, dtype=torch.long, device=model.head.weight.device)
        self._cache: list[WindowCache]
        self._clear_window(model.empty_cache(window) if model.config.eviction == "sliding" else None)

    @property
    def room(self) -> int:
        """Tokens that still fit the window."""
        return self.window - self._filled

    @property
    def held_bytes(self) -> int:
        """Bytes kept between two tokens, of S, the window's cache and, for N > 1, what its sleep begins with."""
        layers = (*self._cache, *(self._left or ()))
        cached = (part for layer in layers for part in vars(layer).values() if isinstance(part, Tensor))
        held = (*self.S, *cached, *(tensor for pair in self._read for tensor in pair))
        blocks = {s._cdata: s.nbytes() for s in map(Tensor.untyped_storage, held)}  # a view keeps the whole
        return sum(blocks.values())

    @torch.no_grad()
    def read(self, tokens: Tensor, logits: bool = True) -> Tensor | None:
        """Read tokens (batch, n), sleeping whenever the window is full; return their logits (batch, n, V), if wanted.

        A long text is read fastest in pieces of many windows each; without logits that takes the memory of one window.
        Raises ValueError for another batch size or tokens outside the vocabulary; nothing has been read then.
        """
        self._check(tokens)
        if not self.room:
            self.sleep()  # an interrupt kept the last one from ending
        answers = []
        while tokens.shape[1]:
            piece, tokens = tokens[:, : self.room], tokens[:, self.room :]
            cache = [replace(layer) for layer in self._cache]  # so that an interrupted pass has changed nothing
            embedding, S = self.model.prelude(self.model.embed(piece, self._filled), self.S, cache)
            h, S = self.model.loop(embedding, S, cache)
            last, S = self.model.coda(h, S, cache)
            self.S, self._cache = S, [layer.compact() for layer in cache]
            if self.passes > 1:
                self._read.append((h, embedding))
            self._filled += piece.shape[1]
            self.tokens_read += piece.shape[1]
            if logits:
                answers.append(self.model.out(last))
            if not self.room:
                self.sleep()
        if not logits:
            return None
        return torch.cat(answers, dim=1) if answers else self.model.out(self.model.embed(tokens))

    @torch.no_grad()
    def sleep(self) -> None:
        """Sleep now on what the window holds, and clear it. The reading was the first of the N passes."""
        if not self._filled:
            return
        S, taken = self.S, torch.full_like(self.passes_taken, self.passes)
        cache, begun = self._left and self._cache, self.model.blocks_in_prelude
        if self.passes > 1:
            h, embedding = (torch.cat(parts, dim=1) for parts in zip(*self._read, strict=True))
            S = S[: len(S) - self.model.fast_in_coda] + self._before  # the coda has read the window, and will again
            if self.tolerance is not None:
                S, taken = settle(self.model, h, embedding, S, self.passes, self.tolerance)
            else:
                for _ in range(1, self.passes):
                    cache = self._left and [*self._cache[:begun], *map(replace, self._left[begun:])]
                    h, S = self.model.loop(self.model.carry(h, embedding), S, cache)
                S = self.model.coda(h, S, cache)[1]
        self.S, self.passes_taken = S, taken
        self.sleeps += 1
        self._clear_window(cache)

    @torch.no_grad()
    def answer(self, prompt: Tensor) -> Tensor:
        """Return the logits (batch, p, V) of a prompt, in one pass, without remembering that it was asked.

        A prompt has to be seen whole: where the window has no room left for it, the session sleeps first.
        Raises ValueError for a prompt that is empty or longer than the window, and as ``read`` does.
        """
        self._check(prompt)
        if not 1 <= prompt.shape[1] <= self.window:
            raise ValueError(f"a prompt must have 1 to {self.window} tokens, to fit the window, got {prompt.shape[1]}")
        if prompt.shape[1] > self.room:
            self.sleep()
        cache = [replace(layer) for layer in self._cache]
        h, _ = self.model.blocks(self.model.embed(prompt, self._filled), self.S, cache)
        return self.model.out(h)

    def _clear_window(self, cache: list[WindowCache] | None) -> None:
        self._left = cache and [layer.slide().compact() for layer in cache]  # of the last window, where windows slide
        self._cache = self._left or self.model.empty_cache()
        self._before = self.S[len(self.S) - self.model.fast_in_coda :]
        self._read: list[tuple[Tensor, Tensor]] = []  # for N > 1: h after the first pass, and embedding, of every piece
        self._filled = 0

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or len(tokens) != self.batch:
            raise ValueError(f"tokens must have shape ({self.batch}, length), got {tuple(tokens.shape)}")
        self.model.check_tokens(tokens)
