"""RWKV-6 "Finch" (x060): the memory of RWKV-5, with token shift and decay that depend on the data.

Time mix. x_t is the normalised input, d = x_{t-1} - x_t the way to its predecessor. Products of same-sized
vectors are elementwise unless written W x; maa_s is the parameter `time_maa_s`:

    [m_w, m_k, m_v, m_r, m_g] = tanh((x + d maa_x) maa_w1) maa_w2      five low-rank corrections
    mix_s(x) = x + d (maa_s + m_s)                                     s in w, k, v, r, g
    r = W_r mix_r(x)      k = W_k mix_k(x)      v = W_v mix_v(x)      g = silu(W_g mix_g(x))
    w = exp(-exp(time_decay + tanh(mix_w(x) decay_w1) decay_w2))
    u = time_faaaa

and per head, with a memory S of shape (V, K):

    y_t = (S_{t-1} + v_t (u * k_t)^T) r_t        the current token counts u, not 1
    S_t = S_{t-1} diag(w_t) + v_t k_t^T
    out = W_o (GroupNorm(y) * g)

Channel mix, with mix_s(x) = x + d maa_s:  out = sigmoid(W_r mix_r(x)) * (W_v relu(W_k mix_k(x))^2)

B batch, T tokens, D width of the model, A of the time mix, H heads, K key and V value channels of a head.

Source: Peng et al. 2024, "Eagle and Finch". Initial values, learning rates and weight decay:
BlinkDL/RWKV-LM, RWKV-v5/src/model.py (x060).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import RWKV6Config
from ..ops import Segments, token_mix, wkv6
from .base import RWKV, Block
from .layers import HeadNorm, Linear, MatrixMemory, activation
from .recipe import Layer, constant, depth, orthogonal, parameter, per_channel, uniform, zeros


class TimeMix(MatrixMemory):
    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__(config)
        D, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        first, remaining = depth(layer, config.n_layer)
        last = max(A - 1, 1)

        def decay(n: Tensor) -> Tensor:
            return -6 + 5 * (n / last) ** (0.7 + 1.3 * first)

        def bonus(n: Tensor) -> Tensor:
            return first * (1 - n / last) + 0.1 * ((n + 1) % 3 - 1)

        self.time_maa_x = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining))
        self.time_maa_w = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining))
        self.time_maa_k = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining))
        self.time_maa_v = parameter(
            1, 1, D, init=per_channel(lambda n: 1 - ((n / D) ** remaining + 0.3 * first))
        )
        self.time_maa_r = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.5 * remaining)))
        self.time_maa_g = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.5 * remaining)))
        self.time_maa_w1 = parameter(D, 5 * config.mix_rank, init=zeros)
        self.time_maa_w2 = parameter(5, config.mix_rank, D, init=uniform(0.01))

        self.time_decay = parameter(1, 1, A, init=per_channel(decay), lr=2.0)
        self.time_decay_w1 = parameter(D, config.decay_rank, init=zeros)
        self.time_decay_w2 = parameter(config.decay_rank, A, init=uniform(0.01))
        self.time_faaaa = parameter(H, N, init=per_channel(bonus))

        self.receptance = Linear(D, A, init=orthogonal())
        self.key = Linear(D, A, init=orthogonal(0.1))
        self.value = Linear(D, A, init=orthogonal())
        self.gate = Linear(D, A, init=orthogonal(0.1))
        self.output = Linear(A, D, init=zeros)
        self.ln_x = HeadNorm(
            H, A, config.group_norm_eps, init=constant(((1 + layer) / config.n_layer) ** 0.7)
        )

    def forward(
        self, x_BTD: Tensor, last_BD: Tensor, memory_BHVK: Tensor, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed tokens, and what the next call needs: last_BD, memory_BHVK."""
        mix = partial(token_mix, x_BTD, last_BD, towards="before", segments=segments)
        (xx,), _ = mix([self.time_maa_x])
        low_rank = torch.tanh(xx @ self.time_maa_w1).unflatten(-1, (5, -1))
        m_sBTD = torch.einsum("BTsr,srD->sBTD", low_rank, self.time_maa_w2)
        maa = self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g
        (xw, xk, xv, xr, xg), last_BD = mix(torch.stack(maa) + m_sBTD)

        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), F.silu(self.gate(xg))
        # float32 before the two exponentials: they would turn a rounding of w into a different half-life.
        omega = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        log_w = -torch.exp(omega.to(memory_BHVK.dtype))

        y, memory_BHVK = wkv6(
            self.heads(r), self.heads(log_w), self.heads(k), self.heads(v),
            self.time_faaaa, memory_BHVK, segments=segments,
        )  # fmt: skip
        return self.output(self.ln_x(y).to(g.dtype).view_as(g) * g), last_BD, memory_BHVK


class ChannelMix(Layer):
    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        D, _, remaining = config.n_embd, *depth(layer, config.n_layer)
        self.config = config
        self.time_maa_k = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining**3))
        self.time_maa_r = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining**3))
        self.key = Linear(D, config.dim_ffn, init=orthogonal())
        self.receptance = Linear(D, D, init=zeros)
        self.value = Linear(config.dim_ffn, D, init=zeros, sparse=True)

    def forward(self, x_BTD: Tensor, last_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        mixes = self.time_maa_k, self.time_maa_r
        (xk, xr), last_BD = token_mix(x_BTD, last_BD, mixes, towards="before", segments=segments)
        hidden = activation(self.config, self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(hidden), last_BD


class RWKV6Block(Block):
    parts = (TimeMix, ChannelMix)


class RWKV6(RWKV):
    """An RWKV-6 language model (x060); `RWKV` documents the call."""

    block = RWKV6Block
