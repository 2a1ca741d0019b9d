"""The definition of the RWKV-5 and RWKV-6 operator: a loop over tokens. Other forms are tested against it.

It is also what decoding runs, one token at a time. So products with the memory are written as row times
matrix, r^T S^T for S r: as matrix times column they take torch four times as long on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); every tensor already has the dtype of the sums."""
    own = (r * u * k).sum(dim=-1, keepdim=True) * v  # v (u * k)^T r of every token: what it reads of itself
    w = log_w.exp().expand_as(r)
    tokens = zip(*(x.unsqueeze(-2).unbind(1) for x in (r, w, k, v, own)), strict=True)
    outputs = []
    for t, (r_t, w_t, k_t, v_t, own_t) in enumerate(tokens):  # rows: (B, H, 1, K or V)
        y = (r_t @ state.mT + own_t).squeeze(-2)
        new = torch.addcmul(state * w_t, v_t.mT, k_t)
        if lengths is not None:
            going_on = (t < lengths)[:, None, None]
            y, new = torch.where(going_on, y, 0), torch.where(going_on[..., None], new, state)
        state = new
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
