"""What training minimises, and what is measured on text that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import RWKV


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
    predictions = torch.tensor([len(text) - 1 for text in texts])
    nats = 0.0
    for start in range(0, len(texts[0]) - 1, chunk_tokens):
        unfinished = int((predictions > start).sum())
        lengths = (predictions[:unfinished] - start).clamp(max=chunk_tokens)
        window = torch.zeros(unfinished, int(lengths[0]) + 1, dtype=torch.int64)
        for row, text in zip(window, texts, strict=False):
            tokens = torch.frombuffer(bytearray(text[start : start + len(row)]), dtype=torch.uint8)
            row[: len(tokens)] = tokens
        window, lengths = window.to(model.device), lengths.to(model.device)

        logits, state = model(window[:, :-1], state[:unfinished], lengths=lengths)
        costs = F.cross_entropy(logits.mT.float(), window[:, 1:], reduction="none")
        valid = torch.arange(costs.shape[1], device=costs.device) < lengths[:, None]
        nats += costs[valid].sum(dtype=torch.float64).item()
    return nats / math.log(2)
