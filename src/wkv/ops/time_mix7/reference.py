"""The time mix of RWKV-7 in plain torch: the equations as they stand, around the operator `wkv7`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import padding
from ..wkv7 import wkv7


def run(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    g: Tensor,
    first: Tensor | None,
    s: Tensor | None,
    state: Tensor,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    lengths: Tensor | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `time_mix7`; `backend` names the row of wkv7."""
    # The decay is float32: near 1 bfloat16 has no values left between 0.996 and 1.
    log_w = torch.sigmoid((w0 + w).to(state.dtype)) * -math.exp(-0.5)
    a = torch.sigmoid(a0 + a).to(k.dtype)  # autocast makes products shorter
    if first is not None and s is not None and v0 is not None:
        v = torch.lerp(v, first, torch.sigmoid(v0 + s).to(v.dtype))

    # Remember: heads apart, (B, T, H, N).
    heads = (*r.shape[:2], *r_k.shape)
    kappa = (k * k_k).view(heads)
    kappa = kappa / torch.linalg.vector_norm(kappa, dim=-1, keepdim=True).clamp_min(1e-12)
    k = torch.lerp(k, k * a, k_a.to(k.dtype))  # k (1 + (a - 1) k_a) in two steps instead of four
    r, k, v = r.view(heads), k.view(heads), v.view(heads)
    y, state = wkv7(r, log_w.view(heads), k, v, kappa, a.view(heads), state, lengths=lengths, backend=backend)

    # Answer: one group of the norm per head, over rows of tokens.
    bonus = (r * k * r_k).sum(dim=-1, keepdim=True) * v
    rows = y.reshape(-1, g.shape[-1])
    y = torch.group_norm(rows, len(r_k), weight.to(y.dtype), bias.to(y.dtype), eps)
    out = (y.view(g.shape).to(g.dtype) + bonus.view(g.shape)) * g
    return out if lengths is None else out.masked_fill(padding(lengths, g.shape[1])[..., None], 0), state
