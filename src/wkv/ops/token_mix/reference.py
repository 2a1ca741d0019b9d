"""The token mix by torch's own operations, the definition; in four passes over memory per mix, both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def run(x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None, towards: str) -> tuple[Tensor, ...]:
    """Shapes as in `token_mix`; weights (n, D) or (n, B, T, D), starts (B, T) bool or None."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, last, weights)):
        mixed: tuple[Tensor, ...] = _Mix.apply(x, last, weights, starts, towards)  # type: ignore[no-untyped-call]
        return mixed
    return _mix(x, last, weights, starts, towards)


def _mix(x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None, towards: str) -> tuple[Tensor, ...]:
    near, far = _ends(x, last, starts, towards)
    return tuple(torch.lerp(near, far, m) for m in weights)


def _ends(x: Tensor, last: Tensor, starts: Tensor | None, towards: str) -> tuple[Tensor, Tensor]:
    """What a weight of 0 takes, and a weight of 1."""
    before = last[:, None] if x.shape[1] == 1 else torch.cat((last[:, None], x[:, :-1]), dim=1)
    if starts is not None:
        before = before.masked_fill(starts[..., None], 0)
    return (x, before) if towards == "before" else (before, x)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None, towards: str
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, weights, starts)
        ctx.towards = towards
        return _mix(x, last, weights, starts, towards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, weights, starts = ctx.saved_tensors
        near, far = _ends(x, last, starts, ctx.towards)
        way = far - near
        to_near, to_far = torch.zeros_like(x), torch.zeros_like(x)
        d_weights = []
        for grad, m in zip(grads, weights, strict=True):
            to_near += grad
            to_far.addcmul_(grad, m)
            d_weights.append((grad * way).sum_to_size(m.shape))
        to_near -= to_far
        dx, d_before = (to_near, to_far) if ctx.towards == "before" else (to_far, to_near)
        if starts is not None:
            d_before.masked_fill_(starts[..., None], 0)
        dx[:, :-1] += d_before[:, 1:]
        return dx, d_before[:, 0], torch.stack(d_weights), None, None
