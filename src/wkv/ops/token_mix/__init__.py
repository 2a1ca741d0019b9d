"""The token mix: every position sees its predecessor, mixed in channel by channel (all generations).

    before_t = x_{t-1}      x_{-1} = the newest input of the call before; zero before the first of a sequence
    mixed_s  = x + (before - x) m_s        towards the predecessor: generations 6 and 7
    mixed_s  = before + (x - before) m_s   towards the token itself: generations 4 and 5

with one learned m_s per use s, which generation 6 corrects for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...errors import InputError
from ..cheap import made_by
from ..common import check_lengths, check_shapes, make_call
from ..dispatch import Backend, Operator, never
from ..native import refuses
from ..segments import Segments
from . import native, reference

OPERATOR = Operator(
    "token_mix", (Backend("native", native.run, refuses), Backend("reference", reference.run, never))
)


def token_mix(
    x: Tensor,
    last: Tensor,
    weights: Sequence[Tensor] | Tensor,
    *,
    towards: Literal["before", "now"],
    lengths: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return x mixed with each token's predecessor, once per weight, and the input for the next call.

    x         (B, T, D)
    last      (B, D), the newest input of the call before, dtype of x
    weights   n of shape (D), or with axes of length 1 before it; or one tensor (n, B, T, D)
    towards   which of the two a weight of 1 takes: the predecessor ("before") or the token itself ("now")
    lengths   (B,) int64, valid tokens per row, or None for all T
    segments  sequences within the rows, in place of lengths: before the first token of each is zero
    returns   n mixes (B, T, D), and the new `last` (B, D): row b's x at lengths[b] - 1, or the old one

    Gradients reach all tensors. For them x, last and the weights are kept, no mix where `cheap_again` is.
    InputError, StateError, BackendError.
    """
    if segments is not None and lengths is not None:
        raise InputError("both lengths and segments", "lengths given to Segments.of")
    starts = None if segments is None else segments.starts
    lengths = lengths if segments is None else segments.lengths
    B, T, D = x.shape
    check_lengths("token_mix", lengths, B, T)
    check_shapes("token_mix", (B, D), state=last)
    if not isinstance(weights, Tensor):
        weights = torch.cat([m.view(1, D) for m in weights])
    elif weights.shape[1:] != x.shape:
        raise InputError(f"token_mix: weights has shape {tuple(weights.shape)}", f"(n, {B}, {T}, {D})")
    row = OPERATOR.choose(make_call(T, 1, x.dtype, x, last, weights), backend)
    mixed = row.run(x, last, weights, starts, towards)
    each = [partial(_one, s, row, towards) for s in range(len(mixed))]
    made_by(mixed, each, x, last, weights, starts)
    return mixed, _newest(x, last, lengths)


def _one(
    s: int, row: Backend, towards: str, x: Tensor, last: Tensor, weights: Tensor, starts: Tensor | None
) -> Tensor:
    (mixed,) = row.run(x, last, weights[s : s + 1], starts, towards)
    return mixed


def _newest(x: Tensor, last: Tensor, lengths: Tensor | None) -> Tensor:
    """A copy: a view would hold all of x as long as the state lives."""
    B, T, _ = x.shape
    if lengths is None:
        return x[:, -1] if T == 1 else x[:, -1].clone()
    newest = x[torch.arange(B, device=x.device), (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0)[:, None], newest, last)
