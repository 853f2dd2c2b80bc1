"""The learned local rule: how a fast-weight memory S is written and read.

Every rule has one signature, ``rule(q, k, v, log_a, b, S) -> (o, S)``, and is a pure function of tensors.

Symbols, after Lee et al. 2026 (section 2) and Yang et al. 2024::

    q, k     (batch, heads, length, d_k)   queries and keys
    v        (batch, heads, length, d_v)   values
    log_a    (batch, heads, length)        log of the forget gate a, finite and <= 0
    b        (batch, heads, length)        write strength
    S        (batch, heads, d_v, d_k)      the fast weights; o = S q
    o        (batch, heads, length, d_v)   what the queries read

The first four functions take one token at a time and are meant to be read. ``gated_delta_chunked`` gives the
numbers of ``gated_delta`` with a few large matrix products, and is what the model trains with.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def hebbian(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Add every association to the memory: S_t = S_{t-1} + v_t k_t^T (Hebb's rule; both gates are ignored).

    Shapes as in the module's table. Raises ValueError for shapes or devices that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + outer(v, k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Forget a little, then add: S_t = a_t S_{t-1} + b_t v_t k_t^T (the paper's general form).

    Shapes as in the module's table. Raises ValueError for shapes or devices that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * S + b * outer(v, k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def delta(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Write only what the memory gets wrong: S_t = S_{t-1} + b_t (v_t - S_{t-1} k_t) k_t^T (log_a is ignored).

    Shapes as in the module's table. Raises ValueError for shapes or devices that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + b * outer(v - read(S, k), k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Forget, then correct what is left: S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T.

    The same as S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T (Yang et al. 2024, equation 10).
    Shapes as in the module's table. Raises ValueError for shapes or devices that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        S = a * S
        return S + b * outer(v - read(S, k), k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta`` a chunk of tokens at a time: the same numbers from a few matrix products.

    Inside a chunk that starts from S_0, let g_t be the sum of log a up to token t and u_t = b_t (v_t - a_t S_{t-1} k_t)
    what token t really writes. Unrolling the recurrence gives a linear system in the u (the WY form)::

        u_t + b_t sum_{i<t} e^(g_t - g_i) (k_t . k_i) u_i = b_t (v_t - e^(g_t) S_0 k_t)

    which is unit lower triangular, so one triangular solve finds all of them. Then
    o_t = e^(g_t) S_0 q_t + sum_{i<=t} e^(g_t - g_i) (q_t . k_i) u_i, and S_C likewise. All exponents are at most 0.

    Shapes as in the module's table; ``length`` need not be a multiple of ``chunk``. Raises ValueError for shapes or
    devices that do not fit together, or a chunk below 1.
    """
    _check(q, k, v, log_a, b, S)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    outputs = []
    for start in range(0, q.shape[2], chunk):
        piece = slice(start, start + chunk)
        o, S = _Chunk.apply(*(tensor[:, :, piece] for tensor in (q, k, v, log_a, b)), S)
        outputs.append(o)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)), S


class _Chunk(torch.autograd.Function):
    """One chunk of ``gated_delta_chunked``, with its gradient written out: the same system, transposed.

    Autograd would find the same gradient, in about twice the time: it keeps and revisits every (t, i) matrix.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, b, S):
        length = q.shape[2]
        # Sums of logarithms in double precision: after strong forgetting, differences of large sums must stay exact.
        g = log_a.double().cumsum(-1)
        decay = (g[..., :, None] - g[..., None, :]).to(q.dtype)  # (b, h, t, i): e^(g_t - g_i), zero for i > t
        past = torch.ones(length, length, dtype=q.dtype, device=q.device).tril()
        decay.clamp_(max=0).exp_().mul_(past)
        e = g.exp().to(q.dtype)[..., None]  # (b, h, t, 1): e^(g_t)
        b = b[..., None]
        kk = k @ k.mT
        kS = k @ S.mT  # (b, h, t, d_v)
        qS = q @ S.mT
        A = (kk * decay).mul_(b)  # its diagonal is ignored by the solver
        news = torch.addcmul(v, e, kS, value=-1)  # what the memory of before the chunk gets wrong
        u = torch.linalg.solve_triangular(A, b * news, upper=False, unitriangular=True)
        M = (q @ k.mT).mul_(decay)
        o = torch.addcmul(M @ u, e, qS)
        to_end = decay[..., -1, :, None] * k
        ctx.save_for_backward(q, k, b, S, decay, e, kk, kS, qS, A, news, u, M, to_end)
        return o, torch.addcmul(u.mT @ to_end, e[..., -1:, :], S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS_end):
        q, k, b, S, decay, e, kk, kS, qS, A, news, u, M, to_end = ctx.saved_tensors
        du = M.mT @ do + to_end @ dS_end.mT
        dr = torch.linalg.solve_triangular(A.mT, du, upper=True, unitriangular=True)
        dv = b * dr
        e_do, dkS = e * do, -e * dv
        dM = do @ u.mT
        dA = -(dr @ u.mT)
        dA.diagonal(dim1=-2, dim2=-1).zero_()
        dg = (dM * M).addcmul_(dA, A)  # the part of every e^(g_t - g_i)
        dg = dg.sum(-1) - dg.sum(-2) + (e_do * qS).sum(-1) + (dkS * kS).sum(-1)
        dqk, dkk_b = dM.mul_(decay), dA.mul_(decay)
        db = (dr * news).sum(-1) + (dkk_b * kk).sum(-1)
        dkk = dkk_b.mul_(b)
        u_dS = u @ dS_end
        ending = (to_end * u_dS).sum(-1)  # the part of every e^(g_C - g_i)
        dg -= ending
        dg[..., -1] += ending.sum(-1) + (e[..., -1, :] * (S * dS_end).sum(-1)).sum(-1)
        dq = e_do @ S + dqk @ k
        dk = dkS @ S + dqk.mT @ q + (dkk + dkk.mT) @ k + decay[..., -1, :, None] * u_dS
        dS = torch.addcmul(e_do.mT @ q + dkS.mT @ k, e[..., -1:, :], dS_end)
        return dq, dk, dv, dg.flip(-1).cumsum(-1).flip(-1), db, dS


def outer(v: Tensor, k: Tensor) -> Tensor:
    """Return v k^T for v (..., d_v) and k (..., d_k), shape (..., d_v, d_k)."""
    return v[..., :, None] * k[..., None, :]


def read(S: Tensor, q: Tensor) -> Tensor:
    """Return S q for S (..., d_v, d_k) and q (..., d_k), shape (..., d_v)."""
    return (S @ q[..., :, None])[..., 0]


def _token_by_token(
    write: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, log_a, b, S)
    a = log_a.exp()[..., None, None]  # (b, h, t, 1, 1), to scale a matrix
    b = b[..., None, None]
    outputs = []
    for t in range(q.shape[2]):
        S = write(S, k[:, :, t], v[:, :, t], a[:, :, t], b[:, :, t])
        outputs.append(read(S, q[:, :, t]))
    return torch.stack(outputs, dim=2), S


def _check(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q and v must be (batch, heads, length, size), got {tuple(q.shape)} and {tuple(v.shape)}")
    batch, heads, length, d_k = q.shape
    d_v = v.shape[-1]
    if length == 0:
        raise ValueError("q, k and v hold no token: length must be at least 1")
    wanted = {
        "k": (k, (batch, heads, length, d_k)),
        "v": (v, (batch, heads, length, d_v)),
        "log_a": (log_a, (batch, heads, length)),
        "b": (b, (batch, heads, length)),
        "S": (S, (batch, heads, d_v, d_k)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit q {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move them to one device")
