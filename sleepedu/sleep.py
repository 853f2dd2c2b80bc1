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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sleepedu.model import FastWeights, SleepLM
from sleepedu.tasks.base import Episode


@dataclass
class SleepTrace:
    """What happened in every pass of every sleep: hand one to ``sleep`` or ``run_episode`` and read it afterwards.

    S[window][n] is the fast weights after pass n, a tuple over fast-weight layers of (b, heads, d_v, d_k); n = 0 is
    before the sleep. h[window][n - 1] is (layers, b, l, w), the hidden states after every block in pass n.
    """

    S: list[list[FastWeights]] = field(default_factory=list)
    h: list[list[Tensor]] = field(default_factory=list)

    def norms(self, window: int = -1) -> Tensor:
        """Return the Frobenius norm of S, mean over the batch: (passes + 1, fast-weight layers)."""
        return torch.stack([torch.stack([_norm(s).mean() for s in S]) for S in self.S[window]])

    def changes(self, window: int = -1) -> Tensor:
        """Return ``|S_n - S_(n-1)| / |S_n|`` for every pass n, mean over the batch: (passes, fast-weight layers)."""
        steps = zip(self.S[window], self.S[window][1:], strict=False)
        return torch.stack(
            [torch.stack([(_norm(t - s) / _norm(t)).mean() for s, t in zip(S, T, strict=True)]) for S, T in steps]
        )

    def hidden_norms(self, window: int = -1) -> Tensor:
        """Return the root mean square of h after every block and pass: (passes, layers)."""
        return torch.stack([h.float().square().mean(dim=(1, 2, 3)).sqrt() for h in self.h[window]])

    def hidden_changes(self, window: int = -1) -> Tensor:
        """Return ``|h_n - h_(n-1)| / |h_n|`` after every block, from pass 2 on: (passes - 1, layers)."""
        h = torch.stack(self.h[window]).float().flatten(2)  # (passes, layers, b * l * w)
        return (h[1:] - h[:-1]).norm(dim=-1) / h[1:].norm(dim=-1)

    @contextmanager
    def _watch(self, model: SleepLM) -> Iterator[None]:
        seen = []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call[-1])) for block in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.h[-1].append(torch.stack([h.detach() for h, _ in seen]))
        self.S[-1].append(tuple(S.detach() for _, S in seen if S is not None))


def _norm(S: Tensor) -> Tensor:
    return S.float().flatten(1).norm(dim=1)


def sleep(
    model: SleepLM,
    tokens: Tensor,
    S: FastWeights | None = None,
    passes: int = 1,
    trace: SleepTrace | None = None,
) -> FastWeights:
    """Sleep on one full window: N recurrent passes over it, of which only the fast weights remain.

    tokens: (b, l) of the window. S: the fast weights so far, empty when None. passes: N, at least 1.
    Raises ValueError for N < 1, tokens outside the vocabulary or an S that does not fit. Algorithm 1, consolidation.
    """
    check_passes(passes)
    embedding = model.embed(tokens)
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    if trace is not None:
        trace.S.append([tuple(matrix.detach() for matrix in S)])
        trace.h.append([])
    h, S = _one_pass(model, embedding, S, trace)
    return _sleep_on(model, h, embedding, S, passes - 1, trace)


def _sleep_on(
    model: SleepLM, h: Tensor, embedding: Tensor, S: FastWeights, passes: int, trace: SleepTrace | None = None
) -> FastWeights:
    """Run the passes of a sleep that follow the reading of the window."""
    for _ in range(passes):
        h, S = _one_pass(model, model.carry(h, embedding), S, trace)
    return S


def _one_pass(model: SleepLM, h: Tensor, S: FastWeights, trace: SleepTrace | None) -> tuple[Tensor, FastWeights]:
    if trace is None:
        return model.blocks(h, S)
    with trace._watch(model):
        return model.blocks(h, S)


def wake(model: SleepLM, prompt: Tensor, S: FastWeights) -> Tensor:
    """Answer with one ordinary pass over the prompt (b, p), given the fast weights S: logits (b, p, V).

    Raises ValueError for tokens outside the vocabulary or an S that does not fit. Algorithm 1, prediction.
    """
    h, _ = model.blocks(model.embed(prompt), S)
    return model.out(h)


def run_episode(model: SleepLM, episode: Episode, passes: int, trace: SleepTrace | None = None) -> Tensor:
    """Sleep on the episode's windows, one after the other, then answer its prompt: logits (b, p, V). Algorithm 1.

    Raises ValueError for N < 1 or tokens outside the vocabulary.
    """
    check_passes(passes)
    S = model.empty_fast_weights(len(episode))
    for tokens in episode.windows.unbind(1):
        S = sleep(model, tokens, S, passes, trace)
    return wake(model, episode.prompt, S)


def check_passes(passes: int) -> None:
    """Raise ValueError unless N, the number of sleep passes, is a whole number of at least 1."""
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        raise ValueError(f"passes (N) must be a whole number of at least 1, got {passes!r}")


class Session:
    """Streaming use of a sleeping model: read tokens in pieces of any size, sleep when the window is full, answer.

    window: L, tokens that attention can hold. passes: N. batch: sequences read side by side.
    ``S`` is the fast weights, ``tokens_read`` and ``sleeps`` count. Raises ValueError for a window or N below 1.
    """

    def __init__(self, model: SleepLM, window: int, passes: int, batch: int = 1):
        check_passes(passes)
        if window < 1 or batch < 1:
            raise ValueError(f"window and batch must be at least 1, got {window} and {batch}")
        if 0 < model.config.positions < window:
            raise ValueError(f"a window of {window} tokens does not fit the model's {model.config.positions} positions")
        self.model, self.window, self.passes, self.batch = model, window, passes, batch
        self.S = model.empty_fast_weights(batch)
        self.tokens_read = 0
        self.sleeps = 0
        self._clear_window()

    @property
    def room(self) -> int:
        """Tokens that still fit the window."""
        return self.window - self._filled

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read tokens (batch, n), sleeping whenever the window is full; return their logits (batch, n, V).

        Raises ValueError for another batch size or tokens outside the vocabulary; nothing has been read then.
        """
        self._check_batch(tokens)
        self.model.check_tokens(tokens)
        logits = [self.model.out(self.model.embed(tokens[:, :0]))]
        while tokens.shape[1]:
            piece, tokens = tokens[:, : self.room], tokens[:, self.room :]
            embedding = self.model.embed(piece, self._filled)
            h, self.S = self.model.blocks(embedding, self.S, self._cache)
            logits.append(self.model.out(h))
            self._read.append((h, embedding))
            self._filled += piece.shape[1]
            self.tokens_read += piece.shape[1]
            if not self.room:
                self.sleep()
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def sleep(self) -> None:
        """Sleep now on what the window holds, and clear it. The reading was the first of the N passes."""
        if not self._filled:
            return
        h, embedding = (torch.cat(parts, dim=1) for parts in zip(*self._read, strict=True))
        self.S = _sleep_on(self.model, h, embedding, self.S, self.passes - 1)
        self.sleeps += 1
        self._clear_window()

    @torch.no_grad()
    def answer(self, prompt: Tensor) -> Tensor:
        """Return the logits (batch, p, V) of a prompt, in one pass, without remembering that it was asked.

        A prompt has to be seen whole: where the window has no room left for it, the session sleeps first.
        Raises ValueError for a prompt longer than the window, another batch size, or tokens outside the vocabulary.
        """
        self._check_batch(prompt)
        if prompt.shape[1] > self.window:
            raise ValueError(f"a prompt of {prompt.shape[1]} tokens does not fit a window of {self.window}")
        self.model.check_tokens(prompt)
        if prompt.shape[1] > self.room:
            self.sleep()
        h, _ = self.model.blocks(
            self.model.embed(prompt, self._filled), self.S, [replace(layer) for layer in self._cache]
        )
        return self.model.out(h)

    def _clear_window(self) -> None:
        self._cache = self.model.empty_cache()
        self._read: list[tuple[Tensor, Tensor]] = []  # h after the first pass, and embedding, of every piece
        self._filled = 0

    def _check_batch(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or len(tokens) != self.batch:
            raise ValueError(f"tokens must have shape ({self.batch}, length), got {tuple(tokens.shape)}")
