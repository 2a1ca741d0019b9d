"""The RWKV-7 operator in matrix form: chunks of tokens at once, in plain PyTorch, with its own backward.

Write M = S^T (K, V), a_t := -kappa_t, b_t := kappa_t * a_t, so that one step is

    M_t = diag(w_t) M_{t-1} + b_t (a_t^T M_{t-1}) + k_t v_t^T            (diagonal plus low rank)

Within a chunk that starts from M, with g_t = sum_{j<=t} log w_j and e_t = g_t - log w_t, put
R~ = R e^g, A~ = A e^e, K~ = K e^-g, B~ = B e^-g. Then (the WY form of the delta rule):

    U  = (I - stril(A~ B~^T))^-1 (A~ M + stril(A~ K~^T) V) = W M + U'     what each token finds under a_t
    Y  = R~ M + tril(R~ B~^T) U + tril(R~ K~^T) V          = Q M + Y'
    M' = e^{g_c} (M + B~^T U + K~^T V)                     = F M + D

W, U', Q, Y', F, D need no M, so all chunks make theirs at once; only M' = F M + D runs in sequence.

The exponents stay finite because log w >= -e^{-1/2}: over a chunk of 32 tokens e^{|g|} is at most 3e8,
and float32 holds 3e38. The error against a float64 recurrence is about 5e-7, near that of the float32
recurrence itself.

Backward, given dY and dM' (the transpose of every line above, Z = (I - stril(A~ B~^T))^-T dU):

    dM = F^T dM' + Q^T dY                                  the only sequential line
    dU = tril(R~ B~^T)^T dY + B~ (e^{g_c} dM')
    [dA~; dR~] = mask([Z; dY] [U; V]^T) [B~; K~] + [Z; dY] M^T
    [dB~; dK~] = mask(...)^T [A~; R~] + [U; V] (e^{g_c} dM')^T
    dV = stril(A~ K~^T)^T Z + tril(R~ K~^T)^T dY + K~ (e^{g_c} dM')
    dlog w_t = sum_{j>=t} (R~ dR~ - K~ dK~ - B~ dB~)_j + sum_{j>t} (A~ dA~)_j + rowsum(dM' M')

Saved for it: the inputs and M at each chunk's start (T x V numbers per K / chunk); the rest is redone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import join_chunks, padding, split_chunks
from ..library import torch_operator

CHUNK = 32  # 16 and 32 cost the same multiplications per token, 64 a third more


def run(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv7`; every tensor already has the dtype of the sums."""
    if lengths is None:
        y, state, _ = _forward(r, log_w, k, v, -kappa, kappa * a, state)
        return y, state
    # No decay, nothing erased, nothing written: padding leaves the memory as it is.
    ended = padding(lengths, r.shape[1])[:, :, None, None]
    log_w, k, kappa = (x.masked_fill(ended, 0) for x in (log_w, k, kappa))
    y, state, _ = _forward(r, log_w, k, v, -kappa, kappa * a, state)
    return y.masked_fill(ended, 0), state


class _Chunks(NamedTuple):
    """The letters of the docstring. N = n * B * H chunks, c tokens each; halves of 2c rows are views."""

    A_R: Tensor  # (N, 2c, K)  [A~; R~]
    B_K: Tensor  # (N, 2c, K)  [B~; K~]
    V: Tensor  # (N, c, V)
    P: Tensor  # (N, 2c, 2c)  mask([A~; R~] [B~; K~]^T)
    W: Tensor  # (N, c, K)
    U: Tensor  # (N, c, V)  U'
    shrink: Tensor  # (N, c, K)  e^g
    shrink_before: Tensor  # (N, c, K)  e^e
    grow: Tensor  # (N, c, K)  e^-g
    carried: Tensor  # (N, 2c, K)  [B~; K~] e^{g_c}: what is left of them at the chunk's end

    @property
    def decay(self) -> Tensor:
        """e^{g_c} (N, 1, K)."""
        return self.shrink[:, -1:]

    @property
    def Q(self) -> Tensor:
        """(N, c, K)."""
        return torch.baddbmm(self.A_R[:, CHUNK:], self.P[:, CHUNK:, :CHUNK], self.W)

    @property
    def Y(self) -> Tensor:
        """Y' (N, c, V)."""
        rb, rk = self.P[:, CHUNK:].split(CHUNK, dim=-1)
        return torch.bmm(rb, self.U).baddbmm_(rk, self.V)

    @property
    def F(self) -> Tensor:
        """(N, K, K)."""
        F = self.carried[:, :CHUNK].mT @ self.W
        F.diagonal(dim1=1, dim2=2).add_(self.decay[:, 0])
        return F

    @property
    def D(self) -> Tensor:
        """(N, K, V)."""
        B, K = self.carried.split(CHUNK, dim=1)
        return torch.bmm(B.mT, self.U).baddbmm_(K.mT, self.V)


def _causal(like: Tensor) -> Tensor:
    """(2c, 2c): the erasing rows [A~] see earlier tokens only, the reading rows [R~] their own too."""
    ones = torch.ones(CHUNK, CHUNK, dtype=like.dtype, device=like.device)
    return torch.cat((ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)))


def _side_by_side(x: Tensor, x_scale: Tensor, y: Tensor, y_scale: Tensor) -> Tensor:
    """[x * x_scale; y * y_scale], (N, c, K) each, without a copy."""
    both = x.new_empty(len(x), 2 * CHUNK, x.shape[-1])
    torch.mul(x, x_scale, out=both[:, :CHUNK])
    torch.mul(y, y_scale, out=both[:, CHUNK:])
    return both


def _prepare(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> _Chunks:
    r, log_w, k, v, a, b = (split_chunks(x, CHUNK).flatten(0, 1) for x in (r, log_w, k, v, a, b))
    g = log_w.cumsum(dim=1)
    shrink, shrink_before, grow = g.exp(), (g - log_w).exp_(), g.neg_().exp_()
    A_R = _side_by_side(a, shrink_before, r, shrink)
    B_K = _side_by_side(b, grow, k, grow)
    P = (A_R @ B_K.mT).mul_(_causal(r))
    ab, ak = P[:, :CHUNK].split(CHUNK, dim=-1)
    solve = functools.partial(torch.linalg.solve_triangular, -ab, upper=False, unitriangular=True)
    W, U = solve(A_R[:, :CHUNK]), solve(ak @ v)
    return _Chunks(A_R, B_K, v, P, W, U, shrink, shrink_before, grow, B_K * shrink[:, -1:])


@torch_operator("wkv7_chunked")
def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and M at every chunk's start and at the end (n + 1, B * H, K, V)."""
    chunks = _prepare(r, log_w, k, v, a, b)
    start = state.mT.flatten(0, 1)
    F, D = (x.view(-1, len(start), *x.shape[1:]) for x in (chunks.F, chunks.D))
    M = torch.empty((len(D) + 1, *start.shape), dtype=D.dtype, device=D.device)
    M[0] = start
    for i in range(len(D)):
        torch.baddbmm(D[i], F[i], M[i], out=M[i + 1])
    y = chunks.Y.baddbmm_(chunks.Q, M[:-1].flatten(0, 1))
    y = join_chunks(y.view(len(D), len(start), *y.shape[1:]), v)
    return y, M[-1].view_as(state.mT).mT.contiguous(), M


@_forward.register_fake
def _(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, V, K = state.shape
    n = (r.shape[1] + CHUNK - 1) // CHUNK
    return torch.empty_like(v), torch.empty_like(state), state.new_empty((n + 1, B * H, K, V))


@torch_operator("wkv7_chunked_backward")
def _backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    M: Tensor,
) -> list[Tensor]:
    chunks = _prepare(r, log_w, k, v, a, b)
    A_R, B_K, V, P = chunks[:4]
    dY = split_chunks(dy, CHUNK).flatten(0, 1)

    # dM[i] is the gradient of the memory before chunk i.
    dM = torch.empty_like(M)
    dM[-1] = dstate.mT.flatten(0, 1)
    F, from_reading = (x.view(-1, *M.shape[1:]) for x in (chunks.F, chunks.Q.mT @ dY))
    for i in reversed(range(len(F))):
        torch.baddbmm(from_reading[i], F[i].mT, dM[i + 1], out=dM[i])
    before, after, dafter = (x.flatten(0, 1) for x in (M[:-1], M[1:], dM[1:]))

    (ab, ak), (rb, rk) = (rows.split(CHUNK, dim=-1) for rows in P.split(CHUNK, dim=1))
    B_H, K_H = (chunks.carried @ dafter).split(CHUNK, dim=1)
    dU = torch.baddbmm(B_H, rb.mT, dY)
    Z = torch.linalg.solve_triangular(-ab.mT, dU, upper=True, unitriangular=True)
    Z_dY = torch.cat((Z, dY), dim=1)
    U_V = torch.cat((torch.baddbmm(chunks.U, chunks.W, before), V), dim=1)
    dP = (Z_dY @ U_V.mT).mul_(_causal(dy))
    dA_R = torch.bmm(dP, B_K).baddbmm_(Z_dY, before.mT)
    dB_K = torch.bmm(U_V, dafter.mT).mul_(chunks.decay).baddbmm_(dP.mT, A_R)
    dV = torch.baddbmm(K_H, ak.mT, Z).baddbmm_(rk.mT, dY)

    # Each e^g meets its own gradient: what a decay did to A~, R~ (grown with it) and B~, K~ (against it).
    de, from_r = (A_R * dA_R).split(CHUNK, dim=1)
    from_b, from_k = (B_K * dB_K).split(CHUNK, dim=1)
    dg = (from_r + de).sub_(from_b).sub_(from_k)
    later = torch.ones(CHUNK, CHUNK, dtype=dg.dtype, device=dg.device).triu()
    dlog_w = (later @ dg).sub_(de).add_((dafter * after).sum(dim=-1)[:, None])

    (da, dr), (db, dk) = dA_R.split(CHUNK, dim=1), dB_K.split(CHUNK, dim=1)
    gradients = [
        dr * chunks.shrink,
        dlog_w,
        dk * chunks.grow,
        dV,
        da * chunks.shrink_before,
        db * chunks.grow,
    ]
    joined = [
        join_chunks(d.view(len(F), -1, *d.shape[1:]), like)
        for d, like in zip(gradients, (r, log_w, k, v, a, b), strict=True)
    ]
    return [*joined, dM[0].view_as(dstate.mT).mT.contiguous()]


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*inputs[:-1], dstate)]  # the last is M


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward(dy, dstate, *ctx.saved_tensors))


_forward.register_autograd(_differentiate, setup_context=_save)
