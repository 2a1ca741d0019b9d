"""The RWKV-7 operator compiled for the CPU (`native/wkv67.h`): the recurrence itself, with its own backward.

Saved for the backward pass: the inputs alone. The memory is computed again, kept at every sqrt(T)-th token.
"""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..library import torch_operator


@torch_operator("wkv7_native")
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
    """Shapes as in `wkv7`, all float32."""
    y, after = native.empty_like(v, state)
    native.wkv7((r, log_w, k, v, kappa, a, state), (y, after), lengths, backward=False)
    return y, after


@run.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    y, after = native.empty_like(inputs[3], inputs[6])
    return y, after


@torch_operator("wkv7_native_backward")
def _backward(
    dy: Tensor,
    dstate: Tensor,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    lengths: Tensor | None,
) -> list[Tensor]:
    inputs = (r, log_w, k, v, kappa, a, state)
    gradients = native.empty_like(*inputs)
    native.wkv7((*inputs, dy, dstate), gradients, lengths, backward=True)
    return gradients


@_backward.register_fake
def _(dy: Tensor, dstate: Tensor, *inputs: Tensor) -> list[Tensor]:
    return native.empty_like(*inputs[:7])


_backward.refuse_derivative()
run.register_backward(_backward)
