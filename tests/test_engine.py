"""The engine: every request gets what it would get alone, whoever comes, goes, or fails beside it."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import CONFIGS, random_tokens, small_model

from wkv.errors import ClosedError, DeadlineError, InputError, OverloadedError, StateError, TokenizerError
from wkv.inference import Engine, Generation, Session, StatePool, Step
from wkv.inference.scheduler import Scheduler
from wkv.models import RWKV
from wkv.ops import native, use_backend
from wkv.state import State
from wkv.tokenizers import bytes_

needs_engine = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def model(name: str = "7", dtype: torch.dtype = torch.float32) -> RWKV:
    return small_model(name, dtype=dtype)


def ids(made: RWKV, n: int, seed: int = 0) -> list[int]:
    return random_tokens(made, 1, n, seed)[0].tolist()


def alone(made: RWKV, prompt: list[int], state: State | None = None, **options: Any) -> list[Step]:
    session = Session(made, None, state)
    session.feed(prompt)
    return list(session.steps(**options))


def assert_same(some: State, others: State) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some.stacked(), others.stacked(), strict=True))


# --- the pool -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_engine), "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pool_reads_like_the_model(name: str, backend: str) -> None:
    made = model(name)
    pool = StatePool(made, 4)
    exact = backend == "native"
    with use_backend(backend), torch.inference_mode():
        assert pool.is_exact == exact
        for turn, sizes in enumerate([{2: 5, 0: 1, 3: 9}, {0: 4, 2: 1}, {1: 3, 0: 1, 3: 1, 2: 2}]):
            before = {slot: pool[slot] for slot in range(4)}
            tokens = {slot: ids(made, n, seed=10 * turn + slot) for slot, n in sizes.items()}
            logits = pool.read(list(tokens.items()))
            for row, (slot, piece) in zip(logits, tokens.items(), strict=True):
                expected, after = made(torch.tensor([piece]), before[slot], output="last")
                if exact:
                    assert torch.equal(row, expected[0, 0])
                    assert_same(pool[slot], after)
                else:
                    torch.testing.assert_close(row, expected[0, 0], rtol=1e-4, atol=1e-4)
            for slot in set(range(4)) - set(sizes):
                assert_same(pool[slot], before[slot])


def test_a_state_comes_out_of_a_pool_and_goes_in_as_a_copy() -> None:
    made = model()
    pool = StatePool(made, 2)
    pool.read([(1, ids(made, 7))])
    kept = pool[1]
    pool[0] = kept
    pool.read([(1, [3])])
    assert_same(pool[0], kept)
    pool.read([(0, [3])])
    assert_same(pool[0], pool[1])


def test_a_pool_refuses_what_it_cannot_read_and_stays_as_it_is() -> None:
    made = model()
    pool = StatePool(made, 2)
    pool.read([(0, [1, 2])])
    before = pool[0]
    for pieces in (
        [],
        [(0, [])],
        [(0, [1]), (0, [2])],
        [(2, [1])],
        [(-1, [1])],
        [(0, [61])],
        [(0, [1]), (1, [-1])],
    ):
        with pytest.raises(InputError):
            pool.read(pieces)  # type: ignore[arg-type]
    assert_same(pool[0], before)
    with pytest.raises(StateError):
        pool[0] = model("4").initial_state(1)
    with pytest.raises(InputError):
        StatePool(made, 0)


# --- requests in company ------------------------------------------------------------------------------------


def some_requests(made: RWKV, n: int, seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    draw = random.Random(seed)
    return [
        (
            ids(made, draw.choice([1, 2, 17, 60]), seed=100 + i),
            {
                "max_tokens": draw.choice([1, 5, 30]),
                "seed": i,
                "temperature": draw.choice([0, 0.7, 1.5]),
                "top_p": draw.choice([0.5, 1.0]),
                "logprobs": draw.choice([None, 0, 3]),
                "stop_tokens": draw.choice([(), (5,)]),
            },
        )
        for i in range(n)
    ]


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
def test_in_company_every_request_gets_the_steps_that_it_gets_alone(name: str, dtype: torch.dtype) -> None:
    made = model(name, dtype)
    requests = some_requests(made, 12, seed=1)
    engine = Engine(made, slots=3, budget=16, budget_beside=4, quantum=7)
    running = [engine.submit(prompt, **options) for prompt, options in requests]
    for (prompt, options), generation in zip(requests, running, strict=True):
        assert list(generation) == alone(made, prompt, **options)
        assert generation.n_prompt == len(prompt)
    assert not engine.step()


def test_without_the_compiled_engine_requests_are_read_too() -> None:
    made = model(dtype=torch.float64)
    requests = some_requests(made, 5, seed=2)
    with use_backend("reference"):
        engine = Engine(made, slots=2, quantum=3)
        running = [engine.submit(prompt, **options) for prompt, options in requests]
        for (prompt, options), generation in zip(requests, running, strict=True):
            expected = alone(made, prompt, **options)
            assert [step.token for step in generation] == [step.token for step in expected]


def test_stop_strings_end_a_text_where_a_session_ends_it() -> None:
    made = small_model(replace(CONFIGS["7"], vocab_size=256), dtype=torch.float32)
    tokenizer = bytes_()
    engine = Engine(made, tokenizer, slots=2)
    free = engine.submit("some text", max_tokens=60, seed=1, stop_tokens=()).text()
    stop = free[20:23]
    session = Session(made, tokenizer)
    session.feed("some text")
    expected = session.generate(60, stop, seed=1, stop_tokens=())
    assert engine.submit("some text", max_tokens=60, seed=1, stop=stop, stop_tokens=()).text() == expected
    assert len(expected) < len(free)


def test_a_request_goes_on_from_a_state_which_stays_as_it_is() -> None:
    made = model()
    session = Session(made, None)
    session.feed(ids(made, 9))
    state = session.state
    kept = state.clone()
    engine = Engine(made, slots=1)
    generation = engine.submit([4], state=state, max_tokens=8, temperature=0)
    for tensor in state.tensors().values():
        tensor.zero_()  # the caller's own, and what it does later is not seen
    found = list(generation)
    state = kept.clone()
    assert [step.token for step in found] == [
        s.token for s in alone(made, [4], state, max_tokens=8, temperature=0)
    ]
    assert_same(state, kept)


@needs_engine
def test_samples_of_one_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    prompt = ids(made, 40)
    read = []
    true_read = StatePool.read
    monkeypatch.setattr(
        StatePool,
        "read",
        lambda pool, pieces: read.extend(len(t) for _, t in pieces) or true_read(pool, pieces),
    )
    engine = Engine(made, slots=2, quantum=4)
    running = engine.samples(5, prompt, max_tokens=9, seed=7, stop_tokens=())
    found = [list(generation) for generation in running]
    assert sum(read) == 40 + 5 * 8  # the last token of each need not be read
    assert found == [alone(made, prompt, max_tokens=9, seed=7 + i, stop_tokens=()) for i in range(5)]
    assert len({tuple(step.token for step in steps) for steps in found}) > 1


# --- coming and going ---------------------------------------------------------------------------------------


def test_a_cancelled_request_ends_and_its_slot_is_the_next_ones() -> None:
    made = model()
    engine = Engine(made, slots=1)
    a, b = (engine.submit([i], max_tokens=1000, stop_tokens=(), seed=0) for i in (1, 2))
    next(a), next(a)
    a.cancel()
    a.cancel()
    assert list(a) == []
    assert a.n_written == 2
    engine.step()
    assert b.n_written == 1
    b.cancel()
    assert not engine.step()


@pytest.mark.parametrize("after_steps", [0, 1, 6])
def test_samples_go_on_when_the_first_of_them_is_cancelled(after_steps: int) -> None:
    made = model()
    prompt = ids(made, 30)
    engine = Engine(made, slots=2, budget=10)
    first, second, third = engine.samples(3, prompt, max_tokens=6, temperature=0, stop_tokens=())
    for _ in range(after_steps):
        engine.step()
    first.cancel()
    third.cancel()
    expected = [step.token for step in alone(made, prompt, max_tokens=6, temperature=0, stop_tokens=())]
    assert [step.token for step in second] == expected
    assert not engine.step()


def test_when_all_samples_are_cancelled_nothing_is_left_to_read() -> None:
    made = model()
    engine = Engine(made, slots=1, budget=10)
    running = engine.samples(3, ids(made, 50), max_tokens=6)
    engine.step()
    for generation in running:
        generation.cancel()
    assert not engine.step()


def test_a_request_whose_time_is_over_says_so() -> None:
    now = [0.0]
    made = model()
    engine = Engine(made, slots=1, clock=lambda: now[0])
    short, *samples = [
        engine.submit([1], max_tokens=1000, stop_tokens=(), timeout=5),
        *engine.samples(2, [2], max_tokens=1000, stop_tokens=(), timeout=6),
    ]
    next(short)
    now[0] = 7.0
    for generation in (short, *samples):
        with pytest.raises(DeadlineError):
            list(generation)
        assert list(generation) == []
    assert not engine.step()


def test_a_full_line_refuses_samples_as_a_whole() -> None:
    engine = Engine(model(), slots=1, max_waiting=3)
    engine.samples(2, [1])
    with pytest.raises(OverloadedError):
        engine.samples(2, [1])  # one waits, and one that it reads for will
    engine.submit([1])
    with pytest.raises(OverloadedError):
        engine.submit([1])


def test_one_row_that_fails_harms_no_other() -> None:
    made = model()
    broken = made.initial_state(1).map(lambda tensor: torch.full_like(tensor, torch.nan))
    engine = Engine(made, slots=3)
    good = [
        engine.submit(ids(made, 5, seed=i), max_tokens=10, temperature=0, stop_tokens=()) for i in range(2)
    ]
    bad = engine.submit([3], state=broken)
    with pytest.raises(InputError, match="best logit is nan"):
        list(bad)
    for i, generation in enumerate(good):
        expected = alone(made, ids(made, 5, seed=i), max_tokens=10, temperature=0, stop_tokens=())
        assert [step.token for step in generation] == [step.token for step in expected]


def test_a_step_that_fails_ends_those_who_took_part_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model()
    engine = Engine(made, slots=2)
    a = engine.submit([1], max_tokens=5, stop_tokens=())
    with monkeypatch.context() as patch:
        patch.setattr(StatePool, "read", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            next(a)
        for generation in engine.samples(2, [1], max_tokens=5):
            with pytest.raises(MemoryError):
                next(generation)
    assert len(list(engine.submit([1], max_tokens=5, stop_tokens=()))) == 5


def test_what_no_request_can_ask_is_refused_before_it_stands_in_line() -> None:
    engine = Engine(model(), slots=1)
    for wrong in (
        {"prompt": [61]},
        {"prompt": []},
        {"prompt": [1], "max_tokens": -1},
        {"prompt": [1], "temperature": float("nan")},
        {"prompt": [1], "logprobs": 1.5},
        {"prompt": [1], "stop_tokens": [99]},
    ):
        with pytest.raises(InputError):
            engine.submit(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError):
        engine.submit("text")
    with pytest.raises(StateError):
        engine.submit([1], state=model("4").initial_state(1))
    with pytest.raises(InputError):
        engine.samples(0, [1])
    assert list(engine.submit([1], max_tokens=0)) == []
    assert not engine.step()


# --- threads ------------------------------------------------------------------------------------------------


@needs_engine
def test_a_thread_of_its_own_serves_many_callers() -> None:
    made = model()
    requests = some_requests(made, 16, seed=3)
    found: dict[int, list[Step]] = {}
    with Engine(made, slots=4, budget_beside=8, quantum=5) as engine:

        def client(i: int) -> None:
            prompt, options = requests[i]
            found[i] = list(engine.submit(prompt, **options))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {i: alone(made, prompt, **options) for i, (prompt, options) in enumerate(requests)}


def test_a_closed_engine_ends_its_requests_and_takes_no_more() -> None:
    generations: list[Generation] = []
    with Engine(model(), slots=1) as engine:
        generations += [engine.submit([i], max_tokens=10**6, stop_tokens=()) for i in (1, 2)]
        next(generations[0])
    for generation in generations:
        with pytest.raises(ClosedError):
            list(generation)
    with pytest.raises(ClosedError):
        engine.submit([1])


def test_a_defect_of_the_engine_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model(), slots=1) as engine:
        generation = engine.submit([1], max_tokens=10**6, stop_tokens=())
        next(generation)
        monkeypatch.setattr(Scheduler, "plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(generation)
        with pytest.raises(ClosedError):
            engine.submit([1])
    with pytest.raises(ClosedError):
        engine.__enter__()
