"""RWKV-4 "Dove": an average of past values, weighted by their keys and faded by a decay, per channel.

Time mix. x_t is the normalised input, x_{t-1} its predecessor, and mix_s(x) = x_t m_s + x_{t-1} (1 - m_s)
with m_s the parameter `time_mix_s`. Products of same-sized vectors are elementwise unless written W x:

    r = sigmoid(W_r mix_r(x))      k = W_k mix_k(x)      v = W_v mix_v(x)
    w = -exp(time_decay)           u = time_first

    wkv_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t)
          / (sum_{i<t} e^{(t-1-i) w + k_i}     + e^{u + k_t}    )
    out   = W_o (r * wkv)

Channel mix:  out = sigmoid(W_r mix_r(x)) * (W_v relu(W_k mix_k(x))^2)

B batch, T tokens, D width of the model, A width of the time mix.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era". Initial values, learning rates
and weight decay: BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import RWKV4Config
from ..ops import Segments, cheap, token_mix, wkv4
from ..ops.wkv4 import EMPTY
from .base import RWKV, Block
from .layers import Linear, activation
from .recipe import Layer, depth, orthogonal, parameter, per_channel, zeros


class TimeMix(Layer):
    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        D, A = config.n_embd, config.dim_att
        first, remaining = depth(layer, config.n_layer)
        self.memory_shape = (3, A)

        def decay(n: Tensor) -> Tensor:  # from slow to fast channels, slower on the whole in deeper layers
            return -5 + 8 * (n / max(A - 1, 1)) ** (0.7 + 1.3 * first)

        def bonus(n: Tensor) -> Tensor:  # a zigzag, so that neighbouring channels differ
            return math.log(0.3) + 0.5 * ((n + 1) % 3 - 1)

        self.time_decay = parameter(A, init=per_channel(decay), lr=2.0)
        self.time_first = parameter(A, init=per_channel(bonus), lr=3.0)
        self.time_mix_k = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.time_mix_v = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining + 0.3 * first))
        self.time_mix_r = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** (0.5 * remaining)))

        self.key = Linear(D, A, init=zeros)
        self.value = Linear(D, A, init=orthogonal(tall=True))
        self.receptance = Linear(D, A, init=zeros)
        self.output = Linear(A, D, init=zeros)

    def initial_memory(self, batch_size: int, like: Tensor) -> Tensor:
        """(B, 3, A): empty sums, of the dtype and on the device of `like`."""
        memory = like.new_zeros(batch_size, *self.memory_shape)
        memory[:, 2] = EMPTY
        return memory

    def forward(
        self, x_BTD: Tensor, last_BD: Tensor, memory_B3A: Tensor, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed tokens, and what the next call needs: last_BD, memory_B3A."""
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r
        (xk, xv, xr), last_BD = token_mix(x_BTD, last_BD, mixes, towards="now", segments=segments)
        k, v, r = self.key(xk), self.value(xv), torch.sigmoid(self.receptance(xr))

        # float32: an exponential of an exponential of the parameter, which bfloat16 would round to steps.
        log_w = -torch.exp(self.time_decay.to(memory_B3A.dtype))
        wkv, memory_B3A = wkv4(log_w, self.time_first, k, v, memory_B3A, segments=segments)
        return self.output(cheap(torch.mul, r, wkv.to(r.dtype))), last_BD, memory_B3A


class ChannelMix(Layer):
    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        D, _, remaining = config.n_embd, *depth(layer, config.n_layer)
        self.config = config
        self.time_mix_k = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.time_mix_r = parameter(1, 1, D, init=per_channel(lambda n: (n / D) ** remaining))
        self.key = Linear(D, config.dim_ffn, init=orthogonal(tall=True))
        self.receptance = Linear(D, D, init=zeros)
        self.value = Linear(config.dim_ffn, D, init=zeros, sparse=True)

    def forward(self, x_BTD: Tensor, last_BD: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
        mixes = self.time_mix_k, self.time_mix_r
        (xk, xr), last_BD = token_mix(x_BTD, last_BD, mixes, towards="now", segments=segments)
        hidden = activation(self.config, self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(hidden), last_BD


class RWKV4Block(Block):
    parts = (TimeMix, ChannelMix)


class RWKV4(RWKV):
    """An RWKV-4 language model; `RWKV` documents the call."""

    block = RWKV4Block
    embedding_bound = 6e-4  # the official trainer takes its initial learning rate, by default this
