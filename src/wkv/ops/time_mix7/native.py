"""The time mix of RWKV-7 compiled for the CPU (`native/time_mix7.h`), as one operator with its own backward.

A head's tokens stay in the caches from the projections to the gate. Saved for the backward pass: the inputs
alone; the rest is computed again, the memory kept at every sqrt(T)-th token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..library import torch_operator


def run(*inputs: Any) -> tuple[Tensor, Tensor]:
    """What `_forward` takes, rounded to float32 before and from it after, where that is not its dtype."""
    *tensors, eps, lengths = inputs
    out, state = _forward(*(None if x is None else x.float() for x in tensors), eps, lengths)
    g, w0 = tensors[5], tensors[9]
    return out.to(torch.promote_types(g.dtype, w0.dtype)), state


@torch_operator("time_mix7_native")
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    first: Tensor | None,
    s: Tensor | None,
    state: Tensor,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `time_mix7`, all float32."""
    inputs = (r, w, k, v, a, g, first, s, state, w0, a0, v0, k_k, k_a, r_k, weight, bias)
    out, after = native.empty_like(r, state)
    native.time_mix7(inputs, (out, after), lengths, backward=False, eps=eps)
    return out, after


@_forward.register_fake
def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    out, after = native.empty_like(inputs[0], inputs[8])
    return out, after


@torch_operator("time_mix7_native_backward")
def _backward(
    dout: Tensor, dstate: Tensor, inputs: Sequence[Tensor | None], eps: float, lengths: Tensor | None
) -> list[Tensor]:
    """The gradients of those inputs that there are, in their order."""
    tokens, parameters = inputs[:9], inputs[9:]
    of_tokens = [None if x is None else native.empty_like(x)[0] for x in tokens]
    of_rows = dout.new_empty(len(dout), len(parameters), dout.shape[-1])
    native.time_mix7((*inputs, dout, dstate), (*of_tokens, of_rows), lengths, backward=True, eps=eps)
    summed = of_rows.sum(dim=0)
    of_parameters = [
        None if x is None else dx.view(x.shape).clone() for x, dx in zip(parameters, summed, strict=True)
    ]
    return [dx for dx in (*of_tokens, *of_parameters) if dx is not None]


@_backward.register_fake
def _(dout: Tensor, dstate: Tensor, inputs: Sequence[Tensor | None], *others: Any) -> list[Tensor]:
    return native.empty_like(*(x for x in inputs if x is not None))


def _differentiate(dout: Tensor, dstate: Tensor, *inputs: Any) -> list[Tensor]:
    *tensors, eps, lengths = inputs
    gradients: list[Tensor] = _backward(dout, dstate, tensors, eps, lengths)
    return gradients


_backward.refuse_derivative()
_forward.register_backward(_differentiate)
