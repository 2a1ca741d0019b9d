"""The models: one readable file per generation, the machinery once in `base.py`. Start with `rwkv7.py`."""

from __future__ import annotations

import torch

from ..config import Config
from .base import RWKV
from .recipe import Recipe, initialize
from .rwkv4 import RWKV4, RWKV4Block
from .rwkv5 import RWKV5, RWKV5Block
from .rwkv6 import RWKV6, RWKV6Block
from .rwkv7 import RWKV7, RWKV7Block

__all__ = [
    "RWKV",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "RWKV4Block",
    "RWKV5Block",
    "RWKV6Block",
    "RWKV7Block",
    "Recipe",
    "build",
    "initialize",
]

_MODELS: dict[int, type[RWKV]] = {4: RWKV4, 5: RWKV5, 6: RWKV6, 7: RWKV7}


def build(
    config: Config, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> RWKV:
    """A new model with the official initial weights; the same seed gives the same weights on any device.

    On the meta device it has names and shapes but no memory: `wkv.load` fills such a model from a file.
    """
    with torch.device("meta"):
        model = _MODELS[config.generation](config).to(dtype)
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
        model.initialize(seed)
    return model
