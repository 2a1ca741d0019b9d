"""A document gives the same logits and gradients alone, in the middle of a row, and cut into batches."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from operators import OPERATORS, arguments, largest_error, meaning
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor

from wkv import ops
from wkv.errors import InputError, StateError
from wkv.models import RWKV
from wkv.ops import Segments
from wkv.state import State

LEARNED_START: dict[str, Any] = {
    f"{name} from a learned state": dataclasses.replace(CONFIGS[name], time_state=True)  # type: ignore[call-arg]
    for name in ("5.2", "6", "7")
}
MODELS: dict[str, Any] = {**CONFIGS, **LEARNED_START}
ROWS = [(name, row.name) for name in OPERATORS for row in ops.OPERATORS[name].backends]
EXACT = 1e-10


def random_starts(B: int, T: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share


def pieces(starts: Tensor, lengths: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, begin, end) of every document, in order."""
    found = []
    for row, marks in enumerate(starts.tolist()):
        end = len(marks) if lengths is None else int(lengths[row])
        borders = [0, *(t for t in range(1, end) if marks[t]), end]
        found += [(row, a, b) for a, b in pairwise(borders)]
    return found


def state_before(model: RWKV, B: int) -> State:
    with torch.no_grad():
        _, state = model(random_tokens(model, B, 6, seed=9))
    return state.map(lambda x: x.requires_grad_())


def value(logits: Tensor, state: State, weights: Tensor) -> Tensor:
    """A number that depends on every logit and on all that a final state says."""
    total = (torch.log_softmax(logits, -1) * weights).sum()
    for layer in state.layers:
        memory = layer.memory
        if memory.ndim == 3:  # RWKV-4 holds its sums over e^pp
            memory = memory[:, :2] * torch.exp(memory[:, 2:].detach())
        total = total + layer.att_shift.sin().sum() + memory.sin().sum() + layer.ffn_shift.sin().sum()
    return total


def gradients(total: Tensor, model: RWKV, state: State) -> list[Tensor]:
    inputs = [*model.parameters(), *state.tensors().values()]
    return list(torch.autograd.grad(total, inputs, materialize_grads=True))


def weights_of(model: RWKV, B: int, T: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(B, T, model.config.vocab_size, generator=generator, dtype=torch.float64)


def alone(
    model: RWKV, tokens: Tensor, start: State, starts: Tensor, lengths: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Every document in a call of its own: the logits (0 in padding) and the same value."""
    B, T = tokens.shape
    logits = torch.zeros(B, T, model.config.vocab_size, dtype=model.dtype)
    total, finals = torch.zeros((), dtype=model.dtype), {}
    for row, a, b in pieces(starts, lengths):
        state = None if a or starts[row, 0] else start[row]
        out, finals[row] = model(tokens[row : row + 1, a:b], state)
        logits[row, a:b] = out[0].detach()
        total = total + (torch.log_softmax(out[0], -1) * weights[row, a:b]).sum()
    end = State.stack([finals[row] for row in range(B)])
    return logits, total + value(torch.zeros(0, 1), end, torch.zeros(0, 1))


CASES = [
    (1, 0.5, False),
    (2, 0.5, True),
    (9, 1, False),
    (40, 0.02, True),
    (75, 0.05, False),
    (75, 0.05, True),
]


@pytest.mark.parametrize(("T", "share", "padded"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_document_has_the_logits_and_gradients_of_the_document_alone(
    name: str, T: int, share: float, padded: bool
) -> None:
    B = 3
    model = small_model(MODELS[name])
    tokens, starts, weights = random_tokens(model, B, T), random_starts(B, T, share), weights_of(model, B, T)
    lengths = torch.tensor([T, 1, (2 * T + 1) // 3]) if padded else None
    start = state_before(model, B)

    logits, state = model(tokens, start, lengths=lengths, starts=starts)
    kept = torch.ones(B, T, 1) if lengths is None else (torch.arange(T) < lengths[:, None])[..., None]
    found = gradients(value(logits, state, weights * kept), model, start)

    expected_logits, total = alone(model, tokens, start, starts, lengths, weights)
    assert float((logits * kept - expected_logits).detach().abs().max()) < EXACT
    for x, y in zip(found, gradients(total, model, start), strict=True):
        assert float((x - y).abs().max()) <= EXACT * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_in_float32_the_two_differ_by_rounding_only(name: str) -> None:
    model = small_model(name, dtype=torch.float32)
    tokens, starts = random_tokens(model, 4, 100), random_starts(4, 100, 0.06)
    exact, _ = copy.deepcopy(model).double()(tokens, starts=starts)
    packed, _ = model(tokens, starts=starts)
    apart = torch.empty_like(packed)
    for row, a, b in pieces(starts, None):
        apart[row, a:b], _ = model(tokens[row : row + 1, a:b])
    # How far rounding carries is the model's own matter: measured on the documents alone.
    rounding = max(float((apart - exact).abs().max()), float(exact.std()) * torch.finfo(torch.float32).eps)
    assert rounding < 1e-2 * float(exact.std())
    assert float((packed - exact).abs().max()) < 5 * rounding


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_nothing_of_what_stands_before_a_document_reaches_it_not_even_a_nan(name: str) -> None:
    model = small_model(name)
    tokens = random_tokens(model, 2, 60)
    for t in (0, 25):
        starts = torch.zeros(2, 60, dtype=torch.bool)
        starts[0, t] = True
        spoilt = state_before(model, 2).map(lambda x: x.index_fill(0, torch.tensor([0]), float("nan")))
        logits, state = model(tokens, spoilt, starts=starts)
        assert not torch.isfinite(logits[0, :t]).any()
        expected, after = model(tokens[:1, t:])
        assert float((logits[0, t:] - expected[0]).abs().max()) < EXACT
        assert all(torch.isfinite(x).all() for x in state.tensors().values())
        for x, y in zip(state[0].tensors().values(), after.tensors().values(), strict=True):
            assert float((x - y).abs().max()) < EXACT


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_start_inside_a_row_nothing_else_is_computed(name: str) -> None:
    model = small_model(name, dtype=torch.float32)
    tokens, start = random_tokens(model, 3, 40), state_before(small_model(name, dtype=torch.float32), 3)
    lengths = torch.tensor([40, 7, 20])
    for options in ({}, {"lengths": lengths}):
        plain, state = model(tokens, start, **options)
        starts = torch.zeros(3, 40, dtype=torch.bool)
        starts[1, 8:] = "lengths" in options  # padding starts nothing
        same, end = model(tokens, start, starts=starts, **options)
        assert torch.equal(plain, same)
        assert all(map(torch.equal, state.tensors().values(), end.tensors().values()))
    starts = torch.zeros(3, 40, dtype=torch.bool)
    starts[:, 0] = True
    fresh, _ = model(tokens)
    assert torch.equal(fresh, model(tokens, start, starts=starts)[0])


@pytest.mark.parametrize("name", ["4", "7"])
def test_recomputed_blocks_see_the_same_documents(name: str) -> None:
    model = small_model(name)
    tokens, starts, weights = random_tokens(model, 2, 40), random_starts(2, 40, 0.1), weights_of(model, 2, 40)
    found = []
    for model.recompute in ("nothing", "cheap", "blocks"):
        start = state_before(model, 2)
        found.append(gradients(value(*model(tokens, start, starts=starts), weights), model, start))
    for expected, *others in zip(*found, strict=True):
        assert all(torch.equal(expected, x) for x in others)


# Operators


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_backend_reads_segments_apart(name: str, row: str, device: torch.device) -> None:
    B, T = 3, 80
    operator = OPERATORS[name]
    dtype, tolerance = (torch.float32, 1e-4) if row == "native" else (torch.float64, 1e-11)
    inputs = arguments(name, B, T, device=device, dtype=dtype)
    fresh = arguments(name, 1, T, device=device, dtype=dtype, seed=1, fresh=True)[-1]
    fresh = fresh.detach().requires_grad_()
    starts, lengths = random_starts(B, T, 0.05), torch.tensor([80, 33, 64])
    segments = Segments.of(starts.to(device), lengths.to(device))
    states = segments.initial(inputs[-1], fresh)
    y, after = operator.run(*inputs[:-1], states, segments=segments, backend=row)
    found = meaning(name, (y, segments.final(after)))

    outputs, finals = torch.zeros_like(y), {}
    for b, begin, end in pieces(starts, lengths):
        state = fresh if begin or starts[b, 0] else inputs[-1][b : b + 1]
        rows = [x[b : b + 1] if i in operator.along_time else x for i, x in enumerate(inputs[:-1])]
        y, finals[b] = operator.run(*operator.piece([*rows, state], begin, end, state), backend="reference")
        outputs[b, begin:end] = y[0]
    expected = meaning(name, (outputs, torch.cat([finals[b] for b in range(B)])))
    assert largest_error(found, expected) < tolerance

    seeds = [torch.randn_like(x) for x in found]
    wanted = [*inputs, fresh]
    pairs = (torch.autograd.grad(x, wanted, seeds, materialize_grads=True) for x in (found, expected))
    assert largest_error(*pairs) < tolerance


def test_calls_are_filled_up_less_than_twofold_and_rows_of_one_document_are_not_copied() -> None:
    starts = random_starts(8, 1000, 0.004)
    plan = Segments.of(starts)._plan
    assert plan is not None
    sizes = [b - a for _, a, b in pieces(starts, None)]
    assert len(plan.place) < 2 * sum(max(size, 32) for size in sizes)
    assert [call.length for call in plan.calls] == sorted({call.length for call in plan.calls})
    starts = torch.zeros(8, 1000, dtype=torch.bool)
    assert Segments.of(starts).starts is None
    starts[3, 0] = True
    assert Segments.of(starts)._plan is None


def test_wrong_starts_are_refused() -> None:
    model = small_model("7")
    tokens = random_tokens(model, 2, 8)
    with pytest.raises(InputError, match=r"starts is torch.int64 of shape \(2, 8\)\. Expected: bool"):
        model(tokens, starts=tokens)
    with pytest.raises(InputError, match=r"shape \(2, 7\)"):
        model(tokens, starts=random_starts(2, 7, 0.5))
    segments = Segments.of(random_starts(2, 40, 0.1))
    *inputs, state = arguments("wkv7", 2, 40)
    with pytest.raises(StateError, match=r"2 states\. Expected: \d+, one per segment"):
        ops.wkv7(*inputs, state, segments=segments)
    states = segments.initial(state, state[:1])
    with pytest.raises(InputError, match="both lengths and segments"):
        ops.wkv7(*inputs, states, segments=segments, lengths=torch.tensor([40, 40]))
    *inputs, _ = arguments("wkv7", 2, 30)
    with pytest.raises(InputError, match="segments of 80 tokens"):
        ops.wkv7(*inputs, states, segments=segments)


# Training on documents longer than a batch


@pytest.mark.parametrize("detached", [False, True], ids=["full", "truncated"])
@pytest.mark.parametrize("name", MODELS)
def test_a_stream_cut_into_batches_has_the_gradients_of_the_full_graph(name: str, detached: bool) -> None:
    B, T, n = 2, 12, 3
    model = small_model(MODELS[name])
    tokens, starts = random_tokens(model, B, n * T), random_starts(B, n * T, 0.06)
    starts[:, 0] = True
    weights = weights_of(model, B, n * T)

    def costs(logits: Tensor, at: int) -> Tensor:
        return (torch.log_softmax(logits, -1) * weights[:, at : at + logits.shape[1]]).sum()

    def in_steps_of(size: int, detach_every: int | None) -> Tensor:
        state, total = None, torch.zeros((), dtype=torch.float64)
        for at in range(0, n * T, size):
            if state is not None and detach_every and at % detach_every == 0:
                state = state.detach()
            logits, state = model(tokens[:, at : at + size], state, starts=starts[:, at : at + size])
            total = total + costs(logits, at)
        return total

    parameters = list(model.parameters())
    if detached:  # as a trainer does it: backward after every batch; against one graph, token by token
        state = None
        for at in range(0, n * T, T):
            logits, state = model(tokens[:, at : at + T], state, starts=starts[:, at : at + T])
            costs(logits, at).backward()
            state = state.detach()
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        expected = torch.autograd.grad(in_steps_of(1, T), parameters, materialize_grads=True)
    else:
        found = torch.autograd.grad(in_steps_of(T, None), parameters, materialize_grads=True)
        expected = torch.autograd.grad(in_steps_of(n * T, None), parameters, materialize_grads=True)
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= EXACT * max(1.0, float(y.abs().max()))
