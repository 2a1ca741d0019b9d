"""The training recipe of a parameter, kept beside its declaration.

RWKV trains well only with a special initialisation, learning-rate multiple and weight-decay choice per
parameter. Here each parameter is declared once, with all three:

    self.w0 = parameter(1, 1, D, init=decay_ramp, lr=2.0)

and the module remembers them by name in `module.recipes`, from which `initialize` fills the weights and
the trainer derives its optimizer groups. So a layer lifted into another network takes its recipe along.
(The recipe sits on the module because loading a checkpoint replaces the parameter itself.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

Shape = tuple[int, ...]
Init = Callable[[Shape, Generator], Tensor]  # float32 on the CPU, whatever the parameter is


@dataclass(frozen=True)
class Recipe:
    """How one parameter is initialised and optimised."""

    init: Init
    lr: float = 1.0  # multiple of the scheduled learning rate
    decay: bool = False  # whether weight decay applies
    muon: bool = False  # a matrix between hidden vectors, which Muon may step


class Layer(nn.Module):
    """A module that remembers the recipe of each parameter that it declares."""

    recipes: dict[str, Recipe]

    def __init__(self) -> None:
        super().__init__()
        self.recipes = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and hasattr(value, "recipe"):
            self.recipes[name] = value.recipe
        super().__setattr__(name, value)


def parameter(*shape: int, init: Init, lr: float = 1.0, decay: bool = False) -> nn.Parameter:
    """An uninitialised parameter with its recipe: `initialize` or a checkpoint fills it."""
    declared = nn.Parameter(torch.empty(shape))
    declared.recipe = Recipe(init, lr, decay)  # type: ignore[attr-defined]
    return declared


@torch.no_grad()
def initialize(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter under `module` from its recipe; the same seed gives the same weights.

    Values are made in float32 and then rounded to the parameter's dtype, so that a bfloat16 model starts
    from the orthogonal matrices that its recipe asks for.
    """
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        recipes: dict[str, Recipe] | None = getattr(child, "recipes", None)
        if recipes is None:
            continue  # somebody else's module, with values of its own
        for name, recipe in recipes.items():
            tensor = child.get_parameter(name)
            tensor.copy_(recipe.init(tuple(tensor.shape), generator))
        for buffer in child.buffers(recurse=False):
            buffer.zero_()


def _empty(shape: Shape) -> Tensor:
    """float32 on the CPU, whatever default dtype and device the program has set."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def constant(value: float) -> Init:
    return lambda shape, generator: _empty(shape).fill_(value)


zeros, ones = constant(0), constant(1)


def uniform(bound: float) -> Init:
    """U(-bound, bound)."""
    return lambda shape, generator: _empty(shape).uniform_(-bound, bound, generator=generator)


def orthogonal(gain: float = 1.0, tall: bool = False) -> Init:
    """A (semi-)orthogonal matrix; `tall` multiplies the gain by sqrt(rows / columns) where that is > 1."""

    def fill(shape: Shape, generator: Generator) -> Tensor:
        rows, columns = shape
        scale = math.sqrt(rows / columns) if tall and rows > columns else 1.0
        return nn.init.orthogonal_(_empty(shape), gain * scale, generator=generator)

    return fill


def per_channel(values: Callable[[Tensor], Tensor]) -> Init:
    """`values(n)` of the channel numbers n = 0, 1, ..., laid out in the parameter's shape."""

    def fill(shape: Shape, generator: Generator) -> Tensor:
        n = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
        return values(n).reshape(shape)

    return fill


def depth(layer: int, n_layer: int) -> tuple[float, float]:
    """How far up a layer is, from 0 to 1, and how much is left, from 1 to almost 0; one layer: 0 and 1."""
    return layer / max(n_layer - 1, 1), 1 - layer / n_layer
