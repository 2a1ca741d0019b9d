"""Random calls of every operator, and how to compare two results of one: used by the operator tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv import ops
from wkv.ops.wkv4 import EMPTY

FLOOR = -0.6065306597126334  # log of the strongest decay of RWKV-7


@dataclass(frozen=True)
class Operator:
    """How to call one operator at random. The state is always the last argument."""

    run: Callable[..., tuple[Tensor, Tensor]]
    make: Callable[..., list[Tensor]]
    along_time: tuple[int, ...]  # which arguments have a T axis (axis 1)

    def piece(self, arguments: list[Tensor], start: int, stop: int, state: Tensor) -> list[Tensor]:
        cut = [x[:, start:stop] if i in self.along_time else x for i, x in enumerate(arguments[:-1])]
        return [*cut, state]


def _wkv4(randn: Any, B: int, T: int, H: int, N: int, *, key: float = 1, decay: float = 0) -> list[Tensor]:
    A = H * N
    state = randn(B, 3, A)
    state[:, 1] = state[:, 1].abs() + 0.1
    return [-torch.exp(randn(A) + decay), randn(A), key * randn(B, T, A), randn(B, T, A), state]


def _wkv5(randn: Any, B: int, T: int, H: int, N: int, *, key: float = 1, decay: float = 0) -> list[Tensor]:
    return [
        randn(B, T, H, N), -torch.exp(2 * randn(H, N) + decay), key * randn(B, T, H, N), randn(B, T, H, N),
        randn(H, N), randn(B, H, N, N),
    ]  # fmt: skip


def _wkv6(randn: Any, B: int, T: int, H: int, N: int, *, key: float = 1, decay: float = 0) -> list[Tensor]:
    r, _, k, v, u, state = _wkv5(randn, B, T, H, N, key=key)
    return [r, -torch.exp(2 * randn(B, T, H, N) + decay), k, v, u, state]


def _wkv7(randn: Any, B: int, T: int, H: int, N: int, *, key: float = 1, decay: float = 0) -> list[Tensor]:
    shape = (B, T, H, N)
    return [
        randn(*shape), FLOOR * torch.sigmoid(4 * randn(*shape) + decay), key * randn(*shape), randn(*shape),
        F.normalize(randn(*shape), dim=-1), torch.sigmoid(randn(*shape)), randn(B, H, N, N),
    ]  # fmt: skip


def _time_mix7(
    randn: Any, B: int, T: int, H: int, N: int, *, key: float = 1, decay: float = 0, is_first: bool = False
) -> list[Tensor]:
    A = H * N
    r, w, k, v, a, g, first, s = (randn(B, T, A) for _ in range(8))
    tokens = [r, 4 * w + decay, key * k, v, a, g]
    channels = [randn(A) for _ in range(6)]  # w0, a0, k_k, k_a, weight, bias
    others = [] if is_first else [first, s, randn(A)]
    return [*tokens, *others, *channels, randn(H, N), randn(B, H, N, N)]


def time_mix7(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`ops.time_mix7` of a list. The norm's eps is that of heads of 64."""
    *first, w0, a0, k_k, k_a, weight, bias, r_k, state = arguments[6:]
    names: dict[str, Any] = {
        "w0": w0,
        "a0": a0,
        "k_k": k_k,
        "k_a": k_a,
        "r_k": r_k,
        "norm": (weight, bias, 64e-5),
    }
    names["first"] = tuple(first) or None
    return ops.time_mix7(*arguments[:6], state, **names, **options)


OPERATORS = {
    "wkv4": Operator(ops.wkv4, _wkv4, (2, 3)),
    "wkv5": Operator(ops.wkv5, _wkv5, (0, 2, 3)),
    "wkv6": Operator(ops.wkv6, _wkv6, (0, 1, 2, 3)),
    "wkv7": Operator(ops.wkv7, _wkv7, (0, 1, 2, 3, 4, 5)),
    "time_mix7": Operator(time_mix7, _time_mix7, tuple(range(8))),
}


def arguments(
    name: str,
    B: int,
    T: int,
    H: int = 2,
    N: int = 8,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    fresh: bool = False,
    **settings: Any,
) -> list[Tensor]:
    """Random arguments that require a gradient; `fresh` starts from the state before the first token."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = OPERATORS[name].make(randn, B, T, H, N, **settings)
    if fresh:
        made[-1].zero_()
        if name == "wkv4":
            made[-1][:, 2] = EMPTY
    return [x.to(device, dtype).requires_grad_() for x in made]


def scale_of(name: str, state: Tensor) -> Tensor | float:
    """wkv4's exponent pp (B, 1, A), by which its sums are held divided; 0 for the others."""
    return state[:, 2:].detach() if name == "wkv4" else 0.0


def meaning(name: str, result: tuple[Tensor, Tensor], scale: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """What a result says. wkv4's state means aa e^pp and bb e^pp (here over e^scale)."""
    y, state = result
    if name != "wkv4":
        return y, state
    return y, state[:, :2] * torch.exp(state[:, 2:].detach() - scale)


def with_gradients(
    name: str, inputs: list[Tensor], *, seed: int = 1, scale: Tensor | float = 0.0, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Output and final state, and the gradients of every argument for random gradients of both."""
    outputs = meaning(name, OPERATORS[name].run(*inputs, **options), scale)
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return outputs, torch.autograd.grad(outputs, inputs, seeds)


def largest_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest entry."""
    errors = [
        float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        for x, y in ((x.detach().double(), y.detach().double()) for x, y in zip(found, expected, strict=True))
    ]
    return max(errors)
