"""What is cheap to compute is not kept for the gradients: it is computed again from what is kept anyway.

    with cheap_again():                  # around a forward pass
        y = linear(cheap(torch.mul, a, b))

`linear` wants its input for the gradient of its weight. Inside the block it gets a b again from a and b
instead, when the backward pass asks: the same operation on the same numbers, so the same bits. Outside of
`cheap_again`, and under torch.compile, which decides such things itself, `cheap` only computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Function = Callable[..., Tensor]


def cheap(function: Function, *inputs: Any) -> Tensor:
    """`function(*inputs)`, of which nothing is kept where `inputs` are, or are cheap themselves.

    The function does the same at any time and changes none of its inputs.
    """
    made = function(*inputs)
    made_by([made], [function], *inputs)
    return made


def made_by(made: Sequence[Tensor], functions: Sequence[Function], *inputs: Any) -> None:
    """Say that each of `made` is the same as its function of `inputs`, which is cheap to compute."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    making = _making.get()
    if making is not None:
        making.remember(made, functions, inputs)


@contextlib.contextmanager
def cheap_again() -> Iterator[None]:
    """Inside, what was made cheaply is not kept for gradients.

    Hooks on saved tensors that were set outside see none of those that are saved inside. As without hooks,
    the backward pass is an error where a tensor that it needs was changed in place.
    """
    making = _Making()
    token = _making.set(making)
    try:
        with torch.autograd.graph.saved_tensors_hooks(making.pack, _unpack):
            yield
    finally:
        _making.reset(token)


class _Kept(NamedTuple):
    """A tensor that is kept as it is, and how often it had been changed in place by then."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor needed for the gradients has been modified by an inplace operation:"
                f" {self.tensor.dtype} {tuple(self.tensor.shape)} is at version {self.tensor._version},"
                f" expected {self.version}"
            )
        return self.tensor


class _Made:
    """A tensor that is computed when it is wanted; while others will want it too, it is held."""

    def __init__(self, function: Function, inputs: Sequence[Any]) -> None:
        self._function, self._inputs = function, inputs
        self._wanted = 0
        self._held: Tensor | None = None

    def want(self) -> None:
        """Somebody will ask for it, once."""
        if not self._wanted:
            for x in self._inputs:
                if isinstance(x, _View):
                    x.made.want()
        self._wanted += 1

    def make(self) -> Tensor:
        made = self._held
        if made is None:
            with torch.no_grad():
                made = self._function(*map(_unpack, self._inputs))
        self._wanted -= 1
        self._held = made if self._wanted > 0 else None
        return made


class _View(NamedTuple):
    """A view of what a _Made makes, as a product saves rows of tokens."""

    made: _Made
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def unpack(self) -> Tensor:
        return self.made.make().as_strided(self.shape, self.stride, self.offset)


@dataclass
class _Known:
    """A storage: it lives as long as any view of it, and unlike an address nothing else takes its place."""

    storage: StorageWeakRef
    dtype: torch.dtype
    version: int
    made: _Made


class _Making:
    """What was made cheaply since `cheap_again` began, by storage."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def remember(
        self, made: Sequence[Tensor], functions: Sequence[Function], inputs: tuple[Any, ...]
    ) -> None:
        packed = [self._pack(x) if isinstance(x, Tensor) else x for x in inputs]
        for x, function in zip(made, functions, strict=True):
            if type(x) is Tensor and x.numel():  # not: sharded, fake
                storage = StorageWeakRef(x.untyped_storage())
                known = _Known(storage, x.dtype, x._version, _Made(function, packed))
                self._known[storage.cdata] = known

    def pack(self, x: Tensor) -> _Kept | _View:
        packed = self._pack(x)
        if isinstance(packed, _View):
            packed.made.want()
        return packed

    def _pack(self, x: Tensor) -> _Kept | _View:
        known = self._find(x)
        if known is None:
            return _Kept(x.detach(), x._version)  # what is saved must not hold the graph that saves it
        return _View(known.made, x.shape, x.stride(), x.storage_offset())

    def _find(self, x: Tensor) -> _Known | None:
        if type(x) is not Tensor or not self._known or x.layout != torch.strided:
            return None
        known = self._known.get(x.untyped_storage()._cdata)
        return known if known and (known.dtype, known.version) == (x.dtype, x._version) else None


_making: ContextVar[_Making | None] = ContextVar("wkv_making", default=None)


def _unpack(packed: Any) -> Any:
    return packed.unpack() if isinstance(packed, _Kept | _View) else packed
