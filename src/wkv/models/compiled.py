"""Blocks as the compiled engine runs them: one call per block, where no gradient is wanted.

The equations that it follows are those of `rwkv4.py` and `rwkv7.py`; their `forward` is the reference that it
is tested against. A block that is anything but one of those, as it is written there, stays with torch.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import Segments, native
from ..state import LayerState
from . import rwkv4, rwkv7
from .base import RWKV, Block
from .layers import NORM_EPS

LARGEST_HEAD = 256  # kLargestHead of engine.cc
_KNOWN = {
    rwkv4.RWKV4Block: (rwkv4.TimeMix, rwkv4.ChannelMix),
    rwkv7.RWKV7Block: (rwkv7.TimeMix, rwkv7.ChannelMix),
}


def why_not(block: Block) -> str | None:
    """The reason why the engine does not run this block, None when it does."""
    if reason := native.why_not():
        return reason
    known = _KNOWN.get(type(block))
    if known is None or (type(block.att), type(block.ffn)) != known:
        return f"{type(block).__name__} has no compiled form"
    weights = list(block.parameters())
    dtype, device = weights[0].dtype, weights[0].device
    if device.type != "cpu":
        return f"the weights are on {device}, not on the CPU"
    if dtype not in native.FORMATS or any(weight.dtype != dtype for weight in weights):
        return f"the weights are {dtype}, or of several formats"
    if any(type(weight) is not nn.Parameter for weight in weights):
        return "the weights are not plain tensors"
    if any(weight.ndim == 2 and native.lies_by_input(weight) is None for weight in weights):
        return "a matrix has gaps in memory"
    if getattr(block.ffn.config, "head_size", 1) > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} channels"
    return None


class CompiledBlock:
    """Called like the block that it stands for, as long as `is_current` says that it may be."""

    def __init__(self, block: Block) -> None:
        config = block.ffn.config
        self._modules = list(block.modules())
        self._places = [(m._parameters, name) for m in self._modules for name in m._parameters]
        self._addresses = self._now()
        tensors = {name: weight.detach() for name, weight in block.named_parameters()}
        sizes = {
            "generation": config.generation,
            "width": config.n_embd,
            "attention": config.dim_att,
            "hidden": config.dim_ffn,
            "squares": int(config.ffn_activation == "relu2"),
        }
        names = ("n_head", "head_size", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        sizes |= {name: getattr(config, name) for name in names if hasattr(config, name)}
        head_eps = getattr(config, "group_norm_eps", 0.0)
        self._engine = native.Block(tensors, sizes, norm_eps=NORM_EPS, head_eps=head_eps)
        self._width = config.dim_att

    def is_current(self) -> bool:
        """Whether the weights are where they were, and nobody has hooked into a layer."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)
        return not hooked and self._addresses == self._now()

    def _now(self) -> list[int | None]:
        weights = (parameters.get(name) for parameters, name in self._places)
        return [None if weight is None else weight.data_ptr() for weight in weights]

    def __call__(
        self, x: Tensor, v_first: Tensor | None, state: LayerState, segments: Segments | None
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        source, x = x.contiguous(), torch.empty(x.shape)
        if v_first is None:
            v_first = torch.empty(*x.shape[:2], self._width)
        before = state.att_shift.contiguous(), state.memory.contiguous(), state.ffn_shift.contiguous()
        after = LayerState(*(torch.empty_like(tensor) for tensor in before))
        self._engine.run(source, x, v_first, before, after)
        return x, v_first, after


_KEPT: WeakKeyDictionary[RWKV, list[CompiledBlock]] = WeakKeyDictionary()


def compiled_blocks(model: RWKV) -> list[CompiledBlock] | str:
    """All blocks of the model in the engine's hands, or the reason why one of them cannot be."""
    kept = _KEPT.get(model)
    if kept is not None and all(block.is_current() for block in kept):
        return kept
    blocks = cast("list[Block]", list(model.blocks))
    if reason := next(filter(None, map(why_not, blocks)), None):
        return reason
    made = _KEPT[model] = [CompiledBlock(block) for block in blocks]
    return (
        made if all(block.is_current() for block in made) else "a layer has a hook, which would not be called"
    )
