"""The token mix compiled for the CPU (`native/shift.h`): one pass over memory forward, one backward."""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..library import torch_operator


def run(x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None, towards: str) -> tuple[Tensor, ...]:
    """Shapes as in `token_mix`, float32; weights (n, D) or (n, B, T, D), starts (B, T) bool or None."""
    return tuple(_forward(x, last, weights if towards == "before" else 1 - weights, starts))


@torch_operator("token_mix_native")
def _forward(x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None) -> list[Tensor]:
    mixed = native.empty_like(*[x] * len(weights))
    native.token_mix((x, last, weights, starts), mixed, backward=False)
    return mixed


@_forward.register_fake
def _(x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None) -> list[Tensor]:
    return native.empty_like(*[x] * len(weights))


@torch_operator("token_mix_native_backward")
def _backward(
    grads: list[Tensor], x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None
) -> list[Tensor]:
    gradients = native.empty_like(x, last, weights)
    native.token_mix((x, last, weights, starts, *grads), gradients, backward=True)
    return gradients


@_backward.register_fake
def _(grads: list[Tensor], *inputs: Tensor) -> list[Tensor]:
    return native.empty_like(*inputs[:3])


_backward.refuse_derivative()
_forward.register_backward(_backward)
