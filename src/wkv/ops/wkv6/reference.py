"""The definition of the RWKV-5 and RWKV-6 operator: a loop over tokens. Other forms are tested against it.

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
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); every tensor already has the dtype of the sums."""
    own = (r * u * k).sum(dim=-1, keepdim=True) * v  # v (u * k)^T r of every token: what it reads of itself
    w = log_w.exp().expand_as(r)
    memory = state.flatten(0, 1)  # (B * H, V, K)
    outputs = []
    for t, (r_t, w_t, k_t, v_t, own_t) in enumerate(
        zip(*map(rows_of_tokens, (r, w, k, v, own)), strict=True)
    ):
        y = torch.baddbmm(own_t, r_t, memory.mT)
        new = (memory * w_t).addcmul_(v_t.mT, k_t)
        if lengths is not None:
            going_on = (t < lengths).repeat_interleave(r.shape[2])[:, None, None]
            y, new = torch.where(going_on, y, 0), torch.where(going_on, new, memory)
        memory = new
        outputs.append(y)
    return tokens_of_rows(outputs, v), memory.view_as(state)
