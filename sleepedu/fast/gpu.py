"""The gated delta rule on a GPU, in Triton: one kernel takes a head through the whole window, S in its registers.

A kernel goes ``CHUNK`` tokens at a time, with the formulas of ``gated_delta_chunked``: a GPU has units for products of
small matrices, and what a window needs of them is done before torch could have started its second kernel. Three things
are done otherwise than there:

* Decay from token i to token t is the product of the gates between them, never a quotient or a difference of sums. So
  a gate of 0 is a gate like any other, and nothing is lost beside a strong one, in the gradient neither.
* The triangular system is solved by inverting its matrix, a row after the other.
* The backward pass keeps S at the beginning of every chunk alone. What each token wrote, u = b w, is kept from the
  forward pass, and S within the chunk is never needed as a matrix.

Sums over keys are made a part of the keys after the other, for a thread has 255 registers and no more: whatever does
not fit would go to memory and back.

Products are as exact as float32 (where there is TF32, three products of it for one) unless torch may use TF32 for its
own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # tokens
# What a program takes at most, by precision: rows of S, rows x d_k, keys in a part of a sum, keys x d_k; and its warps.
# Found by trying: with these no kernel spills a register, from a T4 (sm75) to an H100 (sm90).
LIMITS = {"tf32": (64, 4096, 32, 2048, 4), "tf32x3": (16, 2048, 32, 4096, 8), "ieee": (32, 2048, 32, 4096, 8)}


@triton.jit(do_not_specialize=["length", "heads"])
def forward_kernel(
    q, k, v, log_a, b, S, o, w, S_end, length, heads, q_next, k_next, v_next, a_next, b_next,
    D_K: tl.constexpr, D_V: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    head, first = n % heads, n // heads * length
    q, k, v = there(q, first, q_next, head, D_K), there(k, first, k_next, head, D_K), there(v, first, v_next, head, D_V)
    log_a, b = there(log_a, first, a_next, head, 1), there(b, first, b_next, head, 1)
    o, w = there(o, first, heads * D_V, head, D_V), there(w, first, heads * D_V, head, D_V)
    rows, keys = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_K)
    tile = rows[:, None] * D_K + keys[None, :]
    s = tl.load(S + n * D_V * D_K + tile)  # (rows, d_k)
    for begin in range(0, length, C):
        t = begin + tl.arange(0, C)
        kk, qk = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        k_s, q_s = tl.zeros((C, ROWS), tl.float32), tl.zeros((C, ROWS), tl.float32)
        for key in range(0, D_K, KEYS):
            some, s_ = key + tl.arange(0, KEYS), part_of(s, key, KEYS)  # s_ (rows, keys)
            q_, k_ = channels(q, t, q_next, some, length), channels(k, t, k_next, some, length)  # (c, keys)
            kk += dot(k_, k_.T, PRECISION)
            qk += dot(q_, k_.T, PRECISION)
            k_s += dot(k_, s_.T, PRECISION)
            q_s += dot(q_, s_.T, PRECISION)
        b_ = tl.load(b + t * b_next, t < length, 0.0)  # (c,)
        decay, from_start, to_end = decays(log_a, t, a_next, length, C)
        _, inverse = system(kk, b_, decay, tl.minimum(C, length - begin), C)
        wrong = channels(v, t, v_next, rows, length) - from_start[:, None] * k_s
        w_ = dot(inverse, wrong, PRECISION)  # (c, rows)
        u_ = b_[:, None] * w_
        o_ = from_start[:, None] * q_s + dot(qk * decay, u_, PRECISION)  # (c, rows)
        at = t[:, None] * heads * D_V + rows[None, :]
        tl.store(w + at, w_, t[:, None] < length)
        tl.store(o + at, o_, t[:, None] < length)
        k_ = channels(k, t, k_next, keys, length)  # (c, d_k)
        s = last(from_start, C) * s + dot(u_.T, to_end[:, None] * k_, PRECISION)
    tl.store(S_end + n * D_V * D_K + tile, s)


@triton.jit(do_not_specialize=["length", "heads"])
def writes_kernel(
    q, k, log_a, b, S, w, do, dS_end, dv, db, dS, kept, length, heads, q_next, k_next, a_next, b_next, do_next,
    D_K: tl.constexpr, D_V: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backwards through the window: the gradient of what every token writes, and S and its gradient at every chunk."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, first = n % heads, n // heads * length
    q, k, b = there(q, first, q_next, head, D_K), there(k, first, k_next, head, D_K), there(b, first, b_next, head, 1)
    log_a, do = there(log_a, first, a_next, head, 1), there(do, first, do_next, head, D_V)
    w, dv = there(w, first, heads * D_V, head, D_V), there(dv, first, heads * D_V, head, D_V)
    db += (part * tl.num_programs(0) // heads * length + first) * heads + head  # its share of a sum over rows
    rows, keys = part * ROWS + tl.arange(0, ROWS), tl.arange(0, D_K)
    tile = rows[:, None] * D_K + keys[None, :]
    chunks = tl.cdiv(length, C)
    kept += n * 2 * chunks * D_V * D_K  # S before every chunk, then its gradient after each

    s = tl.load(S + n * D_V * D_K + tile)  # (rows, d_k)
    for chunk in range(chunks):  # once more forwards
        tl.store(kept + chunk * D_V * D_K + tile, s)
        if chunk < chunks - 1:
            t = chunk * C + tl.arange(0, C)
            _, from_start, to_end = decays(log_a, t, a_next, length, C)
            u_ = tl.load(b + t * b_next, t < length, 0.0)[:, None] * channels(w, t, heads * D_V, rows, length)
            k_ = channels(k, t, k_next, keys, length)
            s = last(from_start, C) * s + dot(u_.T, to_end[:, None] * k_, PRECISION)

    d = tl.load(dS_end + n * D_V * D_K + tile)  # (rows, d_k)
    for back in range(chunks):
        chunk = chunks - 1 - back
        tl.store(kept + (chunks + chunk) * D_V * D_K + tile, d)
        t = chunk * C + tl.arange(0, C)
        decay, from_start, to_end = decays(log_a, t, a_next, length, C)
        kk, qk, k_d = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32), tl.zeros((C, ROWS), tl.float32)
        for key in range(0, D_K, KEYS):
            some = key + tl.arange(0, KEYS)
            k_ = channels(k, t, k_next, some, length)  # (c, keys)
            kk += dot(k_, k_.T, PRECISION)
            qk += dot(channels(q, t, q_next, some, length), k_.T, PRECISION)
            k_d += dot(k_, part_of(d, key, KEYS).T, PRECISION)
        b_ = tl.load(b + t * b_next, t < length, 0.0)
        alike, inverse = system(kk, b_, decay, tl.minimum(C, length - chunk * C), C)  # (c, c)
        do_ = channels(do, t, do_next, rows, length)  # (c, rows)
        # A write is in S after the chunk, in what later tokens read, and in what they correct.
        du = to_end[:, None] * k_d + dot((qk * decay).T, do_, PRECISION)  # (c, rows)
        dw = dot(inverse.T, b_[:, None] * du, PRECISION)
        du -= dot(alike.T, dw, PRECISION)
        tl.store(dv + t[:, None] * heads * D_V + rows[None, :], dw, t[:, None] < length)
        tl.store(db + t * heads, tl.sum(channels(w, t, heads * D_V, rows, length) * du, axis=1), t < length)
        q_, k_ = channels(q, t, q_next, keys, length), channels(k, t, k_next, keys, length)  # (c, d_k)
        d = last(from_start, C) * d + dot((from_start[:, None] * do_).T, q_, PRECISION)
        d -= dot((from_start[:, None] * dw).T, k_, PRECISION)
    tl.store(dS + n * D_V * D_K + tile, d)


@triton.jit(do_not_specialize=["length", "heads"])
def inputs_kernel(
    q, k, log_a, b, w, do, dv, kept, dq, dk, da, length, heads, q_next, k_next, a_next, b_next, do_next,
    D_K: tl.constexpr, D_V: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: the gradients of queries, keys and gates, from that of what was written, S before it and dS after."""
    n, part, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head, first = n % heads, n // heads * length
    q, k, b = there(q, first, q_next, head, D_K), there(k, first, k_next, head, D_K), there(b, first, b_next, head, 1)
    log_a, do = there(log_a, first, a_next, head, 1), there(do, first, do_next, head, D_V)
    w, dv = there(w, first, heads * D_V, head, D_V), there(dv, first, heads * D_V, head, D_V)
    share = (part * tl.num_programs(0) // heads * length + first) * heads + head  # of a sum over rows
    dq, dk, da = dq + share * D_K, dk + share * D_K, da + share
    rows, i = part * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    chunks = tl.cdiv(length, C)
    kept += (n * 2 * chunks + chunk) * D_V * D_K
    t = chunk * C + i

    decay, from_start, to_end = decays(log_a, t, a_next, length, C)
    earlier = i[:, None] > i[None, :]  # (t, i): i < t
    u_ = tl.load(b + t * b_next, t < length, 0.0)[:, None] * channels(w, t, heads * D_V, rows, length)  # (c, rows)
    do_ = channels(do, t, do_next, rows, length)
    by_read = dot(do_, u_.T, PRECISION) * decay  # (c, c)
    qk, came = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for key in range(0, D_K, KEYS):
        keys = key + tl.arange(0, KEYS)
        dq_ = from_start[:, None] * dot(do_, tl.load(kept + rows[:, None] * D_K + keys[None, :]), PRECISION)
        q_, k_ = channels(q, t, q_next, keys, length), channels(k, t, k_next, keys, length)  # (c, keys)
        came += tl.sum(dq_ * q_, axis=1)
        qk += dot(q_, k_.T, PRECISION)
        dq_ += dot(by_read, k_, PRECISION)
        tl.store(dq + t[:, None] * heads * D_K + keys[None, :], dq_, t[:, None] < length)
    pairs = by_read * qk

    dw = channels(dv, t, heads * D_V, rows, length)
    by_write = tl.where(earlier, dot(dw, u_.T, PRECISION) * decay, 0.0)  # (c, c)
    by_key = by_write + by_write.T
    kk, goes, left = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32), 0.0
    for key in range(0, D_K, KEYS):
        keys = key + tl.arange(0, KEYS)
        tile = rows[:, None] * D_K + keys[None, :]
        k_ = channels(k, t, k_next, keys, length)  # (c, keys)
        kk += dot(k_, k_.T, PRECISION)
        s, d = tl.load(kept + tile), tl.load(kept + chunks * D_V * D_K + tile)  # (rows, keys)
        left += tl.sum(tl.sum(s * d, axis=1))
        dk_ = to_end[:, None] * dot(u_, d, PRECISION)  # (c, keys)
        goes += tl.sum(dk_ * k_, axis=1)  # (c,): from token i to S after the chunk
        dw_s = from_start[:, None] * dot(dw, s, PRECISION)
        came -= tl.sum(dw_s * k_, axis=1)  # (c,): from S before the chunk to token t
        dk_ -= dw_s
        dk_ += dot(by_read.T, channels(q, t, q_next, keys, length), PRECISION)
        dk_ -= dot(by_key, k_, PRECISION)
        tl.store(dk + t[:, None] * heads * D_K + keys[None, :], dk_, t[:, None] < length)
    pairs -= by_write * kk

    # The gate of token t is passed by all that was there before it, on its way to all that comes with it or after.
    through = left * last(from_start, C)
    through += tl.sum(tl.where(earlier, goes[None, :], 0.0), axis=1)
    through += tl.sum(tl.where(i[:, None] <= i[None, :], came[None, :], 0.0), axis=1)
    spanning = tl.cumsum(tl.where(earlier, pairs, 0.0), 0, reverse=True)  # (t, i): from token i to t or after
    through += tl.sum(tl.where(earlier, spanning, 0.0), axis=1)
    tl.store(da + t * heads, through, t < length)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def part_of(s, key, KEYS: tl.constexpr):
    """Return some keys of s (rows, d_k), from one on. Registers have no addresses, so it is a sum over all parts."""
    if s.shape[1] == KEYS:
        return s
    else:
        parts: tl.constexpr = s.shape[1] // KEYS
        this = tl.arange(0, parts)[None, :, None] * KEYS == key
        return tl.sum(tl.where(this, tl.reshape(s, (s.shape[0], parts, KEYS)), 0.0), axis=1)


@triton.jit
def there(x, first, next, head, SIZE: tl.constexpr):
    """Return where a head's channels of a sequence's first token are."""
    return x + first * next + head * SIZE


@triton.jit
def channels(x, t, next, channel, length):
    """Load some channels of a chunk's tokens, (c, channels); zeros past the window's end."""
    return tl.load(x + t[:, None] * next + channel[None, :], t[:, None] < length, 0.0)


@triton.jit
def decays(log_a, t, next, length, C: tl.constexpr):
    """Return how much of a write by token i is left at token t, (t, i); of S before the chunk, and at its end, (c,)."""
    i = tl.arange(0, C)
    a_ = tl.exp(tl.load(log_a + t * next, t < length, 0.0))  # past the end nothing is forgotten
    passed = tl.cumprod(tl.where(i[:, None] > i[None, :], a_[:, None], 1.0), axis=0)
    decay = tl.where(i[:, None] >= i[None, :], passed, 0.0)
    return decay, tl.cumprod(a_, axis=0), tl.sum(tl.where(i[:, None] == C - 1, decay, 0.0), axis=0)


@triton.jit
def system(kk, b, decay, tokens, C: tl.constexpr):
    """Return (k_t . k_i) decay for i < t, and the inverse of what gives w, I + that times b_i; both (c, c)."""
    i = tl.arange(0, C)
    alike = tl.where(i[:, None] > i[None, :], kk * decay, 0.0)
    lower = alike * b[None, :]
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for t in range(1, tokens):
        row = tl.sum(tl.where(i[:, None] == t, lower, 0.0), axis=0)  # (c,)
        inverse -= tl.where(i[:, None] == t, tl.sum(row[:, None] * inverse, axis=0)[None, :], 0.0)
    return alike, inverse


@triton.jit
def last(x, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0))


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, *found: Tensor) -> None:
    """Compute o, w and S after the last token into ``found``."""
    inputs, strides = zip(*map(rows_of_tokens, (q, k, v, log_a, b)), strict=True)
    grid, sizes = programs(q, v)
    forward_kernel[grid](*inputs, S.contiguous(), *found, q.shape[2], q.shape[1], *strides, **sizes)


def backward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, w: Tensor, *others: Tensor) -> None:
    """Compute the six gradients into the last of ``others``, which begin with the gradients of o and S."""
    do, end, dq, dk, dv, da, db, dS = others
    (q, k, log_a, b, do), strides = zip(*map(rows_of_tokens, (q, k, log_a, b, do)), strict=True)
    grid, sizes = programs(q, v)
    summed = (dq, dk, da, db)
    # A sum over the rows of S is the sum of every program's share.
    shares = [x if grid[1] == 1 else x.new_empty(grid[1], *x.transpose(1, 2).shape) for x in summed]
    chunks = -(-q.shape[2] // sizes["C"])
    kept = S.new_empty(grid[0], 2, chunks, *S.shape[2:])
    shape = (q.shape[2], q.shape[1], *strides)
    inputs = (q, k, log_a, b, S.contiguous(), w, do, end.contiguous())
    writes_kernel[grid](*inputs, dv, shares[3], dS, kept, *shape, **sizes)
    inputs_kernel[(*grid, chunks)](q, k, log_a, b, w, do, dv, kept, *shares[:3], *shape, **sizes)
    if grid[1] > 1:
        for whole, share in zip(summed, shares, strict=True):
            torch.sum(share, 0, out=whole.transpose(1, 2))


def programs(q: Tensor, v: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid, one program for each sequence, head and part of S's rows, and what a kernel is made for."""
    sizes = sizes_of(q.shape[-1], v.shape[-1], precision_of_products())
    return (q.shape[0] * q.shape[1], v.shape[-1] // sizes["ROWS"]), sizes


def precision_of_products() -> str:
    """Return how exactly a kernel multiplies, as Triton calls it."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):  # nor has it TF32
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def sizes_of(d_k: int, d_v: int, precision: str) -> dict[str, Any]:
    """Return what a kernel is made for, besides the GPU."""
    rows, numbers, keys, room, warps = LIMITS[precision]
    rows, keys = min(rows, numbers // d_k, d_v & -d_v), min(keys, room // d_k, d_k)
    made = {"D_K": d_k, "D_V": d_v, "ROWS": rows, "C": CHUNK, "KEYS": keys, "PRECISION": precision}
    return made | {"num_warps": warps, "num_stages": 1}


def rows_of_tokens(x: Tensor) -> tuple[Tensor, int]:
    """Return x (b, h, l, ...) so laid out that a token's channels, of all heads, are one row; and from row to row."""
    batch, heads, length, *channels = x.shape
    size = channels[0] if channels else 1
    next = x.stride(2) if length > 1 else x.stride(0)
    dense = x.stride(1) == size and (batch == 1 or x.stride(0) == length * next) and (not channels or x.stride(3) == 1)
    return (x, next) if dense else (x.transpose(1, 2).contiguous().transpose(1, 2), heads * size)
