"""A model as the compiled engine runs it: one call for all of it, where no gradient is wanted.

The equations that it follows are those of `rwkv4.py` and `rwkv7.py`; their `forward` is the reference that it
is tested against. A model with anything but those blocks, as they are written there, stays with torch.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.native import Parts, Stored
from ..state import LayerState, StackedState, State
from . import rwkv4, rwkv7
from .base import RWKV, Block, Output
from .layers import NORM_EPS, LayerNorm, Linear, RMSNorm
from .quantized import QuantizedLinear

LARGEST_HEAD = 256  # kLargestHead of engine.cc
_KNOWN = {
    rwkv4.RWKV4Block: (rwkv4.TimeMix, rwkv4.ChannelMix),
    rwkv7.RWKV7Block: (rwkv7.TimeMix, rwkv7.ChannelMix),
}
_READ_OUT = (Linear, QuantizedLinear), (LayerNorm, RMSNorm)


def why_not(model: RWKV) -> str | None:
    """The reason why the engine does not run this model, None when it does."""
    if reason := native.why_not():
        return reason
    for block in model.blocks:
        if (type(block.att), type(block.ffn)) != _KNOWN.get(cast("type[Block]", type(block))):
            return f"{type(block).__name__} has no compiled form"
    if type(model.head) not in _READ_OUT[0] or type(model.ln_out) not in _READ_OUT[1]:
        return "its head or its last norm has no compiled form"
    weights = list(model.parameters())
    dtype, device = model.dtype, model.device
    if device.type != "cpu":
        return f"the weights are on {device}, not on the CPU"
    if dtype not in native.FORMATS or any(weight.dtype != dtype for weight in weights):
        return f"the weights are {dtype}, or of several formats"
    if any(type(weight) is not nn.Parameter for weight in weights):
        return "the weights are not plain tensors"
    if any(weight.ndim == 2 and native.lies_by_input(weight) is None for weight in weights):
        return "a matrix has gaps in memory"
    if getattr(model.config, "head_size", 1) > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} channels"
    return None


class CompiledModel:
    """Reads tokens like the model that it stands for, as long as `is_current` says that it may."""

    def __init__(self, model: RWKV) -> None:
        config = model.config
        self._modules = list(model.modules())
        self._places: list[tuple[dict[str, Any], str]] = []
        for module in self._modules:
            for owner in (module._parameters, module._buffers):
                self._places += ((owner, name) for name in owner)
        self._addresses = self._now()
        names = ("n_head", "head_size", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        sizes: Parts = {
            "generation": config.generation,
            "width": config.n_embd,
            "attention": config.dim_att,
            "hidden": config.dim_ffn,
            "squares": int(config.ffn_activation == "relu2"),
            **{name: getattr(config, name) for name in names if hasattr(config, name)},
        }
        blocks = [_tensors(block) | sizes for block in model.blocks]
        whole: Parts = {name: part for name, part in _tensors(model).items() if "blocks." not in name}
        whole["vocabulary"] = config.vocab_size
        head_eps = getattr(config, "group_norm_eps", 0.0)
        self._engine = native.Model(blocks, whole, norm_eps=NORM_EPS, head_eps=head_eps)
        self.dtype = model.dtype
        self._rows = config.vocab_size, config.n_embd

    def is_current(self) -> bool:
        """Whether the weights are where they were, and nobody has hooked into a layer."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._modules[1:])
        return not hooked and self._addresses == self._now()

    def _now(self) -> list[int | None]:
        weights = (owner.get(name) for owner, name in self._places)
        return [None if weight is None else weight.data_ptr() for weight in weights]

    def __call__(self, tokens: Tensor, state: State, output: Output) -> tuple[Tensor, StackedState] | None:
        """What `RWKV.forward` returns; None when a token is not in the vocabulary."""
        B, T = tokens.shape
        before = state.stacked()
        after = LayerState(*(torch.empty(part.shape, dtype=part.dtype) for part in before))
        vocabulary, width = self._rows
        y = torch.empty(B, 1 if output == "last" else T, width if output == "hidden" else vocabulary)
        if not self._engine.run(tokens.contiguous(), before, after, output, y):
            return None
        return native.converted(y, self.dtype), StackedState(after, self)


def _tensors(module: nn.Module) -> Parts:
    """All weights of a module, with the names that they have there."""
    parts: Parts = {name: Stored.plain(weight.detach()) for name, weight in module.named_parameters()}
    for name, inside in module.named_modules():
        if isinstance(inside, QuantizedLinear):
            parts[f"{name}.weight"] = Stored(inside.weight, native.QUANTIZED[inside.bits], inside.by_input)
            parts[f"{name}.scales"] = Stored.plain(inside.scales)
    return parts


_KEPT: WeakKeyDictionary[RWKV, CompiledModel] = WeakKeyDictionary()


def compiled_model(model: RWKV, state: State) -> CompiledModel | str:
    """The model in the engine's hands, or the reason why it cannot be.

    Where the weights are is looked up whenever a model begins to read. Not again while it goes on from a
    state that it has just made: that would cost more than some models' layers.
    """
    kept = _KEPT.get(model)
    if kept is not None and (state.made_by is kept or kept.is_current()):
        return kept
    if reason := why_not(model):
        return reason
    made = _KEPT[model] = CompiledModel(model)
    return made if made.is_current() else "a layer has a hook, which would not be called"
