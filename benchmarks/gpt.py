"""The Transformer that RWKV is measured against: a GPT-2 in torch's own fastest parts.

Pre-norm decoder, learned positions, one product for queries, keys and values, causal attention by
torch's scaled_dot_product_attention, GELU, no biases, an untied head. It is called as a wkv model is,
`hidden, _ = gpt(tokens, output="hidden")`, so `wkv.Trainer` trains it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.state import State

HEAD_SIZE = 64


@dataclass(frozen=True)
class GPTConfig:
    """What `wkv.Trainer` asks of a model's config, and the sizes."""

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    context: int
    generation: int = 0  # of no RWKV

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Block(nn.Module):
    def __init__(self, n_embd: int, dim_ffn: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.qkv, self.output = _linear(n_embd, 3 * n_embd), _linear(n_embd, n_embd)
        self.key, self.value = _linear(n_embd, dim_ffn), _linear(dim_ffn, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, D // HEAD_SIZE, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(B, T, D))
        return x + self.value(F.gelu(self.key(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, *, vocab_size: int, n_layer: int, n_embd: int, dim_ffn: int, context: int) -> None:
        super().__init__()
        self.config = GPTConfig(vocab_size, n_layer, n_embd, dim_ffn, context)
        self.emb, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(context, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, dim_ffn) for _ in range(n_layer))
        self.ln_out = nn.LayerNorm(n_embd, bias=False)
        self.head = _linear(n_embd, vocab_size)
        for embedding in (self.emb, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.emb.weight.device

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        for weight in self.parameters():
            digest.update(weight.detach().contiguous().numpy())
        return digest.hexdigest()

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        starts: Tensor | None = None,
        output: str = "logits",
    ) -> tuple[Tensor, State]:
        assert starts is None and not (state and state.layers), "a GPT sees one window and nothing before it"
        x = self.emb(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.ln_out(x)
        return (x if output == "hidden" else self.head(x)), State(())


def _linear(n_in: int, n_out: int) -> nn.Linear:
    linear = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return linear


def count(module: nn.Module) -> int:
    """Parameters, without a table of positions: it multiplies nothing."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("positions."))


def as_large_as(n_parameters: int, *, vocab_size: int, n_layer: int, n_embd: int, context: int) -> GPT:
    """The GPT of these sizes with that many parameters, to 1 %, by the width of its MLP."""
    sizes = dict(vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, context=context)
    with torch.device("meta"):
        rest = n_parameters - count(GPT(**sizes, dim_ffn=32))
    dim_ffn = 32 + round(rest / (2 * n_layer * n_embd * 32)) * 32
    gpt = GPT(**sizes, dim_ffn=dim_ffn)
    assert abs(count(gpt) / n_parameters - 1) < 0.01
    return gpt
