"""The token shift: every position sees its predecessor (all generations).

shifted_t = x_{t-1},   x_{-1} = the newest input of the call before

It is zero before the first token of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .common import check_lengths, check_shapes
from .segments import Segments


def token_shift(
    x: Tensor, last: Tensor, lengths: Tensor | None = None, *, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Return each token's predecessor and the input to carry into the next call.

    x         (B, T, D)
    last      (B, D), the newest input of the call before, dtype of x
    lengths   (B,) int64, valid tokens per row, or None for all T
    segments  sequences within the rows, in place of lengths: before the first token of each is zero
    returns   shifted (B, T, D) and the new `last` (B, D): row b's x at lengths[b] - 1
    """
    if segments is not None:
        shifted, last = token_shift(x, last, segments.lengths)
        if segments.starts is not None:
            shifted = shifted.masked_fill(segments.starts[..., None], 0)
        return shifted, last
    B, T, D = x.shape
    check_lengths("token_shift", lengths, B, T)
    check_shapes("token_shift", (B, D), state=last)
    shifted = last[:, None] if T == 1 else torch.cat((last[:, None], x[:, :-1]), dim=1)
    if lengths is None:
        return shifted, x[:, -1]
    # A row of length 0 keeps what it had.
    with_last = torch.cat((last[:, None], x), dim=1)
    return shifted, with_last[torch.arange(B, device=x.device), lengths]
