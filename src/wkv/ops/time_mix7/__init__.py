"""RWKV-7's time mix between its matrix products: what they make of a token, the memory, norm, bonus and gate.

Of each token come in, each of A = H N channels: receptance r, key k, value v, gate g, and the results of the
low-rank paths, w for the decay, a for the rate, s for the share of the first layer's value. Per channel:

    d = exp(-e^{-1/2} sigmoid(w0 + w))                  decay
    a = sigmoid(a0 + a)                                 rate at which the memory learns
    v = v + (first - v) sigmoid(v0 + s)                 layers > 0
    kappa = normalise_per_head(k * k_k)                 what to erase
    k = k (1 + (a - 1) k_a)                             what to write

and per head, with the memory S of `wkv7`:

    S_t = S_{t-1} (diag(d) - kappa (a * kappa)^T) + v k^T
    y   = GroupNorm(S_t r) + (sum_n r_n k_n r_k) v      the bonus: a token reads itself
    out = y * g

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution"; BlinkDL/RWKV-LM, RWKV-v7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..common import check_lengths, check_shapes, check_state_dtype, make_call, sum_dtype
from ..dispatch import Backend, Operator, never, short_sequence
from ..native import refuses
from ..segments import Segments
from . import native, reference

OPERATOR = Operator(
    "time_mix7",
    (
        Backend("native", native.run, refuses),
        # The equations in plain torch, around that row of wkv7.
        Backend("chunked", partial(reference.run, backend="chunked"), short_sequence),
        Backend("reference", partial(reference.run, backend="reference"), never),
    ),
)


def time_mix7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    state: Tensor,
    *,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm: tuple[Tensor, Tensor, float],
    first: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    segments: Segments | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read, erase and write the memory once per token; return what the output matrix takes.

    r, w, k, v, a, g  (B, T, A) as above, before the parameters and the sigmoids
    state             (B, H, N, N) the memory (V, K) before the first token; float32, or float64 for float64
    w0, a0, k_k, k_a  (A,), or with axes of length 1 before it
    r_k               (H, N)
    norm              weight (A,), bias (A,) and eps of the GroupNorm
    first             for layers > 0: the first layer's v (B, T, A), s (B, T, A), and v0 shaped as w0
    lengths           (B,) int64 valid tokens per row, or None: later ones leave the state, and give 0
    segments          sequences within the rows, in place of lengths; the states are then one per segment
    returns           (B, T, A) in the dtype of g and the parameters together, and the memory after each row's
                      last token

    The decay, the memory and what it reads are float32 at least, whatever the inputs are; "native" is float32
    throughout. Any T >= 1; gradients reach every tensor, the initial and the final state included.
    InputError, StateError, BackendError.
    """
    tokens = (r, w, k, v, a, g) if first is None else (r, w, k, v, a, g, *first[:2])
    if segments is not None:
        run = partial(time_mix7, w0=w0, a0=a0, k_k=k_k, k_a=k_a, r_k=r_k, norm=norm, backend=backend)
        v0 = None if first is None else first[2]
        return segments.each(partial(_tokens_first, run, v0), tokens, state, lengths)
    B, T, A = r.shape
    check_lengths("time_mix7", lengths, B, T)
    named = dict(zip(("w", "k", "v", "a", "g", "first", "s"), tokens[1:], strict=False))
    check_shapes("time_mix7", (B, T, A), **named)
    weight, bias, eps = norm
    channels = {"w0": w0, "a0": a0, "k_k": k_k, "k_a": k_a, "weight": weight, "bias": bias}
    if first is not None:
        channels["v0"] = first[2]
    check_shapes("time_mix7", (A,), **{name: x.flatten() for name, x in channels.items()})
    H = len(r_k)
    check_shapes("time_mix7", (H, A // H), r_k=r_k)
    check_shapes("time_mix7", (B, H, A // H, A // H), state=state)
    dtype = sum_dtype(r, v)
    check_state_dtype("time_mix7", state, dtype)
    row = OPERATOR.choose(make_call(T, A // H, dtype, *tokens, *channels.values(), r_k, state), backend)
    before, s, v0 = (None, None, None) if first is None else first
    inputs = (r, w, k, v, a, g, before, s, state, w0, a0, v0, k_k, k_a, r_k, weight, bias)
    out, new_state = row.run(*inputs, eps, lengths)
    return out, new_state


def _tokens_first(
    run: Callable[..., tuple[Tensor, Tensor]], v0: Tensor | None, *tokens: Tensor, **others: Any
) -> tuple[Tensor, Tensor]:
    """`run` with the first layer's v and s among the tokens, where they are given."""
    first = None if v0 is None else (*tokens[6:], v0)
    return run(*tokens[:6], first=first, **others)
