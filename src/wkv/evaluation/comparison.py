"""What a second form of a model loses: both read the same documents, and their predictions are compared.

found = compare(model, wkv.load(path, quantize="int8")[0], documents, separator=0, n_bytes=n_bytes)
found.kl, found.agreement, found.bits_per_byte, found.other_bits_per_byte
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..models import RWKV

LOGITS = 2**23  # of each model, at a time: 64 MiB in float64
TOKENS = 512  # at a time, where the vocabulary is small


@dataclass(frozen=True)
class Comparison:
    """Means over all tokens of all documents, in nats where nothing else is said."""

    n_tokens: int
    n_bytes: int | None  # of the same documents; None where the tokens are no text
    loss: float  # of the model
    other_loss: float
    kl: float  # KL(p of the model || p of the other)
    agreement: float  # the share of tokens where both hold the same one likeliest

    @property
    def bits_per_byte(self) -> float | None:
        """What the documents cost under the model, per byte of text; None where there is none."""
        return self._per_byte(self.loss)

    @property
    def other_bits_per_byte(self) -> float | None:
        """The same under the other."""
        return self._per_byte(self.other_loss)

    @property
    def lost(self) -> float:
        """By which share of the model's bits the other needs more: 0.01 is 1 %. Below 0 it needs fewer."""
        return self.other_loss / self.loss - 1 if self.loss else 0.0

    def _per_byte(self, loss: float) -> float | None:
        return loss * self.n_tokens / self.n_bytes / math.log(2) if self.n_bytes else None


@torch.inference_mode()
def compare(
    model: RWKV,
    other: RWKV,
    documents: Sequence[Sequence[int]],
    *,
    separator: int,
    n_bytes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """What `model` and `other` make of `documents` (token ids each), every one read from a fresh state.

    Every token is paid for: the first is predicted from `separator`, which stands before each document as it
    does in training. Both models read a piece of a document at a time and keep its state for the next, so
    memory is bounded: LOGITS numbers of each. Probabilities and sums are float64.

    n_bytes   of the text that the documents are, for the bits per byte
    progress  is called with the number of tokens read, piece after piece

    InputError for models of different vocabularies, and when there is no token at all.
    """
    V, V_other = model.config.vocab_size, other.config.vocab_size
    if V_other != V:
        raise InputError(f"the models have {V} and {V_other} tokens", "models of one vocabulary")
    at_once = max(1, min(TOKENS, LOGITS // V))
    sums = torch.zeros(4, dtype=torch.float64)
    n_tokens = 0
    for document in documents:
        targets = torch.as_tensor(document, dtype=torch.int64)
        read = F.pad(targets[:-1], (1, 0), value=separator)[None]
        state = other_state = None
        for start in range(0, len(targets), at_once):
            piece = slice(start, start + at_once)
            logits, state = model(read[:, piece].to(model.device), state)
            other_logits, other_state = other(read[:, piece].to(other.device), other_state)
            sums += _sums(logits[0], other_logits[0], targets[piece])
            n_tokens += len(targets[piece])
            if progress is not None:
                progress(n_tokens)
    if not n_tokens:
        raise InputError("there is no token to compare the models over", "documents of at least one token")
    loss, other_loss, kl, agreed = (sums / n_tokens).tolist()
    return Comparison(n_tokens, n_bytes, loss, other_loss, kl, agreed)


def _sums(logits: Tensor, other_logits: Tensor, targets: Tensor) -> Tensor:
    """Over T tokens, with logits (T, V): both losses, KL, and how often the likeliest tokens agree."""
    log_p = logits.double().log_softmax(dim=-1)
    log_q = other_logits.to(log_p).log_softmax(dim=-1)
    at = targets[:, None].to(log_p.device)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    agreed = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()
    return torch.stack((-log_p.gather(-1, at).sum(), -log_q.gather(-1, at).sum(), kl, agreed.double())).cpu()
