"""Weights in one piece of memory are the same weights."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch
from small_models import random_tokens, small_model

from wkv.models.arena import Arena, gather
from wkv.models.quantized import quantize


@pytest.mark.parametrize("tier", [None, "int8"])
def test_a_model_that_was_gathered_is_the_same(tier: str | None) -> None:
    model, other = (small_model("7", dtype=torch.float32) for _ in range(2))
    if tier:
        quantize(model, tier), quantize(other, tier)
    tokens = random_tokens(model, 2, 9)
    with torch.no_grad():
        expected, _ = model(tokens)
        weights = dict(model.named_parameters())
        gather(model)
        assert torch.equal(model(tokens)[0], expected)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype, name
    assert all(weight is weights[name] for name, weight in model.named_parameters())  # optimizers know them
    if tier is None:
        model(tokens)[0].sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())


def test_pieces_do_not_meet_and_begin_on_cache_lines() -> None:
    like = [torch.empty(3, 5), torch.empty(0), torch.empty(7, dtype=torch.uint8), torch.empty(4, 6).mT]
    arena = Arena.like(*like)
    pieces = [arena.empty_like(x).fill_(i) for i, x in enumerate(like)]
    for i, (piece, x) in enumerate(zip(pieces, like, strict=True)):
        assert piece.eq(i).all() and piece.shape == x.shape and piece.stride() == x.stride()
        assert piece.untyped_storage().nbytes() == piece.nbytes and piece.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages")
def test_the_memory_goes_with_the_last_piece() -> None:
    arena = Arena(1 << 20)
    memory = weakref.ref(arena._memory)
    piece = arena.empty_like(torch.empty(10))
    del arena
    gc.collect()
    assert memory() is not None and piece.fill_(3).eq(3).all()
    del piece
    gc.collect()
    assert memory() is None
