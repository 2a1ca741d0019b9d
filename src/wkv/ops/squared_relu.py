"""The channel mix's activation, max(x, 0)^2, in one pass over memory; the gradient 2 max(x, 0) dy in another.

Kept for the gradient: x alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .cheap import cheap
from .common import make_call
from .dispatch import Backend, Operator, never
from .library import torch_operator


def squared_relu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """max(x, 0)^2 for x (..., F) of any float dtype. BackendError."""
    row = OPERATOR.choose(make_call(1, 1, x.dtype, x), backend)
    return cheap(row.run, x)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(grad).mul_(2)


@torch_operator("squared_relu_native")
def _forward(x: Tensor) -> Tensor:
    (y,) = native.empty_like(x)
    native.squared_relu((x,), y, backward=False)
    return y


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    (y,) = native.empty_like(x)
    return y


@torch_operator("squared_relu_native_backward")
def _backward(grad: Tensor, x: Tensor) -> list[Tensor]:
    (dx,) = native.empty_like(x)
    native.squared_relu((grad, x), dx, backward=True)
    return [dx]


@_backward.register_fake
def _(grad: Tensor, x: Tensor) -> list[Tensor]:
    return native.empty_like(x)


_backward.refuse_derivative()
_forward.register_backward(_backward)


def _run_reference(x: Tensor) -> Tensor:
    return _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]


OPERATOR = Operator(
    "squared_relu",
    (Backend("native", _forward, native.refuses), Backend("reference", _run_reference, never)),
)
