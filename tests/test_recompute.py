"""Activation checkpointing: less memory, and to the bit the same result."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor

from wkv.config import Recompute
from wkv.models import RWKV
from wkv.training.loss import linear_cross_entropy


def result(model: RWKV, tokens: Tensor, **settings: Any) -> list[Tensor]:
    """Loss, final state and all gradients, after a first call whose state is handed over."""
    model.zero_grad()
    _, state = model(tokens[:, :5])
    hidden, state = model(tokens[:, 5:-1], state, output="hidden", **settings)
    loss = linear_cross_entropy(hidden, model.head.weight, tokens[:, 6:])
    (loss + sum(layer.memory.square().sum() for layer in state.layers)).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(x.detach() for layer in state.layers for x in layer), *gradients]


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_what_is_computed_again_gives_the_same_bits(
    generation: str, precision: torch.dtype, recompute: Recompute
) -> None:
    model = small_model(generation, dtype=torch.float64 if precision == torch.float64 else torch.float32)
    tokens = random_tokens(model, 3, 24)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
    with autocast if precision == torch.bfloat16 else contextlib.nullcontext():
        expected = result(model, tokens, lengths=torch.tensor([18, 7, 12]))
        model.recompute = recompute
        found = result(model, tokens, lengths=torch.tensor([18, 7, 12]))
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("generation", ["4", "7"])
def test_what_blocks_keep_for_the_backward_does_not_grow_with_what_they_compute(generation: str) -> None:
    model = small_model(generation, dtype=torch.float32)
    tokens = random_tokens(model, 2, 64)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def count(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(tokens)
        return sum(sizes.values())

    whole = kept()
    model.recompute = "blocks"
    assert kept() < 0.3 * whole


def test_without_gradients_or_the_setting_nothing_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr("wkv.models.base.checkpoint", refused)
    model = small_model("7")
    tokens = random_tokens(model, 1, 6)
    assert model.recompute == "nothing"
    model(tokens)
    model.recompute = "cheap"
    with torch.no_grad():
        model(tokens)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        model(tokens)
