"""The few layers that every generation uses as they are: matrices, norms, the embedding.

They are torch's own classes with a recipe for each parameter, and uninitialised on construction: a
checkpoint or `initialize` fills them, and no weight is written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, HeadsConfig
from ..ops import cheap, native, squared_relu
from .recipe import Init, Layer, Recipe, ones, parameter, zeros

NORM_EPS = 1e-5


class Linear(nn.Linear):
    """`W x` with W [out, in], no bias. Weight decay applies, as to every `.weight` matrix of the recipe.

    In memory W lies by output, as checkpoints have it. Where torch alone multiplies, on a CPU in float32, it
    lies along its longer axis (a head of 65 536 x 768: 7.4 ms, not 11.6). `sparse`: x is zero in most places,
    and W lies by input, so that what meets a zero need not be read.
    """

    def __init__(self, n_in: int, n_out: int, *, init: Init, muon: bool = True, sparse: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.sparse = sparse
        self.recipes = {"weight": Recipe(init, decay=True, muon=muon)}
        self._lay_out()

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to(dtype), .to(device), ...
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        W = self.weight
        on_cpu = W.device.type in ("cpu", "meta")
        if native.why_not() is None:
            by_input = on_cpu and self.sparse
        else:
            by_input = on_cpu and W.dtype == torch.float32 and len(W) >= W.shape[1]
        if by_input != W.mT.is_contiguous():
            W.data = W.data.mT.contiguous().mT if by_input else W.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if native.takes(x, self.weight):
            return native.product(x, self.weight)
        return super().forward(x)


class Embedding(nn.Embedding):
    """The token vectors [V, D]."""

    def __init__(self, n_vocab: int, n_embd: int, *, init: Init) -> None:
        super().__init__(n_vocab, n_embd)
        self.recipes = {"weight": Recipe(init, decay=True)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""


class LayerNorm(nn.LayerNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPS)
        self.recipes = {"weight": Recipe(ones), "bias": Recipe(zeros)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""

    def forward(self, x: Tensor) -> Tensor:
        if native.takes(x, self.weight):
            return native.normalized(x, self.weight, self.bias, self.eps)
        if torch.is_autocast_enabled(x.device.type):  # on a GPU it norms in float32, the backward pass not
            return super().forward(x)
        return cheap(F.layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPS)
        self.recipes = {"weight": Recipe(ones)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""

    def forward(self, x: Tensor) -> Tensor:
        if native.takes(x, self.weight):
            return native.normalized(x, self.weight, None, NORM_EPS)
        return super().forward(x)


def norm(config: Config) -> LayerNorm | RMSNorm:
    """The norm before each sub-layer, after the embedding and before the head."""
    return LayerNorm(config.n_embd) if config.norm == "layernorm" else RMSNorm(config.n_embd)


class HeadNorm(nn.GroupNorm):
    """GroupNorm with one group per head, over what the heads read (`ln_x`)."""

    def __init__(self, n_head: int, size: int, eps: float, *, init: Init) -> None:
        super().__init__(n_head, size, eps=eps)
        self.recipes = {"weight": Recipe(init), "bias": Recipe(zeros)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""

    def forward(self, y_BTHV: Tensor) -> Tensor:
        """(B, T, H, V) -> rows (B * T, H * V), in the dtype of y: float32 means of float32 sums."""
        B, T, H, V = y_BTHV.shape
        weight, bias = self.weight.to(y_BTHV.dtype), self.bias.to(y_BTHV.dtype)
        return torch.group_norm(y_BTHV.reshape(B * T, H * V), H, weight, bias, self.eps)


def activation(config: Config, hidden: Tensor) -> Tensor:
    """relu(x)^2, or relu(x) where the config says so."""
    return squared_relu(hidden) if config.ffn_activation == "relu2" else F.relu(hidden)


class MatrixMemory(Layer):
    """What the time mixes of generations 5 to 7 have in common: heads, and a matrix per head for a memory.

    `time_state` (H, V, K), where the config has it, is a learned initial memory ("state tuning").
    """

    time_state: nn.Parameter | None

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        H, N = config.n_head, config.head_size
        self.memory_shape = (H, N, N)
        self.time_state = parameter(H, N, N, init=zeros, decay=True) if config.time_state else None

    def initial_memory(self, batch_size: int, like: Tensor) -> Tensor:
        """(B, H, V, K), of the dtype and on the device of `like`."""
        shape = (batch_size, *self.memory_shape)
        return like.new_zeros(shape) if self.time_state is None else self.time_state.to(like).expand(shape)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, A) -> (B, T, H, N)."""
        return x.view(*x.shape[:-1], *self.memory_shape[:2])
