"""What RWKV promises, measured: two forms of one function, and a token that costs the same anywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from ..models import RWKV


@torch.no_grad()
def parallel_recurrent_difference(model: RWKV, tokens: Tensor) -> float:
    """The largest |difference| of any logit between reading `tokens` (1, T) at once and one by one.

    At once as in training; one by one as in generation, where a backend without gradients may do it.
    """
    with torch.enable_grad():
        at_once = model(tokens)[0].detach()
    state, largest = model.initial_state(), 0.0
    for t in range(tokens.shape[1]):
        one, state = model(tokens[:, t : t + 1], state)
        largest = max(largest, (one[:, 0] - at_once[:, t]).abs().max().item())
    return largest


@torch.no_grad()
def seconds_per_token(
    model: RWKV, tokens: Tensor, positions: Sequence[int], *, repeats: int = 200
) -> list[float]:
    """The median time of one recurrent step at each of `positions` (rising) in `tokens` (1, T).

    The positions take turns, so that a busy moment of the machine hits all of them.
    """
    states, state, position = [], model.initial_state(), 0
    for target in positions:
        for start in range(position, target, 512):
            _, state = model(tokens[:, start : min(start + 512, target)], state, output="last")
        states.append(state)
        position = target

    timings: list[list[float]] = [[] for _ in positions]
    for _ in range(repeats):
        for position, state, taken in zip(positions, states, timings, strict=True):
            started = perf_counter()
            model(tokens[:, position : position + 1], state)
            taken.append(perf_counter() - started)
    return [statistics.median(taken) for taken in timings]
