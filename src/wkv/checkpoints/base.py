"""What every open model file offers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..config import Config
from ..errors import CheckpointError
from .naming import naming, shown
from .official import UNTOLD, differences, infer_config, official_names, refuse_foreign

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZATIONS = ("int8", "int4")  # see models/quantized.py; such a file's matrices are bytes, with scales


class TensorInfo(NamedTuple):
    """What a file says of a tensor before its numbers are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint(ABC):
    """An open model file: sizes are known, tensors are read one at a time. A context manager.

    config    the model's config, stored in the file or inferred from names and shapes
    metadata  text that the file carries besides (empty for .pth)
    quantization     "int8" or "int4" where `metadata` says so, else None
    shapes, dtypes   by official name, in the file's order
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        config: Config | None = None,
        quantization: str | None = None,
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.quantization = quantization
        self._stored = official_names(tensors)
        refuse_foreign(self._stored)
        for name, info in tensors.items():
            _check_weight(name, info, is_quantized=quantization is not None)
        self.shapes = {name: tensors[stored].shape for name, stored in self._stored.items()}
        self.dtypes = {name: tensors[stored].dtype for name, stored in self._stored.items()}
        if config is None:
            config = infer_config(self.shapes)
        elif quantization is None:  # else the shapes tell little; loading compares each with the model's
            _check_config(config, self.shapes)
        self.config = config

    @property
    def names(self) -> tuple[str, ...]:
        """Official names, in the file's order."""
        return tuple(self.shapes)

    def read(self, name: str, *, verify: bool = True) -> Tensor:
        """The tensor of that official name: on the CPU, in the file's dtype and shape.

        Its numbers may still lie in the file, mapped into memory; changing them never changes the file.
        With `verify`, the bytes are compared with the checksum that the file holds for them, if it holds
        one (CorruptFileError).
        """
        with naming(self.path):
            if name not in self._stored:
                raise CheckpointError(f"there is no tensor {shown(name)}", "one of `checkpoint.names`")
            return self._read(self._stored[name], verify)

    @abstractmethod
    def _read(self, stored: str, verify: bool) -> Tensor: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_weight(name: str, info: TensorInfo, *, is_quantized: bool) -> None:
    bytes_here = is_quantized and info.dtype == torch.uint8 and name.endswith(".weight")
    if info.dtype not in WEIGHT_DTYPES and not bytes_here:
        raise CheckpointError(
            f"tensor {shown(name)} holds {_plain(info.dtype)}",
            "float64, float32, float16 or bfloat16 weights",
            "the original file, if this one was quantised",
        )
    if 0 in info.shape:
        raise CheckpointError(
            f"tensor {shown(name)} is empty: its shape is {list(info.shape)}", "numbers in it"
        )


def _check_config(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A stored config says nothing that the tensors beside it contradict."""
    inferred = infer_config(shapes)
    if config.generation != inferred.generation:
        raise CheckpointError(
            f"its config is of RWKV-{config.generation}, its tensors are of RWKV-{inferred.generation}",
            "one generation",
            "converting the original checkpoint again",
        )
    for field, (stored, actual) in differences(config, inferred).items():
        if field not in UNTOLD:
            raise CheckpointError(
                f"its config says {field}={stored!r}, the tensors make it {actual!r}",
                "a config that fits its tensors",
                "converting the original checkpoint again",
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
