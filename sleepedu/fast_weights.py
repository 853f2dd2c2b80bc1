"""The learned local rule: how a fast-weight memory S is written and read.

Every rule has one signature, ``rule(q, k, v, log_a, b, S) -> (o, S)``, and is a pure function of tensors; it raises
ValueError for shapes, devices or dtypes that do not fit together.

Symbols, after Lee et al. 2026 (section 2) and Yang et al. 2024::

    q, k     (batch, heads, length, d_k)   queries and keys
    v        (batch, heads, length, d_v)   values
    log_a    (batch, heads, length)        log of the forget gate a, <= 0; -inf forgets all
    b        (batch, heads, length)        write strength
    S        (batch, heads, d_v, d_k)      the fast weights; o = S q
    o        (batch, heads, length, d_v)   what the queries read

The four rules are written as what they do with one token. ``gated_delta_chunked`` gives the numbers of ``gated_delta``
or ``gated`` with a few large matrix products. Models train with ``fast.fast_rule``, which takes compiled code where
there is some and the chunks elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def token_by_token(write: Callable[..., Tensor]) -> Rule:
    """Make a rule of how it writes one token, ``write(S, k, v, a, b) -> S``; it is read after every write."""

    def rule(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(q, k, v, log_a, b, S)
        a = log_a.exp()[..., None, None]  # (b, h, t, 1, 1), to scale a matrix
        b = b[..., None, None]  # (b, h, t, 1, 1)
        outputs = []
        for t in range(q.shape[2]):
            S = write(S, k[:, :, t], v[:, :, t], a[:, :, t], b[:, :, t])  # (b, h, d_v, d_k)
            outputs.append(read(S, q[:, :, t]))  # (b, h, d_v)
        return torch.stack(outputs, dim=2), S

    rule.__name__, rule.__qualname__, rule.__doc__ = write.__name__, write.__qualname__, write.__doc__
    return rule


def outer(v: Tensor, k: Tensor) -> Tensor:
    """Return v k^T for v (..., d_v) and k (..., d_k), shape (..., d_v, d_k)."""
    return v[..., :, None] * k[..., None, :]


def read(S: Tensor, q: Tensor) -> Tensor:
    """Return S q for S (..., d_v, d_k) and q (..., d_k), shape (..., d_v)."""
    return (S @ q[..., :, None])[..., 0]


@token_by_token
def hebbian(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add every association to the memory: S_t = S_{t-1} + v_t k_t^T (Hebb's rule; both gates are ignored)."""
    return S + outer(v, k)


@token_by_token
def gated(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Forget a little, then add: S_t = a_t S_{t-1} + b_t v_t k_t^T (the paper's general form)."""
    return a * S + b * outer(v, k)


@token_by_token
def delta(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write only what the memory gets wrong: S_t = S_{t-1} + b_t (v_t - S_{t-1} k_t) k_t^T (log_a is ignored)."""
    return S + b * outer(v - read(S, k), k)


@token_by_token
def gated_delta(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Forget, then correct what is left: S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T.

    The same as S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T (Yang et al. 2024, equation 10).
    """
    S = a * S
    return S + b * outer(v - read(S, k), k)


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, chunk: int = 64, corrects: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta`` a chunk of tokens at a time: the same numbers from a few matrix products.

    Inside a chunk that starts from S_0, let g_t be the sum of log a up to token t, w_t = v_t - a_t S_{t-1} k_t what the
    memory gets wrong and u_t = b_t w_t what token t really writes. Unrolling the recurrence gives a linear system in
    the w (the WY form)::

        w_t + sum_{i<t} e^(g_t - g_i) (k_t . k_i) b_i w_i = v_t - e^(g_t) S_0 k_t

    which is unit lower triangular, so one triangular solve finds all of them. Then
    o_t = e^(g_t) S_0 q_t + sum_{i<=t} e^(g_t - g_i) (q_t . k_i) u_i, and S_C likewise. All exponents are at most 0.

    chunk: the most tokens that are taken at a time; ``length`` need not be a multiple. ValueError for one below 1.
    corrects: False for ``gated``, which writes u_t = b_t v_t whatever the memory says.
    """
    check_inputs(q, k, v, log_a, b, S)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    outputs = []
    pieces = [tensor.chunk(-(-q.shape[2] // chunk), dim=2) for tensor in (q, k, v, log_a, b)]  # of about equal length
    for q, k, v, log_a, b in zip(*pieces, strict=True):
        # g_t - g_i is summed up for every i by itself: as a difference it would lose what a huge log a swallowed, and
        # so would its gradient.
        steps = log_a[..., None].expand(*log_a.shape, q.shape[2]).tril(-1)  # (b, h, t, i): log a_t where t > i, else 0
        decay = steps.cumsum(dim=-2).exp().tril()  # (b, h, t, i): e^(g_t - g_i) where t >= i, else 0
        e = log_a.cumsum(-1).exp()[..., None]  # (b, h, t, 1): e^(g_t)
        w = v
        if corrects:
            A = k @ k.mT * decay * b[..., None, :]  # (b, h, t, i); the solver takes its diagonal for ones
            w = torch.linalg.solve_triangular(A, v - e * (k @ S.mT), upper=False, unitriangular=True)  # (b, h, t, d_v)
        u = b[..., None] * w  # (b, h, t, d_v): what is really written
        outputs.append(e * (q @ S.mT) + (q @ k.mT * decay) @ u)  # (b, h, t, d_v)
        S = e[..., -1:, :] * S + u.mT @ (decay[..., -1, :, None] * k)
    return torch.cat(outputs, dim=2), S


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> None:
    """Raise ValueError, which names the tensor, unless shapes are the module's table's, and devices and dtypes one."""
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape[1:3]:
        raise ValueError(
            "q and v must be (batch, heads, length, size) with a head and a token at least, "
            f"got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    tokens, d_v, d_k = q.shape[:3], v.shape[3], q.shape[3]
    shapes = {"k": q.shape, "v": (*tokens, d_v), "log_a": tokens, "b": tokens, "S": (*q.shape[:2], d_v, d_k)}
    for (name, shape), tensor in zip(shapes.items(), (k, v, log_a, b, S), strict=True):
        wanted = (tuple(shape), q.dtype, q.device)
        if (found := (tuple(tensor.shape), tensor.dtype, tensor.device)) != wanted:
            raise ValueError("{} must be {}, {}, on {} to fit q and v, got {}, {}, on {}".format(name, *wanted, *found))
