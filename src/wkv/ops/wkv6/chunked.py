"""The RWKV-5 and RWKV-6 operator in matrix form: chunks of tokens at once, with its own backward.

Within a chunk, with l = log w (elementwise, per key channel) and a memory M = S^T (K, V) at its start:

    Y_t = sum_{i<t} (r_t . k_i e^{l_{i+1} + ... + l_{t-1}}) v_i  +  (r_t . u k_t) v_t
          + M^T (r_t e^{l_1 + ... + l_{t-1}})
    M'  = e^{l_1 + ... + l_c} M + sum_i (k_i e^{l_{i+1} + ... + l_c}) v_i^T

The decay of RWKV-6 has no floor, so e^{l_{i+1} + ... + l_{t-1}} must not be split into e^{+..} e^{-..}: the
first overflows. Instead pairs (i, t) are sorted by the largest aligned block of 2m tokens that they
straddle, i in its first half and t in its second. There both ways to the middle are sums of l <= 0,

    e^{l_{i+1} + ... + l_{t-1}} = e^{l_{i+1} + ... + l_{mid-1}} e^{l_mid + ... + l_{t-1}}

so each of the log2(c) sizes m = 1, 2, 4, ... is one matrix product whose factors are at most 1. Nothing
can overflow, and what underflows is below the rounding of the sum. The exponents are products of l with
constant 0/1 matrices, sums of terms of one sign: no cancellation, however strong the decay.

Backward is the transpose of each line; the gradient of l comes from the exponents where they stand, not
from a suffix sum over all of T, which would cancel. Saved for it: the inputs and M at each chunk's start.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import join_chunks, padding, split_chunks
from ..library import torch_operator

CHUNK = 32
NEGLIGIBLE = -1e4  # e^-10000 is 0 in float64 too; -inf itself would make 0 * inf = NaN in a matrix product


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); every tensor already has the dtype of the sums."""
    log_w = log_w.clamp(min=NEGLIGIBLE)
    if lengths is None:
        if r.shape[1] % CHUNK:
            log_w = log_w.expand_as(
                r
            )  # the last chunk is filled up without decay, so it is not common to all
        y, state, _ = _forward(r, log_w, k, v, u, state)
        return y, state
    # No decay and nothing written: padding leaves the memory as it is.
    ended = padding(lengths, r.shape[1])[:, :, None, None]
    log_w, k = (x.expand_as(r).masked_fill(ended, 0) for x in (log_w, k))
    y, state, _ = _forward(r, log_w, k, v, u, state)
    return y.masked_fill(ended, 0), state


class _Plan(NamedTuple):
    """Constants of a chunk: which log decays add up to each exponent, and which pairs it serves."""

    to_middle: Tensor  # (levels, c, c) 0/1: row t sums the l between t and the middle of its block of 2m
    straddles: Tensor  # (levels, c, c) 0/1: pairs (t, i) in different halves of one block of 2m, i first
    before: Tensor  # (c, c) 0/1: row t sums l_1 ... l_{t-1}
    after: Tensor  # (c, c) 0/1: row i sums l_{i+1} ... l_c


@cache
def _plan(dtype: torch.dtype, device: torch.device) -> _Plan:
    j = torch.arange(CHUNK)
    row, column = j[:, None], j[None, :]
    to_middle, straddles = [], []
    for level in range(CHUNK.bit_length() - 1):
        half = 2**level
        middle = row // (2 * half) * (2 * half) + half
        to_middle.append(((middle <= column) & (column < row)) | ((row < column) & (column < middle)))
        same_block = row // (2 * half) == column // (2 * half)
        straddles.append(same_block & (column < middle) & (middle <= row))
    masks = (torch.stack(to_middle), torch.stack(straddles), column < row, column > row)
    return _Plan(*(mask.to(device=device, dtype=dtype) for mask in masks))


def _chunk_decay(log_w: Tensor, like: Tensor) -> Tensor:
    """(n, G, c, K), or (1, G, c, K) for a decay common to all tokens."""
    B, _, H, K = like.shape
    if log_w.shape[1] == 1:
        return log_w.expand(B, CHUNK, H, K).permute(0, 2, 1, 3).reshape(1, B * H, CHUNK, K)
    return split_chunks(log_w, CHUNK)


@torch_operator("wkv6_chunked")
def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and M at every chunk's start and at the end (n + 1, G, K, V)."""
    R, K, V, L = (
        split_chunks(r, CHUNK),
        split_chunks(k, CHUNK),
        split_chunks(v, CHUNK),
        _chunk_decay(log_w, r),
    )
    plan = _plan(r.dtype, r.device)
    A = _attention(R, K, L, u, plan, r.shape[0])
    kept = (plan.after @ L).exp_()
    D = (K * kept).mT @ V
    decay = L.sum(dim=-2).exp_()[..., None].expand(len(D), -1, -1, -1)
    M = torch.empty((len(D) + 1, *D.shape[1:]), dtype=D.dtype, device=D.device)
    M[0] = state.mT.flatten(0, 1)
    for i in range(len(D)):
        torch.addcmul(D[i], decay[i], M[i], out=M[i + 1])
    Y = A @ V + (R * (plan.before @ L).exp_()) @ M[:-1]
    return join_chunks(Y, v), M[-1].view_as(state.mT).mT.contiguous(), M


def _attention(R: Tensor, K: Tensor, L: Tensor, u: Tensor, plan: _Plan, B: int) -> Tensor:
    """(n, G, c, c): how much of v_i token t reads within its chunk."""
    own = ((R * K).unflatten(1, (B, -1)) * u[:, None, :]).sum(dim=-1).flatten(1, 2)
    A = torch.diag_embed(own)
    for to_middle, straddles in zip(plan.to_middle, plan.straddles, strict=True):
        E = (to_middle @ L).exp_()
        A.addcmul_((R * E) @ (K * E).mT, straddles)
    return A


@_forward.register_fake
def _(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, V, K = state.shape
    n = (r.shape[1] + CHUNK - 1) // CHUNK
    return torch.empty_like(v), torch.empty_like(state), state.new_empty((n + 1, B * H, K, V))


@torch_operator("wkv6_chunked_backward")
def _backward(
    dy: Tensor, dstate: Tensor, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, M: Tensor
) -> list[Tensor]:
    R, K, V, L = (
        split_chunks(r, CHUNK),
        split_chunks(k, CHUNK),
        split_chunks(v, CHUNK),
        _chunk_decay(log_w, r),
    )
    dY = split_chunks(dy, CHUNK)
    B = r.shape[0]
    plan = _plan(r.dtype, r.device)
    read, kept = (plan.before @ L).exp_(), (plan.after @ L).exp_()
    decay = L.sum(dim=-2).exp_()[..., None].expand(len(R), -1, -1, -1)

    # dM[i] is the gradient of the memory before chunk i.
    dM = torch.empty_like(M)
    dM[-1] = dstate.mT.flatten(0, 1)
    from_reading = (R * read).mT @ dY
    for i in reversed(range(len(R))):
        torch.addcmul(from_reading[i], decay[i], dM[i + 1], out=dM[i])

    A = _attention(R, K, L, u, plan, B)
    dV = A.mT @ dY + (K * kept) @ dM[1:]
    dA = dY @ V.mT
    dA_own = dA.diagonal(dim1=-2, dim2=-1)[..., None].unflatten(1, (B, -1))  # (n, B, H, c, 1)
    R_heads, K_heads = R.unflatten(1, (B, -1)), K.unflatten(1, (B, -1))
    du = (dA_own * R_heads * K_heads).sum(dim=(0, 1, 3))
    own_u = dA_own * u[:, None, :]

    # Each exponent's gradient is its factor's value times the factor's gradient.
    d_read, d_kept = dY @ M[:-1].mT * read, V @ dM[1:].mT * kept
    dR, dK = d_read + (own_u * K_heads).flatten(1, 2), d_kept + (own_u * R_heads).flatten(1, 2)
    dL = _like(decay * dM[1:] * M[:-1], decay).sum(dim=-1)[..., None, :]
    dL = (
        plan.before.mT @ _like(d_read * R, L)
        + plan.after.mT @ _like(d_kept * K, L)
        + _like(dL, L[..., :1, :])
    )
    for to_middle, straddles in zip(plan.to_middle, plan.straddles, strict=True):
        E = (to_middle @ L).exp_()
        RE, KE, dA_level = R * E, K * E, dA * straddles
        dRE, dKE = dA_level @ KE, dA_level.mT @ RE
        dR.addcmul_(dRE, E)
        dK.addcmul_(dKE, E)
        dL += to_middle.mT @ _like(dRE * RE + dKE * KE, L)

    if log_w.shape[1] == 1:
        dlog_w = dL.sum(dim=-2).unflatten(1, (B, -1)).sum(dim=(0, 1))[None, None]
    else:
        dlog_w = join_chunks(dL, log_w)
    return [
        join_chunks(dR, r), dlog_w, join_chunks(dK, k), join_chunks(dV, v), du,
        dM[0].view_as(dstate.mT).mT.contiguous(),
    ]  # fmt: skip


def _like(x: Tensor, L: Tensor) -> Tensor:
    """Sum the chunks of x when L is common to them all."""
    return x.sum(dim=0, keepdim=True) if len(L) < len(x) else x


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*inputs[:-1], dstate)]  # the last is M


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward(dy, dstate, *ctx.saved_tensors))


_forward.register_autograd(_differentiate, setup_context=_save)
