"""One operator, many backends: a table of rows, each of which may refuse a call and says why.

An operator's rows stand in order of preference; the first that does not refuse runs. A row looks at
shapes, dtypes and devices, never at values, so that the choice is the same for the same call. A backend
that the caller names and that refuses is an error with the reason, never a silent fallback.

    wkv.ops.explain("wkv7", T=512, device="cpu")      every row, and why it would refuse
    with wkv.ops.use_backend("reference"): ...        for everything inside this block
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..errors import BackendError


class Call(NamedTuple):
    """What a backend may look at when it decides."""

    T: int  # tokens
    head_size: int  # 1 for wkv4, which has no heads
    dtype: torch.dtype  # of the computation: float32 or float64
    device: torch.device
    needs_grad: bool


@dataclass(frozen=True)
class Backend:
    """One row of an operator's table."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Call], str | None]  # the reason, or None when it will run


_named: ContextVar[str | None] = ContextVar("wkv_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on the backend `name` (this thread or task only)."""
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def named_backend() -> str | None:
    """What the `use_backend` around this call says."""
    return _named.get()


@dataclass(frozen=True)
class Operator:
    """A name and its backends, best first; the last row is the reference and never refuses."""

    name: str
    backends: tuple[Backend, ...]

    def choose(self, call: Call, backend: str | None = None) -> Backend:
        """The row that runs this call. BackendError when a named row is unknown or refuses."""
        return self._choose(call, backend or _named.get())

    @lru_cache(maxsize=1024)  # noqa: B019  operators live as long as the program
    def _choose(self, call: Call, name: str | None) -> Backend:
        if name is None:
            return next(row for row in self.backends if row.refuses(call) is None)
        for row in self.backends:
            if row.name == name:
                if reason := row.refuses(call):
                    raise BackendError(
                        f"{self.name}: backend {name!r} refuses this call: {reason}",
                        advice="no backend argument, which takes the first row that accepts",
                    )
                return row
        raise BackendError(
            f"{self.name} has no backend {name!r}", f"one of {', '.join(row.name for row in self.backends)}"
        )

    def verdicts(self, call: Call) -> dict[str, str]:
        """Of each row by its name: "runs", "would run", or "refuses: " and the reason."""
        chosen = self.choose(call)
        reasons = {row.name: row.refuses(call) for row in self.backends}
        return {
            name: "runs" if name == chosen.name else f"refuses: {reason}" if reason else "would run"
            for name, reason in reasons.items()
        }

    def explain(self, call: Call) -> str:
        """A line per row: runs, would run, or the reason it refuses."""
        rows = (f"  {name:<10} {verdict}" for name, verdict in self.verdicts(call).items())
        return "\n".join((f"{self.name}, {call}:", *rows))


def never(call: Call) -> str | None:
    """The reference's answer: it refuses nothing."""
    return None


def short_sequence(call: Call) -> str | None:
    """The chunked forms' answer: under this length their set-up costs more than it saves."""
    if call.T < 4:
        return f"T = {call.T}: the recurrence itself is faster below 4 tokens"
    return None
