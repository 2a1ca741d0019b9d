"""Official `.pth` files: the zip archive that torch.save writes around a dict of tensors.

    <root>/data.pkl            names, shapes, and which block each tensor is a window of
    <root>/data/0, 1, ...      the blocks, stored uncompressed, so that they can be mapped into memory
    <root>/wkv_sha256.json     in files written here: SHA-256 per tensor (torch and others ignore it)

Everything that the archive and its pickle claim is checked against the file before torch opens it.
`weights_only=True` is the second guard, and there is no fallback.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, CorruptFileError, UnsafeFileError
from .atomic import atomic_write
from .base import Checkpoint, TensorInfo
from .digest import check_digest, check_table, pieces, sha256
from .naming import shown
from .official import refuse_foreign
from .pickled import Block, PickledTensor, describe, read_state_dict, row_major, write_state_dict

_DIGESTS = "wkv_sha256.json"
_HEADER_LIMIT = 4_000_000  # bytes of any table; the largest published model needs half a million


class PthCheckpoint(Checkpoint):
    """A .pth file. Tensors are mapped, not copied; a window of a shared block is fine, an overlap is not."""

    format: ClassVar[str] = "pth"

    def __init__(self, path: Path) -> None:
        archive = _Archive(path)
        tensors = _plain_tensors(archive)
        announced = {name: TensorInfo(t.block.dtype, t.shape) for name, t in tensors.items()}
        super().__init__(path, announced, {})
        self._digests = archive.digests(set(tensors))
        self._checksums = {n: (t.block.key, archive.blocks[t.block.key].CRC) for n, t in tensors.items()}
        self._checked: set[str] = set()
        self._tensors = _load(path, announced)

    def _read(self, stored: str, verify: bool) -> Tensor:
        tensor = self._tensors[stored].detach()
        if verify and self._digests is not None:
            check_digest(stored, tensor, self._digests)
        elif verify:
            self._check_block(stored, tensor)
        return tensor

    def _check_block(self, stored: str, tensor: Tensor) -> None:
        """Files of others hold no SHA-256, but every zip holds a CRC-32 per block."""
        key, expected = self._checksums[stored]
        if key in self._checked:
            return
        block = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if zlib.crc32(next(pieces(block))) != expected:
            raise CorruptFileError(
                f"tensor {shown(stored)} is damaged: its CRC-32 differs from the one in the archive",
                "the bytes that were written",
                "a fresh copy of the file, or verify=False if you trust it",
            )
        self._checked.add(key)

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path, announced: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    # A .pth under this name works too, unmapped: torch.load hands the suffix to another library.
    misnamed = path.name.endswith(".safetensors")
    try:
        with path.open("rb") as file:
            tensors: dict[str, Tensor] = torch.load(
                file if misnamed else path, map_location="cpu", weights_only=True, mmap=not misnamed
            )
        loaded = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    except Exception as error:  # torch.load documents no error of its own
        raise CorruptFileError(
            f"torch cannot read it ({type(error).__name__})",
            "a file that torch.save wrote",
            "a fresh copy of the file",
        ) from error
    if loaded != announced:
        raise UnsafeFileError("torch reads other tensors than it announces", "a file that nobody changes")
    return tensors


class _BoundedFile(io.FileIO):
    """Refuses to read more at once than a table may take: zipfile would read a directory of any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _HEADER_LIMIT:
            raise UnsafeFileError("its archive has a directory of many megabytes", "a few thousand records")
        return super().read(size)


class _Archive:
    """The tables of a zip file, checked: records stored as they are, within the file, without overlap."""

    def __init__(self, path: Path) -> None:
        try:
            with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                _check_records(records, path.stat().st_size)
                self.pickle, self._digests, root = _tables(archive)
        except _ZIP_ERRORS as error:
            raise CorruptFileError(
                f"its zip archive cannot be read ({error})",
                "the whole file",
                "downloading or copying it again",
            ) from error
        prefix = f"{root}/data/"
        self.blocks = {r.filename.removeprefix(prefix): r for r in records if r.filename.startswith(prefix)}

    def digests(self, names: set[str]) -> dict[str, str] | None:
        """SHA-256 by tensor name, or None in a file that was not written here."""
        if self._digests is None:
            return None
        try:
            return check_table(json.loads(self._digests), names)
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"{_DIGESTS} cannot be read ({error})", "the JSON that was written"
            ) from error


# What zipfile raises on damaged archives, found by flipping every bit of one.
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, LookupError)


def _check_records(records: list[zipfile.ZipInfo], file_size: int) -> None:
    names = {record.filename for record in records}
    if len(names) != len(records):
        raise UnsafeFileError("a record of its archive is there twice", "every record once")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise UnsafeFileError(
                f"the record {shown(record.filename)} is compressed",
                "records stored as they are, as torch.save does",
                "saving the checkpoint again with torch.save",
            )
    ordered = sorted(records, key=lambda record: record.header_offset)
    limits = [*(record.header_offset for record in ordered[1:]), file_size]
    for record, limit in zip(ordered, limits, strict=True):
        if record.header_offset + 30 + record.file_size > limit:
            raise UnsafeFileError(
                f"the record {shown(record.filename)} claims bytes beyond its own",
                "records that do not overlap",
            )


def _tables(archive: zipfile.ZipFile) -> tuple[bytes, bytes | None, str]:
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise CheckpointError(
            "a zip archive without the one data.pkl of torch.save",
            "a .pth file written by torch.save",
            "unpacking the archive, if the model is inside",
        )
    sizes = {record.filename: record.file_size for record in archive.infolist()}
    tables = [f"{roots[0]}/data.pkl", f"{roots[0]}/{_DIGESTS}"]
    for name in tables:
        if sizes.get(name, 0) > _HEADER_LIMIT:
            raise UnsafeFileError(
                f"the record {shown(name)} has {sizes[name]:,} bytes", f"at most {_HEADER_LIMIT:,} bytes"
            )
    return archive.read(tables[0]), archive.read(tables[1]) if tables[1] in sizes else None, roots[0]


def _plain_tensors(archive: _Archive) -> dict[str, PickledTensor]:
    """The tensors that the pickle announces, each an honest window of a block that the archive holds."""
    entries = read_state_dict(archive.pickle)
    refuse_foreign(entries)
    tensors: dict[str, PickledTensor] = {}
    for name, value in entries.items():
        if not isinstance(value, PickledTensor):
            raise CheckpointError(
                f"the entry {shown(name)} is {describe(value)}",
                "tensors only",
                "saving the model's state_dict() alone",
            )
        _check_window(name, value, archive.blocks)
        tensors[name] = value
    _check_disjoint(tensors)
    return tensors


def _check_window(name: str, tensor: PickledTensor, blocks: Mapping[str, zipfile.ZipInfo]) -> None:
    block, offset, shape, strides = tensor
    claimed = block.length * block.dtype.itemsize
    needed = (offset + math.prod(shape)) * block.dtype.itemsize
    held = blocks[block.key].file_size if block.key in blocks else 0
    if min(shape, default=1) < 0 or offset < 0:
        raise UnsafeFileError(f"tensor {shown(name)} has a negative size or offset", "sizes of 1 and more")
    if any(
        stride != expected
        for stride, expected, size in zip(strides, row_major(shape), shape, strict=True)
        if size > 1
    ):
        trick = "repeats few numbers to look larger" if 0 in strides else "is stored out of order"
        raise UnsafeFileError(
            f"tensor {shown(name)} {trick} (strides {list(strides)})", "row-major tensors", _SAVE_CONTIGUOUS
        )
    if claimed != held or needed > claimed:
        raise UnsafeFileError(
            f"tensor {shown(name)} claims {max(needed, claimed):,} bytes where the file holds {held:,}",
            "tensors no larger than their storage",
            "a fresh copy of the file",
        )


_SAVE_CONTIGUOUS = "saving it again as {name: tensor.clone() for ...}"


def _check_disjoint(tensors: Mapping[str, PickledTensor]) -> None:
    """Windows of one block are fine (DeepSpeed saves flat blocks), as long as no number has two names."""
    windows = sorted((t.block.key, t.offset * t.block.dtype.itemsize, n) for n, t in tensors.items())
    for (key, start, name), (next_key, next_start, next_name) in pairwise(windows):
        tensor = tensors[name]
        end = start + math.prod(tensor.shape) * tensor.block.dtype.itemsize
        if key == next_key and next_start < end:
            raise UnsafeFileError(
                f"the tensors {shown(name)} and {shown(next_name)} share numbers",
                "tensors of their own",
                _SAVE_CONTIGUOUS,
            )


def write_pth(path: str | PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write an official .pth file, as torch.save would from the CPU, and a SHA-256 of each tensor besides.

    Atomic and fsynced; no tensor is copied as a whole. CheckpointError when the file cannot be written; a
    file of that name is then as it was.
    """
    windows = {
        name: PickledTensor(
            Block(tensor.dtype, str(key), tensor.numel()), 0, tuple(tensor.shape), row_major(tensor.shape)
        )
        for key, (name, tensor) in enumerate(tensors.items())
    }
    digests = {name: sha256(tensor) for name, tensor in tensors.items()}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_record("data.pkl"), write_state_dict(windows))
        archive.writestr(_record("byteorder"), b"little")
        for name, window in windows.items():
            record = _record(f"data/{window.block.key}")
            record.extra = _filler(file.tell() + _LOCAL_HEADER + len(record.filename))
            # Sizes of 64 bits always: then the length of the header does not depend on that of the block.
            with archive.open(record, "w", force_zip64=True) as block:
                for piece in pieces(tensors[name]):
                    block.write(piece)
        archive.writestr(_record("version"), b"3\n")
        archive.writestr(_record(_DIGESTS), json.dumps(digests))


_LOCAL_HEADER = 30 + 20  # bytes before a block, besides name and filler; the 20 are its 64-bit sizes


def _record(name: str) -> zipfile.ZipInfo:
    """A record without a date: the same tensors make the same file."""
    return zipfile.ZipInfo(f"archive/{name}")


def _filler(position: int) -> bytes:
    """An extra field that makes the block behind it begin at a multiple of 64, so that it can be mapped."""
    size = -(position + 4) % 64
    return struct.pack("<2sH", b"FB", size) + bytes(size)
