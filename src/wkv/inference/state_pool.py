"""The states of many sequences side by side, and one call that reads pieces of any of them.

    pool = StatePool(model, slots=16)
    logits = pool.read([(3, [5, 7, 9]), (0, [2])])    # slot and tokens; (2, V)
    state = pool[3]                                   # copied out
    pool[0] = state                                   # copied in: a fork

Where the compiled engine runs the model, states change in place and a slot's logits and state are the same
bits whatever shares the call with it (`is_exact`). Elsewhere the slots' rows are gathered and put back, and
rounding depends on the company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..models import RWKV
from ..state import LayerState, StackedState, State


class StatePool:
    """`slots` states of a model, all fresh at first."""

    def __init__(self, model: RWKV, slots: int) -> None:
        if slots < 1:
            raise InputError(f"a pool of {slots} slots", "at least one")
        self._model, self._slots = model, slots
        with torch.inference_mode():
            self._fresh = model.initial_state(1)
            whole = model.initial_state(slots).stacked()
            self._whole = LayerState(*(part.clone() for part in whole))

    def __len__(self) -> int:
        return self._slots

    @property
    def is_exact(self) -> bool:
        """Whether what a slot reads never depends, not by a bit, on what is read beside it."""
        with torch.inference_mode():
            return self._model._compiled(self._fresh) is not None

    def __getitem__(self, slot: int) -> State:
        """A copy, of batch size 1."""
        here = self._checked(slot)
        with torch.inference_mode():
            return StackedState(LayerState(*(part[:, here : here + 1].clone() for part in self._whole)))

    def __setitem__(self, slot: int, state: State) -> None:
        """Copy a state of batch size 1 in. StateError for one of another model."""
        here = self._checked(slot)
        self._model.check_state(state, 1)
        with torch.inference_mode():
            for part, row in zip(self._whole, state.stacked(), strict=True):
                part[:, here] = row[:, 0]

    def read(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Each slot reads its tokens; the logits (n, V) after the last of each, in the weights' dtype.

        InputError for a slot that is named twice, a piece without tokens, and ids that the model does not
        have; no state has changed then.
        """
        slots = [self._checked(slot) for slot, _ in pieces]
        lengths = [len(tokens) for _, tokens in pieces]
        if not pieces or len(set(slots)) < len(slots) or not all(lengths):
            raise InputError(
                f"slots {slots} are to read {lengths} tokens", "different slots, and tokens for each"
            )
        tokens = torch.tensor([token for _, piece in pieces for token in piece], dtype=torch.int64)
        self._model._check_tokens(tokens[None], None, None)
        with torch.inference_mode():
            compiled = self._model._compiled(self._fresh)
            rows, sizes = torch.tensor(slots), torch.tensor(lengths)
            if compiled is not None:
                return compiled.read_in_place(tokens, sizes, rows, self._whole)
            return self._read_gathered(tokens, sizes, rows)

    def _read_gathered(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        device = self._model.device
        padded = torch.nn.utils.rnn.pad_sequence(list(tokens.split(lengths.tolist())), batch_first=True)
        slots = slots.to(device)
        before = StackedState(LayerState(*(part[:, slots] for part in self._whole)))
        logits, after = self._model(padded.to(device), before, lengths=lengths.to(device), output="last")
        for part, rows in zip(self._whole, after.stacked(), strict=True):
            part[:, slots] = rows
        return logits[:, 0]

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self._slots:
            raise InputError(f"slot {slot}", f"0 to {self._slots - 1}")
        return slot
