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
numbers of ``gated_delta`` with a few large matrix products. Models train with ``kernel.gated_delta_fast``, which takes
compiled code where there is some and the chunks elsewhere.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def hebbian(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Add every association to the memory: S_t = S_{t-1} + v_t k_t^T (Hebb's rule; both gates are ignored).

    Shapes as in the module's table. Raises ValueError for shapes, devices or dtypes that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + outer(v, k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Forget a little, then add: S_t = a_t S_{t-1} + b_t v_t k_t^T (the paper's general form).

    Shapes as in the module's table. Raises ValueError for shapes, devices or dtypes that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * S + b * outer(v, k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def delta(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Write only what the memory gets wrong: S_t = S_{t-1} + b_t (v_t - S_{t-1} k_t) k_t^T (log_a is ignored).

    Shapes as in the module's table. Raises ValueError for shapes, devices or dtypes that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return S + b * outer(v - read(S, k), k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Forget, then correct what is left: S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T.

    The same as S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T (Yang et al. 2024, equation 10).
    Shapes as in the module's table. Raises ValueError for shapes, devices or dtypes that do not fit together.
    """

    def write(S: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        S = a * S
        return S + b * outer(v - read(S, k), k)

    return _token_by_token(write, q, k, v, log_a, b, S)


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta`` a chunk of tokens at a time: the same numbers from a few matrix products.

    Inside a chunk that starts from S_0, let g_t be the sum of log a up to token t, w_t = v_t - a_t S_{t-1} k_t what the
    memory gets wrong and u_t = b_t w_t what token t really writes. Unrolling the recurrence gives a linear system in
    the w (the WY form)::

        w_t + sum_{i<t} e^(g_t - g_i) (k_t . k_i) b_i w_i = v_t - e^(g_t) S_0 k_t

    which is unit lower triangular, so one triangular solve finds all of them. Then
    o_t = e^(g_t) S_0 q_t + sum_{i<=t} e^(g_t - g_i) (q_t . k_i) u_i, and S_C likewise. All exponents are at most 0.

    Shapes as in the module's table; ``length`` need not be a multiple of ``chunk``, the most tokens that are taken at a
    time. Raises ValueError for shapes, devices or dtypes that do not fit together, or a chunk below 1.
    """
    check_inputs(q, k, v, log_a, b, S)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return _Chunks.apply(q, k, v, log_a, b, S, chunk)


class _Chunks(torch.autograd.Function):
    """``gated_delta_chunked`` with its gradient written out: the same systems, transposed.

    Autograd would find the same gradient, in several times the time: it keeps and revisits every (t, i) matrix, and
    for every chunk it builds a gradient of the whole sequence.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, b, S, chunk):
        ctx.chunks = _cut(q.shape[2], chunk)
        o = q.new_empty(v.shape)
        states = [S.contiguous(), *(S.new_empty(S.shape) for _ in ctx.chunks)]  # S before, between and after the chunks
        saved = []
        for i, piece in enumerate(ctx.chunks):
            given = (tensor[:, :, piece].flatten(0, 1) for tensor in (q, k, v, log_a, b, o))
            kept = _forward(*given, *(S.flatten(0, 1) for S in states[i : i + 2]))
            if any(ctx.needs_input_grad):
                saved += kept
        ctx.save_for_backward(o, *states, *saved)
        return o, states[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS_end):
        o, *saved = ctx.saved_tensors
        states, saved = saved[: len(ctx.chunks) + 1], saved[len(ctx.chunks) + 1 :]
        each = len(saved) // len(ctx.chunks)
        batch, heads, length, d_v = do.shape
        d_k = dS_end.shape[-1]
        shapes = [(length, d_k), (length, d_k), (length, d_v), (length,), (length,)]
        gradients = [do.new_empty(batch, heads, *shape) for shape in shapes]
        dS = do.new_empty(dS_end.shape)
        later = dS_end.flatten(0, 1)
        for i, piece in reversed(list(enumerate(ctx.chunks))):
            saved, kept = saved[:-each], saved[-each:]
            given = (tensor[:, :, piece].flatten(0, 1) for tensor in (o, do, *gradients))
            around = (S.flatten(0, 1) for S in (states[i], states[i + 1], dS))
            _backward(*kept, *given, *around, later)
            later = dS.flatten(0, 1)
        return *gradients, dS, None


def _cut(length: int, chunk: int) -> list[slice]:
    """Cut a length into as few chunks as it takes, of nearly the same length, the first the longest."""
    pieces = -(-length // chunk)
    ends = [-(-length * i // pieces) for i in range(pieces + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _forward(q, k, v, log_a, b, o, S, S_end):
    """Write what a chunk reads and remembers into o and S_end; return what the gradient needs.

    All are (n, ...), n = sequences x heads. What is written into may be a part of a larger tensor: a product straight
    into that is done one matrix at a time, and the compiler does not take it as ``out``. So results are copied there.
    """
    # Sums of logarithms in double precision: after strong forgetting, differences of large sums must stay exact.
    g = log_a.double().cumsum(-1)
    e = g.exp().to(q.dtype)[..., None]  # (n, t, 1): e^(g_t)
    decay = (g[:, :, None] - g[:, None, :]).to(q.dtype).exp_().tril_()  # (n, t, i): e^(g_t - g_i), zero for i > t
    M, K = torch.bmm(q, k.mT).mul_(decay), torch.bmm(k, k.mT).mul_(decay)
    w = torch.addcmul(v, e, torch.bmm(k, S.mT), value=-1)  # what S_0 gets wrong
    A = K * b[:, None, :]  # the solver takes its diagonal for ones, and makes no copies where it may overwrite w
    torch.linalg.solve_triangular(A, w, upper=False, unitriangular=True, out=w)
    u = b[..., None] * w
    o.copy_(torch.bmm(M, u).addcmul_(e, torch.bmm(q, S.mT)))
    torch.mul(e[:, -1:], S, out=S_end).baddbmm_(u.mT, decay[:, -1, :, None] * k)
    return q, k, v, b, e, decay, K, M, w


def _backward(q, k, v, b, e, decay, K, M, w, o, do, dq, dk, dv, dlog_a, db, S, S_end, dS, dS_end):
    """Write the gradients of a chunk into dq, dk, dv, dlog_a, db and dS, which may be dS_end itself."""
    b, to_end = b[..., None], decay[:, -1, :, None]
    u = b * w
    dr = torch.bmm(to_end * k, dS_end.mT).baddbmm_(M.mT, do)  # of u in o and S_end
    torch.linalg.solve_triangular((K * b).mT, dr, upper=True, unitriangular=True, out=dr)  # ... and in later u
    dv.copy_(dr * b)
    db.copy_(dr.mul_(w).sum(-1))
    # The gradient of g takes no (t, i) matrix: row and column t of the system say that to raise g_t alone by x is to
    # divide v_t by e^x and then to multiply o_t by it, and S_end too for the last t.
    dg = torch.addcmul(do * o, dv, v, value=-1).sum(-1)
    dg[:, -1] += (S_end * dS_end).sum((1, 2))
    dlog_a.copy_(dg.sum(-1, keepdim=True) - dg.cumsum(-1) + dg)
    dM, dA = torch.bmm(do, u.mT).mul_(decay), torch.bmm(dv, u.mT).mul_(decay)  # dA: with the other sign
    dA.diagonal(dim1=-2, dim2=-1).zero_()
    dqS, dkS = do * e, dv * -e
    dq.copy_(torch.bmm(dqS, S).baddbmm_(dM, k))
    written = torch.bmm(dkS, S).baddbmm_(dM.mT, q).baddbmm_(u.mul_(to_end), dS_end)
    dk.copy_(written.baddbmm_(dA + dA.mT, k, alpha=-1))
    torch.mul(dS_end, e[:, -1:], out=dS).baddbmm_(dqS.mT, q).baddbmm_(dkS.mT, k)


def outer(v: Tensor, k: Tensor) -> Tensor:
    """Return v k^T for v (..., d_v) and k (..., d_k), shape (..., d_v, d_k)."""
    return v[..., :, None] * k[..., None, :]


def read(S: Tensor, q: Tensor) -> Tensor:
    """Return S q for S (..., d_v, d_k) and q (..., d_k), shape (..., d_v)."""
    return (S @ q[..., :, None])[..., 0]


def _token_by_token(
    write: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    check_inputs(q, k, v, log_a, b, S)
    a = log_a.exp()[..., None, None]  # (b, h, t, 1, 1), to scale a matrix
    b = b[..., None, None]
    outputs = []
    for t in range(q.shape[2]):
        S = write(S, k[:, :, t], v[:, :, t], a[:, :, t], b[:, :, t])
        outputs.append(read(S, q[:, :, t]))
    return torch.stack(outputs, dim=2), S


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> None:
    """Raise ValueError, which names the tensor, unless shapes are the module's table's, and devices and dtypes one."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q and v must be (batch, heads, length, size), got {tuple(q.shape)} and {tuple(v.shape)}")
    batch, heads, length, d_k = q.shape
    d_v = v.shape[-1]
    if not heads or not length:
        raise ValueError(f"q, k and v need a head and a token at least, got {heads} heads and {length} tokens")
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
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q {q.dtype}: make them of one kind")
