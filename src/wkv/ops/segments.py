"""Several sequences in one row: where each begins and ends, and how an operator reads them apart.

    segments = Segments.of(starts)                           # once per batch
    states = segments.initial(state, fresh)                  # one per segment
    y, states = wkv7(r, log_w, k, v, kappa, a, states, segments=segments)
    state = segments.final(states)                           # one per row, that of its last segment

Where every row is one segment, the operator reads the rows as they are. Otherwise the tokens are copied into
rows of their own, one per segment, and the outputs back. So all backends do it alike and none knows of it,
and nothing of one segment, not even a NaN, can reach another. Segments of similar length share a call, filled
up to the next power of two, but no less than 32 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError, StateError
from .common import padding

SHORTEST = 32  # tokens that a call is filled up to: the chunked forms would do so anyway

Recurrence = Callable[..., tuple[Tensor, Tensor]]
Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """Decorator: torch.compile calls `function` as it is. Its shapes differ from batch to batch."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*arguments)

    return cast(Function, call)


class _Call(NamedTuple):
    """Segments that the operator reads in one call."""

    rows: int
    length: int
    lengths: Tensor | None  # (rows,) int64, None when all have the full length


class _Plan(NamedTuple):
    """Segments sorted by length, and where their tokens are."""

    calls: tuple[_Call, ...]
    place: Tensor  # (P,) int64: the place among the B * T tokens of each token of the calls
    way_back: Tensor  # (B * T,) int64: the inverse; 0 for tokens beyond `lengths`, which have none
    continued: Tensor  # (m,) int64: the segments that go on from their row's state, m <= B ...
    rows: Tensor  # (m,) int64: ... and their rows
    last: Tensor  # (B,) int64: the last segment of each row


@dataclass(frozen=True, eq=False)
class Segments:
    """The sequences in B rows of T tokens; `of` makes one.

    lengths  (B,) int64 valid tokens per row, or None for all T
    starts   (B, T) bool, True where a sequence begins from a fresh state; None when none does
    """

    lengths: Tensor | None
    starts: Tensor | None
    _plan: _Plan | None = None  # None: every row is one segment

    @classmethod
    def of(cls, starts: Tensor | None, lengths: Tensor | None = None) -> Self:
        """From the first token of every sequence. A row's tokens before its first start go on from its state.

        starts and lengths as above; starts beyond a row's length do not count. Copies `starts` to the CPU.
        """
        return cls(lengths, None) if starts is None else cls(lengths, *_find(starts, lengths))

    def initial(self, state: Tensor, fresh: Tensor) -> Tensor:
        """The state before each segment, one entry per segment.

        state  (B, ...) before the first token of every row: of its first segment, unless that starts
        fresh  (1, ...) before every token that starts
        """
        if self.starts is None:
            return state
        if self._plan is None:
            return torch.where(self.starts[:, 0].view(-1, *[1] * (state.ndim - 1)), fresh, state)
        n = sum(call.rows for call in self._plan.calls)
        return fresh.expand(n, *fresh.shape[1:]).index_copy(0, self._plan.continued, state[self._plan.rows])

    def final(self, states: Tensor) -> Tensor:
        """The state after each row, (B, ...), out of those after each segment."""
        return states if self._plan is None else states[self._plan.last]

    def each(
        self, operator: Recurrence, tokens: Sequence[Tensor], states: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`operator` on every segment: its output (B, T, ...) and the state after each segment.

        operator  (*tokens, state=, lengths=) -> (y, state), with one state per row of the tokens
        tokens    (B, T, ...) each
        states    one per segment, as `initial` makes them
        lengths   None: the segments have theirs
        """
        if lengths is not None:
            raise InputError("both lengths and segments", "lengths given to Segments.of")
        if self._plan is None:
            return operator(*tokens, state=states, lengths=self.lengths)
        B, T = tokens[0].shape[:2]
        n = sum(call.rows for call in self._plan.calls)
        if len(self._plan.way_back) != B * T:
            raise InputError(
                f"segments of {len(self._plan.way_back)} tokens", f"{B} x {T}, as the tensors have"
            )
        if len(states) != n:
            raise StateError(
                f"{len(states)} states", f"{n}, one per segment", "segments.initial(state, fresh)"
            )
        if self.lengths is None:
            return _run(operator, tokens, states, self._plan)
        beyond = padding(self.lengths, T)  # of no segment: nothing comes from there, and no gradient either
        tokens = [_zeroed(x, beyond) for x in tokens]
        y, after = _run(operator, tokens, states, self._plan)
        return _zeroed(y, beyond), after


def _zeroed(x: Tensor, where: Tensor) -> Tensor:
    """x (B, T, ...) with zeros where `where` (B, T) says so."""
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - 2)), 0)


@_not_compiled
def _run(
    operator: Recurrence, tokens: Sequence[Tensor], states: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """The calls of `plan`, one after another."""
    sizes = [call.rows * call.length for call in plan.calls]
    columns = [_rearrange(x.flatten(0, 1), plan.place, plan.way_back).split(sizes) for x in tokens]
    states_of_calls = states.split([call.rows for call in plan.calls])
    outputs, after = [], []
    for call, state, *inputs in zip(plan.calls, states_of_calls, *columns, strict=True):
        rows = (x.unflatten(0, (call.rows, call.length)) for x in inputs)
        y, state = operator(*rows, state=state, lengths=call.lengths)
        outputs.append(y.flatten(0, 1))
        after.append(state)
    y = _rearrange(torch.cat(outputs), plan.way_back, plan.place)
    return y.unflatten(0, tokens[0].shape[:2]), torch.cat(after)


@_not_compiled
def _find(starts: Tensor, lengths: Tensor | None) -> tuple[Tensor | None, _Plan | None]:
    """The starts that count, None for none, and the plan where any is inside a row."""
    if lengths is not None:
        starts = starts & ~padding(lengths, starts.shape[1])
    here = starts.cpu()
    if not here.any():
        return None, None
    return starts, _make_plan(here, lengths, starts.device) if here[:, 1:].any() else None


def _make_plan(starts: Tensor, lengths: Tensor | None, device: torch.device) -> _Plan:
    """`starts` is on the CPU, where all of this is done; the result is on `device`."""
    B, T = starts.shape
    stops = torch.full((B,), T) if lengths is None else lengths.cpu()
    begins = starts.clone()
    begins[:, 0] = True
    row, begin = begins.nonzero(as_tuple=True)
    ends_row = torch.cat((row[1:] != row[:-1], torch.tensor([True])))
    size = torch.where(ends_row, stops[row], begin.roll(-1)) - begin

    lengths_of_calls = [SHORTEST << i for i in range(T.bit_length()) if SHORTEST << i < T] + [T]
    steps = torch.tensor(lengths_of_calls)
    filled = steps[torch.bucketize(size, steps)]
    order = filled.argsort(stable=True)
    row, begin, size, filled, ends_row = (x[order] for x in (row, begin, size, filled, ends_row))

    segment = torch.arange(len(size)).repeat_interleave(filled)  # of every token of the calls
    step = torch.arange(len(segment)) - (filled.cumsum(0) - filled)[segment]
    # Padding repeats the segment's last token; the operator's `lengths` leave it out.
    place = (row * T + begin)[segment] + step.minimum((size - 1).clamp(min=0)[segment])
    valid = step < size[segment]
    way_back = torch.zeros(B * T, dtype=torch.int64)
    way_back[place[valid]] = valid.nonzero()[:, 0]

    calls = []
    for length in lengths_of_calls:
        own = size[filled == length]
        if len(own):
            full = bool((own == length).all())
            calls.append(_Call(len(own), length, None if full else own.to(device)))
    continued = (~starts[row, begin]).nonzero()[:, 0]
    last = torch.empty(B, dtype=torch.int64)
    last[row[ends_row]] = ends_row.nonzero()[:, 0]
    indices = (place, way_back, continued, row[continued], last)
    return _Plan(tuple(calls), *(x.to(device) for x in indices))


class _Rearrange(torch.autograd.Function):
    """x[there]. No valid token is taken twice, so the gradient is taken the way back.

    Torch would add gradients up by index instead: several times slower on a CPU, in random order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _rearrange(dy[0], back, there), None, None


def _rearrange(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    return cast(Tensor, _Rearrange.apply(x, there, back))  # type: ignore[no-untyped-call]
