"""The few layers that every generation uses as they are: matrices, norms, the embedding.

They are torch's own classes with a recipe for each parameter, and uninitialised on construction: a
checkpoint or `initialize` fills them, and no weight is written twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, HeadsConfig
from .recipe import Init, Layer, Recipe, ones, parameter, zeros

NORM_EPS = 1e-5


class Linear(nn.Linear):
    """`W x` with W [out, in], no bias. Weight decay applies, as to every `.weight` matrix of the recipe."""

    def __init__(self, n_in: int, n_out: int, *, init: Init) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.recipes = {"weight": Recipe(init, decay=True)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""


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


class RMSNorm(nn.RMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPS)
        self.recipes = {"weight": Recipe(ones)}

    def reset_parameters(self) -> None:
        """Nothing: see the top of this file."""


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
        """(B, T, H, V) -> (B, T, H * V), in the dtype of y: float32 means of float32 sums."""
        y = F.layer_norm(y_BTHV, y_BTHV.shape[-1:], eps=self.eps).flatten(2)
        return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))


def activation(config: Config, hidden: Tensor) -> Tensor:
    """relu(x)^2, or relu(x) where the config says so."""
    hidden = F.relu(hidden)
    return hidden * hidden if config.ffn_activation == "relu2" else hidden


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
