"""The token shift: every position sees its predecessor, mixed in channel by channel (all generations).

shifted_t = x_{t-1},   x_{-1} = the newest input of the call before, zero before the first of a sequence
mix_s(a, b) = a + (b - a) * m_s     with one learned m_s per use s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import check_lengths, check_shapes
from .segments import Segments


def token_shift(
    x: Tensor, last: Tensor, lengths: Tensor | None = None, *, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Return each token's predecessor and the input to carry into the next call.

    x         (B, T, D)
    last      (B, D), the newest input of the call before, dtype of x
    lengths   (B,) int64, valid tokens per row, or None for all T
    segments  sequences within the rows, in place of lengths: before the first token of each is zero
    returns   shifted (B, T, D) and the new `last` (B, D): row b's x at lengths[b] - 1
    """
    if segments is not None:
        shifted, last = token_shift(x, last, segments.lengths)
        if segments.starts is not None:
            shifted = shifted.masked_fill(segments.starts[..., None], 0)
        return shifted, last
    B, T, D = x.shape
    check_lengths("token_shift", lengths, B, T)
    check_shapes("token_shift", (B, D), state=last)
    shifted = last[:, None] if T == 1 else torch.cat((last[:, None], x[:, :-1]), dim=1)
    if lengths is None:
        return shifted, x[:, -1]
    # A row of length 0 keeps what it had.
    with_last = torch.cat((last[:, None], x), dim=1)
    return shifted, with_last[torch.arange(B, device=x.device), lengths]


def mix(a: Tensor, b: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`torch.lerp(a, b, m)` for each m of `weights`, with gradients in half as many passes over memory.

    a, b     (..., D)
    weights  (D), or with axes of length 1 before it
    returns  a (..., D) for each of them
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, *weights)):
        mixed: tuple[Tensor, ...] = _Mix.apply(a, b, *weights)  # type: ignore[no-untyped-call]
        return mixed
    return tuple(torch.lerp(a, b, m) for m in weights)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(a, b, *weights)
        return tuple(torch.lerp(a, b, m) for m in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a, b, *weights = ctx.saved_tensors
        difference = b - a
        total, db = torch.zeros_like(a), torch.zeros_like(b)
        dweights = []
        for grad, m in zip(grads, weights, strict=True):
            total += grad
            db.addcmul_(grad, m)
            dweights.append((grad * difference).sum_to_size(m.shape))
        return total.sub_(db), db, *dweights
