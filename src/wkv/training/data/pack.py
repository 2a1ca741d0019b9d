"""Files into token ids, once, so that training need not.

    report = pack(["books/", "chats.jsonl"], named("world"), "packed", held_out=0.05, seed=0)
    data = open_data("packed")                   # data.train, data.validation, data.separator, ...

A packed folder holds train.bin/.idx, val.bin/.idx (where documents are held out), data.json, which says
where all this comes from, and a copy of the tokenizer where it came from a file. The same request gives the
same bytes, whatever the number of workers.

A document is held out when a hash of the seed and its text is small enough. So the choice depends neither on
names, order nor tokenizer, and copies of a document are never on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError, CorruptFileError, Error, InputError
from ...tokenizers import Tokenizer, named
from .binidx import TokenData, Tokens, TokenWriter, open_tokens
from .sources import Encoded, Skipped, Text, read

FORMAT, VERSION = "wkv-data", 1
_DESCRIPTION, _TOKENIZER = "data.json", "tokenizer.json"
_FILES = ("train.bin", "train.idx", "val.bin", "val.idx", _TOKENIZER, _DESCRIPTION)  # the last one comes last
_UNFINISHED, _LOCK = ".wkv-pack.tmp", ".wkv-pack.lock"
_LARGEST_DESCRIPTION = 2**20  # bytes
_NAMED = 100  # sources that data.json lists: a shell may have made ten thousand of one pattern

_PIECE = 4 * 2**20  # characters encoded at once: as a list of Python's integers, forty times as large
_BATCH = 2**18  # characters that go to another process together
_ALONE = 32 * 2**20  # characters encoded here, before starting other processes pays

# Documents, bytes of text and tokens, so far; the share of the sources that is read, 0 to 1.
Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Split:
    """What one of the two parts holds; `n_bytes` of UTF-8, or None where some came as token ids."""

    documents: int
    tokens: int
    n_bytes: int | None


@dataclass(frozen=True)
class PackReport:
    """What `pack` made: `splits` has "train" and, where documents are held out, "val"."""

    path: Path
    tokenizer: str
    splits: dict[str, Split]
    skipped: Skipped

    def __str__(self) -> str:
        lines = [f"{self.path}: packed with the tokenizer {self.tokenizer}"]
        for name, split in self.splits.items():
            size = f"{split.documents:,} documents, {split.tokens:,} tokens"
            rate = f", {split.n_bytes / split.tokens:.3f} bytes per token" if split.n_bytes else ""
            lines.append(f"  {name:<8}{size}{rate}")
        for reason, count in self.skipped.counts.items():
            examples = ", ".join(self.skipped.examples[reason])
            more = ", ..." if count > len(self.skipped.examples[reason]) else ""
            lines.append(f"  skipped {count:,}: {reason} ({examples}{more})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Data:
    """What training reads.

    train             the documents to learn from
    validation        those that are held out, or None
    tokenizer         its name, for `wkv.tokenizers.named`; None where nobody knows
    separator         the token that ends each document
    vocab_size        of the tokenizer; None where nobody knows
    train_bytes       of the UTF-8 text of all of `train`; None where nobody knows
    validation_bytes  the same of `validation`
    """

    train: TokenData
    validation: TokenData | None = None
    tokenizer: str | None = None
    separator: int = 0
    vocab_size: int | None = None
    train_bytes: int | None = None
    validation_bytes: int | None = None

    def count_bytes(self, documents: Iterable[Tokens]) -> int | None:
        """The bytes of text that these documents stand for, separators apart; None without a tokenizer."""
        if self._decode is None:
            return None
        total = 0
        for document in documents:
            text = document[:-1] if len(document) and document[-1] == self.separator else document
            total += len(self._decode.decode_bytes(text.tolist()))
        return total

    @functools.cached_property
    def _decode(self) -> Tokenizer | None:
        return None if self.tokenizer is None else named(self.tokenizer)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether `open_data` is the way to read this: a packed folder or a token file."""
    name = os.fspath(path)
    if os.path.isdir(name):
        return all(os.path.exists(os.path.join(name, file)) for file in (_DESCRIPTION, "train.idx"))
    return name.endswith((".bin", ".idx", ".npy")) or os.path.exists(f"{name}.idx")


def open_data(path: str | os.PathLike[str]) -> Data:
    """A packed folder, or a token file alone (as `open_tokens` takes it), which has no validation.

    InputError when it is neither, CorruptFileError when its files do not belong together or are not whole.
    """
    folder = Path(path)
    if not folder.is_dir():
        return Data(open_tokens(path))
    facts = _description(folder)
    splits = {name: _open_split(folder, name, split) for name, split in facts["splits"].items()}
    tokenizer = facts["tokenizer"]
    return Data(
        train=splits["train"],
        validation=splits.get("val"),
        tokenizer=str(folder / _TOKENIZER) if tokenizer == _TOKENIZER else tokenizer,
        separator=facts["separator"],
        vocab_size=facts["vocab_size"],
        train_bytes=facts["splits"]["train"]["bytes"],
        validation_bytes=facts["splits"].get("val", {}).get("bytes"),
    )


def _description(folder: Path) -> dict[str, Any]:
    """data.json, checked as far as it is used."""
    path = folder / _DESCRIPTION
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_DESCRIPTION)
        facts = json.loads(raw.decode())
    except OSError as error:
        raise InputError(
            f"{folder} is not packed: {_DESCRIPTION} {error.strerror}",
            "a folder that wkv data pack made, or a token file",
            f"wkv data pack {folder} --tokenizer world --out packed",
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON ({error})", "the file as it was packed") from None
    if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{path} is of another kind or version", f"{FORMAT}, version {VERSION}", "packing again"
        )
    match facts:
        case {
            "tokenizer": "world" | "bytes" | "tokenizer.json",
            "separator": int(separator),
            "vocab_size": int(vocab_size),
            "splits": {"train": {}, **others},
        } if 0 <= separator < vocab_size < 2**31 and others.keys() <= {"val"}:
            return facts
    raise CorruptFileError(f"{path} contradicts itself", "the file as it was packed", "packing again")


def _open_split(folder: Path, name: str, facts: Any) -> TokenData:
    data = open_tokens(folder / name)
    match facts:
        case {"documents": data.n_documents, "tokens": data.n_tokens, "bytes": None | int()}:
            return data
    raise CorruptFileError(
        f"{data.path} has {data.n_documents:,} documents and {data.n_tokens:,} tokens, which is not what "
        f"{_DESCRIPTION} says",
        "files of one folder, as they were packed",
        "packing again",
    )


def pack(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    held_out: float = 0.05,
    seed: int = 0,
    field: str = "text",
    workers: int = 1,
    progress: Progress | None = None,
) -> PackReport:
    """Encode the documents of `sources` (see `sources.read`) and write them to the folder `out`.

    held_out  the expected share of documents for validation, below 1; of two or more documents, at least one
              is held out and at least one is not. 0: no validation
    seed      of that choice, 0 to 2^64 - 1
    field     of JSONL sources, where their text is
    workers   processes that encode. More than one, and they start new interpreters: a script that asks for
              them needs `if __name__ == "__main__":`
    progress  is called every now and then

    Each document ends with the tokenizer's end of text, or 0 where it has none. Ids are stored as uint16
    where the vocabulary allows, else as int32. A document of more than 4 million characters is encoded in
    pieces, cut at line ends: the token at such a place may differ from that of encoding it whole.

    The files appear when all are whole and on the disk, data.json last; after an error there are none.
    InputError for bad arguments, sources without a document, text that the tokenizer cannot encode and a
    folder that is taken; CheckpointError when the disk does not take the files.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out is {held_out}", "a share of the documents, from 0 to below 1", "0.05")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}", "0 to 2^64 - 1")
    if workers < 1:
        raise InputError(f"workers is {workers}", "at least 1")
    is_file = tokenizer.name not in ("world", "bytes")
    if is_file and not os.path.isfile(tokenizer.name):
        raise InputError(
            f"the tokenizer {tokenizer.name!r} is no file", "'world', 'bytes' or the path of a tokenizer.json"
        )
    separator = tokenizer.end_of_text or 0
    skipped = Skipped()
    documents = read(
        sources, skipped=skipped, field=field, separator=separator, vocab_size=tokenizer.vocab_size
    )
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

    def show(n_documents: int, n_bytes: int, n_tokens: int) -> None:
        if progress is not None:
            progress(n_documents, n_bytes, n_tokens, documents.share)

    with _folder_that_appears(Path(out)) as folder:
        splits = _write(
            folder,
            _encoded(_batches(_pieces(documents, seed)), tokenizer, workers),
            dtype=dtype,
            separator=separator,
            held_out=held_out,
            show=show,
        )
        if not splits:
            raise _nothing(sources, skipped)
        if is_file:
            shutil.copyfile(tokenizer.name, folder / _TOKENIZER)
            _sync(folder / _TOKENIZER)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": _TOKENIZER if is_file else tokenizer.name,
            "separator": separator,
            "vocab_size": tokenizer.vocab_size,
            "seed": seed,
            "held_out": held_out,
            "field": field,
            "sources": [os.fspath(source) for source in sources[:_NAMED]],
            "n_sources": len(sources),
            "skipped": {
                reason: {"count": count, "examples": skipped.examples[reason]}
                for reason, count in skipped.counts.items()
            },
            "splits": {
                name: {
                    "documents": split.documents,
                    "tokens": split.tokens,
                    "bytes": split.n_bytes,
                    "sha256": {suffix: _sha256(folder / f"{name}.{suffix}") for suffix in ("bin", "idx")},
                }
                for name, split in splits.items()
            },
        }
        (folder / _DESCRIPTION).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _sync(folder / _DESCRIPTION)
    return PackReport(Path(out), tokenizer.name, splits, skipped)


def _write(
    folder: Path,
    batches: Iterable[tuple[list[_Piece], list[Tokens]]],
    *,
    dtype: npt.DTypeLike,
    separator: int,
    held_out: float,
    show: Callable[[int, int, int], None],
) -> dict[str, Split]:
    """Write the token files of both splits; what each holds, without those that hold nothing."""
    with (
        TokenWriter(folder / "train", dtype) as train_writer,
        TokenWriter(folder / "val", dtype) as val_writer,
    ):
        train, val = _Part(train_writer), _Part(val_writer)
        for pieces, encoded in batches:
            for piece, tokens in zip(pieces, encoded, strict=True):
                part = val if piece.draw < held_out else train
                part.writer.append(tokens)
                if piece.is_last:
                    part.end_document(piece, separator, abs(piece.draw - held_out))
            show(*(a + b for a, b in zip(train.counts, val.counts, strict=True)))
        if not train.documents and val.documents:
            val.move_nearest(train)
        elif not val.documents and train.documents > 1 and held_out:
            train.move_nearest(val)
    if not val.documents:
        for suffix in ("bin", "idx"):
            (folder / f"val.{suffix}").unlink()
    return {name: part.split() for name, part in (("train", train), ("val", val)) if part.documents}


def _nothing(sources: Sequence[str | os.PathLike[str]], skipped: Skipped) -> InputError:
    names = ", ".join(os.fspath(source) for source in sources) or "an empty list of sources"
    reasons = "; ".join(
        f"{count:,} x {reason} ({skipped.examples[reason][0]})" for reason, count in skipped.counts.items()
    )
    got = f"everything in {names} was skipped: {reasons}" if reasons else f"there is no file in {names}"
    return InputError(
        got, "text in UTF-8, .jsonl, .npy or .bin/.idx files", "other files, or --field for JSONL"
    )


@contextlib.contextmanager
def _folder_that_appears(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` when the block ends without an error, else it vanishes."""
    # Here, because the other processes, which only encode, do well without them; the second one loads torch.
    from filelock import FileLock, Timeout

    from ...checkpoints import sync_folder

    folder = out / _UNFINISHED
    try:
        with contextlib.ExitStack() as cleanup:
            if not out.exists():
                cleanup.callback(_remove_if_empty, out)
            out.mkdir(parents=True, exist_ok=True)
            try:
                lock = cleanup.enter_context(FileLock(out / _LOCK, timeout=0))
            except Timeout:
                raise InputError(
                    f"another wkv packs into {out}", "a folder for each", "another --out, or waiting"
                ) from None
            cleanup.callback(_remove, Path(lock.lock_file))
            if folder.exists():  # of a packer that was killed, perhaps while its files were moving
                if not (out / _DESCRIPTION).exists():
                    for name in _FILES:
                        _remove(out / name)
                shutil.rmtree(folder)
            if taken := [name for name in _FILES if (out / name).exists()]:
                raise InputError(
                    f"{out} already holds {taken[0]}",
                    "a new or empty folder",
                    f"--out {out}-2, or deleting the old files",
                )
            folder.mkdir()
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            yield folder
            with contextlib.ExitStack() as undo:
                for name in _FILES:
                    if (folder / name).exists():
                        os.replace(folder / name, out / name)
                        undo.callback((out / name).unlink)
                        sync_folder(out)
                undo.pop_all()
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(out.parent).free / 1e6:,.0f} MB free)"
        raise CheckpointError(
            f"{out} could not be written: {error.strerror or error}{free}; nothing of it was kept",
            "a folder with room for all tokens, at 2 or 4 bytes each",
            "freeing space, or --out on another disk",
        ) from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or Windows keeps it while it is open
        path.unlink()


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Splits


class _Part:
    """One of the two parts while it is written."""

    def __init__(self, writer: TokenWriter) -> None:
        self.writer = writer
        self.n_bytes = self.n_unknown = 0  # bytes of text, and documents of which they are not known
        # The document that was nearest to going to the other side: how near, its number, its bytes.
        self.nearest: tuple[float, int, int | None] = (2.0, 0, None)

    @property
    def documents(self) -> int:
        return self.writer.n_documents

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.documents, self.n_bytes, self.writer.n_tokens

    def end_document(self, piece: _Piece, separator: int, distance: float) -> None:
        if piece.tokens is None or piece.tokens[-1] != separator:
            self.writer.append([separator])
        self.nearest = min(self.nearest, (distance, self.documents, piece.n_bytes), key=lambda near: near[0])
        self.writer.end_document()
        self._count(piece.n_bytes, 1)

    def move_nearest(self, other: _Part) -> None:
        _, number, n_bytes = self.nearest
        self.writer.move(number, other.writer)
        self._count(n_bytes, -1)
        other._count(n_bytes, 1)

    def _count(self, n_bytes: int | None, sign: int) -> None:
        if n_bytes is None:
            self.n_unknown += sign
        else:
            self.n_bytes += sign * n_bytes

    def split(self) -> Split:
        return Split(self.documents, self.writer.n_tokens, None if self.n_unknown else self.n_bytes)


# Encoding


class _Piece(NamedTuple):
    """A document, or a part of a long one: text to encode, or `tokens`."""

    name: str
    text: str
    tokens: Tokens | None
    draw: float  # of the document, from 0 to below 1: small ones are held out
    n_bytes: int | None  # of the document
    is_last: bool  # of the document


def draw(document: Text | Encoded, seed: int) -> float:
    """A number from 0 to below 1 that depends on nothing but seed and content; small ones are held out."""
    digest = hashlib.blake2b(key=seed.to_bytes(8, "little"), digest_size=6)  # 48 bits are exact as a float
    if isinstance(document, Text):
        digest.update(document.text.encode())
    else:
        for start in range(0, len(document.tokens), _PIECE):
            digest.update(document.tokens[start : start + _PIECE].astype("<i8").data)
    return int.from_bytes(digest.digest(), "little") / 2**48


def _pieces(documents: Iterable[Text | Encoded], seed: int) -> Iterator[_Piece]:
    for document in documents:
        drawn = draw(document, seed)
        if isinstance(document, Encoded):
            yield _Piece(document.name, "", document.tokens, drawn, None, True)
            continue
        text, start = document.text, 0
        n_bytes = len(text.encode())
        while start < len(text):
            end = start + _PIECE
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield _Piece(document.name, text[start:end], None, drawn, n_bytes, end >= len(text))
            start = end


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 100  # what it costs to send any
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[_Piece]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[_Piece], list[Tokens]]]:
    """Each batch with the tokens of its pieces, in order."""
    characters = 0
    for batch in batches:
        yield batch, _with_tokens(batch, _encode(_texts(batch), tokenizer))
        characters += sum(len(piece.text) for piece in batch)
        if workers > 1 and characters > _ALONE:
            break
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer.name,)
    )
    waiting: deque[tuple[list[_Piece], Future[list[Tokens]]]] = deque()
    try:
        for batch in batches:
            with _no_ctrl_c():
                waiting.append((batch, pool.submit(_encode_here, _texts(batch))))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, _with_tokens(batch, future.result())
        for batch, future in waiting:
            yield batch, _with_tokens(batch, future.result())
    except BrokenProcessPool:
        raise InputError(
            "a process that encodes has died",
            "memory for each, 250 MB and more",
            f"fewer than {workers} workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits until the block ends, and never reaches a process that starts within it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _texts(batch: Iterable[_Piece]) -> list[tuple[str, str]]:
    return [(piece.name, piece.text) for piece in batch if piece.tokens is None]


def _with_tokens(batch: Iterable[_Piece], encoded: Iterable[Tokens]) -> list[Tokens]:
    new = iter(encoded)
    return [next(new) if piece.tokens is None else piece.tokens for piece in batch]


def _encode(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[Tokens]:
    encoded: list[Tokens] = []
    for name, text in texts:
        try:
            encoded.append(np.array(tokenizer.encode(text), dtype=np.int32))
        except Error as error:
            raise InputError(f"{name}: {error.got}", error.expected, error.advice) from None
    return encoded


_TOKENIZER_HERE: list[Tokenizer] = []  # in a process that encodes: its one


def _start(name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _TOKENIZER_HERE.append(named(name))


def _end_with_parent() -> None:
    """A first process that is killed cannot say so, and this one would wait for work forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_here(texts: list[tuple[str, str]]) -> list[Tokens]:
    return _encode(texts, _TOKENIZER_HERE[0])
