"""The compiled engine computes what the equations say, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_tokens, small_model
from torch import Tensor, nn

import wkv
from wkv.config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import BackendError, InputError, StateError
from wkv.models import RWKV, compiled, rwkv7
from wkv.models.quantized import quantize
from wkv.ops import native, use_backend
from wkv.ops.dispatch import Operator
from wkv.state import LayerState, State

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no engine: {native.why_not()}")

FORMATS = list(native.FORMATS)
TIERS = ["int8", "int4"]
ROUNDING = {dtype: 20 * torch.finfo(dtype).eps for dtype in FORMATS}  # relative, of a whole small model


def config(generation: int, *, width: int = 48, head: int = 16, hidden: int = 80, **others: object) -> Config:
    sizes = {"vocab_size": 61, "n_layer": 3, "n_embd": width, "dim_att": width, "dim_ffn": hidden, **others}
    if generation == 4:
        return RWKV4Config(**sizes)
    if generation == 5:
        return RWKV5Config(**sizes, head_size=head)
    if generation == 6:
        return RWKV6Config(**sizes, head_size=head, mix_rank=7, decay_rank=11)
    ranks = dict(decay_rank=6, rate_rank=5, value_rank=4, gate_rank=19)
    return RWKV7Config(**sizes, head_size=head, **ranks)


SHAPES = {
    "4": config(4),
    "4 odd": config(4, width=37, hidden=83),
    "5.0": config(5, minor=0, bonus="time_first"),
    "5.0 raw bonus": config(5, minor=0, width=36, head=12),
    "5.1": config(5, minor=1, bonus="time_first", width=40, head=8, hidden=41),
    "5.2": config(5),
    "5.2 heads of 12": config(5, width=36, head=12, hidden=41, norm="rmsnorm"),
    "5.2 one head of 5": config(5, width=5, head=5, hidden=3, ffn_activation="relu"),
    "5.2 heads of 128": config(5, width=256, head=128, n_layer=2),
    "5.2 more channels in the mix": config(5, dim_att=64),
    "5.2 learned state": config(5, n_layer=2, time_state=True),
    "6": config(6),
    "6 heads of 12": config(6, width=36, head=12, hidden=41),
    "6 one head of 5": config(6, width=5, head=5, hidden=3, ffn_activation="relu"),
    "6 heads of 128": config(6, width=256, head=128, n_layer=2),
    "6 fewer channels in the mix": config(6, dim_att=32, norm="rmsnorm"),
    "6 learned state": config(6, n_layer=2, time_state=True),
    "7": config(7),
    "7 heads of 8": config(7, width=40, head=8),
    "7 heads of 12": config(7, width=36, head=12, hidden=41),
    "7 one head of 5": config(7, width=5, head=5, hidden=3),
    "7 heads of 128": config(7, width=256, head=128, n_layer=2),
    "7 relu": config(7, ffn_activation="relu"),
    "7 rms": config(7, norm="rmsnorm"),
    "7 learned state": config(7, n_layer=2, time_state=True),
}


@pytest.fixture(params=native.engines())
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "engines", lambda: [request.param])
    compiled._KEPT.clear()
    return str(request.param)


@pytest.fixture(autouse=True)
def own_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def prepared(shape: str, form: torch.dtype | str) -> RWKV:
    if isinstance(form, torch.dtype):
        return small_model(SHAPES[shape], dtype=form)
    return quantize(small_model(SHAPES[shape], dtype=torch.float32), form)


def error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def same(a: State, b: State) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))


@torch.no_grad()
def native_run(
    model: RWKV, tokens: Tensor, state: State | None = None, **how: object
) -> tuple[Tensor, State]:
    with use_backend("native"):
        return model(tokens, state, **how)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_and_states_are_those_of_the_equations(engine: str, shape: str, dtype: torch.dtype) -> None:
    model = prepared(shape, dtype)
    exact = copy.deepcopy(model).double()
    tokens = random_tokens(model, 3, 20)
    more = random_tokens(model, 3, 1, seed=1)  # and on from there, one token

    def run(model: RWKV, backend: str) -> list[Tensor]:
        with use_backend(backend):
            logits, state = model(tokens)
            return [logits, model(more, state)[0], *(tensor for layer in state.layers for tensor in layer)]

    expected, plain, found = run(exact, "reference"), run(model, "reference"), run(model, "native")
    for ours, theirs, value in zip(found, plain, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, value) <= 4 * (error(theirs, value) + torch.finfo(dtype).eps)


ROWS = ["4 odd", "5.0", "5.1", "5.2 heads of 12", "6", "6 heads of 12", "7", "7 heads of 12"]


@pytest.mark.parametrize("forms", [[torch.float32], [*FORMATS[1:], *TIERS]])
@pytest.mark.parametrize("shape", ROWS)
@given(data=st.data())
def test_a_rows_bits_depend_on_the_row_alone(
    shape: str, forms: list[torch.dtype | str], data: st.DataObject
) -> None:
    model = prepared(shape, data.draw(st.sampled_from(forms)))
    rows, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    tokens = random_tokens(model, rows, T)
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    together, state = native_run(model, tokens)
    row = data.draw(st.integers(0, rows - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=5)) if T > 1 else [])
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    own, pieces = None, []
    for start, stop in itertools.pairwise([0, *cuts, T]):
        logits, own = native_run(model, tokens[row : row + 1, start:stop], own)
        pieces.append(logits)
    assert own is not None
    assert torch.equal(torch.cat(pieces, dim=1)[0], together[row])
    assert same(own, state[row])


@pytest.mark.parametrize("shape", ["4 odd", "5.1", "5.2", "6", "7"])
@given(data=st.data())
def test_a_padded_rows_bits_are_those_of_the_row_alone(shape: str, data: st.DataObject) -> None:
    model = prepared(shape, data.draw(st.sampled_from([*FORMATS, *TIERS])))
    T = data.draw(st.integers(1, 30))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, T), min_size=1, max_size=9)))
    rows = len(lengths)
    tokens = random_tokens(model, rows, T)
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    before = native_run(model, random_tokens(model, rows, 3, seed=1))[1] if data.draw(st.booleans()) else None
    logits, state = native_run(model, tokens, before, lengths=lengths)
    hidden, hidden_state = native_run(model, tokens, before, lengths=lengths, output="hidden")
    last, last_state = native_run(model, tokens, before, lengths=lengths, output="last")
    assert same(hidden_state, state) and same(last_state, state)
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    row = data.draw(st.integers(0, rows - 1))
    n = int(lengths[row])
    start = None if before is None else before[row]
    alone, own = native_run(model, tokens[row : row + 1, :n], start)
    assert torch.equal(logits[row, :n], alone[0]) and same(own, state[row])
    assert torch.equal(last[row, 0], alone[0, -1])
    vectors, _ = native_run(model, tokens[row : row + 1, :n], start, output="hidden")
    assert torch.equal(hidden[row, :n], vectors[0])
    assert logits[row, n:].eq(0).all() and hidden[row, n:].eq(0).all()


@pytest.mark.parametrize("shape", ["4 odd", "5.1", "6 learned state", "7"])
@given(data=st.data())
def test_a_document_within_a_row_is_read_as_if_alone(shape: str, data: st.DataObject) -> None:
    model = prepared(shape, torch.float32)
    rows, T = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    tokens = random_tokens(model, rows, T)
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * T, max_size=rows * T)))
    starts = starts.view(rows, T)
    is_padded = data.draw(st.booleans())
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, T), min_size=rows, max_size=rows)))
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    _, before = native_run(model, random_tokens(model, rows, 3, seed=1))
    how = dict(starts=starts, lengths=lengths if is_padded else None)
    logits, state = native_run(model, tokens, before, **how)
    last, last_state = native_run(model, tokens, before, **how, output="last")
    assert same(last_state, state)
    for row in {0, rows - 1}:
        n = int(lengths[row]) if is_padded else T
        own: State | None = before[row]
        borders = [t for t in range(n) if t and starts[row, t]]
        for begin, end in itertools.pairwise([0, *borders, n]):
            own = None if starts[row, begin] else own
            alone, own = native_run(model, tokens[row : row + 1, begin:end], own)
            assert torch.equal(logits[row, begin:end], alone[0])
        assert own is not None
        assert same(own, state[row]) and torch.equal(last[row, 0], alone[0, -1])


@pytest.mark.parametrize("shape", ["4", "5.2", "6", "7"])
@torch.no_grad()
def test_rows_of_any_length_are_cut_where_a_batch_is_full(shape: str) -> None:
    model = small_model(SHAPES[shape], dtype=torch.float32)
    tokens, lengths = random_tokens(model, 5, 700), torch.tensor([511, 2, 700, 1, 350])
    starts = torch.zeros(5, 700, dtype=torch.bool)
    starts[2, 600] = starts[4, 3] = True
    for borders in (None, starts):
        logits, state = native_run(model, tokens, lengths=lengths, starts=borders)
        last, _ = native_run(model, tokens, lengths=lengths, starts=borders, output="last")
        for row, n in enumerate(lengths.tolist()):
            first = borders[row].nonzero()[:, 0].tolist() if borders is not None else []
            begin = first[0] if first else 0
            alone, own = native_run(model, tokens[row : row + 1, begin:n])
            assert torch.equal(logits[row, begin:n], alone[0]) and same(own, state[row])
            assert torch.equal(last[row, 0], alone[0, -1])


@pytest.mark.parametrize("form", [torch.float32, torch.bfloat16, "int8"])
@pytest.mark.parametrize("shape", ["4", "5.0", "5.2", "6", "7"])
@torch.no_grad()
def test_what_another_call_left_in_the_buffers_is_not_read(
    engine: str, shape: str, form: torch.dtype | str
) -> None:
    model, poison = prepared(shape, form), small_model(config(6, hidden=400), dtype=torch.float32)
    for weight in poison.parameters():
        weight.fill_(torch.nan)
    tokens, lengths = random_tokens(model, 6, 20), torch.tensor([1, 20, 3, 7, 12, 2])
    expected, state = native_run(model, tokens, lengths=lengths)
    assert expected.isfinite().all()
    assert native_run(poison, random_tokens(poison, 6, 100))[0].isnan().all()
    found, again = native_run(model, tokens, lengths=lengths)
    assert torch.equal(found, expected) and same(again, state)


@pytest.mark.parametrize("shape", ["4", "5.1", "6", "7"])
@torch.no_grad()
def test_a_prompt_longer_than_the_engine_takes_at_once_is_one_function(shape: str) -> None:
    model = small_model(SHAPES[shape], dtype=torch.float32)
    tokens = random_tokens(model, 2, 700)
    logits, state = native_run(model, tokens)
    first, half = native_run(model, tokens[:, :333])
    second, end = native_run(model, tokens[:, 333:], half)
    assert torch.equal(logits, torch.cat((first, second), dim=1)) and same(state, end)


@pytest.mark.parametrize("shape", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("dtype", FORMATS)
@torch.no_grad()
def test_what_meets_a_zero_is_not_read_and_changes_no_bit(shape: str, dtype: torch.dtype) -> None:
    model = small_model(SHAPES[shape], dtype=dtype)
    tokens = random_tokens(model, 1, 9)
    lengths = []
    for t in range(9):
        batch = tokens[:, t : t + 1].expand(2, 1)  # two rows: nothing is skipped
        alone, state = native_run(model, tokens[:, t : t + 1])
        pair, both = native_run(model, batch)
        assert torch.equal(alone[0], pair[1]) and same(state, both[1])
        lengths.append(state)
    # Not read: rows of the matrix that only zeros meet may hold anything.
    block = model.blocks[0]
    dead = torch.zeros(model.config.dim_ffn, dtype=torch.bool)
    dead[::3] = True
    block.ffn.key.weight[dead] = 0
    before, _ = native_run(model, tokens[:, :1])
    block.ffn.value.weight[:, dead] = float("nan")
    after, _ = native_run(model, tokens[:, :1])
    assert torch.equal(before, after)


@pytest.mark.parametrize("shape", ["4 odd", "5.1", "6", "7", "7 heads of 128"])
@torch.no_grad()
def test_states_are_taken_and_left_by_slot(engine: str, shape: str) -> None:
    model = small_model(SHAPES[shape], dtype=torch.float32)
    tokens, V = random_tokens(model, 3, 4), model.config.vocab_size
    _, state = native_run(model, random_tokens(model, 3, 5, seed=1))
    logits, expected = native_run(model, tokens, state)
    engine_model = compiled.compiled_model(model, state)
    assert isinstance(engine_model, compiled.CompiledModel)
    source, target = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 0])
    before = [torch.full_like(part[:, :1], float("nan")).repeat_interleave(5, 1) for part in state.stacked()]
    after = [part.clone() for part in before]
    for pool, part in zip(before, state.stacked(), strict=True):
        pool[:, source] = part
    y = torch.full((3, 4, V), float("nan"))
    run = engine_model._engine.run
    assert run(tokens, LayerState(*before), LayerState(*after), "logits", y, slots=(source, target))
    assert torch.equal(y, logits)
    for pool, part in zip(after, expected.stacked(), strict=True):
        assert torch.equal(pool[:, target], part)
        assert pool[:, [2, 4]].isnan().all()  # the others are left alone
    assert run(tokens, LayerState(*before), LayerState(*before), "logits", y, slots=(source, source))
    assert torch.equal(y, logits)
    for pool, part in zip(before, expected.stacked(), strict=True):
        assert torch.equal(pool[:, source], part)


@pytest.mark.parametrize("shape", ["4", "5.2", "6", "7"])
@torch.no_grad()
def test_every_output_is_a_part_of_the_whole(shape: str) -> None:
    model = small_model(SHAPES[shape], dtype=torch.float32)
    for T in (1, 3, 600):
        tokens = random_tokens(model, 2, T)
        logits, state = native_run(model, tokens)
        with use_backend("native"):
            last, last_state = model(tokens, output="last")
            hidden, hidden_state = model(tokens, output="hidden")
        assert torch.equal(last, logits[:, -1:]) and torch.equal(model.head(hidden), logits)
        assert same(last_state, state) and same(hidden_state, state)


@torch.no_grad()
def test_more_sequences_than_go_through_a_block_together() -> None:
    model = small_model(config(7, n_layer=1), dtype=torch.float32)
    tokens = random_tokens(model, 600, 1)
    logits, state = native_run(model, tokens)
    for row in (0, 255, 256, 599):
        alone, own = native_run(model, tokens[row : row + 1])
        assert torch.equal(alone[0], logits[row]) and same(own, state[row])


@torch.no_grad()
def test_tokens_and_states_that_do_not_fit_are_refused() -> None:
    model, other = (
        small_model(SHAPES["7"], dtype=torch.float32),
        small_model(SHAPES["4"], dtype=torch.float32),
    )
    for wrong in ([[61]], [[-1]], [[0, 1, 2**40]]):
        with pytest.raises(InputError, match="token id"):
            model(torch.tensor(wrong))
    with pytest.raises(InputError, match="int64"):
        model(torch.zeros(1, 1))
    two = torch.tensor([[1, 2], [3, 61]])
    with pytest.raises(InputError, match="token id 61"):
        model(two, lengths=torch.tensor([2, 1]))  # in padding, which torch would not take either
    for lengths in ([0, 1], [1, 3], [1], [1.0, 2.0]):
        with pytest.raises(InputError, match="lengths"):
            model(two % 61, lengths=torch.tensor(lengths))
    with pytest.raises(InputError, match="starts"):
        model(two % 61, starts=torch.zeros(2, 2))
    _, state = native_run(model, random_tokens(model, 2, 3))
    with pytest.raises(StateError, match="2 rows"):
        model(torch.tensor([[1]]), state)
    with pytest.raises(StateError):
        other(torch.tensor([[1], [1]]), state)


@torch.no_grad()
def test_a_state_outlives_its_model_and_travels() -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    tokens = random_tokens(model, 1, 3)
    _, state = native_run(model, tokens)
    expected, _ = native_run(model, tokens, state)
    twin = copy.deepcopy(state)
    assert twin.made_by is None and same(twin, state)
    assert torch.equal(native_run(model, tokens, twin)[0], expected)
    assert torch.equal(native_run(model, tokens, state.clone())[0], expected)
    compiled._KEPT.clear()
    gc.collect()
    assert state.made_by is None  # it kept nothing alive
    assert torch.equal(native_run(model, tokens, state)[0], expected)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", FORMATS)
@given(data=st.data())
def test_products_of_any_size_and_layout(dtype: torch.dtype, data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    if data.draw(st.booleans()):
        inputs += 1024  # more than are multiplied at a time
    rows, by_input = data.draw(st.integers(1, 60)), data.draw(st.booleans())
    rows += data.draw(st.sampled_from([0, 0, 190]))  # more than are packed at a time
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # As slices of something larger that is no number: nothing beyond the edges may be read.
    shape = (inputs + 2, outputs) if by_input else (outputs + 2, inputs)
    weight = torch.full(shape, float("nan"), dtype=dtype)[1:-1]
    weight = weight.mT if by_input else weight
    weight.copy_(torch.randn(outputs, inputs, generator=generator))
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    assert native.lies_by_input(weight) is by_input or 1 in (inputs, outputs)
    with torch.no_grad():
        y = native.product(x, weight)
        alone = native.product(x[-1:], weight)
    exact = x.double() @ weight.double().mT
    scale = x.double().abs() @ weight.double().abs().mT
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= 2e-6 * scale + torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(alone[0], y[-1])


@torch.no_grad()
def test_vectors_of_another_width_are_torchs_error_and_no_read_beyond_the_edge() -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    for layer in (
        model.head,
        model.ln_out,
        quantize(small_model(SHAPES["7"], dtype=torch.float32), "int8").head,
    ):
        with pytest.raises(RuntimeError):
            layer(torch.zeros(1, model.config.n_embd - 1))


@torch.no_grad()
def test_weights_that_change_are_seen() -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    tokens = random_tokens(model, 1, 3)
    first, _ = native_run(model, tokens)
    block = model.blocks[1]

    def check_changed(first: Tensor) -> Tensor:
        now, _ = native_run(model, tokens)
        with use_backend("reference"):
            expected, _ = model(tokens)
        assert not torch.equal(now, first) and error(now, expected) < ROUNDING[torch.float32]
        return now

    block.att.x_r.mul_(2)  # in place
    first = check_changed(first)
    block.ffn.key.weight = nn.Parameter(block.ffn.key.weight * 2)  # another tensor
    first = check_changed(first)
    block.att.w1.data = block.att.w1 * 3  # another memory
    first = check_changed(first)
    model.load_state_dict(small_model(SHAPES["7"], dtype=torch.float32, seed=5).state_dict(), assign=True)
    first = check_changed(first)
    quantize(model, "int8")  # another layer
    now, _ = native_run(model, tokens)
    assert not torch.equal(now, first) and error(now, first) < 0.1


@torch.no_grad()
def test_what_the_engine_does_not_know_stays_with_torch() -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    tokens = random_tokens(model, 1, 3)

    def check_refused(reason: str) -> None:
        with pytest.raises(BackendError, match=reason):
            native_run(model, tokens)
        with use_backend("reference"):
            expected, _ = model(tokens)
        assert error(model(tokens)[0], expected) < ROUNDING[torch.float32]

    class Louder(rwkv7.ChannelMix):
        def forward(self, *arguments: object) -> tuple[Tensor, Tensor]:
            out, last = super().forward(*arguments)
            return 2 * out, last

    block = model.blocks[1]
    block.ffn.__class__ = Louder
    check_refused("no compiled form")
    block.ffn.__class__ = rwkv7.ChannelMix
    seen: list[object] = []
    handle = block.att.key.register_forward_hook(lambda *now: seen.append(now))
    check_refused("hook")
    assert seen
    handle.remove()
    native_run(model, tokens)
    with torch.enable_grad():
        with use_backend("native"):  # then it names the operators' rows
            logits, _ = model(tokens)
        assert logits.requires_grad
        with pytest.raises(BackendError, match="float64"), use_backend("native"):
            small_model(SHAPES["7"])(tokens)
    bonus = block.att.r_k
    for elsewhere in (bonus.mT.contiguous().mT, torch.stack((bonus, bonus), -1)[..., 0]):
        bonus.data = elsewhere
        check_refused("gaps in memory, or its axes")
    bonus.data = bonus.contiguous()
    native_run(model, tokens)
    with pytest.raises(BackendError, match="float64"):
        native_run(small_model(SHAPES["7"]), tokens)


@torch.no_grad()
def test_without_the_extension_torch_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    tokens = random_tokens(model, 2, 6)
    expected, _ = native_run(model, tokens)
    monkeypatch.setattr(native, "_load", lambda: "it was not built")
    monkeypatch.setattr(Operator, "_choose", Operator._choose.__wrapped__)  # which remembers another answer
    plain = small_model(SHAPES["7"], dtype=torch.float32)  # whose matrices lie as torch wants them
    assert plain.head.weight.mT.is_contiguous()
    assert error(plain(tokens)[0], expected) < ROUNDING[torch.float32]
    with pytest.raises(BackendError, match="it was not built"):
        native_run(plain, tokens)


@torch.no_grad()
def test_a_models_copy_and_file_do_not_know_of_the_engine(tmp_path: object) -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    tokens = random_tokens(model, 1, 3)
    logits, _ = native_run(model, tokens)
    twin = copy.deepcopy(model)
    del model
    assert torch.equal(native_run(twin, tokens)[0], logits)
    assert not [name for name in twin.state_dict() if "compiled" in name or "native" in name]


@torch.no_grad()
def test_threads_of_python_take_turns() -> None:
    torch.set_num_threads(2)  # alone, each would be a team of its own
    model = small_model(SHAPES["7"], dtype=torch.float32)
    prompts = [random_tokens(model, 1, 12, seed=i) for i in range(6)]
    expected = [native_run(model, prompt)[0] for prompt in prompts]
    found: dict[int, list[bool]] = {i: [] for i in range(6)}

    def work(i: int) -> None:
        for _ in range(10):
            found[i].append(torch.equal(native_run(model, prompts[i])[0], expected[i]))

    team = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert all(found[i] == [True] * 10 for i in range(6))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@torch.no_grad()
def test_a_process_that_forks_after_a_call_can_call_again() -> None:
    torch.set_num_threads(2)
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    expected = native.product(x, weight)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if torch.equal(native.product(x, weight), expected) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native.product(x, weight), expected)


def test_the_session_runs_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(SHAPES["7"], dtype=torch.float32)
    calls: list[int] = []
    run = native.Model.run
    monkeypatch.setattr(native.Model, "run", lambda self, *a, **k: (calls.append(1), run(self, *a, **k))[1])
    session = wkv.Session(model, None)
    session.feed([1, 2, 3])
    assert len(calls) == 1
