"""Every backend of every operator is the reference recurrence: forward, backward, states, at any length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import OPERATORS, arguments, largest_error, meaning, scale_of, with_gradients

from wkv import ops
from wkv.errors import BackendError, InputError, StateError
from wkv.ops import native
from wkv.ops.dispatch import Call

ROWS = [(name, row.name) for name in OPERATORS for row in ops.OPERATORS[name].backends]
FAST = [(name, row) for name, row in ROWS if row != "reference"]
EXACT = [(name, row) for name, row in ROWS if row != "native"]  # in float64
RECURRENCES = [name for name in OPERATORS if name != "time_mix7"]  # test_time_mix.py has more about that
COMPILED = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
LENGTHS = [4, 15, 16, 17, 31, 32, 33, 63, 64, 65]


def refused(name: str, row: str, T: int, dtype: torch.dtype, device: torch.device) -> str | None:
    (backend,) = (b for b in ops.OPERATORS[name].backends if b.name == row)
    return backend.refuses(Call(T, 8, dtype, device, True))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("T", [1, 2, *LENGTHS, 1000])
@pytest.mark.parametrize(("name", "row"), [row for row in FAST if row in EXACT])
def test_a_backend_is_the_reference_forward_and_backward(
    name: str, row: str, T: int, padded: bool, device: torch.device
) -> None:
    if reason := refused(name, row, T, torch.float64, device):
        pytest.skip(reason)
    inputs = arguments(name, 2, T, device=device)
    lengths = torch.tensor([max(1, T // 3), T], device=device) if padded else None
    found = with_gradients(name, inputs, lengths=lengths, backend=row)
    expected = with_gradients(name, inputs, lengths=lengths, backend="reference")
    assert largest_error(found[0], expected[0]) < 1e-11
    assert largest_error(found[1], expected[1]) < 1e-11


@COMPILED
@pytest.mark.parametrize("lengths", [None, (1, 20, 0)], ids=["whole", "padded"])
@pytest.mark.parametrize(("H", "N"), [(1, 1), (3, 8), (2, 20), (2, 64), (1, 128)])
@pytest.mark.parametrize("T", [1, 16, 17, 70])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_compiled_form_is_the_reference_to_float32_rounding(
    name: str, T: int, H: int, N: int, lengths: tuple[int, ...] | None
) -> None:
    if name == "time_mix7" and N == 1:
        pytest.skip("normalised, one number is 1 or -1: its gradient is nothing but rounding")
    exact = arguments(name, 3, T, H, N)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    ends = None if lengths is None else torch.tensor([min(T, end) for end in lengths])
    scale = scale_of(name, OPERATORS[name].run(*exact, lengths=ends)[1])
    found = with_gradients(name, rounded, scale=scale, lengths=ends, backend="native")
    expected = with_gradients(name, exact, scale=scale, lengths=ends, backend="reference")
    tolerance = 20 * math.sqrt(T + N) * torch.finfo(torch.float32).eps
    assert largest_error(found[0], expected[0]) < tolerance
    assert largest_error(found[1], expected[1]) < 4 * tolerance


@COMPILED
@pytest.mark.parametrize("N", [1, 24])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_compiled_form_gives_the_same_bits_for_any_number_of_threads_and_company(
    name: str, N: int
) -> None:
    T, cut = 50, 23
    inputs = arguments(name, 3, T, H=3, N=N, dtype=torch.float32)
    found = []
    for n in (1, 2, 5):
        threads = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            found.append(with_gradients(name, inputs, backend="native"))
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        for x, y in zip((*found[0][0], *found[0][1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(x, y)

    def alone(row: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [x.detach()[row : row + 1] if x.shape[0] == 3 and x.ndim > 2 else x.detach() for x in inputs]

    operator = OPERATORS[name]
    y, state = operator.run(*inputs, backend="native")
    for row in range(3):
        one = alone(row, inputs)
        first, between = operator.run(*operator.piece(one, 0, cut, one[-1]), backend="native")
        second, end = operator.run(*operator.piece(one, cut, T, between), backend="native")
        assert torch.equal(torch.cat((first, second), dim=1), y[row : row + 1])
        assert torch.equal(end, state[row : row + 1])


@COMPILED
@pytest.mark.parametrize("name", OPERATORS)
def test_the_compiled_form_reads_views_and_hides_no_nan(name: str) -> None:
    inputs = [x.detach() for x in arguments(name, 2, 9, dtype=torch.float32)]
    strided = [torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(*(OPERATORS[name].run(*x, backend="native") for x in (inputs, strided)), strict=True):
        assert torch.equal(x, y)
    key = 2 if name == "wkv4" else 0
    inputs[key] = inputs[key].clone()
    inputs[key][1, 4] = torch.nan
    y, _ = OPERATORS[name].run(*inputs, backend="native")
    assert y[1, 4].isnan().any()
    assert not y[0].isnan().any()
    assert not y[1, :4].isnan().any()


@COMPILED
@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_is_right_or_refused(name: str) -> None:
    x = [part.detach().float().requires_grad_() for part in arguments(name, 1, 5, H=1, N=8)]

    def penalty(row: str) -> torch.Tensor:
        y, _ = OPERATORS[name].run(*x, backend=row)
        gradients = torch.autograd.grad(y.square().sum(), x, create_graph=True, allow_unused=True)
        return torch.stack([g.square().sum() for g in gradients if g is not None]).sum()

    with pytest.raises(BackendError, match="no derivative of its own"):
        penalty("native").backward()
    penalty("reference").backward()
    assert x[0].grad is not None and x[0].grad.abs().sum() > 0


@pytest.mark.parametrize("key", [1, 30, 100])
@pytest.mark.parametrize("decay", [-6, 0, 3], ids=["weak", "mixed", "strong"])
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_float32_stays_near_the_float64_reference_for_any_decay_and_key(
    name: str, row: str, decay: float, key: float, device: torch.device
) -> None:
    T = 200
    exact = arguments(name, 2, T, device=device, decay=decay, key=key, fresh=True)
    rounded = [x.detach().float().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    scale = scale_of(name, OPERATORS[name].run(*exact, backend="reference")[1])
    found = with_gradients(name, rounded, scale=scale, backend=row)
    expected = with_gradients(name, exact, scale=scale, backend="reference")
    # A sum of T terms keeps about sqrt(T) roundings; RWKV-4's weights are exponentials of normal keys of up
    # to four times their scale, and of decays, rounded as often; the backward pass comes on top.
    roundings = math.sqrt(T) * (1 + 4 * key if name == "wkv4" else 1)
    tolerance = 4 * roundings * torch.finfo(torch.float32).eps
    assert largest_error(found[0], expected[0]) < tolerance
    assert largest_error(found[1], expected[1]) < 8 * tolerance


@pytest.mark.parametrize(("name", "row"), EXACT)
def test_the_derivative_is_the_limit_of_differences(name: str, row: str, device: torch.device) -> None:
    inputs = arguments(name, 1, 5, H=1, N=2, device=device)
    inputs = [x.detach().requires_grad_() for x in inputs]
    if name == "wkv4":  # pp is a scale without a gradient: differentiate the rest
        *others, state = inputs
        pp = state.detach()[:, 2:]

        def call(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return meaning(name, OPERATORS[name].run(*x[:-1], torch.cat((x[-1], pp), dim=1), backend=row))

        inputs = [*others, state.detach()[:, :2].clone().requires_grad_()]
    else:

        def call(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return OPERATORS[name].run(*x, backend=row)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(("name", "row"), EXACT)
@given(data=st.data())
def test_a_state_handed_over_at_any_split_gives_the_same_outputs(
    name: str, row: str, data: st.DataObject
) -> None:
    T = data.draw(st.integers(2, 100), label="T")
    cut = data.draw(st.integers(1, T - 1), label="cut")
    inputs = [x.detach() for x in arguments(name, 2, T, seed=data.draw(st.integers(0, 100)))]
    operator = OPERATORS[name]
    whole, state = meaning(name, operator.run(*inputs))
    with ops.use_backend(row) if min(cut, T - cut) >= 4 else ops.use_backend("reference"):
        first, between = operator.run(*operator.piece(inputs, 0, cut, inputs[-1]))
        second, end = meaning(name, operator.run(*operator.piece(inputs, cut, T, between)))
    assert largest_error((torch.cat((first, second), dim=1), end), (whole, state)) < 1e-11


@pytest.mark.parametrize("name", OPERATORS)
def test_a_hundred_thousand_tokens_with_large_keys_stay_finite_and_right(
    name: str, device: torch.device
) -> None:
    T, tail = 100_000, 50
    inputs = arguments(name, 1, T, H=1, N=4, device=device, dtype=torch.float32, key=100, decay=2, fresh=True)
    y, state = OPERATORS[name].run(*inputs)
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()
    for gradient in torch.autograd.grad(y.mean() + state[:, :2].mean(), inputs):
        assert torch.isfinite(gradient).all()
    # The recurrence, started from the state after all but the last tokens, gives the same ending.
    operator, inputs = OPERATORS[name], [x.detach() for x in inputs]
    _, before = operator.run(*operator.piece(inputs, 0, T - tail, inputs[-1]))
    ending, _ = operator.run(*operator.piece(inputs, T - tail, T, before), backend="reference")
    assert largest_error((y[:, -tail:],), (ending,)) < 1e-4


@pytest.mark.parametrize("name", ["wkv5", "wkv6"])
def test_a_decay_of_zero_forgets_everything(name: str, device: torch.device) -> None:
    inputs = [x.detach() for x in arguments(name, 1, 40, device=device)]
    inputs[1] = torch.full_like(inputs[1], -torch.inf)
    found = OPERATORS[name].run(*inputs, backend="chunked")
    assert largest_error(found, OPERATORS[name].run(*inputs, backend="reference")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RECURRENCES)
def test_short_formats_are_summed_in_float32(name: str, dtype: torch.dtype, device: torch.device) -> None:
    *inputs, state = (x.detach() for x in arguments(name, 2, 40, device=device, dtype=torch.float32))
    rounded = [x.to(dtype) for x in inputs]
    y, after = OPERATORS[name].run(*rounded, state)
    assert (y.dtype, after.dtype) == (torch.float32, torch.float32)
    expected = OPERATORS[name].run(*(x.float() for x in rounded), state)
    assert torch.equal(y, expected[0])
    with pytest.raises(StateError, match="float32"):
        OPERATORS[name].run(*rounded, state.to(dtype))


@pytest.mark.parametrize(("name", "row"), [row for row in FAST if row[0] in RECURRENCES])
def test_a_fast_form_is_one_operator_to_the_compiler(name: str, row: str, device: torch.device) -> None:
    inputs = arguments(name, 1, 20, N=4, device=device, dtype=torch.float32)
    operator = getattr(torch.ops.wkv, f"{name.replace('5', '6')}_{row}")
    if name == "wkv5":
        inputs[1] = inputs[1].detach()[None, None].requires_grad_()
        if row == "chunked":
            inputs[1] = inputs[1].detach().expand_as(inputs[0]).clone().requires_grad_()
    takes_lengths = name == "wkv4" or row == "native"
    torch.library.opcheck(operator, [*inputs, torch.tensor([20], device=device)] if takes_lengths else inputs)


def test_an_operator_changes_none_of_its_arguments(device: torch.device) -> None:
    for name, row in ROWS:
        dtype = torch.float32 if row == "native" else torch.float64
        inputs = arguments(name, 2, 40, device=device, dtype=dtype)
        before = [x.detach().clone() for x in inputs]
        with_gradients(name, inputs, backend=row)
        for x, y in zip(inputs, before, strict=True):
            assert torch.equal(x.detach(), y)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_padded_row_is_the_row_alone(name: str, device: torch.device) -> None:
    inputs = [x.detach() for x in arguments(name, 3, 50, device=device)]
    lengths = torch.tensor([7, 50, 33], device=device)
    y, state = OPERATORS[name].run(*inputs, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = OPERATORS[name].piece(inputs, 0, length, inputs[-1])
        alone = [x[row : row + 1] if x.shape[0] == 3 else x for x in alone]
        expected = meaning(name, OPERATORS[name].run(*alone))
        found = meaning(name, (y[row : row + 1, :length], state[row : row + 1]))
        assert largest_error(found, expected) < 1e-12
        assert not y[row, length:].any()


def test_explain_names_every_row_and_the_reason_it_refuses() -> None:
    lines = ops.explain("wkv7", T=1).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [row.name for row in ops.OPERATORS["wkv7"].backends]
    assert "refuses: T = 1" in lines[1]
    assert lines[0].endswith("runs") == (native.why_not() is None)
    assert "float64" in ops.explain("wkv7", dtype=torch.float64).splitlines()[1] or native.why_not()
    with pytest.raises(InputError, match="wkv9"):
        ops.explain("wkv9")


def test_a_named_backend_that_refuses_is_an_error_with_the_reason() -> None:
    inputs = arguments("wkv7", 1, 2)
    with pytest.raises(BackendError, match=r"T = 2"):
        ops.wkv7(*inputs, backend="chunked")
    with pytest.raises(BackendError, match="no backend 'cuda'"), ops.use_backend("cuda"):
        ops.wkv7(*inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_shape_names_the_argument(name: str) -> None:
    inputs = [x.detach() for x in arguments(name, 2, 5)]
    for i in range(1, len(inputs)):
        wrong = list(inputs)
        wrong[i] = wrong[i][..., :-1]
        with pytest.raises((InputError, StateError), match=r"has shape .* Expected"):
            OPERATORS[name].run(*wrong)
    empty = OPERATORS[name].piece(inputs, 0, 0, inputs[-1])
    with pytest.raises(InputError, match="T = 0"):
        OPERATORS[name].run(*empty)
