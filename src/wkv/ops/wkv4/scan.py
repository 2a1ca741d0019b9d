"""The RWKV-4 operator as a two-level scan over time, with its own backward.

A sum x e^p that fades by log_w per token is a pair (x, p); two of them add up as

    (x, p) + (x', p') = (e^{p-q} x + e^{p'-q} x', q),   q = max(p, p')         no factor exceeds 1

which is associative, so time may be cut anywhere. Here it is cut into about sqrt(T) pieces of sqrt(T)
tokens: one loop walks all pieces side by side from an empty sum, a second carries the sums from piece to
piece, and a last line adds the two. That is 2 sqrt(T) steps instead of T, and, unlike a tree of log2(T)
levels, each token is touched a fixed number of times.

Backward, with the sums A_t = sum_{i<t} e^{(t-1-i) log_w + k_i} v_i and B_t (the same without v) before
token t, Z_t = B_t + e^{u+k_t} and y_t = wkv_t. What later outputs want of token i,

    alpha_i = sum_{t>i} e^{(t-1-i) log_w} dy_t / Z_t,    beta_i = -sum_{t>i} e^{(t-1-i) log_w} y_t dy_t / Z_t

is the same scan run from the end, with exponents -log Z_t; a gradient of the final state is one more
leaf, one position after the last token. Then

    dv_i     = e^{k_i} alpha_i + e^{u+k_i} dy_i / Z_i
    dk_i     = e^{k_i} (alpha_i v_i + beta_i) + e^{u+k_i} (v_i - y_i) dy_i / Z_i
    dlog_w   = sum_i e^{log_w} (alpha_i A_i + beta_i B_i)
    du       = sum_i e^{u+k_i} (v_i - y_i) dy_i / Z_i
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import padding
from ..library import torch_operator
from .reference import EMPTY


def run(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv4`; every tensor already has the dtype of the sums."""
    y, state = _forward(log_w, u, k, v, state, lengths)
    return y, state


def fading_sums(
    log_w: Tensor, x: Tensor, p: Tensor, x_start: Tensor, p_start: Tensor
) -> tuple[Tensor, Tensor]:
    """All prefixes of a fading sum: row t holds the sum of the start and the leaves 0 ... t-1.

    x (T, S, B, A) S sums that share the exponents p (T, B, A); start (S, B, A) and (B, A).
    Returns (T + 1, S, B, A) and (T + 1, B, A).
    """
    T, S, B, A = x.shape
    size = max(1, math.isqrt(T))
    pieces = -(-T // size)
    fill = pieces * size - T
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, fill)).view(pieces, size, S, B, A)
    p = torch.nn.functional.pad(p, (0, 0, 0, 0, 0, fill), value=EMPTY).view(pieces, size, B, A)

    # 1. Inside every piece, side by side, from an empty sum.
    inner_x = x.new_zeros(size + 1, pieces, S, B, A)
    inner_p = p.new_full((size + 1, pieces, B, A), EMPTY)
    for j in range(size):
        old, new, inner_p[j + 1] = _weights(inner_p[j] + log_w, p[:, j])
        torch.mul(old[:, None], inner_x[j], out=inner_x[j + 1])
        inner_x[j + 1].addcmul_(new[:, None], x[:, j])

    # 2. From piece to piece.
    start_x, start_p = x.new_empty(pieces, S, B, A), p.new_empty(pieces, B, A)
    for i in range(pieces):
        start_x[i], start_p[i] = x_start, p_start
        old, new, p_start = _weights(p_start + size * log_w, inner_p[size, i])
        x_start = old * x_start + new * inner_x[size, i]

    # 3. Every position: its piece's start, faded, and what the piece has added.
    steps = torch.arange(size, dtype=p.dtype, device=p.device)[:, None, None, None]
    old, new, out_p = _weights(start_p + steps * log_w, inner_p[:size])
    out_x = (old[:, :, None] * start_x).addcmul_(new[:, :, None], inner_x[:size])
    out_x = torch.cat((out_x.transpose(0, 1).flatten(0, 1), x_start[None]))
    out_p = torch.cat((out_p.transpose(0, 1).flatten(0, 1), p_start[None]))
    # Row T stands in place where pieces are filled up: the leaves after it are empty, but they do fade.
    return out_x[: T + 1], out_p[: T + 1]


def _weights(p: Tensor, p_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.maximum(p, p_new)
    return torch.exp(p - q), torch.exp(p_new - q), q


def _prefixes(log_w: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and their exponent before every token and after the last: three (T + 1, B, A)."""
    time_first = v.transpose(0, 1)
    leaves = torch.stack((time_first, torch.ones_like(time_first)), dim=1)
    aa, bb, pp = state.unbind(dim=1)
    x, p = fading_sums(log_w, leaves, k.transpose(0, 1), torch.stack((aa, bb)), pp)
    return x[:, 0], x[:, 1], p


@torch_operator("wkv4_scan")
def _forward(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    T = k.shape[1]
    A, B, p = _prefixes(log_w, k, v, state)
    old, new, _ = _weights(p[:-1], u + k.transpose(0, 1))
    y = ((old * A[:-1]).addcmul_(new, v.transpose(0, 1)) / (old * B[:-1] + new)).transpose(0, 1)
    if lengths is None:
        return y.contiguous(), torch.stack((A[T], B[T], p[T]), dim=1)
    rows = torch.arange(len(k), device=k.device)
    final = torch.stack([x[lengths, rows] for x in (A, B, p)], dim=1)
    return y.masked_fill(padding(lengths, T)[..., None], 0), final


@_forward.register_fake
def _(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(state)


@torch_operator("wkv4_scan_backward")
def _backward(
    dy: Tensor,
    dstate: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    y: Tensor,
    end: Tensor,
) -> list[Tensor]:
    batch, T, _ = k.shape
    A, B, p = _prefixes(log_w, k, v, state)
    k, v, y, dy = (x.transpose(0, 1) for x in (k, v, y, dy))
    own = u + k
    old, new, q = _weights(p[:-1], own)
    Z = old * B[:-1] + new  # times e^q
    if lengths is None:
        lengths = torch.full((batch,), T, device=k.device)
    ended = padding(lengths, T).T[..., None]
    dy = (dy / Z).masked_fill(ended, 0)

    # Leaves of the backward scan, one more than tokens: the outputs, and at `lengths` the final state.
    leaves, exponents = dy.new_zeros(T + 1, 2, *dy.shape[1:]), p.new_full(p.shape, EMPTY)
    leaves[:T, 0], leaves[:T, 1], exponents[:T] = dy, -dy * y, (-q).masked_fill(ended, EMPTY)
    rows = torch.arange(batch, device=k.device)
    leaves[lengths, 0, rows], leaves[lengths, 1, rows] = dstate[:, 0], dstate[:, 1]
    exponents[lengths, rows] = -end[:, 2]
    wanted, rho = fading_sums(
        log_w, leaves.flip(0), exponents.flip(0), torch.zeros_like(leaves[0]), torch.full_like(p[0], EMPTY)
    )
    # Row T - i of the reversed scan holds the leaves after token i; row T + 1 all of them.
    (d_aa, d_bb), start = wanted[T + 1], torch.exp(rho[T + 1] + state[:, 2])
    wanted, rho = wanted[1 : T + 1].flip(0), rho[1 : T + 1].flip(0)
    alpha, beta = wanted.unbind(dim=1)

    later, own = torch.exp(k + rho), torch.exp(own - q) * dy
    d_own = own * (v - y)
    dk = later * (alpha * v + beta) + d_own
    dv = later * alpha + own
    fade = torch.exp(log_w + p[:-1] + rho)
    dlog_w = (fade * (alpha * A[:-1] + beta * B[:-1])).sum(dim=(0, 1))
    dstate_start = torch.stack((start * d_aa, start * d_bb, torch.zeros_like(start)), dim=1)
    dk, dv = (x.transpose(0, 1).contiguous() for x in (dk, dv))
    return [dlog_w, d_own.sum(dim=(0, 1)), dk, dv, dstate_start]


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs[:5]]  # lengths, y and the end have no gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy, dstate, *ctx.saved_tensors), None)


_forward.register_autograd(_differentiate, setup_context=_save)
