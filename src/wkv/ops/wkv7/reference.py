"""The definition of the RWKV-7 operator: a loop over tokens. Every other form is tested against it."""

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
    w, rate = log_w.exp(), kappa * a
    outputs = []
    for t in range(r.shape[1]):
        removed = state @ kappa[:, t, :, :, None]  # (B, H, V, 1): what the memory holds under kappa
        # Erase and write are two outer products: one (V, 2) by (2, K) matrix product does both.
        columns = torch.cat((-removed, v[:, t, :, :, None]), dim=-1)
        rows = torch.stack((rate[:, t], k[:, t]), dim=-2)
        new = state * w[:, t, :, None, :] + columns @ rows
        if lengths is None:
            state = new
            outputs.append((state @ r[:, t, :, :, None])[..., 0])
        else:
            going_on = (t < lengths)[:, None, None, None]
            state = torch.where(going_on, new, state)
            outputs.append(torch.where(going_on, state @ r[:, t, :, :, None], 0)[..., 0])
    return torch.stack(outputs, dim=1), state
