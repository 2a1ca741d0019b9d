"""RWKV-7 "Goose" (x070): a small memory per head, erased and rewritten at every token.

Time mix. x_t is the normalised input, x_{t-1} its predecessor, and mix_s(x) = x_t + (x_{t-1} - x_t) * x_s
with one learned x_s per use s. Products of same-sized vectors are elementwise unless written W x:

    r = W_r mix_r(x)      k = W_k mix_k(x)      v = W_v mix_v(x)
    w = exp(-e^{-1/2} sigmoid(w0 + tanh(mix_w(x) w1) w2))        decay, between 0.545 and 1
    a = sigmoid(a0 + mix_a(x) a1 a2)                             rate at which the memory learns
    g = sigmoid(mix_g(x) g1) g2                                  gate
    v = v + (v_first - v) sigmoid(v0 + mix_v(x) v1 v2)           layers > 0; v_first is layer 0's v
    kappa = normalise_per_head(k * k_k)                          what to erase, from the unmodified key
    k = k (1 + (a - 1) k_a)                                      what to write

and per head, with a memory S of shape (V, K):

    S_t = S_{t-1} (diag(w) - kappa (a * kappa)^T) + v k^T        decay, erase, write
    y   = S_t r                                                  read (the updated memory)
    y   = GroupNorm(y) + (sum_n r_n k_n r_k) v                   the bonus: a token reads itself
    out = W_o (y * g)

Channel mix:  out = W_v relu(W_k mix_k(x))^2

Names carry their shape where it changes: B batch, T tokens, D width, H heads, K key and V value channels
of a head. K = V, yet both are named: a transposed memory still fits.

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution". Initial values, learning
rates and weight decay: BlinkDL/RWKV-LM, RWKV-v7/train_temp (release rc4a), whose code wins over its README.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import RWKV7Config
from ..ops import Segments, time_mix7, token_mix
from ..state import LayerState
from .base import RWKV, Block
from .layers import HeadNorm, Linear, MatrixMemory, activation
from .recipe import Layer, constant, depth, orthogonal, parameter, per_channel, zeros


class TimeMix(MatrixMemory):
    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__(config)
        D, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        first, remaining = depth(layer, config.n_layer)

        # Later channels look at the token before less; deeper layers less still.
        self.x_r = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.2 * remaining)))
        self.x_w = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.9 * remaining)))
        self.x_k = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.7 * remaining)))
        self.x_v = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.7 * remaining)))
        self.x_a = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.9 * remaining)))
        self.x_g = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** (0.2 * remaining)))

        def ramp(n: Tensor) -> Tensor:  # -1/2 ... 1/2 over all channels
            return n / max(A - 1, 1) - 0.5

        def zigzag(n: Tensor) -> Tensor:  # -1 ... 1 within each head, flat in the middle
            s = ((n % N) - (N - 1) / 2) / max((N - 1) / 2, 1)
            return s * s.abs()

        def decay(n: Tensor) -> Tensor:  # the 0.5 keeps the value of the older exp(-exp(.)) form
            return -6 + 6 * (n / max(A - 1, 1)) ** (1 + first**0.3) + 0.5 + 2.5 * zigzag(n)

        small = orthogonal(0.1, tall=True)
        self.w0 = parameter(1, 1, A, init=per_channel(decay), lr=2.0)
        self.w1 = parameter(D, config.decay_rank, init=zeros)
        self.w2 = parameter(config.decay_rank, A, init=small)
        self.a0 = parameter(1, 1, A, init=per_channel(lambda n: -0.19 + 0.3 * zigzag(n) + 0.4 * ramp(n)))
        self.a1 = parameter(D, config.rate_rank, init=zeros)
        self.a2 = parameter(config.rate_rank, A, init=small)
        self.g1 = parameter(D, config.gate_rank, init=zeros)
        self.g2 = parameter(config.gate_rank, A, init=small)
        if layer > 0:
            self.v0 = parameter(1, 1, A, init=per_channel(lambda n: 0.73 - 0.4 * ramp(n)))
            self.v1 = parameter(D, config.value_rank, init=zeros)
            self.v2 = parameter(config.value_rank, A, init=small)
        elif config.first_value_rank:
            # Layer 0 has no earlier value to mix in. Buffers, so that they are written back untrained.
            self.register_buffer("v0", torch.empty(1, 1, A))
            self.register_buffer("v1", torch.empty(D, config.first_value_rank))
            self.register_buffer("v2", torch.empty(config.first_value_rank, A))
        self.k_k = parameter(1, 1, A, init=per_channel(lambda n: 0.71 - 0.1 * ramp(n)))
        self.k_a = parameter(1, 1, A, init=constant(1.02))
        self.r_k = parameter(H, N, init=constant(-0.04))

        self.receptance = Linear(D, A, init=orthogonal())
        self.key = Linear(D, A, init=orthogonal(0.1))
        self.value = Linear(D, A, init=orthogonal())
        self.output = Linear(A, D, init=zeros)
        self.ln_x = HeadNorm(
            H, A, config.group_norm_eps, init=constant(((1 + layer) / config.n_layer) ** 0.7)
        )

    def forward(
        self,
        x_BTD: Tensor,
        v_first: Tensor | None,
        last_BD: Tensor,
        memory_BHVK: Tensor,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the mixed tokens, layer 0's values, and what the next call needs: last_BD, memory_BHVK."""
        mixes = self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g
        mixed, last_BD = token_mix(x_BTD, last_BD, mixes, towards="before", segments=segments)
        xr, xw, xk, xv, xa, xg = mixed

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = torch.tanh(xw @ self.w1) @ self.w2
        a = xa @ self.a1 @ self.a2
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        y, memory_BHVK = time_mix7(
            *(r, w, k, v, a, g, memory_BHVK),
            w0=self.w0,
            a0=self.a0,
            k_k=self.k_k,
            k_a=self.k_a,
            r_k=self.r_k,
            norm=(self.ln_x.weight, self.ln_x.bias, self.ln_x.eps),
            first=None if v_first is None else (v_first, xv @ self.v1 @ self.v2, self.v0),
            segments=segments,
        )
        return self.output(y), v if v_first is None else v_first, last_BD, memory_BHVK


class ChannelMix(Layer):
    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        D, _, remaining = config.n_embd, *depth(layer, config.n_layer)
        self.config = config
        self.x_k = parameter(1, 1, D, init=per_channel(lambda n: 1 - (n / D) ** remaining**4))
        self.key = Linear(D, config.dim_ffn, init=orthogonal())
        self.value = Linear(config.dim_ffn, D, init=zeros, sparse=True)

    def forward(self, x_BTD: Tensor, last_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        (xk,), last_BD = token_mix(x_BTD, last_BD, [self.x_k], towards="before", segments=segments)
        return self.value(activation(self.config, self.key(xk))), last_BD


class RWKV7Block(Block):
    parts = (TimeMix, ChannelMix)

    def time_mix(
        self, x: Tensor, v_first: Tensor | None, state: LayerState, segments: Segments | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        out, v_first, last, memory = self.att(x, v_first, state.att_shift, state.memory, segments)
        return out, v_first, last, memory


class RWKV7(RWKV):
    """An RWKV-7 language model; `RWKV` documents the call."""

    block = RWKV7Block
