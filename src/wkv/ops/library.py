"""Registering a function with torch as one operator: the compiler, export and autograd see it whole.

`torch.library.custom_op` does the same, but its first call imports the compiler: seconds, before the first
token of a program that compiles nothing. This goes through the plain registry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import BackendError

Function = TypeVar("Function", bound=Callable[..., Any])

_REGISTRY = torch.library.Library("wkv", "DEF")


def without_autocast(function: Function) -> Function:
    """Decorator: `function`, whose first argument is a tensor or a list of tensors, keeps the dtypes given.

    Autocast reaches into every call, and would round the products in a sum that is float32 on purpose.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return cast(Function, call)


class TorchOperator:
    """`torch.ops.wkv.<name>`: call it, give it shapes for tracing, give it a derivative."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        _REGISTRY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _REGISTRY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        self._name = f"wkv::{name}"
        self._call = getattr(torch.ops.wkv, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> None:
        """`shapes` returns empty tensors like the outputs, from inputs without data."""
        torch.library.register_fake(self._name, shapes, lib=_REGISTRY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        torch.library.register_autograd(self._name, backward, setup_context=setup_context, lib=_REGISTRY)

    def register_backward(self, backward: Callable[..., list[Tensor]]) -> None:
        """`backward(*grads, *inputs)` gives the gradients of the first tensors among the inputs, in their
        order; those after them, such as `lengths`, have none."""

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

        def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
            gradients = iter(backward(*grads, *inputs))
            return tuple(next(gradients, None) if isinstance(x, Tensor) else None for x in inputs)

        self.register_autograd(differentiate, setup_context=save)

    def refuse_derivative(self) -> None:
        """Of gradients: asked for theirs, raise, where torch would warn and take them for constants."""

        def refuse(ctx: Any, *grads: Tensor) -> None:
            raise BackendError(
                f"{self._name} has no derivative of its own",
                "first derivatives",
                'the recurrence in torch, with wkv.ops.use_backend("reference"), for second ones',
            )

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


def torch_operator(name: str) -> Callable[[Callable[..., Any]], TorchOperator]:
    """Decorator: the function becomes `torch.ops.wkv.<name>`. Its annotations are its schema."""
    return lambda function: TorchOperator(name, function)
