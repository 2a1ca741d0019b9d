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
    """The letters of the docstring. G = B * H rows of n chunks; c tokens a chunk."""

    A_R: Tensor  # (n, G, 2c, K)  [A~; R~]
    B_K: Tensor  # (n, G, 2c, K)  [B~; K~]
    V: Tensor  # (n, G, c, V)
    P: Tensor  # (n, G, 2c, 2c)  mask([A~; R~] [B~; K~]^T)
    W_U: Tensor  # (n, G, c, K + V)  [W, U']
    shrink: Tensor  # (n, G, c, K)  e^g
    shrink_before: Tensor  # (n, G, c, K)  e^e
    grow: Tensor  # (n, G, c, K)  e^-g
    decay: Tensor  # (n, G, K, 1)  e^{g_c}

    @property
    def QY(self) -> Tensor:
        """[Q, Y'] (n, G, c, K + V)."""
        R = self.A_R[..., CHUNK:, :]
        rb, rk = self.P[..., CHUNK:, :].split(CHUNK, dim=-1)
        return rb @ self.W_U + torch.cat((R, rk @ self.V), dim=-1)

    @property
    def F(self) -> Tensor:
        """(n, G, K, K)."""
        K = self.decay.shape[-2]
        B, W = self.B_K[..., :CHUNK, :], self.W_U[..., :K]
        return self.decay * (B.mT @ W + torch.eye(K, dtype=W.dtype, device=W.device))

    @property
    def D(self) -> Tensor:
        """(n, G, K, V)."""
        U = self.W_U[..., self.decay.shape[-2] :]
        return self.decay * (self.B_K.mT @ torch.cat((U, self.V), dim=-2))


def _causal(like: Tensor) -> Tensor:
    """(2c, 2c): the erasing rows [A~] see earlier tokens only, the reading rows [R~] their own too."""
    ones = torch.ones(CHUNK, CHUNK, dtype=like.dtype, device=like.device)
    return torch.cat((ones.tril(-1).repeat(1, 2), ones.tril().repeat(1, 2)))


def _prepare(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> _Chunks:
    r, log_w, k, v, a, b = (split_chunks(x, CHUNK) for x in (r, log_w, k, v, a, b))
    g = log_w.cumsum(dim=-2)
    shrink, shrink_before, grow = g.exp(), (g - log_w).exp(), g.neg().exp()
    A_R = torch.cat((a * shrink_before, r * shrink), dim=-2)
    B_K = torch.cat((b * grow, k * grow), dim=-2)
    P = (A_R @ B_K.mT).mul_(_causal(r))
    ab, ak = P[..., :CHUNK, :].split(CHUNK, dim=-1)
    right = torch.cat((A_R[..., :CHUNK, :], ak @ v), dim=-1)
    W_U = torch.linalg.solve_triangular(-ab, right, upper=False, unitriangular=True)
    return _Chunks(A_R, B_K, v, P, W_U, shrink, shrink_before, grow, shrink[..., -1:, :].mT)


@torch_operator("wkv7_chunked")
def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and M at every chunk's start and at the end (n + 1, G, K, V)."""
    chunks = _prepare(r, log_w, k, v, a, b)
    F, D, QY = chunks.F, chunks.D, chunks.QY
    M = torch.empty((len(D) + 1, *D.shape[1:]), dtype=D.dtype, device=D.device)
    M[0] = state.mT.flatten(0, 1)
    for i in range(len(D)):
        torch.baddbmm(D[i], F[i], M[i], out=M[i + 1])
    Q, Y = QY.split((r.shape[-1], v.shape[-1]), dim=-1)
    return join_chunks(Y + Q @ M[:-1], v), M[-1].view_as(state.mT).mT.contiguous(), M


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
    W, U = chunks.W_U.split((r.shape[-1], v.shape[-1]), dim=-1)
    dY, F, Q = split_chunks(dy, CHUNK), chunks.F, chunks.QY[..., : r.shape[-1]]

    # dM[i] is the gradient of the memory before chunk i.
    dM = torch.empty_like(M)
    dM[-1] = dstate.mT.flatten(0, 1)
    from_reading = Q.mT @ dY
    for i in reversed(range(len(F))):
        torch.baddbmm(from_reading[i], F[i].mT, dM[i + 1], out=dM[i])

    H = chunks.decay * dM[1:]
    (ab, ak), (rb, rk) = (rows.split(CHUNK, dim=-1) for rows in P.split(CHUNK, dim=-2))
    B_H, K_H = (B_K @ H).split(CHUNK, dim=-2)
    Z = torch.linalg.solve_triangular(-ab.mT, rb.mT @ dY + B_H, upper=True, unitriangular=True)
    Z_dY, U_V = torch.cat((Z, dY), dim=-2), torch.cat((U + W @ M[:-1], V), dim=-2)
    dP = (Z_dY @ U_V.mT).mul_(_causal(dy))
    dA_R = dP @ B_K + Z_dY @ M[:-1].mT
    dB_K = dP.mT @ A_R + U_V @ H.mT
    dV = ak.mT @ Z + rk.mT @ dY + K_H

    # Each e^g meets its own gradient: what a decay did to A~, R~ (grown with it) and B~, K~ (against it).
    de, from_r = (A_R * dA_R).split(CHUNK, dim=-2)
    from_b, from_k = (B_K * dB_K).split(CHUNK, dim=-2)
    dg = from_r - from_b - from_k
    after = (dg + de).flip(-2).cumsum(-2).flip(-2)
    dlog_w = after - de + (dM[1:] * M[1:]).sum(dim=-1)[..., None, :]

    (da, dr), (db, dk) = dA_R.split(CHUNK, dim=-2), dB_K.split(CHUNK, dim=-2)
    gradients = [
        dr * chunks.shrink,
        dlog_w,
        dk * chunks.grow,
        dV,
        da * chunks.shrink_before,
        db * chunks.grow,
    ]
    joined = [join_chunks(d, like) for d, like in zip(gradients, (r, log_w, k, v, a, b), strict=True)]
    return [*joined, dM[0].view_as(dstate.mT).mT.contiguous()]


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*inputs[:-1], dstate)]  # the last is M


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward(dy, dstate, *ctx.saved_tensors))


_forward.register_autograd(_differentiate, setup_context=_save)
