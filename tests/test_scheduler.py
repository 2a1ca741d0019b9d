"""The engine's scheduler: what it promises to each request, and to all of them under random loads."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import random
import sys
from dataclasses import dataclass, field

import pytest

from wkv.errors import InputError, OverloadedError
from wkv.inference import scheduler as module
from wkv.inference.scheduler import Piece, Plan, Scheduler


def scheduler(slots: int = 2, **options: int | float) -> Scheduler:
    return Scheduler(slots, **{"budget": 100, "budget_beside": 10, **options})  # type: ignore[arg-type]


def pieces(plan: Plan) -> dict[object, int]:
    return {piece.name: piece.n_tokens for piece in plan.pieces}


def test_it_imports_nothing_but_the_standard_library_and_errors() -> None:
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert absolute <= sys.stdlib_module_names | {"collections.abc"}
    assert {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level} == {"errors"}


def test_a_prompt_is_read_in_pieces_of_the_budget_and_then_a_token_at_a_time() -> None:
    it = scheduler()
    it.add("a", 230, now=0)
    plans = [it.plan(0) for _ in range(4)]
    assert [(p.start, p.n_tokens, p.writes) for plan in plans for p in plan.pieces] == [
        (0, 100, False),
        (100, 100, False),
        (200, 30, True),
        (230, 1, True),
    ]
    assert [len(plan.entering) for plan in plans] == [1, 0, 0, 0]


def test_what_has_nothing_to_read_writes_at_once() -> None:
    it = scheduler()
    it.add("fork", 0, now=0)
    assert [(p.start, p.n_tokens, p.writes) for p in it.plan(0).pieces] == [(0, 1, True)]


def test_beside_writers_prompts_get_the_small_budget_and_the_writers_their_token() -> None:
    it = scheduler()
    it.add("writer", 1, now=0)
    it.plan(0)
    it.add("reader", 1000, now=0)
    for _ in range(5):
        assert pieces(it.plan(0)) == {"writer": 1, "reader": 10}


def test_the_first_in_line_gets_half_of_the_budget_and_short_prompts_end_soon() -> None:
    it = scheduler(slots=4)
    it.add("first", 1000, now=0)
    it.add("long", 1000, now=1)
    it.add("short", 5, now=2)
    assert pieces(it.plan(3)) == {"first": 50 + 23, "long": 22, "short": 5}


def test_no_piece_goes_across_a_border() -> None:
    it = scheduler()
    it.add("a", 120, now=0, borders=[30, 100, 110])
    assert [it.plan(0).pieces[0].n_tokens for _ in range(4)] == [30, 70, 10, 10]


def test_requests_without_a_slot_wait_in_order() -> None:
    it = scheduler(slots=1)
    for name in "abc":
        it.add(name, 5, now=ord(name))
    assert [move.name for move in it.plan(0).entering] == ["a"]
    assert it.n_waiting == 2
    it.remove("a")
    it.remove("b")
    assert [move.name for move in it.plan(0).entering] == ["c"]


def test_a_priority_is_worth_so_many_seconds_and_no_more() -> None:
    it = scheduler(slots=1, patience=10)
    it.add("urgent", 5, now=20, priority=1)
    it.add("patient", 5, now=9)
    it.add("late", 5, now=11)
    order = []
    for _ in range(3):
        [(name, _)] = it.plan(20).entering
        order.append(name)
        it.remove(name)
    assert order == ["patient", "urgent", "late"]


def test_a_full_line_refuses_and_forgets_nothing() -> None:
    it = scheduler(slots=1, max_waiting=2)
    it.add("a", 5, now=0)
    it.add("b", 5, now=0)
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        it.add("c", 5, now=0)
    it.plan(0)
    it.add("c", 5, now=0)
    assert it.n_running == 1
    assert it.n_waiting == 2


def test_a_deadline_ends_requests_in_line_and_in_slots() -> None:
    it = scheduler(slots=1)
    it.add("inside", 5, now=0, deadline=2)
    it.plan(0)
    it.add("in line", 5, now=0, deadline=1)
    it.add("next", 5, now=0)
    assert it.plan(1).expired == ["in line"]
    plan = it.plan(2)
    assert plan.expired == ["inside"]
    assert pieces(plan) == {"next": 5}


def test_who_has_had_its_quantum_makes_room_and_comes_back() -> None:
    it = scheduler(slots=1, quantum=3)
    it.add("a", 1, now=0)
    it.plan(0)
    it.add("b", 1, now=0)
    seen = [it.plan(time) for time in range(1, 9)]
    assert [next(iter(pieces(plan))) for plan in seen] == ["a", "a", "b", "b", "b", "a", "a", "a"]
    assert [(move.name, move.slot) for move in seen[2].leaving] == [("a", 0)]
    assert [(move.name, move.slot) for move in seen[2].entering] == [("b", 0)]
    assert it.n_parked == 1


def test_nobody_makes_room_for_who_would_stand_behind() -> None:
    it = scheduler(slots=1, quantum=1, patience=100)
    it.add("urgent", 1, now=0, priority=1)
    it.plan(0)
    it.add("other", 1, now=50)
    assert pieces(it.plan(149)) == {"urgent": 1}
    assert pieces(it.plan(150)) == {"other": 1}


@pytest.mark.parametrize("name", ["slots", "budget", "budget_beside", "quantum"])
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        scheduler(**{name: 0})  # type: ignore[arg-type]


def test_names_are_used_once() -> None:
    it = scheduler()
    it.add("a", 5, now=0)
    with pytest.raises(InputError, match="already"):
        it.add("a", 5, now=0)
    it.plan(0)
    with pytest.raises(InputError, match="already"):
        it.add("a", 5, now=0)


@dataclass
class Client:
    n_prompt: int
    n_write: int
    arrives: float
    leaves: float  # cancels then
    deadline: float
    read: int = 0
    written: int = 0
    place: str = "away"  # away, line, slot, gone
    slot: int = -1
    last: float = field(default=math.nan)


class Simulation:
    """An engine that only counts, with clients that come, go and lose patience by lot."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.slots, self.quantum = draw.randint(1, 8), draw.choice([5, 50, 10**9])
        self.budget, self.beside, self.max_waiting = (
            draw.randint(1, 200),
            draw.randint(1, 40),
            draw.randint(1, 30),
        )
        self.it = Scheduler(
            self.slots,
            budget=self.budget,
            budget_beside=self.beside,
            max_waiting=self.max_waiting,
            quantum=self.quantum,
            patience=draw.choice([0.0, 5.0]),
        )
        self.now, self.longest_step = 0.0, 0.0
        self.clients = {f"c{i}": self.client() for i in range(draw.randint(1, 60))}
        self.turned_away = 0

    def client(self) -> Client:
        draw = self.draw
        arrives = draw.uniform(0, 50)
        leaves = arrives + draw.uniform(0, 30) if draw.random() < 0.2 else math.inf
        deadline = arrives + draw.uniform(0, 60) if draw.random() < 0.2 else math.inf
        n_prompt = draw.choice([0, 1, draw.randint(2, 50), draw.randint(50, 2000)])
        return Client(n_prompt, draw.randint(1, 120), arrives, leaves, deadline)

    def run(self) -> None:
        for step in itertools.count():
            assert step < 100_000, "somebody never ends"
            self.arrivals()
            plan = self.it.plan(self.now)
            self.follow(plan)
            if not plan.pieces:
                away = [c.arrives for c in self.clients.values() if c.place == "away"]
                if not away:
                    break
                self.now = max(self.now, min(away))
        assert all(client.place == "gone" for client in self.clients.values())
        assert (self.it.n_running, self.it.n_waiting, self.it.n_parked) == (0, 0, 0)

    def arrivals(self) -> None:
        for name, client in self.clients.items():
            if client.place == "away" and client.arrives <= self.now:
                try:
                    self.it.add(
                        name,
                        client.n_prompt,
                        now=self.now,
                        priority=self.draw.randint(0, 2),
                        deadline=client.deadline,
                    )
                    client.place = "line"
                except OverloadedError:
                    assert self.it.n_waiting == self.max_waiting
                    client.place = "gone"
                    self.turned_away += 1
            elif client.place in ("line", "slot") and client.leaves <= self.now:
                self.it.remove(name)
                client.place = "gone"
        assert self.it.n_waiting <= self.max_waiting

    def follow(self, plan: Plan) -> None:
        for name in plan.expired:
            assert self.clients[str(name)].deadline <= self.now
            self.clients[str(name)].place = "gone"
        for name, slot in plan.leaving:
            client = self.clients[str(name)]
            assert (client.place, client.slot) == ("slot", slot)
            assert client.read == client.n_prompt, "a reader made room"
            client.place = "line"
        for name, slot in plan.entering:
            client = self.clients[str(name)]
            assert client.place == "line"
            assert slot not in [c.slot for c in self.clients.values() if c.place == "slot"]
            client.place, client.slot = "slot", slot
        inside = {name for name, client in self.clients.items() if client.place == "slot"}
        assert len(inside) <= self.slots
        writers = [name for name in inside if self.clients[name].read == self.clients[name].n_prompt]
        assert [piece.name for piece in plan.pieces if piece.name in writers] == [
            piece.name for piece in plan.pieces[: len(writers)]
        ]
        assert {piece.name for piece in plan.pieces} >= set(writers), "a writer was left out"
        read = sum(piece.n_tokens for piece in plan.pieces[len(writers) :])
        assert read <= (self.beside if writers else self.budget)
        assert bool(plan.pieces) == bool(inside), "nobody gets on"
        for piece in plan.pieces:
            self.take(str(piece.name), piece)
        self.now += 0.01 + 0.001 * sum(piece.n_tokens for piece in plan.pieces)

    def take(self, name: str, piece: Piece) -> None:
        client = self.clients[name]
        assert client.slot == piece.slot
        assert piece.start == client.read
        if client.read < client.n_prompt:
            client.read += piece.n_tokens
            assert client.read <= client.n_prompt
        assert piece.writes == (client.read == client.n_prompt)
        client.written += client.read == client.n_prompt
        if client.written == client.n_write:
            self.it.remove(name)
            client.place = "gone"


@pytest.mark.parametrize("seed", range(60))
def test_under_random_loads_nobody_is_lost_starved_or_doubled(seed: int) -> None:
    Simulation(seed).run()


def test_a_stream_of_urgent_requests_does_not_starve_a_patient_one() -> None:
    it = scheduler(slots=1, patience=5)
    it.add("patient", 3, now=0)
    now, served = 0.0, None
    it.add("urgent 0", 3, now=0, priority=3)
    for i in range(1, 100):
        plan = it.plan(now)
        served = plan.pieces[0].name
        if served == "patient":
            break
        it.remove(served)
        now += 1
        it.add(f"urgent {i}", 3, now=now, priority=3)
    assert served == "patient"
    assert now == pytest.approx(15, abs=1)


def test_everybody_writes_when_there_are_more_requests_than_slots() -> None:
    it = scheduler(slots=2, quantum=10)
    for i in range(9):
        it.add(i, 4, now=0)
    written = dict.fromkeys(range(9), 0)
    for step in range(900):
        for piece in it.plan(step).pieces:
            written[piece.name] += piece.writes  # type: ignore[index]
    assert max(written.values()) - min(written.values()) <= 2 * 10
