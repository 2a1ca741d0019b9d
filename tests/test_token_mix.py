"""Every token mixed with its predecessor, and the activation beside it: each form is the equation."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wkv import ops
from wkv.errors import BackendError, InputError, StateError
from wkv.ops import Segments, native

COMPILED = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 5, 3),
    (1, 64, 8, 1),
    (3, 65, 20, 2),
    (2, 130, 7, 6),
    (1, 200, 33, 5),
]  # B, T, D, n


def inputs(B: int, T: int, D: int, n: int, each_token: bool, **kind: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, D), (B, D), *([(n, B, T, D)] if each_token else [(1, 1, D)] * n)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(**kind).requires_grad_() for s in shapes
    ]


def random_segments(B: int, T: int, device: torch.device | str = "cpu") -> Segments:
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(B, T, generator=generator) < 0.2
    starts[0, 64::64] = True  # where the compiled form goes on to its next piece
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    return Segments.of(starts.to(device), lengths.to(device))


def run(given: list[Tensor], each_token: bool, **options: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    x, last, *weights = given
    return ops.token_mix(x, last, weights[0] if each_token else weights, **options)


def equation(
    given: list[Tensor], each_token: bool, towards: str, segments: Segments | None
) -> tuple[list[Tensor], Tensor]:
    """Token after token, as the docstring has it."""
    x, last, *weights = given
    starts = None if segments is None else segments.starts
    lengths = None if segments is None else segments.lengths
    rows, newest = [], []
    for row, (own, before) in enumerate(zip(x, last, strict=True)):
        column = []
        for t, token in enumerate(own):
            is_first = starts is not None and bool(starts[row, t])
            column.append(torch.zeros_like(before) if is_first else before)
            before = token
        rows.append(torch.stack(column))
        newest.append(own[-1 if lengths is None else int(lengths[row]) - 1])
    before = torch.stack(rows)
    ms = weights[0] if each_token else weights
    mixed = [x * (1 - m) + before * m if towards == "before" else x * m + before * (1 - m) for m in ms]
    return mixed, torch.stack(newest)


def with_gradients(outputs: tuple[Any, Tensor], learnt: list[Tensor]) -> list[Tensor]:
    mixed, newest = outputs
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (*mixed, newest)]
    return [*mixed, newest, *torch.autograd.grad((*mixed, newest), learnt, grads)]


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("each_token", [False, True], ids=["channels", "each-token"])
@pytest.mark.parametrize("towards", ["before", "now"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ["reference", pytest.param("native", marks=COMPILED)])
def test_a_row_is_the_equation_forward_and_backward(
    row: str, shape: tuple[int, ...], towards: str, each_token: bool, segmented: bool
) -> None:
    dtype = torch.float32 if row == "native" else torch.float64
    segments = random_segments(*shape[:2]) if segmented else None
    exact, given = inputs(*shape, each_token), inputs(*shape, each_token, dtype=dtype)
    found = run(given, each_token, towards=towards, segments=segments, backend=row)
    expected = equation(exact, each_token, towards, segments)
    tolerance = 20 * math.sqrt(shape[0] * shape[1]) * torch.finfo(dtype).eps
    for a, b in zip(with_gradients(found, given), with_gradients(expected, exact), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


@COMPILED
@pytest.mark.parametrize("each_token", [False, True], ids=["channels", "each-token"])
def test_the_compiled_bits_depend_neither_on_threads_nor_on_company_nor_on_strides(each_token: bool) -> None:
    given = inputs(
        3, 150, 515, 3, each_token, dtype=torch.float32
    )  # so wide that threads wait for each other
    segments = random_segments(3, 150)
    results = []
    for n in (1, 2, 5):
        threads = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            results.append(
                with_gradients(
                    run(given, each_token, towards="before", segments=segments, backend="native"), given
                )
            )
        finally:
            torch.set_num_threads(threads)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in given]
    results.append(
        with_gradients(
            run(strided, each_token, towards="before", segments=segments, backend="native"), strided
        )
    )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))

    x, last, *weights = given
    for b in range(3):
        alone = [x[b : b + 1], last[b : b + 1], *([weights[0][:, b : b + 1]] if each_token else weights)]
        (first, *_), _ = run([y.detach() for y in alone], each_token, towards="before", backend="native")
        (together, *_), _ = run([y.detach() for y in given], each_token, towards="before", backend="native")
        assert torch.equal(first[0], together[b])


@pytest.mark.parametrize("row", ["reference", pytest.param("native", marks=COMPILED)])
def test_nothing_of_a_document_reaches_the_next(row: str) -> None:
    given = inputs(1, 6, 4, 2, False, dtype=torch.float32)
    starts = torch.zeros(1, 6, dtype=torch.bool)
    starts[0, 3] = True
    with torch.no_grad():
        given[0][:, :3] = math.nan
        given[1].fill_(math.nan)
    mixed, _ = run(given, False, towards="before", segments=Segments.of(starts), backend=row)
    gradients = torch.autograd.grad(sum(y[:, 3:].sum() for y in mixed), given[:1])
    assert all(torch.isfinite(y[:, 3:]).all() for y in mixed)
    assert torch.isfinite(gradients[0][:, 3:]).all()
    assert not gradients[0][:, :3].any()


@COMPILED
def test_what_another_call_left_in_the_buffers_is_not_read() -> None:
    given = inputs(1, 100, 4, 2, False, dtype=torch.float32)
    segments = random_segments(1, 100)
    expected = with_gradients(run(given, False, towards="before", segments=segments, backend="native"), given)
    outputs = run(given, False, towards="before", segments=segments, backend="native")
    nothing = torch.full((1, 100, 1, 16), math.nan)
    ops.wkv7(*[nothing] * 6, nothing.new_full((1, 1, 16, 16), math.nan), backend="native")
    assert all(map(torch.equal, with_gradients(outputs, given), expected))


def test_the_newest_input_is_carried_and_holds_no_other(device: torch.device) -> None:
    x, last, m = inputs(3, 9, 4, 1, False, device=device)
    _, newest = ops.token_mix(x, last, [m], towards="now")
    assert torch.equal(newest, x[:, -1])
    assert newest.untyped_storage().nbytes() == newest.numel() * 8
    _, newest = ops.token_mix(x, last, [m], towards="now", lengths=torch.tensor([4, 0, 9], device=device))
    assert torch.equal(newest, torch.stack((x[0, 3], last[1], x[2, 8])))


def test_wrong_arguments_are_named() -> None:
    x, last, m = (y.detach() for y in inputs(2, 5, 4, 1, False))
    with pytest.raises(StateError, match=r"state has shape \(2, 3\)"):
        ops.token_mix(x, last[:, :3], [m], towards="now")
    with pytest.raises(InputError, match="T = 0"):
        ops.token_mix(x[:, :0], last, [m], towards="now")
    with pytest.raises(InputError, match=r"weights has shape \(1, 2, 4, 4\)"):
        ops.token_mix(x, last, m.expand(1, 2, 4, 4), towards="now")
    with pytest.raises(InputError, match="both lengths and segments"):
        ops.token_mix(
            x, last, [m], towards="now", lengths=torch.tensor([1, 2]), segments=Segments(None, None)
        )
    with pytest.raises(BackendError, match="float32" if native.why_not() is None else "native"):
        ops.token_mix(x, last, [m], towards="now", backend="native")


SPECIAL = [math.nan, -math.inf, math.inf, -0.0, -1.0]


@COMPILED
@pytest.mark.parametrize("shape", [(), (2, 0), (1,), (3, 5), (2, 3, 70)])
def test_the_compiled_activation_is_torchs(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "threads", lambda: 3)
    x, grad = torch.randn(shape), torch.randn(shape)
    x.view(-1)[:5] = torch.tensor(SPECIAL)[: x.numel()]
    grad.view(-1)[4:10:5] = math.inf  # of a negative number, and of any
    results = []
    for row in ("native", "reference"):
        given = x.clone().requires_grad_()
        y = ops.squared_relu(given, backend=row)
        results.append((y, *torch.autograd.grad(y, given, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    strided = torch.randn(6, 4).mT
    assert torch.equal(ops.squared_relu(strided, backend="native"), F.relu(strided).square())


def test_the_activation_is_the_square_of_relu_and_its_derivative(device: torch.device) -> None:
    x = torch.randn(4, 9, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.equal(ops.squared_relu(x), F.relu(x) ** 2)
    assert torch.autograd.gradcheck(ops.squared_relu, x)


@pytest.mark.parametrize("towards", ["before", "now"])
@pytest.mark.parametrize("row", ["reference", pytest.param("native", marks=COMPILED)])
def test_a_mix_that_is_made_again_is_made_by_the_same_row(row: str, towards: str) -> None:
    given = inputs(2, 30, 9, 3, False, dtype=torch.float32)
    W = torch.randn(5, 9, requires_grad=True)
    segments, gradients = random_segments(2, 30), []
    for block in (contextlib.nullcontext(), ops.cheap_again()):
        with block:
            mixed, _ = run(given, False, towards=towards, segments=segments, backend=row)
            y = sum(F.linear(x, W).square().sum() for x in mixed)
        gradients.append(torch.autograd.grad(y, W)[0])
    assert torch.equal(*gradients)


@COMPILED
def test_the_compiled_forms_are_operators_to_the_compiler() -> None:
    x, last, m = inputs(2, 5, 4, 1, True, dtype=torch.float32)
    starts = torch.rand(2, 5) < 0.3
    torch.library.opcheck(torch.ops.wkv.token_mix_native, [x, last, m, starts])
    torch.library.opcheck(torch.ops.wkv.squared_relu_native, [x])
