"""Weights in one piece of memory are the same weights."""

from __future__ import annotations

import gc
import mmap
import os
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


def test_all_weights_lie_in_their_order_in_one_piece_in_huge_pages() -> None:
    model = quantize(small_model("7", dtype=torch.float32), "int8")  # whose matrices are buffers
    model.twin = model.head  # of tied weights there is one
    gather(model)
    tensors = [*model.parameters(), *model.buffers()]
    places = [x.data_ptr() for x in tensors if x.nbytes]
    assert places == sorted(places)
    assert places[-1] - places[0] <= sum(-(-x.nbytes // 64) * 64 for x in tensors)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert "hg" in flags_of(places[0])


def flags_of(address: int) -> list[str]:
    """Of the piece of memory there, as Linux tells them."""
    is_here = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *rest = line.split()
            if "-" in first:
                begin, end = (int(x, 16) for x in first.split("-"))
                is_here = begin <= address < end
            elif is_here and first == "VmFlags:":
                return rest
    raise AssertionError(f"nothing lies at {address:x}")


def test_pieces_do_not_meet_and_begin_on_cache_lines() -> None:
    like = [torch.empty(3, 5), torch.empty(0), torch.empty(7, dtype=torch.uint8), torch.empty(4, 6).mT]
    arena = Arena.like(*like)
    pieces = [arena.empty_like(x).fill_(i) for i, x in enumerate(like)]
    for i, (piece, x) in enumerate(zip(pieces, like, strict=True)):
        assert piece.eq(i).all() and piece.shape == x.shape and piece.stride() == x.stride()
        assert piece.untyped_storage().nbytes() == piece.nbytes and piece.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_child_writes_stays_there() -> None:
    piece = Arena(1 << 20).empty_like(torch.empty(10)).fill_(1)
    child = os.fork()
    if child == 0:
        piece.fill_(2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and piece.eq(1).all()


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
