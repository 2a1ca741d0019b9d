"""The RWKV-4 operator compiled for the CPU (`native/wkv4.h`): the recurrence itself, with its own backward.

Saved for the backward pass: the inputs alone. The sums are computed again, kept at every sqrt(T)-th token.
"""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..library import torch_operator


@torch_operator("wkv4_native")
def run(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv4`, all float32."""
    y, after = native.empty_like(v, state)
    native.wkv4((log_w, u, k, v, state), (y, after), lengths, backward=False)
    return y, after


@run.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    y, after = native.empty_like(*inputs[3:5])
    return y, after


@torch_operator("wkv4_native_backward")
def _backward(
    dy: Tensor,
    dstate: Tensor,
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    lengths: Tensor | None,
) -> list[Tensor]:
    of_rows = k.new_empty(2, len(k), len(u))
    dk, dv, dbefore = native.empty_like(k, v, state)
    inputs = (log_w, u, k, v, state, dy, dstate)
    native.wkv4(inputs, (*of_rows, dk, dv, dbefore), lengths, backward=True)
    dlog_w, du = of_rows.sum(dim=1)
    return [dlog_w.clone(), du.clone(), dk, dv, dbefore]


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return native.empty_like(*inputs[:5])


_backward.refuse_derivative()
run.register_backward(_backward)
