"""Many texts at a time: requests come and go between steps, and every step reads a piece of each.

    engine = Engine(model, tokenizer, slots=16)
    a = engine.submit("Once upon a time", max_tokens=100)
    b = engine.submit([5, 7, 9], temperature=0)
    for step in a:                    # whoever waits for a step runs the engine,
        print(step.text, end="")
    with engine:                      # or a thread of its own does
        print(b.text())

A request is a place in the scheduler, a slot of the state pool and a sampler. Where the pool is exact
(`StatePool.is_exact`), its tokens and log probabilities are those of the same request alone, and of a
`Session` with the same seed, whatever shares its steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ..errors import ClosedError, DeadlineError, InputError, TokenizerError
from ..models import RWKV
from ..state import State
from ..tokenizers import Tokenizer, check_fits
from .sampling import Sampler, Sampling, is_exempt, log_probabilities
from .scheduler import Piece, Scheduler
from .session import Step, Tail, check_count, checked_ids, checked_stops
from .state_pool import StatePool

_Event = Step | BaseException | None  # None: no more will come


class Generation:
    """What a request writes: iterate over its steps, once. Fit for use by one thread at a time.

    n_prompt   tokens of the prompt
    n_written  tokens chosen so far
    """

    def __init__(
        self, n_prompt: int, wait: Callable[[Generation], None], cancel: Callable[[Generation], None]
    ) -> None:
        self.n_prompt, self.n_written = n_prompt, 0
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._wait, self._cancel = wait, cancel
        self._is_over = False

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step, when there is one. DeadlineError when the time is over before the text is."""
        if self._is_over:
            raise StopIteration
        if self._events.empty():
            self._wait(self)
        event = self._events.get()
        if isinstance(event, Step):
            self._is_over = event.finish is not None
            return event
        self._is_over = True
        raise StopIteration if event is None else event

    def text(self) -> str:
        """All the text that is still to come."""
        return "".join(step.text for step in self)

    def cancel(self) -> None:
        """No more steps; the slot is free within one step of the engine. Nothing happens when it is over."""
        self._cancel(self)


@dataclass(eq=False)
class _Request:
    generation: Generation
    prompt: list[int]  # that it has to read itself
    sampler: Sampler
    tail: Tail[None]
    stop_tokens: frozenset[int]
    left: int  # tokens that it may still write
    logprobs: int | None
    deadline: float
    priority: int
    state: State | None = None  # while it has no slot: what it goes on from; None: fresh
    next: int = -1  # the token that it wrote and reads next
    twins: Sequence[_Request] = ()  # for whom it reads the prompt too
    leader: _Request | None = None  # who reads the prompt for it
    is_live: bool = True  # somebody waits for what it writes

    def give(self, event: _Event) -> None:
        self.generation._events.put(event)

    @property
    def is_wanted(self) -> bool:
        return self.is_live or any(twin.is_live for twin in self.twins)


class Engine:
    """Reads and writes for many requests at once, with `slots` of them in every step.

    The other arguments are those of `Scheduler`. TokenizerError for a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        clock: Callable[[], float] = time.monotonic,
        **scheduling: Any,
    ) -> None:
        if tokenizer is not None:
            check_fits(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer = model, tokenizer
        self.pool = StatePool(model, slots)
        self._scheduler: Scheduler[_Request] = Scheduler(slots, **scheduling)
        self._clock = clock
        self._fresh = model.initial_state(1)
        self._requests: dict[Generation, _Request] = {}  # that are live
        self._changed = threading.Condition()  # guards scheduler and requests; told of new ones
        self._stepping = threading.Lock()  # guards the pool: one step at a time
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, prompt: str | Iterable[int], **options: Any) -> Generation:
        """Put a request in line, from any thread. Options as in `samples`."""
        return self.samples(1, prompt, **options)[0]

    def samples(
        self,
        n: int,
        prompt: str | Iterable[int],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        stop_tokens: Collection[int] | None = None,
        logprobs: int | None = None,
        state: State | None = None,
        priority: int = 0,
        timeout: float = math.inf,
        **sampling: Any,
    ) -> list[Generation]:
        """n continuations of a prompt that is read once. With a seed, that of the i-th is `seed` + i.

        state     to go on from, batch size 1; None: a fresh one
        priority  a request with a higher one is served sooner: see `Scheduler`
        timeout   seconds from now, after which the generations end in a DeadlineError

        The other options are those of `Session.steps`. An empty prompt stands for the end-of-text token.
        OverloadedError when too many wait; InputError for what no request can ask.
        """
        vocab_size = self.model.config.vocab_size
        check_count("max_tokens", max_tokens)
        if logprobs is not None:
            check_count("logprobs", logprobs)
        if n < 1:
            raise InputError(f"{n} samples", "at least one")
        stops = checked_stops(stop)
        if self.tokenizer is None and (stops or isinstance(prompt, str)):
            raise TokenizerError("this engine has no tokenizer", "token ids", "Engine(model, tokenizer)")
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            prompt = self.tokenizer.encode(prompt)
        end = self._end_of_text
        tokens = checked_ids(prompt, vocab_size) or end
        if not tokens:
            raise InputError("the prompt is empty: there is nothing to continue", "some text or token ids")
        last_tokens = frozenset(checked_ids(end if stop_tokens is None else stop_tokens, vocab_size))
        if state is not None:
            self.model.check_state(state, 1)
            state = state.clone()
        settings = Sampling(**sampling)
        known = self.tokenizer.vocab_size if self.tokenizer else None
        made = []
        for i in range(n):
            seed = None if settings.seed is None else settings.seed + i
            request = _Request(
                generation=Generation(len(tokens), self._run_until, self._cancel),
                prompt=tokens,
                sampler=Sampler(with_fields(settings, seed=seed), vocab_size, known),
                tail=Tail(None, stops, self.tokenizer),
                stop_tokens=last_tokens,
                left=max_tokens,
                logprobs=logprobs,
                deadline=self._clock() + timeout,
                priority=priority,
                state=state,
            )
            made.append(request)
        if max_tokens:
            self._welcome(made)
        else:
            for request in made:
                request.give(None)
        return [request.generation for request in made]

    def step(self) -> bool:
        """Read a piece for everybody who is in; False when there was nothing to do."""
        with self._stepping:
            with self._changed:
                plan = self._scheduler.plan(self._clock())
                for request in plan.expired:
                    for each in (request, *request.twins):
                        self._end(
                            each, DeadlineError("the request's time is over", "more time, or fewer tokens")
                        )
            for request, slot in plan.leaving:
                request.state = self.pool[slot]
            for request, slot in plan.entering:
                self.pool[slot] = self._fresh if request.state is None else request.state
                request.state = None
            if plan.pieces:
                self._read(plan.pieces)
            return bool(plan.pieces)

    def close(self) -> None:
        """Stop the thread, and end every request with a ClosedError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all(ClosedError("the engine was closed before the text was complete"))

    def __enter__(self) -> Self:
        if self._is_closed:
            raise ClosedError("the engine is closed", advice="another one")
        self._thread = threading.Thread(target=self._run, name="wkv-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _welcome(self, requests: Sequence[_Request]) -> None:
        """The first reads the prompt for all."""
        leader, *twins = requests
        leader.twins = twins
        for twin in twins:
            twin.leader = leader
        with self._changed:
            if self._is_closed:
                raise ClosedError("the engine is closed")
            expected = sum(request.leader is not None for request in self._requests.values())
            self._scheduler.check_room(len(requests) + expected)
            self._stand_in_line(leader, len(leader.prompt))
            self._requests.update((request.generation, request) for request in requests)
            self._changed.notify()

    def _stand_in_line(self, request: _Request, n_prompt: int) -> None:
        self._scheduler.add(
            request,
            n_prompt,
            now=self._clock(),
            priority=request.priority,
            deadline=request.deadline,
            is_expected=True,
        )

    def _read(self, pieces: Sequence[Piece[_Request]]) -> None:
        wanted = [
            (slot, request.prompt[start : start + n] if start < len(request.prompt) else [request.next])
            for request, slot, start, n, _ in pieces
        ]
        try:
            logits = self.pool.read(wanted)
        except BaseException as error:  # Ctrl-C too: states may be half-way
            with self._changed:
                for request, *_ in pieces:
                    for each in (request, *request.twins):
                        self._end(each, error)
            if not isinstance(error, Exception):
                raise
            return
        with self._changed:
            for piece, row in zip(pieces, logits, strict=True):
                if piece.writes:
                    self._go_on(piece.name, piece.slot, row)

    def _go_on(self, request: _Request, slot: int, logits: Tensor) -> None:
        """Choose the request's next token; after its prompt, that of its twins too."""
        twins, request.twins = request.twins, ()
        for each in (request, *twins):
            if each.is_live:
                self._choose(each, logits)
        for twin in twins:
            if twin.is_live:
                twin.state, twin.leader, twin.prompt = self.pool[slot], None, []
                self._stand_in_line(twin, 0)
        if not request.is_live:
            self._scheduler.remove(request)

    def _choose(self, request: _Request, logits: Tensor) -> None:
        try:
            step = self._next_step(request, logits)
        except Exception as error:  # its own: the others go on
            self._end(request, error)
            return
        request.generation.n_written += 1
        request.give(step)
        if step.finish is not None:
            self._end(request)

    def _next_step(self, request: _Request, logits: Tensor) -> Step:
        sampler, tail = request.sampler, request.tail
        token = sampler.pick(logits)
        logged: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())
        if request.logprobs is not None:
            logged = log_probabilities(logits, token, request.logprobs)
        if token in request.stop_tokens:
            return Step(token, tail.flush(), *logged, "stop")
        piece = self.tokenizer.decode_bytes([token]) if self.tokenizer else b""
        if (stop_at := tail.push(token, piece)) is not None:
            return Step(token, tail.cut(stop_at)[0], *logged, "stop")
        sampler.record(token, penalised=self.tokenizer is None or not is_exempt(piece))
        tail.mark(None)
        request.next = token
        request.left -= 1
        if request.left:
            return Step(token, tail.release(), *logged)
        return Step(token, tail.flush(), *logged, "length")

    def _end(self, request: _Request, event: BaseException | None = None) -> None:
        """It is over. The event is the last that is heard of it; None: its last step was given."""
        if not request.is_live:
            return
        request.is_live = False
        del self._requests[request.generation]
        if event is not None:
            request.give(event)
        for reader in (request, request.leader):
            if reader is not None and not reader.is_wanted:
                self._scheduler.remove(reader)

    def _cancel(self, generation: Generation) -> None:
        with self._changed:
            if request := self._requests.get(generation):
                self._end(request)
                request.give(None)

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            self._is_closed = True
            for request in list(self._requests.values()):
                self._end(request, error)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._requests and not self._is_closed:
                        self._changed.wait()
                    if self._is_closed:
                        return
                self.step()
        except BaseException as error:  # a defect of the engine itself: nobody is to wait for ever
            self._end_all(error)

    def _run_until(self, generation: Generation) -> None:
        """Until it has something to say. With a thread at work that is not ours to do."""
        while self._thread is None and generation._events.empty():
            if not self.step() and self._thread is None and generation._events.empty():
                raise AssertionError("the engine has lost a request")

    @property
    def _end_of_text(self) -> list[int]:
        token = self.tokenizer.end_of_text if self.tokenizer else None
        return [] if token is None else [token]
