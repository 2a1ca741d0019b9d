"""Who reads how much in the next step of an engine: slots, budgets and fairness, without a tensor or a clock.

    scheduler = Scheduler(slots=8, max_waiting=64)
    scheduler.add("a", n_prompt=1000, now=0.0)
    while (plan := scheduler.plan(now)).pieces:
        ...                                   # one call of the model reads all pieces
        scheduler.remove("a")                 # when it has written its last token, or was cancelled

A request first reads its prompt and then writes: it reads one token a step, the one that it wrote before.
In a step every writer reads its token, and those who still read prompts share a budget of tokens, so that no
prompt holds up the writers for longer than the budget takes. Half of the budget is for the request that is
first in line, the other half is shared evenly: long prompts end in the order in which they came, short ones
soon.

First in line is who has the least `arrived - patience * priority`: a level of priority is worth so many
seconds of waiting and no more, and nobody waits for ever. While others wait, a writer that has had its
`quantum` of tokens gives its slot away and stands in line again: its state is parked, which costs a copy of
constant size. So more may write than there are slots.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..errors import InputError, OverloadedError

Name = TypeVar("Name", bound=Hashable)


class Piece(NamedTuple, Generic[Name]):
    """What a request reads in a step: `n_tokens` of its prompt from `start` on, or what it wrote."""

    name: Name
    slot: int
    start: int
    n_tokens: int
    writes: bool  # after it the request has read all there is, and its next token can be chosen


class Move(NamedTuple, Generic[Name]):
    """A request and the slot that it leaves or enters."""

    name: Name
    slot: int


@dataclass(frozen=True)
class Plan(Generic[Name]):
    """A step. In this order:

    expired   requests that are gone, because their deadline has passed
    leaving   requests whose state is to be taken out of the slot and kept
    entering  requests whose state is to be put into the slot: that with which they left, or the first
    pieces    what is read, the writers' first
    """

    expired: Sequence[Name]
    leaving: Sequence[Move[Name]]
    entering: Sequence[Move[Name]]
    pieces: Sequence[Piece[Name]]


@dataclass
class _Request(Generic[Name]):
    name: Name
    rank: float  # the least is first in line
    n_prompt: int
    borders: Sequence[int]  # of the prompt, ascending: no piece goes across one
    deadline: float
    lead: float  # in seconds: what its priority is worth
    read: int = 0  # of the prompt
    stay: int = 0  # tokens read since it entered its slot
    slot: int = -1

    @property
    def writes(self) -> bool:
        return self.read == self.n_prompt

    @property
    def readable(self) -> int:
        """Prompt tokens up to the next border."""
        return next((b for b in self.borders if b > self.read), self.n_prompt) - self.read


class Scheduler(Generic[Name]):
    """Requests in slots and in line. All times are of one clock that never goes back, in seconds.

    slots          requests that take part in a step at most
    max_waiting    requests in line at most, beside those that gave their slot away
    budget         prompt tokens of a step in which nobody writes
    budget_beside  the same beside writers
    patience       seconds of waiting that a level of priority is worth
    quantum        tokens that a request reads before it makes room for one in line
    """

    def __init__(
        self,
        slots: int,
        *,
        max_waiting: int = 256,
        budget: int = 512,
        budget_beside: int = 64,
        patience: float = 10.0,
        quantum: int = 512,
    ) -> None:
        least = {"slots": slots, "budget": budget, "budget_beside": budget_beside, "quantum": quantum}
        for name, value in least.items():
            if value < 1:
                raise InputError(f"{name} is {value}", "at least 1")
        self._max_waiting, self._budgets, self._patience = max_waiting, (budget, budget_beside), patience
        self._quantum = quantum
        self._free = list(range(slots))[::-1]
        self._inside: dict[Name, _Request[Name]] = {}
        self._line: dict[Name, _Request[Name]] = {}
        self._parked = 0  # in line, but not for the first time

    @property
    def n_running(self) -> int:
        return len(self._inside)

    @property
    def n_waiting(self) -> int:
        """Requests in line that have never had a slot."""
        return len(self._line) - self._parked

    @property
    def n_parked(self) -> int:
        return self._parked

    def add(
        self,
        name: Name,
        n_prompt: int,
        *,
        now: float,
        priority: int = 0,
        deadline: float = math.inf,
        borders: Sequence[int] = (),
        is_expected: bool = False,
    ) -> None:
        """Put a request in line. OverloadedError when the line is full.

        n_prompt     tokens to read before the first is written; 0: what it reads first is what it wrote first
        borders      places in the prompt, ascending, at which a piece ends: there the state can be kept
        is_expected  there was room for it when it was announced (see `check_room`): it is not refused
        """
        if name in self:
            raise InputError(f"there is a request {name!r} already", "another name")
        if n_prompt < 0:
            raise InputError(f"n_prompt is {n_prompt}", "0 or more")
        if not is_expected:
            self.check_room(1)
        lead = self._patience * priority
        self._line[name] = _Request(name, now - lead, n_prompt, borders, deadline, lead)

    def check_room(self, n: int) -> None:
        """OverloadedError unless n more requests may stand in line."""
        if self.n_waiting + n > self._max_waiting:
            raise OverloadedError(
                f"{self.n_waiting} requests are waiting, and {n} more want to",
                f"{self._max_waiting} at most",
                "again in a moment",
            )

    def remove(self, name: Name) -> None:
        """The request is over: its slot is free for the next plan. Nothing happens if it is gone already."""
        if request := self._inside.pop(name, None):
            self._free.append(request.slot)
        elif request := self._line.pop(name, None):
            self._parked -= request.stay > 0

    def __contains__(self, name: Name) -> bool:
        return name in self._inside or name in self._line

    def plan(self, now: float) -> Plan[Name]:
        """The next step. It counts as done: the next plan goes on behind it."""
        expired = [r.name for r in (*self._inside.values(), *self._line.values()) if r.deadline <= now]
        for name in expired:
            self.remove(name)
        leaving, entering = self._change_places(now)
        return Plan(expired, leaving, entering, self._pieces())

    def _change_places(self, now: float) -> tuple[list[Move[Name]], list[Move[Name]]]:
        line = sorted(self._line.values(), key=lambda request: request.rank)
        sated = [r for r in self._inside.values() if r.writes and r.stay >= self._quantum]
        sated.sort(key=lambda request: request.stay, reverse=True)
        leaving = []
        for request, other in zip(sated, line[len(self._free) :], strict=False):
            if other.rank > now - request.lead:
                break  # it would be behind this one
            leaving.append(Move(request.name, request.slot))
            self.remove(request.name)
            request.rank = now - request.lead
            self._line[request.name] = request
            self._parked += 1
        entering = []
        for request in line[: len(self._free)]:
            del self._line[request.name]
            self._parked -= request.stay > 0
            request.slot, request.stay = self._free.pop(), 0
            self._inside[request.name] = request
            entering.append(Move(request.name, request.slot))
        return leaving, entering

    def _pieces(self) -> list[Piece[Name]]:
        writers = [r for r in self._inside.values() if r.writes]
        readers = sorted((r for r in self._inside.values() if not r.writes), key=lambda r: r.rank)
        shares = _shares([r.readable for r in readers], self._budgets[bool(writers)])
        pieces = [self._piece(request, 1) for request in writers]
        return pieces + [self._piece(r, n) for r, n in zip(readers, shares, strict=True) if n]

    @staticmethod
    def _piece(request: _Request[Name], n_tokens: int) -> Piece[Name]:
        start = request.read
        if not request.writes:
            request.read += n_tokens
        request.stay += n_tokens
        return Piece(request.name, request.slot, start, n_tokens, request.writes)


def _shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Half of the budget for the first, the rest evenly; what one does not want goes to the others."""
    if not wanted:
        return []
    shares = [min(wanted[0], (budget + 1) // 2), *[0] * (len(wanted) - 1)]
    budget -= shares[0]
    open_ = sorted(range(len(wanted)), key=lambda i: wanted[i] - shares[i])
    for place, i in enumerate(open_):
        more = min(wanted[i] - shares[i], -(-budget // (len(open_) - place)))
        shares[i] += more
        budget -= more
    return shares
