"""From files to packed tokens: what becomes a document, what is skipped, and what is left on the disk."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wkv.errors import CheckpointError, CorruptFileError, Error, InputError
from wkv.tokenizers import Tokenizer, bytes_, world
from wkv.training.data import (
    Data,
    Skipped,
    TokenData,
    TokenWriter,
    is_packed,
    open_data,
    open_tokens,
    pack,
    read,
    sources,
    standard_library,
)

PACK = sys.modules[pack.__module__]
BOM = b"\xef\xbb\xbf"
GONE, EMPTY, BINARY = "gone when it was to be read", "empty", "binary, a NUL byte"
HIDDEN, TWICE = "hidden, its name begins with a dot", "read already, under another name"


def texts(*given: Path | str, **options: Any) -> tuple[dict[str, str], dict[str, int]]:
    """What is read, by name, and how much was skipped, by reason."""
    skipped = Skipped()
    found = {document.name: document.text for document in read(given, skipped=skipped, **options)}
    return found, dict(skipped.counts)


def lines(folder: Path, *records: Any, name: str = "x.jsonl") -> Path:
    """A JSONL file; bytes stand for themselves."""
    raw = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (folder / name).write_bytes(b"\n".join(raw) + b"\n")
    return folder / name


def corpus(folder: Path, count: int = 40) -> Path:
    """A folder of small texts, none like another."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"text number {i}\n" * (i % 7 + 1))
    return folder


def documents(data: TokenData) -> list[list[int]]:
    return [data.document(i).tolist() for i in range(data.n_documents)]


def decoded(data: TokenData, tokenizer: Tokenizer) -> list[str]:
    """The texts of a split, each of which ends with the separator 0."""
    assert all(document[-1] == 0 for document in documents(data))
    return [tokenizer.decode(document[:-1]) for document in documents(data)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- files --------------------------------------------------------------------------------------------


def test_every_kind_of_unfit_file_is_skipped_and_counted_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in {
        "good.txt": "Grüße\n".encode(),
        "no-suffix": b"too",
        "bom.txt": BOM + b"marked",
        "crlf.txt": b"a\r\nb\rc\n",
        "empty.txt": b"",
        "only-bom.txt": BOM,
        "image.png": b"\x89PNG\r\n\x1a\n\x00\x00",
        "utf16.txt": "wide".encode("utf-16"),
        "latin1.txt": b"caf\xe9 au lait",
        "cut.txt": "Grüße".encode()[:3],
        "surrogate.txt": b"x\xed\xa0\x80",
        "packed.txt.gz": gzip.compress(b"\x00" * 100, mtime=0),
        ".hidden": b"hidden",
    }.items():
        (folder / name).write_bytes(content)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("not read")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "x.md").write_text("below")
    os.mkfifo(folder / "pipe")  # opening it would wait forever
    skipped = Skipped()
    found = {document.name: document.text for document in read([folder], skipped=skipped)}
    assert found == {
        f"{folder}/bom.txt": "marked",
        f"{folder}/crlf.txt": "a\r\nb\rc\n",
        f"{folder}/good.txt": "Grüße\n",
        f"{folder}/no-suffix": "too",
        f"{folder}/sub/deep/x.md": "below",
    }
    assert list(found) == sorted(found)
    assert skipped.counts == {EMPTY: 2, BINARY: 3, "not UTF-8": 3, HIDDEN: 2, "not a regular file": 1}
    assert skipped.examples["not UTF-8"] == [
        f"{folder}/cut.txt: byte 2",
        f"{folder}/latin1.txt: byte 3",
        f"{folder}/surrogate.txt: byte 1",
    ]
    assert f"{folder}/image.png: byte 8" in skipped.examples[BINARY]


def test_all_are_counted_and_only_a_few_are_named(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.txt").touch()
    skipped = Skipped()
    assert list(read([tmp_path], skipped=skipped)) == []
    assert skipped.counts == {EMPTY: 50}
    assert skipped.examples == {EMPTY: [f"{tmp_path}/{i:02}.txt" for i in range(3)]}


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data", 2)
    (folder / "up").symlink_to(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "round").symlink_to(folder / "sub")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "dangling").symlink_to(folder / "nothing")
    found, skipped = texts(folder)
    assert len(found) == 2
    assert skipped == {TWICE: 2, GONE: 1, f"cannot be read: {os.strerror(errno.ELOOP)}": 1}


def test_a_file_is_read_once_whatever_leads_to_it(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data", 3)
    (tmp_path / "link").symlink_to(folder / "000.txt")
    found, skipped = texts(folder / "001.txt", folder, tmp_path / "link", f"{folder}/*2.txt")
    assert sorted(found) == [f"{folder}/{i:03}.txt" for i in range(3)]
    assert skipped == {TWICE: 3}


def test_a_file_that_vanishes_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "data", 4)
    skipped, stat = Skipped(), Path.stat

    def vanish(path: Path, **options: Any) -> os.stat_result:
        result = stat(path, **options)
        if path.name == "002.txt":  # before the first is read
            path.unlink()
        return result

    monkeypatch.setattr(Path, "stat", vanish)
    reading = read([folder], skipped=skipped)
    next(reading)
    (folder / "001.txt").unlink()  # just before it is its turn
    assert [Path(document.name).name for document in reading] == ["003.txt"]
    assert skipped.counts == {GONE: 2}


def test_a_file_that_may_not_be_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "data", 3)
    open_ = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "001.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    found, skipped = texts(folder)
    assert len(found) == 2
    assert skipped == {"cannot be read: Permission denied": 1}


def test_a_text_file_larger_than_memory_should_hold_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGEST_TEXT", 10)
    (tmp_path / "a.txt").write_text("x" * 10)
    (tmp_path / "b.txt").write_text("x" * 11)
    found, skipped = texts(tmp_path)
    assert list(found.values()) == ["x" * 10]
    assert skipped == {"longer than 10 bytes": 1}


def test_patterns_are_expanded_in_order(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data", 3)
    (folder / "sub").mkdir()
    (folder / "sub" / "x.txt").write_text("x")
    (folder / "y.md").write_text("y")
    found, _ = texts(f"{folder}/**/*.txt")
    assert list(found) == [f"{folder}/{name}.txt" for name in ("000", "001", "002", "sub/x")]
    assert len(texts(f"{folder}/su*")[0]) == 1


@pytest.mark.parametrize("name", ["nothing.txt", "nothing/*.txt", "Stdlib"])
def test_a_source_that_does_not_exist_is_an_error_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist|matches no file"):
        read([corpus(tmp_path / "data"), tmp_path / name], skipped=Skipped())


def test_the_library_gives_the_bytes_of_its_files() -> None:
    found, skipped = texts("stdlib")
    assert {name.removeprefix("stdlib/"): text.encode() for name, text in found.items()} == dict(
        standard_library()
    )
    assert skipped == {}


# --- JSONL --------------------------------------------------------------------------------------------


def test_every_kind_of_unfit_line_is_skipped_with_its_number(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        BOM + b'{"text": "first"}',
        {"text": "Gr\u00fc\u00dfe \U0001f600", "id": 3},
        b"",
        b"  \r",
        {"id": 3},
        {"text": None},
        {"text": 5},
        {"text": ""},
        b'{"text": "half',
        b"[1, 2]",
        b'"text"',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": 1' + b"0" * 5000 + b"}",
        b'{"text": "crlf\\r\\n"}\r',
        {"text": "last"},
    )
    skipped = Skipped()
    found = {document.name: document.text for document in read([path], skipped=skipped)}
    assert found == {
        f"{path}: line 1": "first",
        f"{path}: line 2": "Grüße 😀",
        f"{path}: line 16": "crlf\r\n",
        f"{path}: line 17": "last",
    }
    assert skipped.counts == {
        "a line without the field 'text'": 2,
        "a line whose field 'text' is not text": 1,
        EMPTY: 1,
        "a line that is not JSON": 3,
        "a line that is not a JSON object": 2,
        "not UTF-8": 1,
        "not valid Unicode, a lone surrogate": 1,
    }
    assert skipped.examples["a line without the field 'text'"] == [f"{path}: line 5", f"{path}: line 6"]


def test_a_line_of_200_mb_is_skipped_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n')
        file.truncate(200_000_000)  # a hole: 200 MB of zeros at no cost
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"text": "after"}')
    tracemalloc.start()
    found, skipped = texts(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == {f"{path}: line 1": "before", f"{path}: line 3": "after"}
    assert skipped == {"a line longer than 67,108,864 bytes": 1}
    assert peak < 150e6


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_of_exactly_the_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    monkeypatch.setattr(sources, "LARGEST_LINE", 20)
    fits = b'{"text": "12345678"}'
    path = tmp_path / "x.jsonl"
    path.write_bytes(fits + b"\n" + fits + b" \n" + b" " * 41 + b"\n" + fits + ending)
    found, skipped = texts(path)
    assert found == {f"{path}: line {number}": "12345678" for number in (1, 4)}
    assert skipped == {"a line longer than 20 bytes": 2}


def test_the_field_is_a_choice(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": "no", "body": "yes"}, {"text": "no"})
    found, skipped = texts(path, field="body")
    assert list(found.values()) == ["yes"]
    assert skipped == {"a line without the field 'body'": 1}


def test_chats_are_written_as_the_official_models_read_them(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": " Hi\r\n\n\nthere "},
                {"role": "assistant", "content": "Hello.\n\nWell?\n"},
            ]
        },
        {"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": []},
        {"messages": "no list, and so text"},
    )
    found, skipped = texts(path)
    assert list(found.values()) == [
        "System: Be kind.\n\nUser: Hi\nthere\n\nAssistant: Hello.\n\nWell?\n\n",
        "User: 1 + 1\n\nAssistant: 2\n\n",
        "no list, and so text",
    ]
    assert skipped == {
        "a chat with a speaker other than system, user and assistant": 1,
        "a chat with a turn that has no speaker or no text": 2,
        EMPTY: 1,
    }


def test_a_json_file_is_lines_only_when_its_first_line_is_an_object(tmp_path: Path) -> None:
    lines(tmp_path, {"text": "one"}, {"text": "two"}, name="lines.json")
    (tmp_path / "pretty.json").write_text('{\n "text": "three"\n}\n')
    found, skipped = texts(tmp_path)
    assert list(found.values()) == ["one", "two", '{\n "text": "three"\n}\n']
    assert skipped == {}


@given(raw=st.lists(st.binary(max_size=40) | st.sampled_from([b'{"text": "x"}', b'{"messages": [', BOM])))
def test_any_bytes_as_jsonl_are_read_or_counted(
    tmp_path_factory: pytest.TempPathFactory, raw: list[bytes]
) -> None:
    path = lines(tmp_path_factory.mktemp("noise"), *raw)
    found, skipped = texts(path)
    content = path.read_bytes().removeprefix(BOM)
    assert len(found) + sum(skipped.values()) == sum(bool(line.strip()) for line in content.split(b"\n"))


# --- token files as sources ---------------------------------------------------------------------------


def write_pair(prefix: Path, *parts: list[int]) -> Path:
    with TokenWriter(prefix, np.uint16) as writer:
        for part in parts:
            writer.append(part)
            writer.end_document()
    return prefix.with_suffix(".bin")


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx", "", "*", "*.idx"])
def test_a_pair_is_one_source_whatever_it_is_called_by(tmp_path: Path, name: str) -> None:
    write_pair(tmp_path / "x", [1, 2, 0], [], [3])
    skipped = Skipped()
    found = [document.tokens.tolist() for document in read([tmp_path / name], skipped=skipped)]
    assert found == [[1, 2, 0], [3]]
    assert skipped.counts == {EMPTY: 1}


def test_separators_divide_a_npy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK", 2)
    np.save(tmp_path / "x.npy", np.array([5, 0, 6, 7, 8, 0, 0, 9]))
    found = [document.tokens.tolist() for document in read([tmp_path / "x.npy"], skipped=Skipped())]
    assert found == [[5, 0], [6, 7, 8, 0], [0], [9]]


def test_a_damaged_token_file_is_an_error_by_name_and_skipped_in_a_folder(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data", 2)
    path = write_pair(folder / "x", [1, 2, 0])
    path.write_bytes(path.read_bytes()[:-1])
    np.save(folder / "image.npy", np.zeros((2, 2)))
    with pytest.raises(CorruptFileError, match=r"x\.bin has 5 bytes"):
        texts(path)
    found, skipped = texts(folder)
    assert len(found) == 2
    assert skipped == {"not a whole token file": 2}


def test_ids_beyond_the_vocabulary_are_refused_before_they_are_packed(tmp_path: Path) -> None:
    write_pair(tmp_path / "x", [1, 2], [3, 256])
    with pytest.raises(InputError, match="the token id 256, at position 3 in document 1"):
        pack([tmp_path / "x"], bytes_(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [bytes_(), world()], ids=["bytes", "world"])
def test_every_document_is_packed_once_with_the_separator_at_its_end(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = corpus(tmp_path / "data")
    (folder / "unicode.txt").write_text("Grüße 😀 你好")
    report = pack([folder], tokenizer, tmp_path / "out", held_out=0.3, seed=1)
    data = open_data(tmp_path / "out")
    assert data.validation is not None
    train, held_out = decoded(data.train, tokenizer), decoded(data.validation, tokenizer)
    originals = [path.read_text() for path in sorted(folder.iterdir())]
    assert sorted(train + held_out) == sorted(originals)
    assert train == [text for text in originals if text in train]  # in order
    assert 3 < len(held_out) < 25
    assert data.tokenizer == tokenizer.name
    assert (data.separator, data.vocab_size) == (0, tokenizer.vocab_size)
    assert data.train.tokens.dtype == np.uint16
    for name, split, found, n_bytes in (
        ("train", data.train, train, data.train_bytes),
        ("val", data.validation, held_out, data.validation_bytes),
    ):
        expected = sum(len(text.encode()) for text in found)
        assert n_bytes == expected
        assert data.count_bytes(documents_of(split)) == expected
        assert report.splits[name] == PACK.Split(split.n_documents, split.n_tokens, expected)


def documents_of(data: TokenData) -> list[Any]:
    return [data.document(i) for i in range(data.n_documents)]


def test_the_packed_library_is_its_bytes(tmp_path: Path) -> None:
    pack(["stdlib"], bytes_(), tmp_path / "out", held_out=0)
    data = open_data(tmp_path / "out")
    assert data.validation is None
    packed = data.train.tokens.astype(np.uint8).tobytes()
    assert packed == b"".join(document.text + b"\x00" for document in standard_library())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data.json",
        "train.bin",
        "train.idx",
    ]


def test_the_folder_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data")
    (folder / "x.bin").write_bytes(b"\x00")
    report = pack([folder], bytes_(), tmp_path / "out", held_out=0.25, seed=7, field="body")
    facts = json.loads((tmp_path / "out" / "data.json").read_text())
    digests = {
        name: {
            suffix: hashlib.sha256((tmp_path / "out" / f"{name}.{suffix}").read_bytes()).hexdigest()
            for suffix in ("bin", "idx")
        }
        for name in ("train", "val")
    }
    assert facts == {
        "format": "wkv-data",
        "version": 1,
        "tokenizer": "bytes",
        "separator": 0,
        "vocab_size": 256,
        "seed": 7,
        "held_out": 0.25,
        "field": "body",
        "sources": [str(folder)],
        "n_sources": 1,
        "skipped": {BINARY: {"count": 1, "examples": [f"{folder}/x.bin: byte 0"]}},
        "splits": {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "bytes": split.n_bytes,
                "sha256": digests[name],
            }
            for name, split in report.splits.items()
        },
    }
    assert f"skipped 1: {BINARY} ({folder}/x.bin: byte 0)" in str(report)


def test_the_same_request_gives_the_same_bytes_whatever_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corpus(tmp_path / "data", 60)
    monkeypatch.setattr(PACK, "_BATCH", 1000)
    pack([folder], world(), tmp_path / "here", seed=3)
    pack([folder], world(), tmp_path / "again", seed=3, workers=2)
    monkeypatch.setattr(PACK, "_ALONE", 1500)
    pack([folder], world(), tmp_path / "there", seed=3, workers=2)
    assert tree(tmp_path / "here") == tree(tmp_path / "again") == tree(tmp_path / "there")


def test_the_choice_of_held_out_documents_is_a_matter_of_seed_and_text_alone(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        (renamed / f"{number:03}").write_bytes(path.read_bytes())
    held_out = {}
    for name, source, tokenizer, seed in (
        ("first", folder, bytes_(), 0),
        ("renamed", renamed, bytes_(), 0),
        ("world", folder, world(), 0),
        ("other seed", folder, bytes_(), 1),
    ):
        pack([source], tokenizer, tmp_path / name, held_out=0.3, seed=seed)
        data = open_data(tmp_path / name)
        assert data.validation is not None
        held_out[name] = set(decoded(data.validation, tokenizer))
    assert held_out["first"] == held_out["renamed"] == held_out["world"] != held_out["other seed"]


def test_copies_of_a_document_are_on_the_same_side(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}").write_text(f"text {i % 6}")
    pack([folder], bytes_(), tmp_path / "out", held_out=0.5)
    data = open_data(tmp_path / "out")
    assert data.validation is not None
    train, held_out = (set(decoded(split, bytes_())) for split in (data.train, data.validation))
    assert train
    assert held_out
    assert not train & held_out


@pytest.mark.parametrize("held_out", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_of_two_documents_or_more_one_is_held_out_and_one_is_not(
    tmp_path: Path, held_out: float, count: int
) -> None:
    folder = corpus(tmp_path / "data", count)
    report = pack([folder], bytes_(), tmp_path / "out", held_out=held_out)
    data = open_data(tmp_path / "out")
    assert data.validation is not None
    rare, common = (data.validation, data.train) if held_out < 0.5 else (data.train, data.validation)
    assert (rare.n_documents, common.n_documents) == (1, count - 1)
    both = decoded(data.train, bytes_()) + decoded(data.validation, bytes_())
    assert sorted(both) == sorted(path.read_text() for path in folder.iterdir())
    assert report.splits["val"].n_bytes == data.count_bytes(documents_of(data.validation))


@pytest.mark.parametrize("held_out", [0, 0.05, 0.999999])
def test_a_single_document_is_trained_on(tmp_path: Path, held_out: float) -> None:
    pack([corpus(tmp_path / "data", 1)], bytes_(), tmp_path / "out", held_out=held_out)
    data = open_data(tmp_path / "out")
    assert data.validation is None
    assert data.train.n_documents == 1


def test_the_share_of_held_out_documents_is_the_one_asked_for(tmp_path: Path) -> None:
    path = lines(tmp_path, *({"text": f"document {i}"} for i in range(4000)))
    pack([path], bytes_(), tmp_path / "out", held_out=0.1)
    data = open_data(tmp_path / "out")
    assert data.validation is not None
    assert abs(data.validation.n_documents - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations


def test_long_documents_are_encoded_in_pieces_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PACK, "_PIECE", 20)
    monkeypatch.setattr(PACK, "_BATCH", 1)
    encoded: list[str] = []

    class Spy(type(bytes_())):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            encoded.append(text)
            return super().encode(text)

    texts = {"a": "12345678\n12345678\n12345678\n12\n", "b": "x" * 45, "c": "y" * 20, "d": "z" * 19 + "\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    pack([tmp_path / name for name in texts], Spy(), tmp_path / "out", held_out=0)
    assert decoded(open_data(tmp_path / "out").train, bytes_()) == list(texts.values())
    assert encoded == [
        "12345678\n12345678\n", "12345678\n12\n", "x" * 20, "x" * 20, "x" * 5, "y" * 20, "z" * 19 + "\n",
    ]  # fmt: skip


def test_the_corpus_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        for i in range(200):
            file.write(json.dumps({"text": f"{i} " * 15_000}) + "\n")
    assert path.stat().st_size > 10_000_000
    pack([path], bytes_(), tmp_path / "warm", held_out=0)  # what is imported and made once is not counted
    tracemalloc.start()
    pack([path], bytes_(), tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.8 * path.stat().st_size


def test_packed_tokens_can_be_packed_again(tmp_path: Path) -> None:
    pack([corpus(tmp_path / "data")], world(), tmp_path / "first", held_out=0)
    np.save(tmp_path / "x.npy", np.arange(1, 5))
    report = pack([tmp_path / "first", tmp_path / "x.npy"], world(), tmp_path / "second", held_out=0)
    first, second = open_data(tmp_path / "first"), open_data(tmp_path / "second")
    text = (tmp_path / "first" / "data.json").read_text()
    assert documents(second.train) == [[*world().encode(text), 0], *documents(first.train), [1, 2, 3, 4, 0]]
    assert second.train_bytes is None  # nobody decoded it
    assert "bytes per token" not in str(report)


def small_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Made(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
    return path


def test_a_tokenizer_file_is_copied_beside_the_tokens(tmp_path: Path) -> None:
    from wkv.tokenizers import from_file

    path = small_tokenizer(tmp_path / "mine.json")
    original = path.read_bytes()
    pack([corpus(tmp_path / "data")], from_file(path), tmp_path / "out", held_out=0)
    path.unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    data = open_data(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "tokenizer.json").read_bytes() == original
    assert data.tokenizer == str(tmp_path / "elsewhere" / "tokenizer.json")
    assert data.separator == 256
    assert all(document[-1] == 256 for document in documents(data.train))
    assert data.count_bytes(documents_of(data.train)) == data.train_bytes


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    class Large(type(bytes_())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size = 2**16 + 1

        def encode(self, text: str) -> list[int]:
            return [2**16 - byte for byte in text.encode()]

    pack([corpus(tmp_path / "data", 2)], Large(), tmp_path / "out")
    data = open_data(tmp_path / "out")
    assert data.train.tokens.dtype == np.int32
    assert data.train.tokens.max() > 2**16 - 128
    data.train.check_vocabulary(2**16 + 1)


def test_progress_is_told_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACK, "_BATCH", 1)
    told: list[tuple[int, int, int, float]] = []
    report = pack(
        [corpus(tmp_path / "data", 9)], bytes_(), tmp_path / "out", progress=lambda *now: told.append(now)
    )
    totals = [
        sum(getattr(split, name) for split in report.splits.values())
        for name in ("documents", "n_bytes", "tokens")
    ]
    assert [documents for documents, *_ in told] == list(range(1, 10))
    assert list(told[-1]) == [*totals, 1.0]


def test_the_share_of_the_sources_grows_to_one_whatever_is_skipped(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": "x" * 90}, {"body": "y" * 90}, {"text": "z" * 90})
    (tmp_path / "noise.bin").write_bytes(bytes(99))
    np.save(tmp_path / "ids.npy", np.arange(1, 60, dtype=np.uint16))
    (tmp_path / "a.txt").write_text("a" * 100)
    reading = read([path, tmp_path], skipped=Skipped())
    shares = [reading.share, *(reading.share for _ in reading), reading.share]
    assert shares == sorted(shares) and len(shares) == 6
    assert shares[0] == 0 < shares[1] < shares[2] < shares[3] and shares[-1] == 1


# --- packing that fails -------------------------------------------------------------------------------


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"there is no file in .*data"):
        pack([tmp_path / "data"], bytes_(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_when_everything_is_skipped_the_error_says_why(tmp_path: Path) -> None:
    path = lines(tmp_path, {"body": "x"}, {"body": "y"})
    (tmp_path / "noise.bin").write_bytes(bytes(9))
    with pytest.raises(InputError) as caught:
        pack([path, tmp_path / "noise.bin"], bytes_(), tmp_path / "out")
    for part in ("2 x a line without the field 'text'", "x.jsonl: line 1", f"1 x {BINARY}", "--field"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data.json", "train.bin", "val.idx", "tokenizer.json"])
def test_a_folder_that_is_taken_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(InputError, match=f"already holds {name}.*--out"):
        pack([corpus(tmp_path / "data")], bytes_(), tmp_path / "out")
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_two_never_pack_into_one_folder(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "data")

    def second(*now: float) -> None:
        with pytest.raises(InputError, match="another wkv packs into"):
            pack([folder], bytes_(), tmp_path / "out")

    pack([folder], bytes_(), tmp_path / "out", progress=second)
    assert open_data(tmp_path / "out").train.n_documents > 30


def test_what_a_killed_packer_left_is_no_obstacle(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "data"), tmp_path / "out"
    (out / ".wkv-pack.tmp").mkdir(parents=True)
    (out / ".wkv-pack.tmp" / "data.json").write_text("never moved")
    (out / ".wkv-pack.lock").touch()
    (out / "train.bin").write_text("moved already")
    pack([folder], bytes_(), out)
    pack([folder], bytes_(), tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")
    # Killed when all was moved: the pack is whole and stays.
    (out / ".wkv-pack.tmp").mkdir()
    with pytest.raises(InputError, match=r"already holds train\.bin"):
        pack([folder], bytes_(), out)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    "options", [{"held_out": -0.1}, {"held_out": 1}, {"held_out": float("nan")}, {"seed": -1}, {"workers": 0}]
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name} is "):
        pack(["stdlib"], bytes_(), tmp_path / "out", **options)


def test_text_that_the_tokenizer_cannot_encode_is_named(tmp_path: Path) -> None:
    class Narrow(type(bytes_())):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            raise InputError("no token for 'x'", "others")

    with pytest.raises(InputError, match=r"000\.txt: no token for 'x'"):
        pack([corpus(tmp_path / "data", 1)], Narrow(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


FAULTS = [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO)]


@pytest.mark.parametrize("fault", [*FAULTS, KeyboardInterrupt()], ids=["full disk", "broken disk", "Ctrl-C"])
def test_a_failure_at_any_moment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    """Every call that could touch the disk fails once, in turn, until one pack goes through."""
    folder = corpus(tmp_path / "data", 5)
    expected = CheckpointError if isinstance(fault, OSError) else KeyboardInterrupt
    moments = 0
    for failing in range(100):
        calls = 0

        def fail(result: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise fault
            return result

        with monkeypatch.context() as patch:
            for place, name in (
                (os, "fsync"), (os, "replace"), (TokenWriter, "append"), (TokenWriter, "_write_index"),
                (PACK, "_sha256"), (Path, "mkdir"), (Path, "write_text"),
            ):  # fmt: skip
                original = getattr(place, name)
                patch.setattr(
                    place, name, lambda *a, original=original, **k: (fail(None), original(*a, **k))[1]
                )
            try:
                pack([folder], bytes_(), tmp_path / "out")
            except expected as error:
                moments += 1
                if isinstance(error, CheckpointError):
                    assert os.strerror(fault.errno) in str(error)  # type: ignore[union-attr]
                assert not (tmp_path / "out").exists()
                continue
            break
    assert moments > 20
    assert open_data(tmp_path / "out").train.n_documents == 4


# --- opening ------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack([corpus(tmp_path / "data")], bytes_(), tmp_path / "out", held_out=0.3)
    return tmp_path / "out"


def test_a_token_file_alone_is_data_without_validation(packed: Path) -> None:
    data = open_data(packed / "train.bin")
    assert data == Data(data.train)
    assert data.validation is None
    assert data.tokenizer is None
    assert data.count_bytes(documents_of(data.train)) is None
    assert data.train.fingerprint() == open_tokens(packed / "train").fingerprint()


def test_what_is_packed_is_told_from_what_is_not(packed: Path, tmp_path: Path) -> None:
    assert all(
        is_packed(path) for path in (packed, packed / "train", packed / "val.bin", "x.npy", str(packed))
    )
    (tmp_path / "data" / "data.json").write_text("{}")
    assert not any(is_packed(path) for path in (tmp_path / "data", "stdlib", "x.txt", tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("tokenizer", "../../etc/passwd"),
        ("tokenizer", None),
        ("separator", -1),
        ("separator", 256),
        ("separator", "0"),
        ("vocab_size", 2**40),
        ("vocab_size", None),
        ("splits", {}),
        ("splits", []),
        ("splits", {"train": {"documents": 1, "tokens": 1, "bytes": 1}}),
        ("splits", {"train": 5}),
    ],
)
def test_a_false_description_is_refused(packed: Path, key: str, value: Any) -> None:
    path = packed / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(Error, match=r"data\.json"):
        open_data(packed)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_description_that_is_none_is_refused(packed: Path, raw: bytes) -> None:
    (packed / "data.json").write_bytes(raw)
    with pytest.raises(Error, match=r"data\.json"):
        open_data(packed)


def test_a_folder_that_is_not_packed_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wkv data pack"):
        open_data(corpus(tmp_path / "data"))


def test_swapped_and_missing_splits_are_noticed(packed: Path) -> None:
    for suffix in ("bin", "idx"):
        (packed / f"train.{suffix}").rename(packed / "held")
        (packed / f"val.{suffix}").rename(packed / f"train.{suffix}")
        (packed / "held").rename(packed / f"val.{suffix}")
        with pytest.raises(CorruptFileError):
            open_data(packed)
    (packed / "val.bin").unlink()
    (packed / "train.bin").rename(packed / "val.bin")
    with pytest.raises(InputError, match=r"train\.bin cannot be read: No such file"):
        open_data(packed)


def test_a_pack_of_very_many_files_can_be_opened(tmp_path: Path) -> None:
    name = "a" * 100
    files = []
    for i in range(300):
        path = tmp_path / "texts" / f"{name}{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i}")
        files.append(path)
    pack(files, bytes_(), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert facts["n_sources"] == 300 and len(facts["sources"]) == 100
    assert open_data(tmp_path / "out").train.n_documents > 200


def test_packing_does_not_load_torch() -> None:
    program = "import sys, wkv.training.data.pack, wkv.training.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("theirs")
    (tmp_path / "texts" / "b.txt").symlink_to(tmp_path / "secret.txt")
    skipped = Skipped()
    assert [document.text for document in read([tmp_path / "texts"], skipped=skipped)] == ["theirs"]
    assert skipped.counts["a link to somewhere outside the folder"] == 1
