"""The definition of the RWKV-7 operator: a loop over tokens. Every other form is tested against it.

It is also what decoding runs, one token at a time. So products with the memory are written as row times
matrix, r^T S^T for S r: as matrix times column they take torch four times as long on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    tokens = zip(*(x.unsqueeze(-2).unbind(1) for x in (r, log_w.exp(), k, v, kappa, kappa * a)), strict=True)
    outputs = []
    for t, (r_t, w_t, k_t, v_t, kappa_t, rate_t) in enumerate(tokens):  # rows: (B, H, 1, K or V)
        removed = kappa_t @ state.mT  # what the memory holds under kappa
        new = torch.addcmul(state * w_t, removed.mT, rate_t, value=-1)
        new = torch.addcmul(new, v_t.mT, k_t)
        y = (r_t @ new.mT).squeeze(-2)
        if lengths is not None:
            going_on = (t < lengths)[:, None, None]
            y, new = torch.where(going_on, y, 0), torch.where(going_on[..., None], new, state)
        state = new
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
