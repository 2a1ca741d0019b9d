"""The bytes of a tensor and their SHA-256: what is written, and what must come back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CorruptFileError
from .naming import shown

_PIECE = 2**22  # bytes


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order. Nothing is copied of a tensor that lies so on the CPU; of any
    other (on a GPU, or stored by columns) a few rows, about 4 MB, at a time."""
    tensor = torch.atleast_1d(tensor.detach())
    at_once = len(tensor)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        at_once = max(1, _PIECE * len(tensor) // tensor.nbytes)
    for rows in tensor.split(max(1, at_once)):
        yield rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def check_digest(name: str, tensor: Tensor, digests: Mapping[str, str]) -> None:
    """CorruptFileError unless the tensor's bytes are those whose digest was stored."""
    if sha256(tensor) != digests[name]:
        raise CorruptFileError(
            f"tensor {shown(name)} is damaged: its SHA-256 differs from the one stored with it",
            "the bytes that were written",
            "a fresh copy of the file",
        )


def check_table(digests: object, names: set[str]) -> dict[str, str]:
    """The stored digests, when they are one per tensor; CorruptFileError otherwise."""
    if not isinstance(digests, dict) or set(digests) != names:
        raise CorruptFileError(
            "the stored SHA-256 values are not one per tensor",
            "the names of the tensors",
            "a fresh copy of the file",
        )
    return digests
