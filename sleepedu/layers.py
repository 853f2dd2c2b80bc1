"""The two mixers, attention and fast weights, and the block that holds one of them.

Attention keeps every token for as long as the window lasts, fast weights a matrix of fixed size for as long as the
sequence lasts. Symbols: b batch, l tokens, w width, h heads, d size of a head.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sleepedu.fast import fast_rule, is_traced
from sleepedu.fast.operator import ShortConvolution

EPSILON = 1e-6  # keeps a vector of zeros from being divided by its length, 0


@dataclass
class WindowCache:
    """What one layer needs to read a window in pieces, thrown away with it; where windows slide, its end is kept."""

    keys: Tensor | None = None  # (b, h, seen, d), of attention
    values: Tensor | None = None  # (b, h, seen, d), of attention
    tail: Tensor | None = None  # (b, convolution - 1, c), what the short convolution saw last; Qwen3.5's is (b, c, ...)
    start: int = 0  # the place of the first key in the text
    reach: int = 0  # L where windows slide: a token sees itself and the L - 1 before it; 0: all that is there

    @property
    def seen(self) -> int:
        """How many tokens the keys are of."""
        return 0 if self.keys is None else self.keys.shape[2]

    def mask(self, length: int, device: Any) -> Tensor | None:
        """Return what so many new tokens may see of the keys and of one another, (l, seen + l).

        None where attention needs no mask: every token sees all before it, and either there are no keys yet (causal
        attention will do) or there is one token (it sees everything).
        """
        all_in_reach = not self.reach or self.seen + length <= self.reach
        if all_in_reach and (length == 1 or not self.seen):
            return None
        mask = torch.ones(length, self.seen + length, dtype=torch.bool, device=device).tril(self.seen)
        return mask.triu(self.seen - self.reach + 1) if self.reach else mask

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values (b, h, l, d) behind those that are there; return all. Blocks of transformers call it."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def slide(self) -> "WindowCache":
        """Return the cache without the keys that no later token sees."""
        if self.keys is None or self.values is None:
            return self
        gone = max(0, self.seen - self.reach + 1)
        return replace(self, keys=self.keys[:, :, gone:], values=self.values[:, :, gone:], start=self.start + gone)

    def compact(self) -> "WindowCache":
        """Return the cache without the memory of larger tensors that its own are views of."""
        parts = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        views: Any = {name: x.clone() for name, x in parts.items() if x.nbytes < x.untyped_storage().nbytes()}
        return replace(self, **views)


class CausalAttention(nn.Module):
    """Softmax attention over the current window, o = V^T softmax(K q / sqrt(d)), with rotary positions.

    x: (batch, length, width) -> (batch, length, width). Positions count from 0 in every window, or go on where windows
    slide. With a cache, x continues the tokens in it and the cache grows by x.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: WindowCache | None = None) -> Tensor:
        cache = WindowCache() if cache is None else cache
        mask, place = cache.mask(x.shape[1], x.device), cache.start + cache.seen
        qkv = self.project(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)  # (b, 3 h, l, d)
        qk, v = qkv.split((2 * self.heads, self.heads), dim=1)
        q, k = rotate(qk, start=place).chunk(2, dim=1)  # (b, h, l, d) each, as v is
        k, v = cache.update(k, v)  # (b, h, seen + l, d)
        causal = mask is None and x.shape[1] > 1
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # (b, h, l, d)
        return self.out(rearrange(o, "b h l d -> b l (h d)"))  # (b, l, w)


class RuleInputs(NamedTuple):
    """What the rule gets of every token, and the gate that its output passes."""

    q: Tensor  # (b, h, l, key_size), of unit length
    k: Tensor  # (b, h, l, key_size), of unit length
    v: Tensor  # (b, h, l, value_size)
    log_a: Tensor  # (b, h, l)
    b: Tensor  # (b, h, l)
    gate: Tensor  # (b, l, h value_size)


class FastWeightMixer(nn.Module):
    """A learned local rule as a layer (Gated DeltaNet, Yang et al. 2024): reads and writes the fast weights S.

    x: (batch, length, width), S: (batch, heads, value_size, key_size) -> output like x, and the S after the last
    token. q, k and v pass a short causal convolution and SiLU; q and k get unit length; the gates are
    a = exp(-exp(A) softplus(W_a x + dt)) and b = write_range * sigmoid(W_b x). S is float32 under autocast too.
    rule: a name in ``model.RULES``; a gate that it ignores is there and does nothing.
    """

    _scale: Any = staticmethod(torch.mul)  # (..., h) by a parameter (h,); ``lab.together`` has another, for many models

    def __init__(
        self, width: int, heads: int, key_size: int, value_size: int, convolution: int, write_range: float,
        rule: str = "gated_delta",
    ):  # fmt: skip
        super().__init__()
        self.heads, self.write_range, self.rule = heads, write_range, rule
        self.keys, self.values = heads * key_size, heads * value_size  # channels of all heads together
        mixed = 2 * self.keys + self.values  # channels of q, k and v
        self.project = nn.Linear(width, mixed + self.values, bias=False)  # ..., and of the output gate
        self.taps = nn.Parameter(torch.zeros(convolution, mixed))
        self.gates = nn.Linear(width, 2 * heads)
        self.decay_rate = nn.Parameter(torch.zeros(heads))  # A, a logarithm
        self.norm = nn.Parameter(torch.ones(value_size))
        self.out = nn.Linear(self.values, width, bias=False)
        with torch.no_grad():
            self.taps[-1] = 1.0  # at first a token sees itself alone
            self.gates.weight.mul_(0.1)
            self.gates.bias.zero_()[:heads] = -4.0  # dt: forget about 2% a token at first

    def forward(self, x: Tensor, S: Tensor, cache: WindowCache | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, log_a, b, gate = self.rule_inputs(x, S.dtype, cache)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is no autocast on meta
            o, S = fast_rule(self.rule, q, k, v, log_a, b, S)  # (b, h, l, d)
            o = F.rms_norm(rearrange(o, "b h l d -> b l h d"), self.norm.shape, self.norm.to(o.dtype), EPSILON)
        o = o.flatten(2) * F.silu(gate)  # (b, l, h d)
        return self.out(o.to(gate.dtype)), S  # (b, l, w)

    def rule_inputs(self, x: Tensor, dtype: torch.dtype, cache: WindowCache | None = None) -> RuleInputs:
        """Return what the rule gets of every token of x (b, l, w), in the dtype of S; and the gate."""
        mixed, gate = self.project(x).split((2 * self.keys + self.values, self.values), dim=-1)
        qk, v = self.convolve(mixed, cache).split((2 * self.keys, self.values), dim=-1)
        qk = rearrange(qk, "b l (heads d) -> b l heads d", heads=2 * self.heads).to(dtype)
        v = rearrange(v, "b l (h d) -> b h l d", h=self.heads).to(dtype)
        forget, write = self.gates(x).to(dtype).chunk(2, dim=-1)  # (b, l, h)
        d = qk.shape[-1]  # q / sqrt(|q|^2 + EPSILON^2) in one operation: a vector of length 1 has mean square 1 / d
        q, k = F.rms_norm(qk, (d,), qk.new_full((d,), d**-0.5), EPSILON**2 / d).chunk(2, dim=2)  # (b, l, h, d)
        log_a = self._scale(F.softplus(forget), -self.decay_rate.exp())  # (b, l, h)
        b = self.write_range * write.sigmoid()  # (b, l, h)
        return RuleInputs(q.transpose(1, 2), k.transpose(1, 2), v, log_a.mT, b.mT, gate)

    def convolve(self, x: Tensor, cache: WindowCache | None = None) -> Tensor:
        """Return SiLU(sum_j taps[-1 - j] x_(t-j)) of x (b, l, c), where x is zero before the window's first token."""
        if cache is None:
            return F.silu(ShortConvolution.apply(x, self.taps))
        before = len(self.taps) - 1
        tail = x.new_zeros(len(x), before, x.shape[2]) if cache.tail is None else cache.tail
        joined = torch.cat((tail, x), dim=1)  # (b, before + l, c)
        cache.tail = joined[:, x.shape[1] :]  # (b, before, c)
        return F.silu(ShortConvolution.apply(joined, self.taps)[:, before:])


class SwiGLU(nn.Module):
    """The block's MLP, out(silu(gate(x)) * up(x)): (batch, length, width) -> the same."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        inner = max(1, int(width * ratio))
        self.project = nn.Linear(width, 2 * inner, bias=False)  # gate and up
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x).chunk(2, dim=-1)  # (b, l, inner) each
        return self.out(F.silu(gate) * up)  # (b, l, w)


class Block(nn.Module):
    """Mixer and MLP, each behind an RMSNorm and added to the residual stream h (batch, length, width)."""

    def __init__(self, mixer: nn.Module, width: int, mlp_ratio: float):
        super().__init__()
        self.mixer, self.has_fast_weights = mixer, isinstance(mixer, FastWeightMixer)
        self.mlp = SwiGLU(width, mlp_ratio)
        self.mixer_norm = nn.RMSNorm(width, EPSILON)
        self.mlp_norm = nn.RMSNorm(width, EPSILON)

    def forward(self, h: Tensor, S: Tensor | None, cache: WindowCache | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.mixer_norm(h)  # (b, l, w)
        mixed, S = self.mixer(x, S, cache) if self.has_fast_weights else (self.mixer(x, cache), S)
        h = h + mixed  # (b, l, w)
        return h + self.mlp(self.mlp_norm(h)), S


def rotate(x: Tensor, start: int) -> Tensor:
    """Turn x (..., length, size) by its positions start, start + 1, ...: rotary encoding (Su et al. 2021)."""
    # Angles are kept in training alone: a session asks for another place at every token.
    find = angles if x.requires_grad and not is_traced() else angles.__wrapped__
    cos, sin = find(*x.shape[-2:], start, x.device, x.dtype, type(x))  # (l, size) each
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


@functools.lru_cache(8)  # all passes turn by the same angles; kind keeps those of fake tensors apart from real ones
def angles(length: int, size: int, start: int, device: Any, dtype: Any, kind: type) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (length, size) of -t f_i in one half and t f_i in the other, for every position t."""
    whole = torch.promote_types(dtype, torch.float32)
    frequency = torch.logspace(0, 8 / size - 4, size // 2, device=device, dtype=whole)  # f_i = 10,000^(-2 i / size)
    angle = torch.arange(start, start + length, device=device)[:, None] * torch.cat((-frequency, frequency))
    return angle.cos().to(dtype), angle.sin().to(dtype)
