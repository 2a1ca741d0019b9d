"""The definition of the RWKV-5 and RWKV-6 operator: a loop over tokens.

Every other form is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def run(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv6`, log_w also (1, 1, H, K); every tensor already has the dtype of the sums."""
    w = log_w.exp().expand_as(r)
    outputs = []
    for t in range(r.shape[1]):
        written = v[:, t, :, :, None] * k[:, t, :, None, :]  # (B, H, V, K)
        y = ((state + u[:, None, :] * written) @ r[:, t, :, :, None])[..., 0]
        new = state * w[:, t, :, None, :] + written
        if lengths is None:
            state = new
        else:
            going_on = (t < lengths)[:, None, None]
            y, state = torch.where(going_on, y, 0), torch.where(going_on[..., None], new, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
