"""Documents out of files, one at a time: nothing but the document at hand (and names) is in memory.

    skipped = Skipped()
    for document in read(["notes/", "books/*.txt", "chats.jsonl"], skipped=skipped): ...
    skipped.counts                    # {"binary, a NUL byte": 2, "not UTF-8": 1}

What `read` gives also says how far it is: its `share`, 0 to 1, of the bytes of all files.

    text        a file is a document: UTF-8; a byte order mark is left out, line ends stay as they are
    folders     every file below, in order of names; nothing whose name begins with a dot
    .jsonl      a line is a document (.ndjson too, and .json where the first line is a whole object): the text
                in `field`, or a chat in `field`, "messages" or "conversations"
    .npy        token ids; a document ends with each separator
    .bin/.idx   token ids with their documents, as in `binidx`
    stdlib      the word, not a file: the Python library of this interpreter

Files are read as they are found, and each once, whatever its number of names. What cannot be a document is
left out and counted; a token file that the caller named, and that is damaged, is an error.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ...errors import Error, InputError
from .binidx import TokenData, Tokens, open_tokens

if TYPE_CHECKING:
    from .stdlib import Document

LARGEST_TEXT = 2**30  # bytes of a text file: it is read at once
LARGEST_LINE = 64 * 2**20  # bytes of a JSONL line
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXAMPLES = 3  # places remembered for each reason
_BLOCK = 2**20  # tokens or bytes looked at together


class Text(NamedTuple):
    """A document of text; `name` is for messages."""

    name: str
    text: str


class Encoded(NamedTuple):
    """A document that is token ids already."""

    name: str
    tokens: Tokens


class Skipped:
    """What was left out: how often for each reason, and the first few places."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(place)


class _File(NamedTuple):
    path: Path
    size: int  # bytes, when it was listed
    is_named: bool  # by the caller, this very file


class _Unfit(Exception):
    """The reason why a line is no document."""


def read(
    sources: Sequence[str | os.PathLike[str]],
    *,
    skipped: Skipped,
    field: str = "text",
    separator: int = 0,
    vocab_size: int = 2**31,
) -> Documents:
    """The documents of all sources, in order.

    A source is a file, a folder, a pattern such as "books/**/*.txt", or "stdlib" (a folder of that name is
    "./stdlib"). `separator` and `vocab_size` are those of the tokenizer for sources of token ids.

    InputError, at once, for a source that does not exist; later, for a damaged token file among the
    sources and for token ids that are not below `vocab_size`.
    """
    roots = [root for source in sources for root in _roots(os.fspath(source))]
    return Documents(roots, skipped, field, separator, vocab_size)


def _size(item: _File | list[Document]) -> int:
    return item.size if isinstance(item, _File) else sum(len(document.text) for document in item)


def _roots(source: str) -> list[tuple[Path | None, bool]]:
    """What a source stands for: (path, whether the caller named this very file); None is the library."""
    if source == "stdlib":
        return [(None, True)]
    if os.path.lexists(source):
        return [(_data_file(Path(source)), True)]
    if os.path.exists(f"{source}.bin"):
        return [(Path(f"{source}.bin"), True)]
    matches = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else []
    if not matches:
        problem = "matches no file" if glob.has_magic(source) else "does not exist"
        raise InputError(f"{source} {problem}", "a file, a folder, a pattern, or the word stdlib")
    return [(path, False) for path in dict.fromkeys(_data_file(Path(match)) for match in matches)]


def _data_file(path: Path) -> Path:
    """Of a pair, the .bin file stands for both."""
    data = path.with_suffix(".bin")
    return data if path.suffix == ".idx" and data.exists() else path


class Documents(Iterator[Text | Encoded]):
    """See `read`. The files are listed at once and opened one after the other."""

    def __init__(
        self,
        roots: list[tuple[Path | None, bool]],
        skipped: Skipped,
        field: str,
        separator: int,
        vocab_size: int,
    ) -> None:
        self.skipped, self.field = skipped, field
        self.separator, self.vocab_size = separator, vocab_size
        self._seen: set[tuple[int, int]] = set()  # files and folders, by device and inode
        self._bytes_read = 0
        listed: list[_File | list[Document]] = []
        for root, is_named in roots:
            if root is None:
                from .stdlib import standard_library  # here: it loads torch, and reading files needs none

                listed.append(standard_library())
            else:
                listed += (_File(path, size, is_named and path == root) for path, size in self._files(root))
        self._n_bytes = sum(_size(item) for item in listed)
        self._documents = self._read(listed)

    @property
    def share(self) -> float:
        """How much of the files is read, 0 to 1."""
        return min(1.0, self._bytes_read / max(1, self._n_bytes))

    def __next__(self) -> Text | Encoded:
        return next(self._documents)

    def _read(self, listed: list[_File | list[Document]]) -> Iterator[Text | Encoded]:
        end = 0
        for item in listed:
            end += _size(item)
            if isinstance(item, _File):
                try:
                    yield from self._file(item.path, item.is_named)
                except OSError as error:
                    self._unreadable(item.path, error)
            else:
                yield from self._library(item)
            self._bytes_read = end  # whatever part of it was skipped

    def _files(self, root: Path) -> Iterator[tuple[Path, int]]:
        """The regular files at and below `root`, with their sizes: what somebody put there, not what
        their links lead to."""
        waiting, inside = [root], _real(root)
        while waiting:
            path = waiting.pop()
            try:
                status = path.stat()
                is_folder = stat.S_ISDIR(status.st_mode)
                # Links may lead in circles, and two sources to one file, which would then be in both splits.
                identity = (status.st_dev, status.st_ino)
                if identity in self._seen:
                    self.skipped.add("read already, under another name", str(path))
                    continue
                self._seen.add(identity)
                names = sorted(os.listdir(path), reverse=True) if is_folder else []
            except OSError as error:
                self._unreadable(path, error)
                continue
            if not is_folder and stat.S_ISREG(status.st_mode):
                yield path, status.st_size
            elif not is_folder:
                self.skipped.add("not a regular file", str(path))
            for name in names:
                if name.startswith("."):
                    self.skipped.add("hidden, its name begins with a dot", str(path / name))
                elif (path / name).is_symlink() and not _real(path / name).is_relative_to(inside):
                    self.skipped.add("a link to somewhere outside the folder", str(path / name))
                elif _data_file(path / name) == path / name:
                    waiting.append(path / name)

    def _unreadable(self, path: Path, error: OSError) -> None:
        gone = isinstance(error, FileNotFoundError)
        reason = "gone when it was to be read" if gone else f"cannot be read: {error.strerror or error}"
        self.skipped.add(reason, str(path))

    def _library(self, documents: list[Document]) -> Iterator[Text]:
        for path, data in documents:
            self._bytes_read += len(data)
            if text := self._decoded(data, f"stdlib/{path}"):
                yield Text(f"stdlib/{path}", text)

    def _file(self, path: Path, is_named: bool) -> Iterator[Text | Encoded]:
        suffix = path.suffix.lower()
        if suffix == ".npy" or (suffix == ".bin" and path.with_suffix(".idx").exists()):
            try:
                data = open_tokens(path)
            except Error as error:
                if is_named:
                    raise
                self.skipped.add("not a whole token file", f"{path} ({error.got})")
            else:
                yield from self._encoded(data)
            return
        with path.open("rb") as file:
            if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and _is_lines(file)):
                yield from self._lines(file, path)
            else:
                data_bytes = file.read(LARGEST_TEXT + 1)
                self._bytes_read += len(data_bytes)
                if len(data_bytes) > LARGEST_TEXT:
                    self.skipped.add(f"longer than {LARGEST_TEXT:,} bytes", str(path))
                elif text := self._decoded(data_bytes, str(path)).removeprefix("\ufeff"):
                    yield Text(str(path), text)

    def _decoded(self, data: bytes, name: str) -> str:
        """The text of a file; empty, and counted, when it is none."""
        if data in (b"", _BYTE_ORDER_MARK):
            self.skipped.add("empty", name)
        elif (place := data.find(0)) >= 0:
            self.skipped.add("binary, a NUL byte", f"{name}: byte {place:,}")
        else:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                self.skipped.add("not UTF-8", f"{name}: byte {error.start:,}")
        return ""

    def _lines(self, file: BinaryIO, path: Path) -> Iterator[Text]:
        number = 0
        while line := file.readline(LARGEST_LINE + 1):
            number += 1
            self._bytes_read += len(line)
            name = f"{path}: line {number:,}"
            if len(line) > LARGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(_BLOCK)
                self.skipped.add(f"a line longer than {LARGEST_LINE:,} bytes", name)
                continue
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                try:
                    yield Text(name, _text_of(line, self.field))
                except _Unfit as reason:
                    self.skipped.add(str(reason), name)

    def _encoded(self, data: TokenData) -> Iterator[Encoded]:
        data.check_vocabulary(self.vocab_size)
        ends = _ends(data, self.separator) if data.path.suffix == ".npy" else data.ends
        start = 0
        for number, end in enumerate(ends):
            self._bytes_read += (end - start) * data.tokens.itemsize
            name = f"{data.path}: document {number:,}"
            if start < end:
                yield Encoded(name, data.tokens[start:end])
            else:
                self.skipped.add("empty", name)
            start = end


def _real(path: Path) -> Path:
    """Where a path leads; unlike `Path.resolve`, no error where links lead in circles."""
    return Path(os.path.realpath(path))


def _ends(data: TokenData, separator: int) -> Iterator[int]:
    """Where documents end in tokens that only separators divide."""
    end = 0
    for start in range(0, data.n_tokens, _BLOCK):
        for place in np.flatnonzero(data.tokens[start : start + _BLOCK] == separator).tolist():
            end = start + place + 1
            yield end
    if end < data.n_tokens:
        yield data.n_tokens


def _is_lines(file: BinaryIO) -> bool:
    """Whether the first line is a JSON object by itself; the file is at its start again."""
    first = file.readline(LARGEST_LINE)
    file.seek(0)
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _text_of(line: bytes, field: str) -> str:
    """The document in a JSONL line."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _Unfit("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _Unfit("a line that is not JSON") from None
    if not isinstance(record, dict):
        raise _Unfit("a line that is not a JSON object")
    present = [name for name in (field, "messages", "conversations") if record.get(name) is not None]
    if not present:
        raise _Unfit(f"a line without the field {field!r}")
    value = record[present[0]]
    text = _chat(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise _Unfit(f"a line whose field {present[0]!r} is not text")
    if not text:
        raise _Unfit("empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unfit("not valid Unicode, a lone surrogate") from None
    return text


_SPEAKERS = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
}


def _chat(turns: list[Any]) -> str:
    """`User: ...\\n\\nAssistant: ...\\n\\n`, as the official chat models saw it.

    Turns are {"role", "content"} or {"from", "value"}. A blank line ends a turn, so questions have none
    (as when a chat is written for generation); answers keep theirs.
    """
    parts = []
    for turn in turns:
        match turn:
            case {"role": str(role), "content": str(text)} | {"from": str(role), "value": str(text)}:
                pass
            case _:
                raise _Unfit("a chat with a turn that has no speaker or no text")
        if role not in _SPEAKERS:
            raise _Unfit("a chat with a speaker other than system, user and assistant")
        text = text.replace("\r\n", "\n").strip()
        if _SPEAKERS[role] != "Assistant":
            text = re.sub(r"\n{2,}", "\n", text)
        parts.append(f"{_SPEAKERS[role]}: {text}\n\n")
    return "".join(parts)
