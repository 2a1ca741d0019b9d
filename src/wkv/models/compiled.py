"""A model as the compiled engine runs it: one call for all of it, where no gradient is wanted.

The equations that it follows are those of `rwkv4.py` to `rwkv7.py`; their `forward` is the reference that it
is tested against. A model with anything but those blocks, as they are written there, stays with torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.common import padding
from ..ops.native import Parts, Stored
from ..state import LayerState, StackedState, State
from . import rwkv4, rwkv5, rwkv6, rwkv7
from .base import RWKV, Block, Output
from .layers import NORM_EPS, LayerNorm, Linear, RMSNorm
from .quantized import QuantizedLinear

LARGEST_HEAD = 256  # kLargestHead of engine.cc
_KNOWN = {
    rwkv4.RWKV4Block: (rwkv4.TimeMix, rwkv4.ChannelMix),
    rwkv5.RWKV5Block: (rwkv5.TimeMix, rwkv5.ChannelMix),
    rwkv6.RWKV6Block: (rwkv6.TimeMix, rwkv6.ChannelMix),
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
    if any(not _lies_well(module, name) for module in model.modules() for name in module._parameters):
        return "a weight has gaps in memory, or its axes in another order"
    if getattr(model.config, "head_size", 1) > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} channels"
    return None


def _lies_well(module: nn.Module, name: str) -> bool:
    """Matrices may lie either way: those of Linear, and the low-rank pairs w1, w2, ..."""
    weight = module._parameters[name]
    if weight is None or weight.is_contiguous():
        return True
    is_matrix = weight.ndim == 2 and (type(module) is Linear or name.endswith(("1", "2")))
    return is_matrix and native.lies_by_input(weight) is not None


class _Reading(NamedTuple):
    """The tokens (B, T) of a call as the engine takes them: sequence after sequence, without padding.

    tokens   (B, T) int64 where that is all, else (N,)
    lengths  (n,) int64, the tokens of each sequence; None: T each
    slots    their rows of the states before and after; None: sequence i has row i
    valid    (B, T) bool: what is no padding; None: all
    last     (B,) int64: the last sequence of each row; None: sequence i is row i
    """

    tokens: Tensor
    lengths: Tensor | None = None
    slots: tuple[Tensor, Tensor] | None = None
    valid: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Self:
        """Where a sequence starts within a row, its state before is in row B."""
        B, T = tokens.shape
        if lengths is None and starts is None:
            return cls(tokens.contiguous())
        if lengths is None:
            lengths = torch.full((B,), T)
        valid = ~padding(lengths, T)
        if starts is None:
            return cls(tokens[valid], lengths.contiguous(), valid=valid)
        begins = starts.clone()
        begins[:, 0] = True
        place = begins[valid].nonzero()[:, 0]
        row = torch.arange(B).repeat_interleave(lengths)[place]
        before = torch.where(starts[valid][place], B, row)
        sizes = place.diff(append=lengths.sum()[None])
        return cls(tokens[valid], sizes, (before, row), valid, torch.bincount(row).cumsum(0) - 1)

    def outputs(self, output: Output) -> int:
        """How many vectors the engine gives back."""
        if output == "last":
            return len(self.tokens if self.lengths is None else self.lengths)
        return self.tokens.numel()

    def laid_out(self, y: Tensor, output: Output) -> Tensor:
        """Those vectors in the order of the rows: (B or B * T, ...); zeros in padding."""
        if output == "last":
            return y if self.last is None else y[self.last]
        if self.valid is None:
            return y
        whole = y.new_zeros(self.valid.numel(), y.shape[1])
        whole[self.valid.flatten()] = y
        return whole


class CompiledModel:
    """Reads tokens like the model that it stands for, as long as `is_current` says that it may."""

    def __init__(self, model: RWKV) -> None:
        config = model.config
        self._modules = _inside(model)
        self._places: list[tuple[dict[str, Any], str]] = []
        for module in self._modules:
            for owner in (module._parameters, module._buffers):
                self._places += ((owner, name) for name in owner)
        self._addresses = self._now()
        names = ("n_head", "head_size", "mix_rank", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        sizes: Parts = {
            "generation": config.generation,
            "width": config.n_embd,
            "attention": config.dim_att,
            "hidden": config.dim_ffn,
            "squares": int(config.ffn_activation == "relu2"),
            "is_per_head": int(getattr(config, "minor", 2) < 2),
            **{name: getattr(config, name) for name in names if hasattr(config, name)},
        }
        blocks = [_tensors(block) | sizes for block in model.blocks]
        whole: Parts = {name: part for name, part in _tensors(model).items() if "blocks." not in name}
        whole["vocabulary"] = config.vocab_size
        head_eps = getattr(config, "group_norm_eps", 0.0)
        self._engine = native.Model(blocks, whole, norm_eps=NORM_EPS, head_eps=head_eps)
        self.dtype = model.dtype
        self._vocabulary, self._width = config.vocab_size, config.n_embd

    def is_current(self, model: RWKV) -> bool:
        """Whether layers and weights are where they were, and nobody has hooked into a layer."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)
        return not hooked and self._modules == _inside(model) and self._addresses == self._now()

    def _now(self) -> list[int | None]:
        weights = (owner.get(name) for owner, name in self._places)
        return [None if weight is None else weight.data_ptr() for weight in weights]

    def __call__(
        self,
        tokens: Tensor,
        state: State,
        output: Output,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        fresh: State | None = None,
    ) -> tuple[Tensor, StackedState] | None:
        """What `RWKV.forward` returns, zeros in padding; None when a token is not in the vocabulary.

        fresh  the state of one row before a token that starts, where there are `starts`
        """
        before = state.stacked()
        after = LayerState(*(torch.empty(part.shape, dtype=part.dtype) for part in before))
        if fresh is not None:
            before = LayerState(
                *(torch.cat(pair, dim=1) for pair in zip(before, fresh.stacked(), strict=True))
            )
        reading = _Reading.of(tokens, lengths, starts)
        y = torch.empty(reading.outputs(output), self._width if output == "hidden" else self._vocabulary)
        run = self._engine.run
        if not run(reading.tokens, before, after, output, y, lengths=reading.lengths, slots=reading.slots):
            return None
        y = reading.laid_out(native.converted(y, self.dtype), output)
        return y.view(len(tokens), -1, y.shape[1]), StackedState(after, self)

    def read_in_place(self, tokens: Tensor, lengths: Tensor, slots: Tensor, states: LayerState) -> Tensor:
        """Read pieces of several sequences: the logits (n, V) after each one's last token, in the model's
        dtype.

        tokens   (N,) int64, checked: piece after piece, without padding
        lengths  (n,) int64, the tokens of each, at least one
        slots    (n,) int64, all different: the rows of `states` that they go on from, and change
        states   as `State.stacked` has them
        """
        y = torch.empty(len(lengths), self._vocabulary)
        done = self._engine.run(tokens, states, states, "last", y, lengths=lengths, slots=(slots, slots))
        assert done, "a token is out of the vocabulary"
        return native.converted(y, self.dtype)


def _inside(model: RWKV) -> list[nn.Module]:
    """Its layers; not the model itself, which would never be let go by one who holds it."""
    return list(model.modules())[1:]


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
    if kept is not None and (state.made_by is kept or kept.is_current(model)):
        return kept
    if reason := why_not(model):
        return reason
    made = _KEPT[model] = CompiledModel(model)
    return made if made.is_current(model) else "a layer has a hook, which would not be called"
