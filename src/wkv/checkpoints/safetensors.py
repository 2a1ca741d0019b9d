"""`.safetensors` files: a JSON header, then the tensors' bytes without holes.

    8 bytes    length of the header, little-endian
    header     {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest   the tensors, row-major, little-endian

Files written here carry in their metadata `sha256` (a JSON object, one digest per tensor) and `digest`
(of the header itself), so that a flipped bit anywhere is noticed. A model file adds `format`, `version`
and `config`. Any program that reads safetensors can read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Config, config_from_dict
from ..errors import CheckpointError, CorruptFileError, UnsafeFileError
from .atomic import atomic_write
from .base import QUANTIZATIONS, Checkpoint, TensorInfo
from .digest import check_digest, check_table, pieces, sha256
from .naming import naming, shown

MODEL_FORMAT, MODEL_VERSION = "wkv-model", "1"

_HEADER_LIMIT = 4_000_000  # bytes; the largest published model needs half a million
_CONFIG_LIMIT = 10_000  # characters; a config has a dozen fields
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NO_DIGEST = "0" * 64  # stands in the header while its own digest is computed


def model_metadata(config: Config, quantization: str | None = None) -> dict[str, str]:
    """The metadata of a model file."""
    metadata = {"format": MODEL_FORMAT, "version": MODEL_VERSION, "config": json.dumps(config.to_dict())}
    return metadata if quantization is None else {**metadata, "quantization": quantization}


class SafetensorsCheckpoint(Checkpoint):
    """A model in safetensors: ours, with its config in the metadata, or plain, with official names."""

    format: ClassVar[str] = "safetensors"

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        config = _stored_config(header.metadata) if header.digests is not None else None
        quantization = None if config is None else header.metadata.get("quantization")
        if quantization not in (None, *QUANTIZATIONS):
            raise CheckpointError(
                f"its quantization is {shown(quantization)}",
                f"one of {', '.join(QUANTIZATIONS)}",
                "a newer wkv",
            )
        super().__init__(path, header.tensors, header.metadata, config, quantization)
        self._digests = header.digests
        self._file = _open(path)

    def _read(self, stored: str, verify: bool) -> Tensor:
        return _get(self._file, stored, self._digests if verify else None)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


def read_safetensors(
    path: str | PathLike[str], *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU, in memory of their own) and the metadata of any safetensors file.

    CheckpointError, UnsafeFileError or CorruptFileError when it is none, or damaged; `verify=False`
    skips the SHA-256 of the tensors.
    """
    with naming(path):
        header = read_header(Path(path))
        with _open(Path(path)) as file:
            digests = header.digests if verify else None
            return {name: _get(file, name, digests).clone() for name in header.tensors}, header.metadata


def write_safetensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata, with a SHA-256 per tensor and one of the header.

    Atomic and fsynced; no tensor is copied as a whole. The metadata keys "sha256" and
    "digest" are taken. CheckpointError when the file cannot be written; a file of that name is then as
    it was.
    """
    # Wide dtypes first: then every tensor starts at a multiple of its own item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(ordered, metadata)
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in ordered.values():
            for piece in pieces(tensor):
                file.write(piece)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    digests = json.dumps({name: sha256(tensor) for name, tensor in tensors.items()})
    table: dict[str, Any] = {"__metadata__": {**metadata, "sha256": digests, "digest": _NO_DIGEST}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return raw.replace(_NO_DIGEST.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)


@dataclass(frozen=True)
class Header:
    """A checked header; `digests` is None in a file that was not written here."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    digests: dict[str, str] | None


def read_header(path: Path) -> Header:
    """The header of a safetensors file, when all that it claims is true of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CorruptFileError(
                f"its header claims {length:,} bytes in a file of {size:,}", "the whole file", _FRESH_COPY
            )
        if length > _HEADER_LIMIT:
            raise UnsafeFileError(f"its header has {length:,} bytes", f"at most {_HEADER_LIMIT:,} bytes")
        return parse_header(file.read(length), size - 8 - length)


_FRESH_COPY = "a fresh copy of the file"


def parse_header(raw: bytes, data_size: int) -> Header:
    """Check a header's bytes against the number of bytes that follow them.

    CorruptFileError or UnsafeFileError for bad JSON, duplicate keys, unknown fields or dtypes, sizes
    that contradict each other, holes, overlaps, and a digest that differs.
    """
    try:
        table = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise _corrupt("its header is not a table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _corrupt("its metadata is not a table of texts")
    spans = {name: _span(name, entry) for name, entry in table.items()}
    _check_spans({name: (begin, end) for name, (_, begin, end) in spans.items()}, data_size)
    tensors = {name: info for name, (info, _, _) in spans.items()}
    return Header(tensors, metadata, _digests(raw, metadata, set(tensors)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a size")


def _span(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """What an entry says, and where its tensor begins and ends."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(entry) == 3:
            if dtype not in _DTYPES:
                raise CheckpointError(
                    f"tensor {shown(name)} has the dtype {shown(dtype)}", f"one of {', '.join(_DTYPES)}"
                )
            numbers = [*shape, begin, end]
            if len(shape) <= 8 and all(type(number) is int and 0 <= number < 2**48 for number in numbers):
                info = TensorInfo(_DTYPES[dtype], tuple(shape))
                if end - begin == math.prod(shape) * info.dtype.itemsize:
                    return info, begin, end
    raise UnsafeFileError(
        f"what its header says of {shown(name)} cannot be true",
        "a dtype, a shape and the offsets of as many bytes",
        _FRESH_COPY,
    )


def _check_spans(spans: Mapping[str, tuple[int, int]], data_size: int) -> None:
    """The tensors cover the data: the first begins at 0, each next where one ends, the last at the end."""
    ordered = sorted(spans.items(), key=lambda item: item[1])
    fenced = [("the start", (0, 0)), *ordered, ("the end of the file", (data_size, data_size))]
    for (name, (_, end)), (following, (begin, _)) in pairwise(fenced):
        if begin != end:
            problem = "overlap" if begin < end else "leave a hole"
            raise UnsafeFileError(
                f"{shown(name)} and {shown(following)} {problem} ({abs(begin - end):,} bytes)",
                "tensors side by side, up to the last byte",
                _FRESH_COPY,
            )


def _digests(raw: bytes, metadata: Mapping[str, str], names: set[str]) -> dict[str, str] | None:
    """The digests of a file written here, the header's own checked. Any trace of them makes a file ours:
    a flipped bit can hide one of the keys, not both."""
    if not {"sha256", "digest"} & metadata.keys():
        return None
    digest = metadata.get("digest", "")
    blank = raw.replace(digest.encode(errors="replace"), _NO_DIGEST.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise _corrupt("its header is damaged: its SHA-256 differs from the one stored in it")
    try:
        return check_table(json.loads(metadata.get("sha256", "")), names)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its table of SHA-256 values is not JSON ({error})") from error


def _stored_config(metadata: Mapping[str, str]) -> Config:
    if metadata.get("format") != MODEL_FORMAT:
        raise CheckpointError(
            f"it holds {shown(metadata.get('format', 'something else'))}, not a model",
            "a model that wkv.save wrote",
            "Session.restore, if it is a saved session",
        )
    if metadata.get("version") != MODEL_VERSION:
        raise CheckpointError(
            f"its format has the version {shown(metadata.get('version', ''))}",
            f"version {MODEL_VERSION}",
            "a newer wkv",
        )
    text = metadata.get("config", "")
    if len(text) > _CONFIG_LIMIT:
        raise _corrupt(f"its config has {len(text):,} characters")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its config is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _corrupt("its config is not a table")
    return config_from_dict(fields)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise _corrupt(f"safetensors cannot read it ({error})") from error


def _get(file: Any, name: str, digests: Mapping[str, str] | None) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise _corrupt(f"tensor {shown(name)} cannot be read ({error})") from error
    if digests is not None:
        check_digest(name, tensor, digests)
    return tensor


def _corrupt(got: str) -> CorruptFileError:
    return CorruptFileError(got, "the file as it was written", _FRESH_COPY)
