"""The RWKV-6 operator: a matrix memory per head with a decay of its own per channel and token.

For one head, with column vectors r, w, k, u (K) and v (V) and a memory S of shape (V, K):

    y_t = (S_{t-1} + v_t (u * k_t)^T) r_t        the current token counts u, not 1
    S_t = S_{t-1} diag(w_t) + v_t k_t^T

Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence".
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..common import cast, check_lengths, check_shapes, check_state_dtype, make_call, sum_dtype
from ..dispatch import Backend, Operator, never, short_sequence
from ..native import refuses
from ..segments import Segments
from . import chunked, native, reference

OPERATOR = Operator(
    "wkv6",
    (
        Backend("native", native.run, refuses),
        Backend("chunked", chunked.run, short_sequence),
        Backend("reference", reference.run, never),
    ),
)


def wkv6(
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

    r, log_w, k  (B, T, H, K) receptance, log of the decay (any value <= 0, -inf included), key
    v            (B, T, H, V) value
    u            (H, K) weight of the current token
    state        (B, H, V, K) the memory before the first token; float32, or float64 for float64
    lengths      (B,) int64 valid tokens per row, or None: later ones leave the state, and give 0
    segments     sequences within the rows, in place of lengths; the states are then one per segment
    returns      y (B, T, H, V) and the memory after each row's last token, both in the sums' dtype

    Sums are float32 whatever the inputs are. Any T >= 1; gradients reach every argument, the initial and
    the final state included. InputError, StateError, BackendError.
    """
    if segments is not None:
        return segments.each(partial(wkv6, u=u, backend=backend), (r, log_w, k, v), state, lengths)
    B, T, H, K = r.shape
    check_shapes("wkv6", (B, T, H, K), log_w=log_w)
    return run(OPERATOR, r, log_w, k, v, u, state, lengths, backend)


def run(
    operator: Operator,
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Checks, dtypes and choice of backend for wkv5 and wkv6, which differ in the shape of log_w alone."""
    B, T, H, K = r.shape
    V = v.shape[-1]
    check_lengths(operator.name, lengths, B, T)
    check_shapes(operator.name, (B, T, H, K), k=k)
    check_shapes(operator.name, (B, T, H, V), v=v)
    check_shapes(operator.name, (H, K), u=u)
    check_shapes(operator.name, (B, H, V, K), state=state)
    dtype = sum_dtype(r, v)
    check_state_dtype(operator.name, state, dtype)
    r, log_w, k, v, u = cast(dtype, r, log_w, k, v, u)
    row = operator.choose(make_call(T, K, dtype, r, log_w, k, v, u, state), backend)
    y, new_state = row.run(r, log_w, k, v, u, state, lengths)
    return y, new_state
