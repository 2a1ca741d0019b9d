"""The bytes of a tensor and their SHA-256: what is written, and what must come back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CorruptFileError
from .naming import shown


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Row-major bytes of a tensor; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


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
