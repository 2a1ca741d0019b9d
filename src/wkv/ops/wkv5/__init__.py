"""The RWKV-5 operator: the memory of `wkv6` with a decay that is the same for every token.

    y_t = (S_{t-1} + v_t (u * k_t)^T) r_t
    S_t = S_{t-1} diag(w) + v_t k_t^T

Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence".
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .. import wkv6
from ..common import check_shapes
from ..dispatch import Backend, Operator, never, short_sequence
from ..native import refuses
from ..segments import Segments

OPERATOR = Operator(
    "wkv5",
    (
        Backend("native", wkv6.native.run, refuses),
        Backend("chunked", wkv6.chunked.run, short_sequence),
        Backend("reference", wkv6.reference.run, never),
    ),
)


def wkv5(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the memory, decay it and write to it, once per token.

    log_w and u are (H, K) (a decay per head is that value K times); everything else as in `wkv6`.
    """
    if segments is not None:
        operator = partial(_tokens_first, log_w=log_w, u=u, backend=backend)
        return segments.each(operator, (r, k, v), state, lengths)
    H, K = r.shape[-2:]
    check_shapes("wkv5", (H, K), log_w=log_w)
    return wkv6.run(OPERATOR, r, log_w[None, None], k, v, u, state, lengths, backend)


def _tokens_first(r: Tensor, k: Tensor, v: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    return wkv5(r=r, k=k, v=v, **others)
