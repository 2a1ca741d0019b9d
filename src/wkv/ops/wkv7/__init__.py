"""The RWKV-7 operator: a matrix memory per head, decayed, erased by a delta rule, and rewritten.

For one head, with column vectors r, w, k, v, kappa, a and a memory S of shape (V, K):

    S_t = S_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k_t^T       decay, erase, write
    y_t = S_t r_t                                                          read

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", section 4.
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
    "wkv7",
    (
        Backend("native", native.run, refuses),
        Backend("chunked", chunked.run, short_sequence),
        Backend("reference", reference.run, never),
    ),
)


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read, erase and write the memory once per token.

    r, log_w, k, kappa, a  (B, T, H, K) receptance, log of the decay, key, normalised removal key, rate
    v                      (B, T, H, V) value
    state                  (B, H, V, K) the memory before the first token; float32, or float64 for float64
    lengths                (B,) int64 valid tokens per row, or None: later ones leave the state, and give 0
    segments               sequences within the rows, in place of lengths; the states are then one per segment
    returns                y (B, T, H, V) and the memory after each row's last token, both in the sums' dtype

    log_w lies in [-exp(-1/2), 0], as the model guarantees; the chunked form relies on it. Sums are float32
    whatever the inputs are: the decay may be within 1e-4 of 1. Any T >= 1; gradients reach every
    argument, the initial and the final state included. InputError, StateError, BackendError.
    """
    if segments is not None:
        return segments.each(partial(wkv7, backend=backend), (r, log_w, k, v, kappa, a), state, lengths)
    B, T, H, K = r.shape
    V = v.shape[-1]
    check_lengths("wkv7", lengths, B, T)
    check_shapes("wkv7", (B, T, H, K), log_w=log_w, k=k, kappa=kappa, a=a)
    check_shapes("wkv7", (B, T, H, V), v=v)
    check_shapes("wkv7", (B, H, V, K), state=state)
    dtype = sum_dtype(r, v)
    check_state_dtype("wkv7", state, dtype)
    r, log_w, k, v, kappa, a = cast(dtype, r, log_w, k, v, kappa, a)
    row = OPERATOR.choose(make_call(T, K, dtype, r, log_w, k, v, kappa, a, state), backend)
    y, new_state = row.run(r, log_w, k, v, kappa, a, state, lengths)
    return y, new_state
