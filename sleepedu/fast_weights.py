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
    pieces = max(1, round(q.shape[2] / chunk))
    if pieces == 1:
        return _Chunk.apply(q, k, v, log_a, b, S)
    outputs = []
    for piece in zip(*(tensor.tensor_split(pieces, dim=2) for tensor in (q, k, v, log_a, b)), strict=True):
        o, S = _Chunk.apply(*piece, S)
        outputs.append(o)
    return torch.cat(outputs, dim=2), S


class _Chunk(torch.autograd.Function):
    """One chunk of ``gated_delta_chunked``, with its gradient written out: the same system, transposed.

    Autograd would find the same gradient, in several times the time: it keeps and revisits every (t, i) matrix. On a
    CPU the batch is taken a slab at a time, so that what one step leaves is still in the core's cache for the next.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, b, S):
        o, S_end = q.new_empty(v.shape), torch.empty_like(S, memory_format=torch.contiguous_format)
        saved = []
        ctx.slabs = _slabs(S, q.shape[2])
        for slab in ctx.slabs:
            given = (tensor[slab] for tensor in (q, k, v, log_a, b, S))
            saved += _forward(*given, o[slab].flatten(0, 1), S_end[slab].flatten(0, 1))
        ctx.save_for_backward(*saved)
        return o, S_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS_end):
        saved = ctx.saved_tensors
        each = len(saved) // len(ctx.slabs)
        batch, heads, length, d_v = do.shape
        d_k = dS_end.shape[-1]
        shapes = [(length, d_k), (length, d_k), (length, d_v), (length,), (length,), (d_v, d_k)]
        gradients = [do.new_empty(batch, heads, *shape) for shape in shapes]
        for number, slab in enumerate(ctx.slabs):
            out = (gradient[slab].flatten(0, 1) for gradient in gradients)
            kept = saved[number * each : (number + 1) * each]
            _backward(*kept, do[slab].flatten(0, 1), dS_end[slab].flatten(0, 1), *out)
        return tuple(gradients)


def _slabs(S: Tensor, length: int, numbers: int = 2**18) -> list[slice]:
    """Return slices of the batch with about ``numbers`` numbers in S or in the (t, i) matrices; one slice on a GPU."""
    batch, heads, d_v, d_k = S.shape
    size = batch
    if S.device.type == "cpu":
        size = max(1, numbers // (heads * max(d_v * d_k, length * length)))
    return [slice(start, start + size) for start in range(0, batch, size)]


def _forward(q, k, v, log_a, b, S, o, S_end):
    """Write what one slab reads and remembers into o and S_end; return what the gradient needs."""
    q, k, v, log_a, S = (tensor.flatten(0, 1) for tensor in (q, k, v, log_a, S))  # (n, ...): sequences x heads
    b = b.flatten(0, 1)[..., None]
    length = q.shape[1]
    # Sums of logarithms in double precision: after strong forgetting, differences of large sums must stay exact.
    g = log_a.double().cumsum(-1)
    past = torch.ones(length, length, dtype=q.dtype, device=q.device).tril_()
    decay = (g[:, :, None] - g[:, None, :]).to(q.dtype)
    decay.clamp_(max=0).exp_().mul_(past)  # (n, t, i): e^(g_t - g_i), zero for i > t
    e = g.exp().to(q.dtype)[..., None]  # (n, t, 1): e^(g_t)
    K = torch.bmm(k, k.mT).mul_(decay)
    A = K * b  # the solver takes its diagonal for ones
    M = torch.bmm(q, k.mT).mul_(decay)
    kS, qS = torch.bmm(k, S.mT), torch.bmm(q, S.mT)
    news = torch.addcmul(v, e, kS, value=-1)  # what S_0 gets wrong
    u = torch.linalg.solve_triangular(A, b * news, upper=False, unitriangular=True)
    torch.mul(e, qS, out=o).baddbmm_(M, u)
    to_end = decay[:, -1, :, None] * k
    torch.mul(e[:, -1:], S, out=S_end).baddbmm_(u.mT, to_end)
    return q, k, b, S, decay, e, K, A, M, kS, qS, news, u, to_end


def _backward(q, k, b, S, decay, e, K, A, M, kS, qS, news, u, to_end, do, dS_end, dq, dk, dv, dlog_a, db, dS):
    """Write the gradients of one slab into dq, dk, dv, dlog_a, db and dS."""
    do, ends = do.contiguous(), e[:, -1:]
    du = torch.bmm(to_end, dS_end.mT).baddbmm_(M.mT, do)
    dr = torch.linalg.solve_triangular(A.mT, du, upper=True, unitriangular=True)  # of b news
    torch.mul(dr, b, out=dv)
    dqS, dkS = do * e, dv * -e
    dM, dA = torch.bmm(do, u.mT), torch.bmm(dr, u.mT).neg_()
    dA.diagonal(dim1=-2, dim2=-1).zero_()
    part = dA * K
    torch.add((dr * news).sum(-1), part.sum(-1), out=db)
    part = part.mul_(b).addcmul_(dM, M)  # of every e^(g_t - g_i)
    u_dS = torch.bmm(u, dS_end)
    ending = (to_end * u_dS).sum(-1)  # of every e^(g_C - g_i)
    dg = part.sum(-1) - part.sum(-2) + (dqS * qS).addcmul_(dkS, kS).sum(-1) - ending
    dg[:, -1] += ending.sum(-1) + ends.flatten() * (S * dS_end).sum((1, 2))
    torch.sub(dg.sum(-1, keepdim=True), dg.cumsum(-1) - dg, out=dlog_a)
    dM.mul_(decay)
    dA.mul_(decay).mul_(b)
    torch.bmm(dqS, S, out=dq).baddbmm_(dM, k)
    torch.bmm(dkS, S, out=dk).baddbmm_(dM.mT, q).baddbmm_(dA + dA.mT, k)
    dk.addcmul_(decay[:, -1, :, None], u_dS)
    torch.mul(dS_end, ends, out=dS).baddbmm_(dqS.mT, q).baddbmm_(dkS.mT, k)


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
