"""The definition of the RWKV-4 operator: a loop over tokens. Every other form is tested against it.

The running sums would overflow: their terms are e^k with |k| up to 100. So the state holds them divided
by e^pp, where pp is the largest exponent so far, and every factor below is at most 1. The result does not
depend on pp, which is why it is detached: it is a scale, not a variable, and carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import without_autocast

EMPTY = -1e30  # pp of an empty sum: e^EMPTY is 0, and EMPTY + log_w stays finite


@without_autocast
def run(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `wkv4`; every tensor already has the dtype of the sums."""
    aa, bb, pp = state.unbind(dim=1)
    pp = pp.detach()
    outputs = []
    for t in range(k.shape[1]):
        k_t, v_t = k[:, t], v[:, t]
        q = torch.maximum(pp, u + k_t).detach()
        old, new = torch.exp(pp - q), torch.exp(u + k_t - q)
        y = (old * aa + new * v_t) / (old * bb + new)

        q = torch.maximum(pp + log_w, k_t).detach()
        old, new = torch.exp(pp + log_w - q), torch.exp(k_t - q)
        after = (old * aa + new * v_t, old * bb + new, q)
        if lengths is None:
            aa, bb, pp = after
        else:
            going_on = (t < lengths)[:, None]
            y = torch.where(going_on, y, 0)
            aa, bb, pp = (torch.where(going_on, x, y) for x, y in zip(after, (aa, bb, pp), strict=True))
        outputs.append(y)
    return torch.stack(outputs, dim=1), torch.stack((aa, bb, pp), dim=1)
