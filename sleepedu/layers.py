"""The two mixers, attention and fast weights, and the block that holds one of them.

Attention keeps every token of the window, exactly, for as long as the window lasts. Fast weights keep a matrix of
fixed size for as long as the sequence lasts. A ``WindowCache`` is what attention needs in order to read one window in
pieces; it is thrown away with the window, and so is the short convolution's tail, so that nothing but S outlives it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sleepedu.fast.cpp import gated_delta_fast
from sleepedu.operations import convolve, rms_norm, unit_length


@dataclass
class WindowCache:
    """What one layer remembers of the tokens already read in the current window.

    keys, values: (batch, heads, length, size) of an attention layer; tail: (batch, convolution - 1, channels), the
    last inputs of a fast-weight layer's short convolution. A layer fills in what it uses.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    tail: Tensor | None = None


class CausalAttention(nn.Module):
    """Softmax attention over the current window, o = V^T softmax(K q / sqrt(d)), with rotary positions.

    x: (batch, length, width) -> (batch, length, width). Positions count from 0 in every window. With a cache, x
    continues the tokens in it and the cache grows by x.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: WindowCache | None = None) -> Tensor:
        seen = 0 if cache is None or cache.keys is None else cache.keys.shape[2]
        qkv = rearrange(self.project(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        q, k = rotate(qkv[:2], start=seen)
        v = qkv[2]
        mask = None
        if cache is not None:
            if cache.keys is not None and cache.values is not None:
                k, v = torch.cat((cache.keys, k), dim=2), torch.cat((cache.values, v), dim=2)
                if x.shape[1] > 1:  # a single token may see all that there is
                    mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(seen)
            cache.keys, cache.values = k, v
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not seen)
        return self.out(rearrange(o, "b h l d -> b l (h d)"))


class FastWeightMixer(nn.Module):
    """The gated delta rule as a layer (Gated DeltaNet, Yang et al. 2024): reads and writes the fast weights S.

    x: (batch, length, width), S: (batch, heads, value_size, key_size) -> output like x, and the S after the last
    token. q, k and v pass a short causal convolution and SiLU; q and k get unit length; the gates are
    a = exp(-exp(A) softplus(W_a x + dt)) and b = write_range * sigmoid(W_b x). S is float32 under autocast too.
    """

    def __init__(self, width: int, heads: int, key_size: int, value_size: int, convolution: int, write_range: float):
        super().__init__()
        self.heads, self.key_size, self.value_size = heads, key_size, value_size
        self.write_range = write_range
        mixed = heads * (2 * key_size + value_size)  # channels of q, k and v together
        self.mixed = mixed
        self.project = nn.Linear(width, mixed + heads * value_size, bias=False)  # ..., and of the output gate
        self.taps = nn.Parameter(torch.zeros(convolution, mixed))
        self.gates = nn.Linear(width, 2 * heads)
        self.decay_rate = nn.Parameter(torch.zeros(heads))  # A
        self.norm = nn.Parameter(torch.ones(value_size))
        self.out = nn.Linear(heads * value_size, width, bias=False)
        with torch.no_grad():
            self.taps[-1] = 1.0  # at first a token sees itself alone
            self.gates.weight.mul_(0.1)
            self.gates.bias[:heads] = -4.0  # dt: forget about 2% a token at first
            self.gates.bias[heads:] = 0.0

    def forward(self, x: Tensor, S: Tensor, cache: WindowCache | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, log_a, b, gate = self.rule_inputs(x, S.dtype, cache)
        with torch.autocast(x.device.type, enabled=False):
            o, S = gated_delta_fast(q, k, v, log_a, b, S)
            o = rms_norm(o, self.norm)
        o = rearrange(o, "b h l d -> b l (h d)") * F.silu(gate)
        return self.out(o.to(gate.dtype)), S

    def write(self, x: Tensor, S: Tensor) -> Tensor:
        """Return the S after the last token of a whole window x; what they read is neither scaled nor projected."""
        q, k, v, log_a, b, _ = self.rule_inputs(x, S.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return gated_delta_fast(q, k, v, log_a, b, S)[1]

    def rule_inputs(self, x: Tensor, dtype: torch.dtype, cache: WindowCache | None = None) -> tuple[Tensor, ...]:
        """Return what the rule gets of every token of x: q, k, v (b, h, l, size), log a, b (b, h, l); and the gate."""
        mixed, gate = self.project(x).split((self.mixed, self.heads * self.value_size), dim=-1)
        mixed = self.convolve(mixed, cache)
        sizes = (self.heads * self.key_size,) * 2 + (self.heads * self.value_size,)
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.heads) for part in mixed.split(sizes, dim=-1))
        forget, write = rearrange(self.gates(x).to(dtype), "b l (two h) -> two b h l", two=2)
        log_a = -self.decay_rate.exp()[:, None] * F.softplus(forget)
        b = self.write_range * write.sigmoid()
        with torch.autocast(x.device.type, enabled=False):
            return unit_length(q.to(dtype)), unit_length(k.to(dtype)), v.to(dtype), log_a, b, gate

    def convolve(self, x: Tensor, cache: WindowCache | None) -> Tensor:
        """Mix every channel with its last few tokens, then SiLU; a window starts with nothing before it."""
        if cache is None:
            return convolve(x, self.taps)
        reach = len(self.taps) - 1
        seen = 0 if cache.tail is None else cache.tail.shape[1]
        x = x if cache.tail is None else torch.cat((cache.tail, x), dim=1)
        cache.tail = x[:, max(0, x.shape[1] - reach) :]
        return convolve(x, self.taps)[:, seen:]


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale every component: (batch, length, width) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class SwiGLU(nn.Module):
    """The block's MLP, out(silu(gate(x)) * up(x)): (batch, length, width) -> the same."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        inner = int(width * ratio)
        self.project = nn.Linear(width, 2 * inner, bias=False)  # gate and up
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """Mixer and MLP, each behind an RMSNorm and added to the residual stream h (batch, length, width)."""

    def __init__(self, mixer: CausalAttention | FastWeightMixer, width: int, mlp_ratio: float):
        super().__init__()
        self.mixer = mixer
        self.mlp = SwiGLU(width, mlp_ratio)
        self.mixer_norm = RMSNorm(width)
        self.mlp_norm = RMSNorm(width)

    @property
    def has_fast_weights(self) -> bool:
        return isinstance(self.mixer, FastWeightMixer)

    def forward(self, h: Tensor, S: Tensor | None, cache: WindowCache | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.mixer_norm(h)
        if self.has_fast_weights:
            mixed, S = self.mixer(x, S, cache)
        else:
            mixed = self.mixer(x, cache)
        h = h + mixed
        return h + self.mlp(self.mlp_norm(h)), S

    def write(self, h: Tensor, S: Tensor) -> Tensor:
        """Return what a block of fast weights remembers after the whole window h, without its hidden states."""
        return self.mixer.write(self.mixer_norm(h), S)


def rotate(x: Tensor, start: int) -> Tensor:
    """Turn x (..., length, size) by its positions start, start + 1, ...: rotary encoding (Su et al. 2021)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(start, start + length, device=x.device)[:, None] * frequency  # (l, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
