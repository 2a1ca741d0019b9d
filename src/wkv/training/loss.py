"""What training minimises, and what is measured on text that it never saw.

The training loss comes in two forms of one function: `cross_entropy` of logits is the definition, and
`linear_cross_entropy` of the vectors before the head never holds all the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .data.batches import IGNORE


def cross_entropy(
    logits: Tensor, targets: Tensor, *, l2wrap: float = 1e-4, n_targets: int | Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats, with RWKV's "L2Wrap": a pull of every largest logit towards zero.

        gradient of   (sum of nats + l2wrap / 2 * sum of (max over v of logit)^2) / n_targets
        value of      sum of nats / n_targets, so that losses stay comparable

    logits     (..., V) of any float dtype
    targets    (...) int64; where one is IGNORE nothing is learnt and nothing is pulled
    n_targets  the denominator: by default the targets that count. Parts of a batch that are given the
               number of the whole one have losses and gradients that add up to those of the whole
    returns    a float32 scalar (float64 for float64 logits); 0 when no target counts

    The pull keeps logits from drifting to where bfloat16 is coarse. Like any loss it scales with the
    gradient that comes in, so accumulation and loss scaling leave its share. Source: BlinkDL/RWKV-LM,
    RWKV-v7/train_temp/src/model.py, whose comment calls the older form, which does not scale, wrong.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()).reshape(-1, logits.shape[-1])
    targets = targets.flatten()
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    largest = logits.max(dim=-1).values.masked_fill(targets == IGNORE, 0)
    pull = l2wrap / 2 * largest.square().sum()
    return (nats + (pull - pull.detach())) / _denominator(targets, n_targets)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    l2wrap: float = 1e-4,
    n_targets: int | Tensor | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, targets)`, some rows at a time: (B, T, V) never exists.

    hidden   (..., D) what `model(tokens, output="hidden")` returns
    weight   (V, D) `model.head.weight`, of any float dtype and laid out by row or by column
    targets, l2wrap, n_targets and the result are those of `cross_entropy`

    Both gradients are made together with the value, while a chunk of logits is at hand, and kept: D numbers
    per token and one more copy of the weight. Products are in the dtype of hidden, or autocast's; the
    log-sum-exp, the weight's gradient and the result in float32 (float64 for float64).
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]).to(dtype), targets.flatten()
    ignored = targets == IGNORE
    if device != "cpu" or ignored.any():  # on a CPU, asking costs less than two copies
        # Rows of zeros add nothing to the weight's gradient, and the mask returns none to what was there.
        rows = rows.masked_fill(ignored[:, None], 0)
    with torch.autocast(device, enabled=False):
        nats = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, weight, targets, l2wrap, torch.is_grad_enabled()
        )
    return nats / _denominator(targets, n_targets)


def _denominator(targets: Tensor, n_targets: int | Tensor | None) -> int | Tensor:
    if n_targets is None:
        n_targets = (targets != IGNORE).sum()
    return n_targets.clamp_min(1) if isinstance(n_targets, Tensor) else max(n_targets, 1)


def _rows_per_chunk(n_vocab: int, device: torch.device) -> int:
    """As many as have 256 MiB of float32 logits. On a CPU 64 MiB, and no more rows than a product needs to
    be fast (512, or 4 MiB) so that the logits may stay in its cache."""
    if device.type != "cpu":
        return max(1, 2**26 // n_vocab)
    return max(1, min(2**24 // n_vocab, max(512, 2**20 // n_vocab)))


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of nats of (N, D) rows; with p = softmax(W x), one-hot vectors e and the largest logit z_m

    d logits = p - e_target + l2wrap z_m e_m,    dx = W^T d logits,    dW = sum of d logits x^T
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: float, grad_enabled: bool
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        W = weight.to(hidden.dtype)
        needs_hidden, needs_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        nats = torch.zeros((), dtype=wide, device=hidden.device)

        size = _rows_per_chunk(len(weight), hidden.device)
        room = hidden.new_empty(min(size, len(hidden)), len(weight))  # for every chunk: none adds to the peak
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            x, target = hidden[chunk], targets[chunk, None]
            ignored = target == IGNORE
            target = target.masked_fill(ignored, 0)

            logits = torch.mm(x, W.mT, out=room[: len(x)])
            largest, at_largest = logits.max(dim=-1, keepdim=True)
            of_target = logits.gather(-1, target)
            p = logits if logits.dtype == wide else logits.to(wide)
            torch.softmax(p, dim=-1, out=p)
            # log-sum-exp out of the largest p, which is at least 1 / V: the target's own may underflow.
            costs = largest - p.gather(-1, at_largest).log() - of_target
            nats += costs.masked_fill(ignored, 0).sum()

            if d_hidden is None and d_weight is None:
                continue
            p.scatter_add_(-1, target, p.new_full(target.shape, -1.0))
            p.scatter_add_(-1, at_largest, l2wrap * largest.to(wide))
            d_logits = logits.copy_(p)
            if d_hidden is not None:
                torch.mm(d_logits, W, out=d_hidden[chunk])
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.mT, x)
            elif d_weight is not None:
                d_weight += d_logits.mT @ x

        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_nats
        if d_weight is not None:
            d_weight = (d_weight * d_nats).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None
