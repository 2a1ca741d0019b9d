"""Long sequences over several processes: each reads a part of every row, and hands its state to the next.

That is all an RWKV needs: no token looks back further than the state. Process r computes block l once it has
finished block l - 1 and process r - 1 has finished block l:

    process 0   block 0  block 1  block 2
    process 1            block 0  block 1  block 2          time ->
    process 2                     block 0  block 1  block 2

So L blocks on W processes take the time of L + W - 1 of the L W small ones that one process would compute one
after another, and what travels per block is one state, whatever the length. Gradients go the same way back.
It is exact: the sum over processes is the gradient of the whole row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models import RWKV
from ..ops import Segments
from ..state import LayerState, State
from .distributed import Group


def read(
    model: RWKV, group: Group, tokens: Tensor, state: State | None = None, *, starts: Tensor | None = None
) -> tuple[Tensor, State]:
    """`model(tokens, state, starts=starts, output="hidden")` on rows that continue from process to process.

    tokens   (B, T) int64, this process's part of every row; parts may differ in length
    state    before the first token of the whole rows: what rank 0 is given counts
    starts   (B, T) bool or None, of these tokens
    returns  (B, T, D), and the state after these tokens: in the last process, after the whole rows

    All processes must also run the backward, and then sum the gradients of the weights.
    """
    segments = None if starts is None else Segments.of(starts)
    if state is None:
        state = model.initial_state(len(tokens))
    x, v_first = model.emb(tokens), None
    layers = []
    for block, layer in zip(model._blocks(), state.layers, strict=True):
        if group.rank > 0:
            x, *received = _Receive.apply(group.rank - 1, x, *layer)  # type: ignore[no-untyped-call]
            layer = LayerState(*received)
        x, v_first, layer = model.run_block(block, x, v_first, layer, segments)
        if group.rank < group.size - 1:
            x = _Send.apply(group.rank + 1, x, *layer)  # type: ignore[no-untyped-call]
        layers.append(layer)
    return model.ln_out(x), State(tuple(layers))


class _Send(torch.autograd.Function):
    """x, after a state was sent to `other`, from where its gradient comes back before that of x goes on."""

    @staticmethod
    def forward(ctx: Any, other: int, x: Tensor, *state: Tensor) -> Tensor:
        ctx.other, ctx.like = other, [(part.shape, part.dtype, part.device) for part in state]
        for part in state:
            dist.send(part.contiguous(), other)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_x: Tensor) -> tuple[Tensor | None, ...]:
        d_state = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        for part in d_state:
            dist.recv(part, ctx.other)
        return None, *d_x, *d_state


class _Receive(torch.autograd.Function):
    """x, and a state from `other`, of the shapes of the one given, to where its gradient is sent."""

    @staticmethod
    def forward(ctx: Any, other: int, x: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.other = other
        state = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in like]
        for part in state:
            dist.recv(part, other)
        return x.view_as(x), *state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_x, *d_state = gradients
        for part in d_state:
            dist.send(part.contiguous(), ctx.other)
        return None, d_x, *(None for _ in d_state)
