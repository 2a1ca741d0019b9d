"""RWKV-7's time mix as one operator: what test_ops.py does not say of every operator."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from operators import arguments, largest_error, time_mix7
from small_models import random_tokens, small_model
from torch import Tensor

from wkv import ops
from wkv.errors import BackendError
from wkv.models import RWKV
from wkv.ops import native, use_backend

COMPILED = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
EPS = torch.finfo(torch.float32).eps


def with_gradients(inputs: list[Tensor], backend: str, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
    """The result, the state, and the gradients of every argument for random gradients of both."""
    outputs = time_mix7(*inputs, backend=backend, lengths=lengths)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return (*outputs, *torch.autograd.grad(outputs, inputs, seeds))


def rounded(inputs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in inputs]


@COMPILED
@pytest.mark.parametrize("lengths", [None, (33, 1, 0)], ids=["whole", "padded"])
@pytest.mark.parametrize(("T", "H", "N"), [(1, 2, 8), (33, 3, 12), (33, 1, 64), (47, 1, 100)])
def test_the_first_layer_is_the_reference_to_float32_rounding(
    T: int, H: int, N: int, lengths: tuple[int, ...] | None
) -> None:
    exact = arguments("time_mix7", 3, T, H, N, is_first=True)
    ends = None if lengths is None else torch.tensor(lengths).clamp(max=T)
    found = with_gradients(rounded(exact), "native", ends)
    expected = with_gradients(exact, "reference", ends)
    assert len(found) == 2 + 14
    assert largest_error(found, expected) < 80 * math.sqrt(T + N) * EPS


@COMPILED
@pytest.mark.parametrize("spoilt", ["key", "normaliser"])
def test_a_key_of_zeros_erases_nothing_and_has_the_reference_s_gradient(spoilt: str) -> None:
    exact = arguments("time_mix7", 2, 20)
    with torch.no_grad():
        if spoilt == "key":
            exact[2][0, 3:7] = 0
            exact[2][1, 5, 8:] = 2e-13  # the second head's: shorter than keys are taken to be
        else:
            exact[11].zero_()  # k_k
    found = with_gradients(rounded(exact), "native")
    expected = with_gradients(exact, "reference")
    assert all(torch.isfinite(x).all() for x in found)
    for x, y in zip(found, expected, strict=True):
        assert (
            largest_error((x,), (y,)) < 1e-4
            or float(y.detach().abs().max()) == float(x.detach().abs().max()) == 0
        )


@COMPILED
def test_nothing_of_the_padding_reaches_anything_not_even_a_nan() -> None:
    lengths = torch.tensor([5, 0, 20])
    inputs = rounded(arguments("time_mix7", 3, 20))
    expected = with_gradients(inputs, "native", lengths)
    beyond = torch.arange(20) >= lengths[:, None]
    with torch.no_grad():
        for x in inputs[:8]:
            x[beyond] = torch.nan
    found = with_gradients(inputs, "native", lengths)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    for x in (found[0], *found[2:10]):
        assert not x[beyond].any()


@COMPILED
@pytest.mark.parametrize("is_first", [True, False], ids=["first layer", "later layer"])
def test_it_is_one_operator_to_the_compiler(is_first: bool) -> None:
    inputs = arguments("time_mix7", 1, 20, N=4, dtype=torch.float32, is_first=is_first)
    *first, w0, a0, k_k, k_a, weight, bias, r_k, state = inputs[6:]
    before, s, v0 = first or (None, None, None)
    flat = (*inputs[:6], before, s, state, w0, a0, v0, k_k, k_a, r_k, weight, bias)
    torch.library.opcheck(torch.ops.wkv.time_mix7_native, [*flat, 64e-5, torch.tensor([20])])


@COMPILED
def test_all_that_is_kept_for_the_gradients_are_the_inputs() -> None:
    inputs = arguments("time_mix7", 2, 100, dtype=torch.float32)
    kept: set[int] = set()

    def keep(x: Tensor) -> Tensor:
        kept.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        time_mix7(*inputs, backend="native")
    assert kept == {x.untyped_storage().data_ptr() for x in inputs}


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    *inputs, state = arguments("time_mix7", 2, 40, dtype=torch.float32)
    tokens, parameters = rounded(inputs[:8], dtype), rounded(inputs[8:], dtype)
    exact, after = time_mix7(*rounded(tokens), *rounded(parameters), state, backend="native")
    out, found = time_mix7(*tokens, *parameters, state, backend="native")
    assert (out.dtype, found.dtype) == (dtype, torch.float32)
    assert torch.equal(out, exact.to(dtype)) and torch.equal(found, after)
    # As under autocast: products are short, parameters are not.
    assert time_mix7(*tokens, *inputs[8:], state, backend="native")[0].dtype == torch.float32
    for backend in ("chunked", "reference"):
        assert time_mix7(*tokens, *parameters, state, backend=backend)[0].dtype == dtype
        assert time_mix7(*tokens, *inputs[8:], state, backend=backend)[0].dtype == torch.float32


def test_a_named_row_is_that_row_of_the_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments("time_mix7", 1, 40)
    seen: list[str] = []
    table = ops.OPERATORS["wkv7"]
    choose = type(table).choose

    def watched(self: ops.dispatch.Operator, *arguments: object) -> ops.dispatch.Backend:
        row = choose(self, *arguments)  # type: ignore[arg-type]
        seen.append(f"{self.name} {row.name}")
        return row

    monkeypatch.setattr(type(table), "choose", watched)
    for backend in ("chunked", "reference"):
        time_mix7(*inputs, backend=backend)
        with use_backend(backend):
            time_mix7(*inputs)
        assert seen == [f"{name} {backend}" for name in ("time_mix7", "wkv7")] * 2
        seen.clear()
    time_mix7(*inputs)  # float64: not what "native" takes
    assert seen == ["time_mix7 chunked", "wkv7 chunked"]
    with pytest.raises(BackendError, match="T = 2"):
        time_mix7(*(x[:, :2] if x.ndim == 3 else x for x in inputs), backend="chunked")


def gradients(model: RWKV, backend: str, **how: Tensor) -> list[Tensor]:
    tokens = random_tokens(model, 3, 50)
    with use_backend(backend):
        logits, state = model(tokens, **how)
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
        total = (torch.log_softmax(logits, -1) * weights).sum()
        total = total + sum(layer.memory.sin().sum() for layer in state.layers)
        return list(torch.autograd.grad(total, list(model.parameters())))


@COMPILED
@pytest.mark.parametrize("how", ["whole", "padded", "documents"])
def test_a_model_has_the_gradients_of_the_float64_reference(how: str) -> None:
    model = small_model("7", dtype=torch.float32)
    starts = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.1
    options = {"padded": {"lengths": torch.tensor([50, 1, 33])}, "documents": {"starts": starts}}.get(how, {})
    exact = gradients(copy.deepcopy(model).double(), "reference", **options)
    plain, found = gradients(model, "reference", **options), gradients(model, "native", **options)
    errors = [
        [float((x - y).norm() / y.norm()) for x, y in zip(those, exact, strict=True)]
        for those in (plain, found)
    ]
    assert max(errors[1]) < 3 * max(errors[0]) < 1e-3
