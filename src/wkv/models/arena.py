"""Where weights lie in memory: all of a model in one piece, in huge pages.

A token reads every weight once. In pages of 4 KiB the processor looks up half a million addresses for two
gigabytes, and what it fetches ahead ends where a page does; pages of 2 MiB are 500 times fewer.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

_LINE = 64  # bytes of a cache line


class Arena:
    """Memory for tensors on the CPU, handed out piece by piece and given back when the last piece is gone."""

    def __init__(self, n_bytes: int) -> None:
        self._memory: mmap.mmap | None = None
        self._used = 0
        if n_bytes and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
            self._memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    @classmethod
    def like(cls, *tensors: Tensor) -> Arena:
        """Room for an `empty_like` of each."""
        return cls(sum(-(-x.nbytes // _LINE) * _LINE for x in tensors))

    def empty_like(self, like: Tensor) -> Tensor:
        """A tensor of that shape, dtype and order of axes, which has no gaps; its storage is its own."""
        if self._memory is None or not like.nbytes:
            return torch.empty_like(like, device="cpu")
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=self._used)
        self._used += -(-like.nbytes // _LINE) * _LINE
        return flat.as_strided(like.shape, like.stride())


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Move the weights of a model on the CPU into one arena, in the order in which they are read."""
    tensors = [*model.parameters(), *model.buffers()]
    arena = Arena.like(*tensors)
    for tensor in tensors:
        tensor.data = arena.empty_like(tensor).copy_(tensor)
