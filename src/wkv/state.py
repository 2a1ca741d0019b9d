"""The recurrent state: everything a model remembers of the tokens that it has read, as a value.

A model never changes a state that it was given; it returns a new one. So forking a conversation costs
nothing (keep both names), batching is `State.stack`, and taking one row out of a batch is `state[i]`.

Every tensor has the batch first. Per layer:

    att_shift  (B, D)          the newest input of the time mix, for its token shift
    memory     v4   (B, 3, A)  running numerator aa, denominator bb, and their exponent pp
               v5-7 (B, H, V, K)  one matrix per head, rows = value channels, columns = key channels
    ffn_shift  (B, D)          the newest input of the channel mix

The shifts have the dtype of the activations. The memory is float32 (float64 in a float64 model)
whatever the weights are: its decay may be within 1e-4 of 1, and bfloat16 would round that to 1.

Orientation: V x K in the whole library, v5 and v6 included (the official CUDA kernels and
`att.time_state` use it too; the `rwkv` package holds v5 and v6 states as K x V).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from .errors import StateError


class LayerState(NamedTuple):
    """What one block remembers; the module's docstring gives the shapes."""

    att_shift: Tensor
    memory: Tensor
    ffn_shift: Tensor


@dataclass(frozen=True, eq=False)
class State:
    """The memory of a whole model for a batch of sequences."""

    layers: tuple[LayerState, ...]

    @property
    def made_by(self) -> object:
        """Who made it and knows that it fits, if anybody."""
        return None

    def stacked(self) -> LayerState:
        """The tensors of all layers as one: (layers, B, ...), contiguous."""
        return LayerState(*map(torch.stack, zip(*self.layers, strict=True)))

    @property
    def batch_size(self) -> int:
        return self.layers[0].memory.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors: constant, however many tokens were read."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """A new state with `function` applied to every tensor."""
        return State(tuple(LayerState(*map(function, layer)) for layer in self.layers))

    def clone(self) -> State:
        return self.map(torch.clone)

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: int | slice | Tensor) -> State:
        """Some rows of the batch: one (kept as a batch of one), a slice, or a tensor of row numbers."""
        if isinstance(rows, int):
            if not -self.batch_size <= rows < self.batch_size:
                raise StateError(f"row {rows} of a state with {self.batch_size} rows")
            rows = slice(rows, rows + 1 or None)
        return self.map(lambda tensor: tensor[rows])

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """One batch out of several; rows keep their order."""
        if not states:
            raise StateError("no state to stack", "at least one")
        if len({len(state.layers) for state in states}) > 1:
            raise StateError("states of different models cannot be stacked", "states of one model")
        columns = zip(*(state.layers for state in states), strict=True)
        return State(tuple(LayerState(*map(torch.cat, zip(*column, strict=True))) for column in columns))

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors, as a state file holds them: `blocks.0.att_shift`, ..."""
        return {
            f"blocks.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in layer._asdict().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`; StateError when a name is missing or unknown."""
        n_layer = len(tensors) // len(LayerState._fields)
        names = [[f"blocks.{i}.{field}" for field in LayerState._fields] for i in range(n_layer)]
        wrong = set(tensors) ^ {name for row in names for name in row}
        if wrong or not n_layer:
            raise StateError(f"not the tensors of a state: {sorted(wrong)[:3] or 'none at all'}")
        return cls(tuple(LayerState(*(tensors[name] for name in row)) for row in names))


class StackedState(State):
    """A State whose layers lie in one tensor of each kind, (layers, B, ...): cheap to make and go on from."""

    _whole: LayerState
    _made_by: Callable[[], object]  # weak: a state does not keep the weights of a model alive
    _layers: tuple[LayerState, ...] | None

    def __init__(self, whole: LayerState, made_by: object = None) -> None:
        maker = (lambda: None) if made_by is None else weakref.ref(made_by)
        for name, value in {"_whole": whole, "_made_by": maker, "_layers": None}.items():
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> tuple[LayerState, ...]:
        if self._layers is None:
            layers = tuple(map(LayerState, *(part.unbind() for part in self._whole)))
            object.__setattr__(self, "_layers", layers)
        return cast("tuple[LayerState, ...]", self._layers)

    @property
    def made_by(self) -> object:
        return self._made_by()

    def stacked(self) -> LayerState:
        return self._whole

    @property
    def batch_size(self) -> int:
        return self._whole.memory.shape[1]

    def __reduce__(self) -> tuple[type[StackedState], tuple[LayerState]]:
        return StackedState, (self._whole,)
