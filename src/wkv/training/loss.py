"""What training minimises, and what is measured on text that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import RWKV
from .data import as_tokens

_PADDING = -100  # no byte: a target that costs nothing


def cross_entropy(logits: Tensor, targets: Tensor, *, l2wrap: float = 1e-4) -> Tensor:
    """Mean cross-entropy in nats, with RWKV's "L2Wrap": a pull of every largest logit towards zero.

        gradient of   cross-entropy + l2wrap / (2 B T) * sum over b, t of (max over v of logit)^2
        value of      cross-entropy alone, so that losses stay comparable

    logits (B, T, V) of any float dtype, targets (B, T) int64; the result is a float32 scalar (float64
    for float64 logits). The pull keeps logits from drifting to where bfloat16 is coarse. Like any loss
    it scales with the gradient that comes in, so gradient accumulation and loss scaling leave its share.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    pull = l2wrap / 2 * logits.max(dim=-1).values.square().mean()
    return loss + (pull - pull.detach())


def bits_per_byte(
    model: RWKV, texts: Iterable[bytes], *, batch_size: int = 16, chunk_tokens: int = 512
) -> float:
    """Bits that `model`, whose tokens are bytes, needs per byte of `texts`, each read from a fresh state.

    Every byte is paid for: the first of a text, which nothing precedes, costs log2(vocabulary). Texts
    of similar length share a batch and are read `chunk_tokens` at a time, so that memory is bounded
    whatever their length; neither setting changes the result. Empty texts cost nothing.
    """
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    n_bytes = sum(map(len, longest_first))
    bits = len(longest_first) * math.log2(model.config.vocab_size)
    for start in range(0, len(longest_first), batch_size):
        bits += _bits_after_the_first(model, longest_first[start : start + batch_size], chunk_tokens)
    return bits / n_bytes


@torch.no_grad()
def _bits_after_the_first(model: RWKV, texts: Sequence[bytes], chunk_tokens: int) -> float:
    """The sum over `texts`, which come longest first: rows that are through leave at the end of the batch."""
    state = model.initial_state(len(texts))
    nats = 0.0
    for start in range(0, len(texts[0]) - 1, chunk_tokens):
        unfinished = sum(len(text) - 1 > start for text in texts)
        width = min(len(texts[0]) - start, chunk_tokens + 1)
        tokens = torch.zeros(unfinished, width, dtype=torch.int64)
        targets = torch.full_like(tokens, _PADDING)
        for row, text in enumerate(texts[:unfinished]):
            piece = text[start : start + width]
            tokens[row, : len(piece)] = targets[row, : len(piece)] = as_tokens(piece)
        # Padding needs no `lengths`: it comes last in its row, which then leaves; nobody reads that state.
        logits, state = model(tokens[:, :-1].to(model.device), state[:unfinished])
        costs = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets[:, 1:].flatten().to(model.device),
            ignore_index=_PADDING,
            reduction="none",
        )
        nats += costs.sum(dtype=torch.float64).item()
    return nats / math.log(2)
