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

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.layers import WindowCache
from sleepedu.model import FastWeights, SleepLM
from sleepedu.tasks.base import Episode


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

    def stack(self, window: int = -1) -> Tensor:
        """Return S before and after every pass as one tensor, (passes + 1, fast-weight layers, b, heads, d_v, d_k).

        Raises ValueError for the trace of a model without fast weights.
        """
        if not self.S[window][0]:
            raise ValueError("there is no S in this trace: trace a model that has 'g' in its layout")
        return torch.stack([torch.stack(S).float() for S in self.S[window]])

    def norms(self, window: int = -1) -> Tensor:
        """Return the Frobenius norm of S, mean over the batch: (passes + 1, fast-weight layers)."""
        return self.stack(window).flatten(3).norm(dim=-1).mean(dim=2)

    def changes(self, window: int = -1, by_head: bool = False) -> Tensor:
        """Return ``|S_n - S_(n-1)| / |S_n|`` for every pass n, mean over the batch: (passes, fast-weight layers).

        by_head: of every head by itself, (passes, fast-weight layers, heads).
        """
        S = self.stack(window).flatten(-2 if by_head else 3)
        return ((S[1:] - S[:-1]).norm(dim=-1) / S[1:].norm(dim=-1)).mean(dim=2)

    def hidden_norms(self, window: int = -1) -> Tensor:
        """Return the root mean square of h after every block and pass: (passes, layers)."""
        return torch.stack([h.float().square().mean(dim=(1, 2, 3)).sqrt() for h in self.h[window]])

    def _begin(self, S: FastWeights) -> None:
        self.S.append([tuple(matrix.detach() for matrix in S)])
        for kept in (self.h, self.a, self.b):
            kept.append([])

    @contextmanager
    def _watch(self, model: SleepLM) -> Iterator[None]:
        seen = []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call)) for block in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.h[-1].append(torch.stack([h.detach() for *_, (h, _) in seen]))
        self.S[-1].append(tuple(S.detach() for *_, (_, S) in seen if S is not None))
        with torch.no_grad():
            gates = [
                block.mixer.rule_inputs(block.mixer_norm(entering[0]), S.dtype)[3:5]
                for block, entering, (_, S) in seen
                if S is not None
            ]
        log_a, b = (torch.stack(values) for values in zip(*gates, strict=True)) if gates else (torch.empty(0),) * 2
        self.a[-1].append(log_a.exp())
        self.b[-1].append(b)


def sleep(
    model: SleepLM,
    tokens: Tensor,
    S: FastWeights | None = None,
    passes: int = 1,
    trace: SleepTrace | None = None,
    recompute: bool = False,
) -> FastWeights:
    """Sleep on one full window: N recurrent passes over it, of which only the fast weights remain.

    tokens: (b, l) of the window. S: the fast weights so far, empty when None. passes: N, at least 1.
    recompute: as in ``run_episode``.
    Raises ValueError for N < 1, tokens outside the vocabulary, an S that does not fit or a model that keeps its cache.
    Algorithm 1, consolidation.
    """
    check_passes(passes)
    _check_sleeps(model)
    embedding = model.embed(tokens)
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    if trace is not None:
        trace._begin(S)
    return _run_passes(model, None, embedding, S, passes, trace, recompute)


@torch.no_grad()
def sleep_until_settled(
    model: SleepLM, tokens: Tensor, S: FastWeights | None = None, passes: int = 16, tolerance: float = 0.1
) -> tuple[FastWeights, Tensor]:
    """Sleep on one full window for as long as S changes: return S, and how many passes each sequence took, (b,).

    A sequence has settled when a pass after the first has changed the S of every layer by no more than ``tolerance``
    of its norm, ``|S_n - S_(n-1)| <= tolerance |S_n|``; that pass is its last, and the others go on without it.
    tokens, S: as in ``sleep``. passes: the most to take, which one that never settles takes, too. Not for training:
    there is no gradient.
    Raises ValueError for passes < 1, a tolerance that is not finite and above 0, tokens outside the vocabulary, an S
    that does not fit, or a model that has no fast weights or keeps its cache.
    """
    check_passes(passes)
    _check_settles(model, tolerance)
    embedding = model.embed(tokens)
    S = model.empty_fast_weights(len(tokens)) if S is None else S
    h, S = model.blocks(embedding, S)
    return _until_settled(model, h, embedding, S, passes, tolerance)


def _until_settled(
    model: SleepLM, h: Tensor, embedding: Tensor, S: FastWeights, passes: int, tolerance: float
) -> tuple[FastWeights, Tensor]:
    """Go on from the h and S that the first pass left; return the last S, and all passes taken."""
    final = tuple(matrix.clone() for matrix in S)
    taken = torch.ones(len(h), dtype=torch.long, device=h.device)
    awake = torch.arange(len(h), device=h.device)  # the sequences that go on
    for _ in range(1, passes):
        if not len(awake):
            break
        h, after = model.blocks(model.carry(h, embedding), S)
        taken[awake] += 1
        still = torch.zeros_like(awake, dtype=torch.bool)
        for whole, new, old in zip(final, after, S, strict=True):
            whole[awake] = new
            settled = (new - old).flatten(1).norm(dim=1) <= tolerance * new.flatten(1).norm(dim=1)
            still |= ~settled  # so that what is no number has not settled
        awake, h, embedding = awake[still], h[still], embedding[still]
        S = tuple(matrix[still] for matrix in after)
    return final, taken


def _check_settles(model: SleepLM, tolerance: float) -> None:
    _check_sleeps(model)
    checks.finite("tolerance", tolerance)
    if tolerance <= 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights that could settle: use sleep")


def _check_sleeps(model: SleepLM) -> None:
    if model.config.keeps_cache:
        raise ValueError(f"layout {model.config.layout!r} keeps its cache and cannot sleep: use run_episode")


def _run_passes(
    model: SleepLM,
    h: Tensor | None,
    embedding: Tensor,
    S: FastWeights,
    passes: int,
    trace: SleepTrace | None = None,
    recompute: bool = False,
) -> FastWeights:
    """Run passes of a sleep over one window; h is what the pass before them left, None when there was none."""
    for left in reversed(range(passes)):
        with nullcontext() if trace is None else trace._watch(model):
            h, S = _one_pass(model, h, embedding, S, recompute, keep_h=left > 0 or trace is not None)
    return S


def _one_pass(
    model: SleepLM, h: Tensor | None, embedding: Tensor, S: FastWeights, recompute: bool, keep_h: bool
) -> tuple[Tensor | None, FastWeights]:
    first = h is None

    def run(h: Any, embedding: Tensor, *S: Tensor) -> tuple[Any, ...]:
        entering = embedding if first else model.carry(h, embedding)
        if not keep_h:
            return None, *model.write(entering, S)
        leaving, S = model.blocks(entering, S)
        return leaving, *S

    if recompute:
        used = model.layers if first else model  # what else there is gets its gradient elsewhere, or (inject) none
        parameters = [parameter for parameter in used.parameters() if parameter.requires_grad]
        entering = (embedding if first else h, embedding, *S)
        h, *after = _Recomputed.apply(run, len(entering), *entering, *parameters)
    else:
        h, *after = run(h, embedding, *S)
    return h, tuple(after)


class _Recomputed(torch.autograd.Function):
    """``run(*entering)`` that keeps nothing but what enters it and, when its gradient is asked for, runs again.

    ``torch.utils.checkpoint`` without its generality, and without a graph in its first run: that one leaves the heap
    of a CPU full of holes between the tensors that are kept, more than twice the memory in all.
    """

    @staticmethod
    def forward(ctx, run, entering, *tensors):
        """Run on the first ``entering`` of the tensors; the others are the parameters that run uses."""
        ctx.run, ctx.entering = run, entering
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        device = tensors[0].device.type
        # No cache: older versions of torch would go on using a parameter's copy made here, which has no gradient.
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        with torch.autocast(**ctx.autocast):
            return run(*tensors[:entering])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        tensors = ctx.saved_tensors
        entering = [tensor.detach().requires_grad_() for tensor in tensors[: ctx.entering]]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            leaving = ctx.run(*entering)
        used = [(x, gradient) for x, gradient in zip(leaving, gradients, strict=True) if gradient is not None]
        found = torch.autograd.grad(
            [x for x, _ in used],
            [*entering, *tensors[ctx.entering :]],
            [gradient for _, gradient in used],
            allow_unused=True,
        )
        return None, None, *found


def wake(model: SleepLM, prompt: Tensor, S: FastWeights) -> Tensor:
    """Answer with one ordinary pass over the prompt (b, p), given the fast weights S: logits (b, p, V).

    Raises ValueError for tokens outside the vocabulary or an S that does not fit. Algorithm 1, prediction.
    """
    h, _ = model.blocks(model.embed(prompt), S)
    return model.out(h)


def run_episode(
    model: SleepLM, episode: Episode, passes: int, trace: SleepTrace | None = None, recompute: bool = False
) -> Tensor:
    """Sleep on the episode's windows, one after the other, then answer its prompt: logits (b, p, V). Algorithm 1.

    recompute: for the gradient, keep only the h and S that enter each pass and compute the rest again when its turn
    comes; the gradient is the same, for about a third more time.
    Raises ValueError for N < 1, N > 1 with a model that keeps its cache, or tokens outside the vocabulary.
    """
    check_passes(passes)
    if model.config.keeps_cache:
        return _read_whole(model, episode, passes)
    S = model.empty_fast_weights(len(episode))
    for tokens in episode.windows.unbind(1):
        S = sleep(model, tokens, S, passes, trace, recompute)
    return wake(model, episode.prompt, S)


def _read_whole(model: SleepLM, episode: Episode, passes: int) -> Tensor:
    """Answer with every window still in sight: one pass over windows and prompt together."""
    if passes != 1:
        raise ValueError(f"a model that keeps its cache does not sleep: passes must be 1, got {passes}")
    pieces = (*episode.windows.unbind(1), episode.prompt)
    h, _ = model.blocks(torch.cat([model.embed(tokens) for tokens in pieces], dim=1), ())
    return model.out(h[:, -episode.prompt.shape[1] :])


def check_passes(passes: int) -> None:
    """Raise ValueError unless N, the number of sleep passes, is a whole number of at least 1."""
    checks.whole("passes (N)", passes, least=1)


@dataclass(frozen=True)
class Reading:
    """How far the reading of a stream has come: what ``Session.read_stream`` reports.

    tokens and seconds since it began; speed: tokens a second since the report before, in the last one over all of it;
    number: of the report, from 1; finished: whether it is the last.
    """

    tokens: int = 0
    seconds: float = 0.0
    speed: float = 0.0
    number: int = 0
    finished: bool = False


def print_reading(reading: Reading) -> None:
    """Show a report in one line: rewritten in place in a terminal, ever more rarely in a notebook or a log."""
    in_place = sys.stdout.isatty()
    if not in_place and not reading.finished and reading.number & (reading.number - 1):
        return  # all but numbers 1, 2, 4, 8, ...
    line = f"{reading.tokens:,} tokens read in {reading.seconds:.0f} s, {reading.speed:,.0f} tokens a second"
    end = "" if in_place and not reading.finished else "\n"
    print(f"\r{line:<80}" if in_place else line, end=end, flush=True)


class Session:
    """Streaming use of a sleeping model: read tokens in pieces of any size, sleep when the window is full, answer.

    window: L, tokens that attention can hold. passes: N. batch: sequences read side by side. tolerance: None, or to end
    a sleep before N passes as ``sleep_until_settled`` does. However much it reads, it keeps no more than one window and
    S. ``S`` is the fast weights; ``tokens_read`` and ``sleeps`` count; ``passes_taken`` (batch,) is of the last sleep,
    zero before the first.
    Raises ValueError for a window, N or batch below 1, a window longer than the model has positions, a model that keeps
    its cache, or a tolerance that is not above 0 or of a model without fast weights.
    """

    def __init__(self, model: SleepLM, window: int, passes: int, batch: int = 1, tolerance: float | None = None):
        check_passes(passes)
        _check_sleeps(model)
        checks.whole("window", window, least=1)
        checks.whole("batch", batch, least=1)
        if tolerance is not None:
            _check_settles(model, tolerance)
        if 0 < model.config.positions < window:
            raise ValueError(f"a window of {window} tokens does not fit the model's {model.config.positions} positions")
        self.model, self.window, self.passes, self.batch = model, window, passes, batch
        self.tolerance = tolerance
        self.S = model.empty_fast_weights(batch)
        self.tokens_read = 0
        self.sleeps = 0
        self.passes_taken = torch.zeros(batch, dtype=torch.long, device=model.head.weight.device)
        self._filled: int
        self._cache: list[WindowCache]
        self._clear_window()

    @property
    def room(self) -> int:
        """Tokens that still fit the window."""
        return self.window - self._filled

    @torch.no_grad()
    def read(self, tokens: Tensor, logits: bool = True) -> Tensor | None:
        """Read tokens (batch, n), sleeping whenever the window is full; return their logits (batch, n, V).

        logits=False: compute none and return None.
        Raises ValueError for another batch size or tokens outside the vocabulary; nothing has been read then.
        """
        self._check(tokens)
        if not self.room:
            self.sleep()  # an interrupt kept the last one from ending
        answers = []
        while tokens.shape[1]:
            piece, tokens = tokens[:, : self.room], tokens[:, self.room :]
            embedding = self.model.embed(piece, self._filled)
            cache = [replace(layer) for layer in self._cache]  # so that an interrupted pass has changed nothing
            h, S = self.model.blocks(embedding, self.S, cache)
            self.S, self._cache = S, cache
            if self.passes > 1:
                self._read.append((h, embedding))
            self._filled += piece.shape[1]
            self.tokens_read += piece.shape[1]
            if logits:
                answers.append(self.model.out(h))
            if not self.room:
                self.sleep()
        if not logits:
            return None
        return torch.cat(answers, dim=1) if answers else self.model.out(self.model.embed(tokens))

    def read_stream(self, pieces: Iterable[Tensor], watch: Callable[[Reading], None] | None = None) -> Reading:
        """Read a text that need not fit into memory: any iterable of pieces (batch, n). Return the last report.

        The same as ``read(piece, logits=False)`` for one after the other, but at its best speed for pieces of any
        size, and they may be on the CPU wherever the model is. ``watch`` is called with a report about once a second
        and at the end (``print_reading`` shows a line).
        Raises ValueError as ``read`` does, and whatever the iterable raises; the pieces before have been read then.
        """
        before, started = self.tokens_read, time.perf_counter()
        report = Reading()
        for part in self._windowfuls(pieces):
            self.read(part, logits=False)
            tokens, seconds = self.tokens_read - before, time.perf_counter() - started
            if seconds - report.seconds >= 1:
                speed = (tokens - report.tokens) / (seconds - report.seconds)
                report = Reading(tokens, seconds, speed, report.number + 1)
                if watch is not None:
                    watch(report)
        tokens, seconds = self.tokens_read - before, time.perf_counter() - started
        report = Reading(tokens, seconds, tokens / max(seconds, 1e-9), report.number + 1, finished=True)
        if watch is not None:
            watch(report)
        return report

    def _windowfuls(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Join and cut pieces, so that each fills the window: one long pass is much faster than many short ones."""
        waiting = torch.empty(self.batch, 0, dtype=torch.long, device=self.model.head.weight.device)
        try:
            for piece in pieces:
                self._check(piece)
                waiting = torch.cat((waiting, piece.to(waiting.device)), dim=1)
                while waiting.shape[1] >= self.room:
                    part, waiting = waiting[:, : self.room], waiting[:, self.room :]
                    yield part
        except Exception:
            yield waiting  # what came before the error
            raise
        yield waiting

    @torch.no_grad()
    def sleep(self) -> None:
        """Sleep now on what the window holds, and clear it. The reading was the first of the N passes."""
        if not self._filled:
            return
        S, taken = self.S, torch.full_like(self.passes_taken, self.passes)
        if self.passes > 1:
            h, embedding = (torch.cat(parts, dim=1) for parts in zip(*self._read, strict=True))
            if self.tolerance is None:
                S = _run_passes(self.model, h, embedding, S, self.passes - 1)
            else:
                S, taken = _until_settled(self.model, h, embedding, S, self.passes, self.tolerance)
        self.S, self.passes_taken = S, taken
        self.sleeps += 1
        self._clear_window()

    @torch.no_grad()
    def answer(self, prompt: Tensor) -> Tensor:
        """Return the logits (batch, p, V) of a prompt, in one pass, without remembering that it was asked.

        A prompt has to be seen whole: where the window has no room left for it, the session sleeps first.
        Raises ValueError for a prompt that is empty or longer than the window, another batch size, or tokens outside
        the vocabulary.
        """
        self._check(prompt)
        if not prompt.shape[1]:
            raise ValueError("a prompt must have a token at least")
        if prompt.shape[1] > self.window:
            raise ValueError(f"a prompt of {prompt.shape[1]} tokens does not fit a window of {self.window}")
        if prompt.shape[1] > self.room:
            self.sleep()
        h, _ = self.model.blocks(
            self.model.embed(prompt, self._filled), self.S, [replace(layer) for layer in self._cache]
        )
        return self.model.out(h)

    def _clear_window(self) -> None:
        self._cache = self.model.empty_cache()
        self._read: list[tuple[Tensor, Tensor]] = []  # for N > 1: h after the first pass, and embedding, of every piece
        self._filled = 0

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or len(tokens) != self.batch:
            raise ValueError(f"tokens must have shape ({self.batch}, length), got {tuple(tokens.shape)}")
        self.model.check_tokens(tokens)
