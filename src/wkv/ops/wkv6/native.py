"""The RWKV-5 and 6 operator compiled for the CPU (`native/wkv67.h`): the recurrence, with its own backward.

Saved for the backward pass: the inputs alone. The memory is computed again, kept at every sqrt(T)-th token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..library import torch_operator


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); all float32."""
    y, state = _forward(r, log_w, k, v, u, state, lengths)
    return y, state


def is_constant(log_w: Tensor, r: Tensor) -> bool:
    """Whether log_w (1, 1, H, K) is the decay of every token."""
    return log_w.shape != r.shape


@torch_operator("wkv6_native")
def _forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, after = native.empty_like(v, state)
    inputs = (r, log_w, k, v, u, state)
    native.wkv6(inputs, (y, after), lengths, backward=False, constant_decay=is_constant(log_w, r))
    return y, after


@_forward.register_fake
def _(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, after = native.empty_like(v, state)
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy, dstate, *ctx.saved_tensors), None)


_forward.register_autograd(_differentiate, setup_context=_save)
