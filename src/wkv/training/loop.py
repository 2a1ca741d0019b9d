"""The training loop, for a budget of minutes: as long as fits in a demonstration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from ..errors import DivergenceError
from ..models import RWKV
from .loss import cross_entropy
from .optim import set_learning_rate, warmup_cosine


@dataclass(frozen=True)
class Progress:
    """Where training stands after one step."""

    step: int  # steps done
    tokens: int  # tokens learnt from
    seconds: float  # spent on steps; what the caller does in between is not counted
    done: float  # share of the budget used, 0 to 1
    loss: float  # of this step's batch, nats per token
    gradient_norm: float  # before clipping


def train(
    model: RWKV,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    minutes: float,
    warmup: float = 0.02,
    final: float = 0.05,
    clip: float = 1.0,
) -> Iterator[Progress]:
    """Train `model` in place, one step per item taken: the caller shows progress, samples, or breaks off.

        for progress in train(model, windows(...), adamw(model, ...), minutes=3):
            print(progress.loss)

    batches    int64 (B, T + 1) each: tokens, and the token after them
    minutes    the budget of training time. The learning rate follows the share of it that is used, so a
               slow machine learns from fewer tokens but still ends on the smallest rate
    warmup     share of the budget during which the rate rises
    final      the rate at the end, as a share of the highest
    clip       largest norm of all gradients together

    DivergenceError, before any weight is touched, when the loss or a gradient is not finite.
    """
    tokens_seen, seconds = 0, 0.0
    for step, batch in enumerate(batches, 1):
        started = perf_counter()
        done = seconds / (60 * minutes)
        set_learning_rate(optimizer, warmup_cosine(done, warmup=warmup, final=final))

        batch = batch.to(model.device)
        logits, _ = model(batch[:, :-1])
        loss = cross_entropy(logits, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise DivergenceError(
                f"at step {step} the loss is {loss.item():g} and the norm of the gradients {norm.item():g}",
                "finite numbers",
                "a smaller learning rate",
            )
        optimizer.step()

        tokens_seen += logits.shape[0] * logits.shape[1]
        seconds += perf_counter() - started
        done = min(seconds / (60 * minutes), 1.0)
        yield Progress(step, tokens_seen, seconds, done, loss.item(), norm.item())
        if done >= 1:
            return
