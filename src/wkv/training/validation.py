"""What a model makes of documents that it never saw.

result = validate(model, held_out_documents, separator=0, n_bytes=n_bytes)
result.loss, result.perplexity, result.bits_per_byte
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..models import RWKV
from .data.batches import IGNORE
from .distributed import Group, settle
from .loss import linear_cross_entropy


@dataclass(frozen=True)
class Validation:
    """Means over all tokens of all documents."""

    loss: float  # nats per token
    n_tokens: int
    n_bytes: int | None  # of the same documents; None where no tokenizer could tell

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """What the documents cost, per byte of text: comparable between tokenizers and with compressors."""
        return self.loss * self.n_tokens / self.n_bytes / math.log(2) if self.n_bytes else None


def validate(
    model: RWKV,
    documents: Sequence[Any],
    *,
    separator: int,
    n_bytes: int | None = None,
    batch_size: int = 16,
    chunk_tokens: int = 512,
    group: Group | None = None,
) -> Validation:
    """The mean loss of `documents` (token ids each), every one read from a fresh state.

    Every token is paid for: the first is predicted from `separator`, which stands before each document as
    it does in training. Documents of similar length share a batch and are read `chunk_tokens` at a time,
    so memory is bounded whatever their length; neither setting changes the result. The processes of a
    `group` take turns with the documents, and all of them return the result.
    """
    group = group or Group(model.device)
    longest_first = sorted((document for document in documents if len(document)), key=len, reverse=True)
    training = model.training
    model.eval()
    together = batch_size * group.size
    try:
        nats = sum(
            _nats(model, longest_first[start : start + together], separator, chunk_tokens, group)
            for start in range(0, len(longest_first), together)
        )
    finally:
        model.train(training)
        settle(model)
    n_tokens = sum(map(len, longest_first))
    return Validation(group.sum(nats) / max(n_tokens, 1), n_tokens, n_bytes)


@torch.no_grad()
def _nats(model: RWKV, documents: Sequence[Any], separator: int, chunk_tokens: int, group: Group) -> float:
    """The sum over this process's share of `documents`, longest first: a row that is through leaves.

    Sharded weights are put together by all processes at once, so each reads as often as the longest document
    asks for: who has none left, a token that is not counted.
    """
    longest = len(documents[0])
    documents = documents[group.rank :: group.size]
    state = model.initial_state(max(len(documents), 1))
    nats = 0.0
    for start in range(0, longest, chunk_tokens):
        rows = [document for document in documents if len(document) > start]
        width = min(len(rows[0]) - start, chunk_tokens) if rows else 1
        tokens = torch.full((max(len(rows), 1), width), separator)
        targets = torch.full_like(tokens, IGNORE)
        for row, document in enumerate(rows):
            piece = torch.from_numpy(np.asarray(document[start : start + width], dtype=np.int64))
            targets[row, : len(piece)] = piece
            tokens[row, 1 : len(piece)] = piece[:-1]
            tokens[row, 0] = int(document[start - 1]) if start else separator
        # Padding needs no `lengths`: it comes last in its row, which then leaves; nobody reads that state.
        hidden, state = model(tokens.to(model.device), state[: len(tokens)], output="hidden")
        nats += linear_cross_entropy(
            hidden, model.head.weight, targets.to(model.device), l2wrap=0, n_targets=1
        ).item()
    return nats
