"""What is cheap to compute is not kept for the gradients, and changes no bit of them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from wkv.ops import cheap, cheap_again


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def counted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    calls: list[int] = []

    def call(*inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        return function(*inputs)

    return call, calls


def test_a_product_is_made_again_with_the_same_bits_and_not_held_between() -> None:
    a, b, W = leaves((2, 5, 8), (2, 5, 8), (3, 8))
    expected = torch.autograd.grad(F.linear(a * b, W).square().sum(), (a, b, W))
    with cheap_again():
        product = cheap(torch.mul, a, b)
        held = StorageWeakRef(product.untyped_storage())
        y = F.linear(product, W)  # which saves a view: rows of tokens
        del product
    assert held.expired()
    found = torch.autograd.grad(y.square().sum(), (a, b, W), retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), (a, b, W))
    for x, twice, z in zip(found, again, expected, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(twice, z)


def test_outside_of_the_block_it_is_only_computed() -> None:
    a, b, W = leaves((5, 8), (5, 8), (3, 8))
    product = cheap(torch.mul, a, b)
    held = StorageWeakRef(product.untyped_storage())
    y = F.linear(product, W)
    del product
    assert not held.expired()
    assert y.requires_grad


def test_a_chain_is_made_once_for_all_who_want_it() -> None:
    a, V, W = leaves((5, 8), (3, 8), (4, 8))
    multiply, multiplied = counted(torch.mul)
    negate, negated = counted(torch.neg)
    with cheap_again():
        product = cheap(multiply, a, a)
        negative = cheap(negate, product)
        y = F.linear(product, V).sum() + F.linear(negative, W).square().sum() + product.exp().sum()
        held = [StorageWeakRef(x.untyped_storage()) for x in (product, negative)]
        del product, negative
    assert all(x.expired() for x in held)
    y.backward()
    assert (len(multiplied), len(negated)) == (2, 2)
    product = a.detach() ** 2
    other = a.detach().requires_grad_()
    product = other * other
    again = F.linear(product, V).sum() + F.linear(-product, W).square().sum() + product.exp().sum()
    (expected,) = torch.autograd.grad(again, other)
    assert torch.allclose(a.grad, expected)  # three gradients meet in one tensor: in any order


def test_a_tensor_that_was_changed_after_it_was_made_is_kept_as_it_is() -> None:
    a, W = leaves((5, 8), (3, 8))
    with cheap_again():
        product = cheap(torch.mul, a.detach(), a.detach())
        product += 1
        y = F.linear(product, W)
    (found,) = torch.autograd.grad(y.sum(), W)
    assert torch.allclose(found, (a.detach() ** 2 + 1).sum(0).expand(3, 8))


@pytest.mark.parametrize("view", [lambda x: x[2:], lambda x: x.mT, lambda x: x[:, ::2]])
def test_a_view_is_made_again_as_it_lies(view: Callable[[Tensor], Tensor]) -> None:
    a, b = leaves((5, 5), (5, 5))
    expected = torch.autograd.grad(view(a * b).square().sum(), (a, b))
    with cheap_again():
        product = cheap(torch.mul, a, b)
        held = StorageWeakRef(product.untyped_storage())
        y = view(product).square().sum()
        del product
    assert held.expired()
    assert all(map(torch.equal, torch.autograd.grad(y, (a, b)), expected))


def test_what_was_made_again_goes_when_all_have_had_it() -> None:
    a, V, W = leaves((5, 8), (3, 8), (4, 8))
    held: list[StorageWeakRef] = []

    def square(x: Tensor) -> Tensor:
        made = x * x
        held.append(StorageWeakRef(made.untyped_storage()))
        return made

    with cheap_again():
        fourth = cheap(square, cheap(square, a))
        y = F.linear(fourth, V).sum() + F.linear(fourth, W).sum()
        del fourth
    y.backward(retain_graph=True)
    assert len(held) == 4 and all(x.expired() for x in held)


def test_a_view_as_another_dtype_is_kept_as_it_is() -> None:
    a, b = leaves((5, 2), (5, 2))
    expected = torch.autograd.grad(torch.view_as_complex(a * b).abs().sum(), (a, b))
    with cheap_again():
        y = torch.view_as_complex(cheap(torch.mul, a, b)).abs().sum()
    assert all(map(torch.equal, torch.autograd.grad(y, (a, b)), expected))


@pytest.mark.parametrize("way", [lambda a, b: cheap(torch.mul, a, b), torch.mul])
def test_changing_what_it_is_made_from_is_an_error_as_without(way: Callable[..., Tensor]) -> None:
    a, W = leaves((5, 8), (3, 8))
    b = torch.ones(5, 8)
    with cheap_again():
        y = F.linear(way(a, b), W)
    with torch.no_grad():
        b += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_gradients_nothing_is_remembered() -> None:
    with cheap_again(), torch.no_grad():
        (x,) = leaves((5, 8))
        held = StorageWeakRef(x.untyped_storage())
        cheap(torch.neg, x)
        del x
        assert held.expired()


def test_the_compiler_sees_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, W = leaves((5, 8), (5, 8), (3, 8))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with cheap_again():
        product = cheap(torch.mul, a, b)
        held = StorageWeakRef(product.untyped_storage())
        y = F.linear(product, W)
        del product
    assert not held.expired() and y.requires_grad


def test_an_error_inside_ends_the_block() -> None:
    a, b, W = leaves((5, 8), (5, 8), (3, 8))
    with pytest.raises(ValueError, match="inside"), cheap_again(), cheap_again():
        raise ValueError("inside")
    product = cheap(torch.mul, a, b)
    held = StorageWeakRef(product.untyped_storage())
    y = F.linear(product, W)
    del product
    assert not held.expired()
    y.sum().backward()
    held = StorageWeakRef(a.untyped_storage())
    del a, y
    assert held.expired()  # no block remembers what it was made from


def test_an_inner_block_knows_nothing_of_an_outer_one() -> None:
    a, b, W = leaves((5, 8), (5, 8), (3, 8))
    with cheap_again():
        outer = cheap(torch.mul, a, b)
        with cheap_again():
            inner = cheap(torch.add, a, b)
            y = F.linear(outer, W) + F.linear(inner, W)
        z = F.linear(outer, W)
        expected = 2 * a * b + a + b
        held = StorageWeakRef(outer.untyped_storage())
        del outer
    assert not held.expired()  # y keeps it
    (y + z).sum().backward()
    assert torch.allclose(W.grad, expected.detach().sum(0).expand(3, 8), atol=1e-5)


def test_the_second_derivative_is_that_of_what_was_not_kept() -> None:
    a, W = leaves((5, 8), (3, 8))
    derivatives = []
    for cheaply in (False, True):
        if cheaply:
            with cheap_again():
                y = F.linear(cheap(torch.mul, a, a), W)
        else:
            y = F.linear(a * a, W)
        (first,) = torch.autograd.grad(y.square().sum(), W, create_graph=True)
        derivatives.append(torch.autograd.grad(first.square().sum(), a)[0])
    assert torch.equal(*derivatives)


def test_nothing_is_left_behind_when_a_graph_dies() -> None:
    gc.disable()
    try:
        (a,) = leaves((5, 8))
        with cheap_again():
            e = a.exp()  # saves its own output
            y = cheap(torch.mul, e, e).exp()
        held = [StorageWeakRef(x.untyped_storage()) for x in (e, y)]
        del e, y
        assert all(x.expired() for x in held)
    finally:
        gc.enable()
