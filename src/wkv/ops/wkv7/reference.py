"""The definition of the RWKV-7 operator: a loop over tokens. Every other form is tested against it.

It is also what decoding runs, one token at a time. So products with the memory are written as row times
matrix, r^T S^T for S r: as matrix times column they take torch four times as long on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import rows_of_tokens, tokens_of_rows
from ..library import without_autocast


@without_autocast
def run(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv7`; every tensor already has the dtype of the sums."""
    memory = state.flatten(0, 1)  # (B * H, V, K)
    tokens = zip(*map(rows_of_tokens, (r, log_w.exp(), k, v, kappa, kappa * a)), strict=True)
    outputs = []
    for t, (r_t, w_t, k_t, v_t, kappa_t, rate_t) in enumerate(tokens):
        removed = torch.bmm(kappa_t, memory.mT)  # what the memory holds under kappa
        # In place on a result that autograd does not keep: one new memory per token instead of three.
        new = (memory * w_t).addcmul_(removed.mT, rate_t, value=-1).addcmul_(v_t.mT, k_t)
        y = torch.bmm(r_t, new.mT)
        if lengths is not None:
            going_on = (t < lengths).repeat_interleave(r.shape[2])[:, None, None]
            y, new = torch.where(going_on, y, 0), torch.where(going_on, new, memory)
        memory = new
        outputs.append(y)
    return tokens_of_rows(outputs, v), memory.view_as(state)
