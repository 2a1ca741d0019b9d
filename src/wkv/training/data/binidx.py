"""Token files: the official .bin/.idx pair, read and written, and one-dimensional .npy files, read.

    data = open_tokens("corpus.bin")             # or corpus.idx, or the common name: corpus
    data.n_tokens, data.document(3)              # nothing is in memory yet but the borders of documents

X.bin is nothing but token ids. X.idx says which, all of it little-endian and without gaps:

    9 bytes       magic                           8 bytes       version, 1
    1 byte        dtype code of the ids           8 bytes       n, the number of items
    8 bytes       m, the number of borders        n int32       size of each item, in tokens
    n int64       where each begins, in bytes     m int64       borders of documents, counted in items

There is one item per document, but several may form one: its items lie between two borders. The format is
that of Megatron's MMapIndexedDataset, as `binidx.py` of RWKV-LM reads it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CorruptFileError, InputError

Tokens = npt.NDArray[np.integer[Any]]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, borders
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)  # forks disagree on how wide they are, and token ids they are not
_LARGEST_ITEM = 2**31 - 1  # tokens: sizes are int32
_BLOCK = 2**20  # tokens worked on at a time
_HASHED_WHOLE = 4 * 2**30  # bytes; of larger files the fingerprint takes samples
_SAMPLES, _SAMPLE = 1024, 2**20  # how many, and bytes of each
_FRESH_COPY = "a fresh copy of both files"


@dataclass(frozen=True, eq=False)
class TokenData:
    """The documents of one token file, one after another.

    path    the file that holds the ids
    tokens  (n_tokens,) integers of the file's own dtype, memory-mapped and read-only
    ends    (n_documents,) int64: where each document ends in `tokens`, exclusive
    """

    path: Path
    tokens: Tokens
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, documents: Iterable[bytes | Sequence[int] | Tokens]) -> TokenData:
        """Documents that are in memory already: ids, or bytes of which each is an id."""
        parts = [np.frombuffer(d, np.uint8) if isinstance(d, bytes) else np.asarray(d) for d in documents]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return cls(Path("memory"), np.concatenate(parts), np.cumsum(lengths))

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.ends)

    def document(self, i: int) -> Tokens:
        """The ids of document `i`, counted from 0: a view of the file."""
        if not 0 <= i < self.n_documents:
            raise InputError(f"document {i} of {self.path}", f"0 to {self.n_documents - 1}")
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError, naming the id and its place, when a token is not below `vocab_size`."""
        bounds = np.iinfo(self.tokens.dtype)
        if bounds.min >= 0 and bounds.max < vocab_size:
            return  # no id of this dtype could be
        for start, block in self._blocks():
            if block.min() < 0 or block.max() >= vocab_size:
                position = start + int(np.argmax((block < 0) | (block >= vocab_size)))
                document = int(np.searchsorted(self.ends, position, side="right"))
                raise InputError(
                    f"{self.path} holds the token id {self.tokens[position]}, at position {position:,} in "
                    f"document {document:,}",
                    f"ids from 0 to {vocab_size - 1}, the size of the vocabulary",
                    "the tokenizer that the tokens were made with, or a model of its vocabulary",
                )

    def fingerprint(self) -> str:
        """The SHA-256 of dtype, borders and tokens: the same for the same contents, wherever they are.

        Of more than 4 GiB of tokens it takes 1024 samples of 1 MiB, evenly spread.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.tokens.dtype.str} {self.n_tokens} {self.n_documents} ".encode())
        digest.update(np.ascontiguousarray(self.ends, dtype="<i8").data)
        if self.tokens.nbytes <= _HASHED_WHOLE:
            for _, block in self._blocks():
                digest.update(block.data)
        else:
            size = _SAMPLE // self.tokens.itemsize
            for i in range(_SAMPLES):
                start = i * (self.n_tokens - size) // (_SAMPLES - 1)
                digest.update(np.ascontiguousarray(self.tokens[start : start + size]).data)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[tuple[int, Tokens]]:
        for start in range(0, self.n_tokens, _BLOCK):
            yield start, np.ascontiguousarray(self.tokens[start : start + _BLOCK])


def open_tokens(path: str | os.PathLike[str]) -> TokenData:
    """Open X.bin with its X.idx (either, or the common X, may be named), or the integers of X.npy.

    A .npy file knows no borders: it is one document. InputError when the files are missing, of another
    kind or without tokens; CorruptFileError when they are truncated or do not belong together.
    """
    name = os.fspath(path)
    try:
        if name.endswith(".npy"):
            return _open_npy(Path(name))
        stem = name[:-4] if name.endswith((".bin", ".idx")) else name
        return _open_pair(Path(f"{stem}.bin"), Path(f"{stem}.idx"))
    except OSError as error:
        raise InputError(
            f"{error.filename or name} cannot be read: {error.strerror or error}",
            "a token file: X.bin beside X.idx, or X.npy",
        ) from None


def _open_npy(path: Path) -> TokenData:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # its header is text that numpy reads as Python, and it fails in many ways
        reason = str(error).partition("\n")[0][:200]
        raise CorruptFileError(
            f"{path} is not a whole .npy file: {reason}", "integers that numpy.save wrote", "a fresh copy"
        ) from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.dtype.isnative or not len(tokens):
        raise InputError(
            f"{path} holds {tokens.dtype.str} of shape {tokens.shape}",
            "token ids: at least one, in one dimension, of an integer type in this machine's byte order",
            f"numpy.save({path.name!r}, tokens.ravel().astype(numpy.int32))",
        )
    return TokenData(path, tokens, np.array([len(tokens)], dtype=np.int64))


def _open_pair(data: Path, index: Path) -> TokenData:
    size = data.stat().st_size
    with data.open("rb") as file:
        swapped = file.read(len(_MAGIC)) == _MAGIC
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            got = f"{index} is not an index of tokens"
            if swapped:
                raise CorruptFileError(f"{got}, but {data} is: they are swapped", "the names exchanged")
            raise InputError(got, "the .idx file that came with the .bin file", _FRESH_COPY)
        if len(header) < _HEADER.size:
            raise CorruptFileError(f"{index} ends within its header", "the whole file", _FRESH_COPY)
        _, version, code, n_items, n_borders = _HEADER.unpack(header)
        if version != 1:
            raise InputError(f"{index} has the version {version}", "version 1")
        if code not in _DTYPES:
            kind = "floating-point numbers" if code in _FLOATS else f"numbers of the unknown kind {code}"
            raise InputError(f"{index} says that {data.name} holds {kind}", "integers, the ids of tokens")
        # Before anything is read by these counts: they are what the file claims, up to 2^64.
        claimed, found = _HEADER.size + 12 * n_items + 8 * n_borders, os.fstat(file.fileno()).st_size
        if claimed != found:
            raise CorruptFileError(
                f"{index} has {found:,} bytes, and its header says {claimed:,}", "the whole file", _FRESH_COPY
            )
        sizes = np.fromfile(file, "<i4", n_items).astype(np.int64)
        starts = np.fromfile(file, "<i8", n_items)
        borders = np.fromfile(file, "<i8", n_borders)
    dtype = np.dtype(_DTYPES[code])
    item_ends = np.concatenate([[0], np.cumsum(sizes)])
    if (sizes < 0).any() or (starts != item_ends[:-1] * dtype.itemsize).any():
        raise CorruptFileError(
            f"the items in {index} overlap or leave gaps", "one after another", _FRESH_COPY
        )
    if not n_borders or borders[0] != 0 or borders[-1] != n_items or (np.diff(borders) < 0).any():
        raise CorruptFileError(
            f"the borders of documents in {index} do not fit its {n_items:,} items",
            f"numbers that rise from 0 to {n_items}",
            _FRESH_COPY,
        )
    if item_ends[-1] * dtype.itemsize != size:
        raise CorruptFileError(
            f"{data} has {size:,} bytes, and its index says {item_ends[-1] * dtype.itemsize:,}",
            "the two files of one pair, whole",
            _FRESH_COPY,
        )
    if not size:
        raise InputError(f"{data} holds no tokens", "at least one")
    return TokenData(data, np.memmap(data, dtype, mode="r"), item_ends[borders[1:]])


class TokenWriter:
    """Writes X.bin as the tokens come, and X.idx at the end; for each document 8 bytes stay in memory.

        with TokenWriter("corpus", np.uint16) as writer:
            writer.append(ids)          # in as many parts as you like
            writer.end_document()

    Both files are on the disk (fsync) when the block ends. After an error, Ctrl-C included, neither is left.
    `dtype` is uint8, int8, uint16, int16, int32 or int64. FileExistsError when one of the files is there.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = {np.dtype(name): code for code, name in _DTYPES.items()}[self.dtype]
        data, self._index = Path(f"{os.fspath(prefix)}.bin"), Path(f"{os.fspath(prefix)}.idx")
        if self._index.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._index))
        self._lengths = array("q")  # of each document, in tokens
        self._length = 0  # so far, of the document that is not ended
        self.n_tokens = 0
        self._data = data.open("x+b")

    @property
    def n_documents(self) -> int:
        return len(self._lengths)

    def append(self, tokens: Tokens | Sequence[int]) -> None:
        """More tokens of the current document. InputError for an id that the dtype cannot hold."""
        bounds = np.iinfo(self.dtype)
        for start in range(0, len(tokens), _BLOCK):
            block = np.asarray(tokens[start : start + _BLOCK])
            if block.min() < bounds.min or block.max() > bounds.max:
                worst = block.min() if block.min() < bounds.min else block.max()
                raise InputError(
                    f"the token id {worst} does not fit {self.dtype.name}", f"{bounds.min} to {bounds.max}"
                )
            self._data.write(np.ascontiguousarray(block, dtype=self.dtype).data)
            self._length += len(block)
            self.n_tokens += len(block)

    def end_document(self) -> None:
        """The tokens since the last end are a document."""
        self._lengths.append(self._length)
        self._length = 0

    def move(self, i: int, other: TokenWriter) -> None:
        """Document `i` becomes the last of `other`; those after it close the gap."""
        start = sum(self._lengths[:i]) * self.dtype.itemsize
        length = self._lengths.pop(i) * self.dtype.itemsize
        self.n_tokens -= length // self.dtype.itemsize
        end = self._data.seek(0, os.SEEK_END)
        for block in self._read(start, start + length):
            other.append(np.frombuffer(block, self.dtype))
        other.end_document()
        place = start
        for block in self._read(start + length, end):
            self._data.seek(place)
            place += self._data.write(block)
        self._data.truncate(place)
        self._data.seek(place)

    def _read(self, start: int, end: int) -> Iterator[bytes]:
        size = _BLOCK * self.dtype.itemsize
        for place in range(start, end, size):
            self._data.seek(place)
            yield self._data.read(min(size, end - place))

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._data.flush()
                os.fsync(self._data.fileno())
                self._write_index()
        except BaseException as problem:
            kind = type(problem)
            raise
        finally:
            with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses
                self._data.close()
            if kind is not None:
                for name in (self._data.name, self._index):
                    with contextlib.suppress(OSError):
                        os.unlink(name)

    def _write_index(self) -> None:
        lengths = np.array(self._lengths, dtype=np.int64)
        n_items = np.maximum(1, -(-lengths // _LARGEST_ITEM))  # of each document
        borders = np.concatenate([[0], np.cumsum(n_items)])
        sizes = np.full(borders[-1], _LARGEST_ITEM)
        sizes[borders[1:] - 1] = lengths - (n_items - 1) * _LARGEST_ITEM
        starts = (np.cumsum(sizes) - sizes) * self.dtype.itemsize
        with self._index.open("xb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, self._code, len(sizes), len(borders)))
            for numbers, dtype in ((sizes, "<i4"), (starts, "<i8"), (borders, "<i8")):
                file.write(np.ascontiguousarray(numbers, dtype=dtype).data)
            file.flush()
            os.fsync(file.fileno())
