"""Activation checkpointing: less memory, and to the bit the same result."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor

from wkv.config import Recompute, RWKV4Config, RWKV7Config
from wkv.models import RWKV, build
from wkv.training.loss import linear_cross_entropy

cheap_again_module = importlib.import_module("wkv.ops.cheap")  # wkv.ops.cheap is the function


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
        model.recompute = "nothing"
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

    model.recompute = "nothing"
    whole = kept()
    model.recompute = "blocks"
    assert kept() < 0.3 * whole


# Numbers per token and channel that a block keeps, dim_ffn being four times the width. Of the channel mix:
# what the norm read, and the input of the activation (4); in RWKV-4 the gate and what it gates.
MOST = {"4": 12.5, "7": 19.0}


@pytest.mark.parametrize("generation", sorted(MOST))
def test_a_block_keeps_no_mix_no_norm_and_no_activation(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = dict(vocab_size=61, n_layer=4, n_embd=64, dim_att=64, dim_ffn=256)
    model = build((RWKV4Config if generation == "4" else RWKV7Config)(**sizes))
    tokens, kept = random_tokens(model, 4, 256), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    pack = cheap_again_module._Making.pack

    def count(making: Any, x: Tensor) -> Any:
        packed = pack(making, x)
        if (
            isinstance(packed, cheap_again_module._Kept)
            and packed.tensor.untyped_storage().data_ptr() not in weights
        ):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return packed

    monkeypatch.setattr(cheap_again_module._Making, "pack", count)
    model(tokens, output="hidden")
    numbers = sum(kept.values()) / 4 / tokens.numel()
    assert 8 < numbers / (64 * 4) < MOST[generation]


@pytest.mark.parametrize("recompute", ["nothing", "cheap", "blocks"])
def test_each_word_does_what_it_says_and_only_for_gradients(
    recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def checkpoint(block: Any, *inputs: Any, **how: Any) -> Any:
        called.append("blocks")
        return block(*inputs)

    @contextlib.contextmanager
    def cheap_again() -> Iterator[None]:
        called.append("cheap")
        yield

    monkeypatch.setattr("wkv.models.base.checkpoint", checkpoint)
    monkeypatch.setattr("wkv.models.base.cheap_again", cheap_again)
    model = small_model("7")
    tokens = random_tokens(model, 1, 6)
    assert model.recompute == "cheap"
    model.recompute = recompute
    with torch.no_grad():
        model(tokens)
    assert called == []
    model(tokens)
    assert called == [recompute] * 3 or (recompute == "nothing" and called == [])
    called.clear()
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    model.run_block(
        model.blocks[0],
        torch.zeros(1, 6, 32, dtype=torch.float64),
        None,
        model.initial_state().layers[0],
        None,
    )
    assert "cheap" not in called
