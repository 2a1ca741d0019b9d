"""RWKV-5 "Eagle": a matrix per head for a memory, with a learned decay that is the same for every token.

Time mix. x_t is the normalised input, x_{t-1} its predecessor, and mix_s(x) = x_t m_s + x_{t-1} (1 - m_s)
with m_s the parameter `time_mix_s`. Products of same-sized vectors are elementwise unless written W x:

    r = W_r mix_r(x)      k = W_k mix_k(x)      v = W_v mix_v(x)      g = silu(W_g mix_g(x))
    w = exp(-exp(time_decay))
    u = time_faaaa, or exp(time_first) where the checkpoint has that name

and per head, with a memory S of shape (V, K):

    y_t = (S_{t-1} + v_t (u * k_t)^T) r_t        the current token counts u, not 1
    S_t = S_{t-1} diag(w) + v_t k_t^T
    out = W_o (GroupNorm(y) * g)

5.0 has no gate g; 5.0 and 5.1 have one w and one u per head, 5.2 one per key channel.

Channel mix:  out = sigmoid(W_r mix_r(x)) * (W_v relu(W_k mix_k(x))^2)

B batch, T tokens, D width of the model, A of the time mix, H heads, K key and V value channels of a head.

Source: Peng et al. 2024, "Eagle and Finch". Initial values, learning rates and weight decay:
BlinkDL/RWKV-LM, RWKV-v5/src/model.py. The trainer divides y by 8 and normalises with eps 1e-5, which is
the same as eps 64e-5 on y itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import RWKV5Config
from ..ops import Segments, token_mix, wkv5
from .base import RWKV, Block
from .layers import HeadNorm, Linear, MatrixMemory, activation
from .recipe import Layer, constant, depth, orthogonal, parameter, per_channel, zeros


class TimeMix(MatrixMemory):
    def __init__(self, config: RWKV5Config, layer: int) -> None:
        super().__init__(config)
        D, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        first, remaining = depth(layer, config.n_layer)
        per_head = config.minor < 2
        shape = (H,) if per_head else (H, N)
        last = max((H if per_head else A) - 1, 1)

        def decay(n: Tensor) -> Tensor:
            return -6 + 5 * (n / last) ** (0.7 + 1.3 * first)

        def bonus(n: Tensor) -> Tensor:
            zigzag = 0 if per_head else 0.1 * ((n + 1) % 3 - 1)
            return first * (1 - n / last) + zigzag

        self.time_decay = parameter(*shape, init=per_channel(decay), lr=2.0)
        if config.bonus == "time_first":
            self.time_first = parameter(*shape, init=constant(-3), lr=3.0)
        else:
            self.time_faaaa = parameter(*shape, init=per_channel(bonus))
        self.bonus_is_log = config.bonus == "time_first"

        self.time_mix_k = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.time_mix_v = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining + 0.3 * first))
        self.time_mix_r = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** (0.5 * remaining)))
        self.has_gate = config.minor > 0
        if self.has_gate:
            self.time_mix_g = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** (0.5 * remaining)))
            self.gate = Linear(D, A, init=orthogonal(0.1))

        self.receptance = Linear(D, A, init=orthogonal())
        self.key = Linear(D, A, init=orthogonal(0.1))
        self.value = Linear(D, A, init=orthogonal())
        self.output = Linear(A, D, init=zeros)
        self.ln_x = HeadNorm(
            H, A, config.group_norm_eps, init=constant(((1 + layer) / config.n_layer) ** 0.7)
        )

    def forward(
        self, x_BTD: Tensor, last_BD: Tensor, memory_BHVK: Tensor, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed tokens, and what the next call needs: last_BD, memory_BHVK."""
        mixes = [self.time_mix_r, self.time_mix_k, self.time_mix_v]
        if self.has_gate:
            mixes.append(self.time_mix_g)
        (xr, xk, xv, *xg), last_BD = token_mix(x_BTD, last_BD, mixes, towards="now", segments=segments)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)

        log_w_HK, u_HK = self.decay_and_bonus(memory_BHVK.dtype)
        y, memory_BHVK = wkv5(
            self.heads(r), log_w_HK, self.heads(k), self.heads(v), u_HK, memory_BHVK, segments=segments
        )
        y = self.ln_x(y).to(x_BTD.dtype).view_as(r)
        if self.has_gate:
            y = y * F.silu(self.gate(*xg))
        return self.output(y), last_BD, memory_BHVK

    def decay_and_bonus(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """log w and u, (H, K) each, in the sums' dtype: w is an exponential of an exponential."""
        log_w = -torch.exp(self.time_decay.to(dtype))
        u = torch.exp(self.time_first.to(dtype)) if self.bonus_is_log else self.time_faaaa.to(dtype)
        H, N = self.memory_shape[:2]
        return log_w.view(H, -1).expand(H, N), u.view(H, -1).expand(H, N)


class ChannelMix(Layer):
    def __init__(self, config: RWKV5Config, layer: int) -> None:
        super().__init__()
        D, _, remaining = config.n_embd, *depth(layer, config.n_layer)
        self.config = config
        self.time_mix_k = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.time_mix_r = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.key = Linear(D, config.dim_ffn, init=orthogonal())
        self.receptance = Linear(D, D, init=zeros)
        self.value = Linear(config.dim_ffn, D, init=zeros, sparse=True)

    def forward(self, x_BTD: Tensor, last_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        mixes = self.time_mix_k, self.time_mix_r
        (xk, xr), last_BD = token_mix(x_BTD, last_BD, mixes, towards="now", segments=segments)
        hidden = activation(self.config, self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(hidden), last_BD


class RWKV5Block(Block):
    parts = (TimeMix, ChannelMix)


class RWKV5(RWKV):
    """An RWKV-5 language model (5.0, 5.1 or 5.2); `RWKV` documents the call."""

    block = RWKV5Block
