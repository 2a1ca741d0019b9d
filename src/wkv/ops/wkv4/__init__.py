"""The RWKV-4 operator: a weighted average of values whose weights fade with distance, per channel.

    wkv_t = (sum_{i<t} e^{(t-1-i) log_w + k_i} v_i + e^{u + k_t} v_t)
          / (sum_{i<t} e^{(t-1-i) log_w + k_i}     + e^{u + k_t}    )

The two sums are the state, held as (aa, bb, pp): the sums are aa e^pp and bb e^pp.
Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", equation 16 and appendix D.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..common import cast, check_lengths, check_shapes, check_state_dtype, make_call, sum_dtype
from ..dispatch import Backend, Operator, never, short_sequence
from ..native import refuses
from ..segments import Segments
from . import native, reference, scan
from .reference import EMPTY

__all__ = ["EMPTY", "OPERATOR", "wkv4"]

OPERATOR = Operator(
    "wkv4",
    (
        Backend("native", native.run, refuses),
        Backend("scan", scan.run, short_sequence),
        Backend("reference", reference.run, never),
    ),
)


def wkv4(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    lengths: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the values read so far, weighted by e^key and faded by the decay.

    log_w, u  (A,) log of the decay (<= 0; -exp(time_decay) in checkpoints) and the bonus (time_first)
    k, v      (B, T, A) key and value; |k| may be large: no exponential of it is ever formed alone
    state     (B, 3, A) aa, bb, pp before the first token; float32, or float64 for float64 inputs
    lengths   (B,) int64 valid tokens per row, or None: later ones leave the state, and give 0
    segments  sequences within the rows, in place of lengths; the states are then one per segment
    returns   wkv (B, T, A) and the state after each row's last token, both in the sums' dtype

    Sums are float32 whatever the inputs are. Any T >= 1. Gradients reach every argument; of a state they
    reach aa and bb, while pp is a scale that the result does not depend on and gets none.
    InputError, StateError, BackendError.
    """
    if segments is not None:
        return segments.each(partial(wkv4, log_w, u, backend=backend), (k, v), state, lengths)
    B, T, A = k.shape
    check_lengths("wkv4", lengths, B, T)
    check_shapes("wkv4", (A,), log_w=log_w, u=u)
    check_shapes("wkv4", (B, T, A), v=v)
    check_shapes("wkv4", (B, 3, A), state=state)
    dtype = sum_dtype(k, v)
    check_state_dtype("wkv4", state, dtype)
    log_w, u, k, v = cast(dtype, log_w, u, k, v)
    row = OPERATOR.choose(make_call(T, 1, dtype, log_w, u, k, v, state), backend)
    y, new_state = row.run(log_w, u, k, v, state, lengths)
    return y, new_state
