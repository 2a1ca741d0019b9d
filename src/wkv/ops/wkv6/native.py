"""The RWKV-5 and 6 operator compiled for the CPU (`native/wkv67.h`): the recurrence, with its own backward.

Saved for the backward pass: the inputs alone. The memory is computed again, kept at every sqrt(T)-th token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..library import torch_operator


@torch_operator("wkv6_native")
def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); all float32."""
    y, after = native.empty_like(v, state)
    inputs = (r, log_w, k, v, u, state)
    native.wkv6(inputs, (y, after), lengths, backward=False, constant_decay=is_constant(log_w, r))
    return y, after


def is_constant(log_w: Tensor, r: Tensor) -> bool:
    """Whether log_w (1, 1, H, K) is the decay of every token."""
    return log_w.shape != r.shape


@run.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    y, after = native.empty_like(inputs[3], inputs[5])
    return y, after


@torch_operator("wkv6_native_backward")
def _backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    lengths: Tensor | None,
) -> list[Tensor]:
    constant_decay = is_constant(log_w, r)
    dr, dk, dv, dbefore = native.empty_like(r, k, v, state)
    du = r.new_empty(len(r), *u.shape)  # of every row, to be added up
    dlog_w = torch.empty_like(du) if constant_decay else native.empty_like(log_w)[0]
    inputs = (r, log_w, k, v, u, state, dy, dstate)
    outputs = (dr, dlog_w, dk, dv, du, dbefore)
    native.wkv6(inputs, outputs, lengths, backward=True, constant_decay=constant_decay)
    if constant_decay:
        dlog_w = dlog_w.sum(dim=0).view_as(log_w)
    return [dr, dlog_w, dk, dv, du.sum(dim=0), dbefore]


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return native.empty_like(*inputs[:6])


_backward.refuse_derivative()
run.register_backward(_backward)
