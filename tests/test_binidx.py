"""Token files: byte for byte the official format, and a clear error for any other bytes."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wkv.errors import CorruptFileError, Error, InputError
from wkv.training.data import TokenData, TokenWriter, binidx, open_tokens

DOCUMENTS = [[1, 2, 0], [65535, 0], [0], [7] * 5 + [0]]


def official(
    prefix: Path, items: list[list[int]], borders: list[int], code: int = 8, letter: str = "H"
) -> None:
    """The pair as the table of the format has it, put together field by field."""
    sizes = [len(item) for item in items]
    width = struct.calcsize(letter)
    starts = [width * sum(sizes[:i]) for i in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code) + struct.pack("<QQ", len(items), len(borders))
    index += struct.pack(f"<{len(items)}i", *sizes)
    index += struct.pack(f"<{len(items)}q", *starts)
    index += struct.pack(f"<{len(borders)}q", *borders)
    tokens = [token for item in items for token in item]
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(document)
            writer.end_document()


def documents(data: TokenData) -> list[list[int]]:
    return [data.document(i).tolist() for i in range(data.n_documents)]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    official(tmp_path / "x", DOCUMENTS, [0, 1, 2, 3, 4])
    return tmp_path / "x"


# --- the format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "code", "letter"),
    [
        ("uint8", 1, "B"),
        ("int8", 2, "b"),
        ("int16", 3, "h"),
        ("int32", 4, "i"),
        ("int64", 5, "q"),
        ("uint16", 8, "H"),
    ],
)
def test_written_pairs_are_the_official_bytes(tmp_path: Path, dtype: str, code: int, letter: str) -> None:
    small = [[token % 100 for token in document] for document in DOCUMENTS]
    official(tmp_path / "by_hand", small, [0, 1, 2, 3, 4], code, letter)
    write(tmp_path / "x", small, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"by_hand{suffix}").read_bytes()
    data = open_tokens(tmp_path / "x")
    assert documents(data) == small
    assert data.tokens.dtype == np.dtype(dtype)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_either_file_or_their_common_name_opens_the_pair(pair: Path, suffix: str) -> None:
    data = open_tokens(f"{pair}{suffix}")
    assert documents(data) == DOCUMENTS
    assert (data.n_documents, data.n_tokens) == (4, 12)
    assert data.ends.tolist() == [3, 5, 6, 12]
    assert data.ends.dtype == np.int64
    assert data.path == pair.with_suffix(".bin")


def test_tokens_are_mapped_not_read_and_cannot_be_written(pair: Path) -> None:
    data = open_tokens(pair)
    assert isinstance(data.tokens, np.memmap)
    assert np.shares_memory(data.document(3), data.tokens)
    with pytest.raises(ValueError, match="read-only"):
        data.tokens[0] = 1


def test_a_name_with_dots_is_a_common_name_too(tmp_path: Path) -> None:
    write(tmp_path / "corpus.v1.2", DOCUMENTS)
    assert documents(open_tokens(tmp_path / "corpus.v1.2")) == DOCUMENTS


def test_several_items_can_form_a_document(tmp_path: Path) -> None:
    official(tmp_path / "x", [[1], [2, 3], [4, 5, 6], [], [7]], [0, 2, 2, 5])
    assert documents(open_tokens(tmp_path / "x")) == [[1, 2, 3], [], [4, 5, 6, 7]]


def test_a_document_too_long_for_one_item_becomes_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binidx, "_LARGEST_ITEM", 4)
    long = [[1] * 9, [2] * 4, [], [3] * 8]
    write(tmp_path / "x", long)
    official(tmp_path / "y", [[1] * 4, [1] * 4, [1], [2] * 4, [], [3] * 4, [3] * 4], [0, 3, 4, 5, 7])
    assert (tmp_path / "x.idx").read_bytes() == (tmp_path / "y.idx").read_bytes()
    assert documents(open_tokens(tmp_path / "x")) == long


def test_a_document_may_come_in_parts_of_any_type(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x", np.int32) as writer:
        writer.append([1, 2])
        writer.append(np.array([3], dtype=np.uint8))
        writer.append([])
        writer.append(np.array([2**20], dtype=np.int64))
        writer.end_document()
        assert (writer.n_documents, writer.n_tokens) == (1, 4)
    assert documents(open_tokens(tmp_path / "x")) == [[1, 2, 3, 2**20]]


@pytest.mark.parametrize("moved", range(4))
def test_a_document_moves_to_another_writer_and_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    monkeypatch.setattr(binidx, "_BLOCK", 2)
    with TokenWriter(tmp_path / "x", np.uint16) as x, TokenWriter(tmp_path / "y", np.uint16) as y:
        for document in DOCUMENTS:
            x.append(document)
            x.end_document()
        x.move(moved, y)
        x.append([9])
        x.end_document()
    rest = DOCUMENTS[:moved] + DOCUMENTS[moved + 1 :]
    assert documents(open_tokens(tmp_path / "x")) == [*rest, [9]]
    assert documents(open_tokens(tmp_path / "y")) == [DOCUMENTS[moved]]
    assert (x.n_tokens, y.n_tokens) == (13 - len(DOCUMENTS[moved]), len(DOCUMENTS[moved]))


@pytest.mark.parametrize(
    ("dtype", "token"), [("uint16", 65536), ("uint16", -1), ("int32", 2**31), ("uint8", 256)]
)
def test_an_id_that_does_not_fit_is_refused_and_no_file_is_left(
    tmp_path: Path, dtype: str, token: int
) -> None:
    with pytest.raises(InputError, match=f"the token id {token} does not fit {dtype}"):
        write(tmp_path / "x", [[1], [2, token]], dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_writer_replaces_nothing(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", DOCUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{suffix}"]
    assert (tmp_path / f"x.{suffix}").read_text() == "mine"


# --- NumPy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint32"])
def test_a_npy_file_is_one_document(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", np.arange(100, dtype=dtype))
    data = open_tokens(tmp_path / "x.npy")
    assert isinstance(data.tokens, np.memmap)
    assert documents(data) == [list(range(100))]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.int64),
        np.zeros(3),
        np.zeros(0, np.int32),
        np.array(5),
        np.zeros(3, ">i4"),
        np.array(["a"]),
    ],
    ids=["matrix", "floats", "empty", "scalar", "big-endian", "text"],
)
def test_an_array_that_is_no_list_of_ids_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(Error, match=r"x\.npy"):
        open_tokens(tmp_path / "x.npy")


def test_a_npy_file_of_python_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptFileError, match=r"x\.npy is not a whole \.npy file"):
        open_tokens(tmp_path / "x.npy")


# --- files that are not what they should be -----------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x.bin", "x.idx", "x.npy"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"x\.(bin|npy) cannot be read: No such file"):
        open_tokens(tmp_path / name)


def test_a_missing_index_is_named(pair: Path) -> None:
    pair.with_suffix(".idx").unlink()
    with pytest.raises(InputError, match=r"x\.idx cannot be read: No such file"):
        open_tokens(pair)


def test_a_truncated_or_longer_bin_is_named_with_both_sizes(pair: Path) -> None:
    data = pair.with_suffix(".bin")
    whole = data.read_bytes()
    for wrong in (whole[:-1], whole[:-2], b"", whole + b"\x00\x00"):
        data.write_bytes(wrong)
        with pytest.raises(CorruptFileError, match=rf"x\.bin has {len(wrong)} bytes, and its index says 24"):
            open_tokens(pair)


def test_an_index_truncated_anywhere_is_refused(pair: Path) -> None:
    index = pair.with_suffix(".idx")
    whole = index.read_bytes()
    for length in range(len(whole)):
        index.write_bytes(whole[:length])
        with pytest.raises(Error, match=r"x\.idx"):
            open_tokens(pair)


def test_swapped_files_are_recognised(pair: Path) -> None:
    data, index = pair.with_suffix(".bin"), pair.with_suffix(".idx")
    shutil.move(data, pair)
    shutil.move(index, data)
    shutil.move(pair, index)
    with pytest.raises(CorruptFileError, match="they are swapped"):
        open_tokens(pair)


def test_the_bin_of_another_pair_is_refused(tmp_path: Path, pair: Path) -> None:
    write(tmp_path / "y", [*DOCUMENTS, [1]])
    shutil.copy(tmp_path / "y.bin", tmp_path / "x.bin")
    with pytest.raises(CorruptFileError, match=r"x\.bin has 26 bytes, and its index says 24"):
        open_tokens(pair)


def test_an_index_over_no_tokens_is_refused(tmp_path: Path) -> None:
    official(tmp_path / "x", [[], []], [0, 1, 2])
    with pytest.raises(InputError, match="holds no tokens"):
        open_tokens(tmp_path / "x")


def patched(index: bytes, place: int, form: str, value: int) -> bytes:
    new = struct.pack(form, value)
    return index[:place] + new + index[place + len(new) :]


ITEMS, STARTS, BORDERS = 34, 34 + 4 * 4, 34 + 12 * 4


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        (0, "<B", 0, "is not an index"),
        (9, "<Q", 2, "has the version 2"),
        (9, "<Q", 2**64 - 1, "has the version"),
        (17, "<B", 0, "unknown kind 0"),
        (17, "<B", 6, "floating-point"),
        (17, "<B", 7, "floating-point"),
        (17, "<B", 9, "unknown kind 9"),
        (17, "<B", 4, "items in .* overlap or leave gaps"),
        (18, "<Q", 2**64 - 1, "its header says"),
        (18, "<Q", 3, "its header says"),
        (26, "<Q", 2**63, "its header says"),
        (26, "<Q", 0, "its header says"),
        (ITEMS, "<i", -1, "overlap or leave gaps"),
        (ITEMS, "<i", 4, "overlap or leave gaps"),
        (ITEMS + 12, "<i", 7, "its index says"),
        (ITEMS + 12, "<i", -6, "overlap or leave gaps"),
        (STARTS, "<q", 2, "overlap or leave gaps"),
        (STARTS + 8, "<q", -6, "overlap or leave gaps"),
        (STARTS + 24, "<q", 2**62, "overlap or leave gaps"),
        (BORDERS, "<q", 1, "borders of documents"),
        (BORDERS + 8, "<q", -1, "borders of documents"),
        (BORDERS + 16, "<q", 2**40, "borders of documents"),
        (BORDERS + 16, "<q", 0, "borders of documents"),
        (BORDERS + 32, "<q", 3, "borders of documents"),
        (BORDERS + 32, "<q", 5, "borders of documents"),
    ],
)
def test_a_false_field_of_the_index_is_refused(
    pair: Path, place: int, form: str, value: int, message: str
) -> None:
    index = pair.with_suffix(".idx")
    index.write_bytes(patched(index.read_bytes(), place, form, value))
    with pytest.raises(Error, match=message):
        open_tokens(pair)


def test_counts_that_fit_the_size_by_overflow_are_refused(pair: Path) -> None:
    index = pair.with_suffix(".idx")
    raw = index.read_bytes()
    # 12 n + 8 m modulo 2^64 is what it was.
    index.write_bytes(patched(patched(raw, 18, "<Q", 4 + 2**62), 26, "<Q", 5 + 2**63))
    with pytest.raises(CorruptFileError, match="its header says"):
        open_tokens(pair)


@given(place=st.integers(0, 34 + 12 * 4 + 8 * 5 - 1), value=st.integers(0, 255), more=st.binary(max_size=20))
def test_any_damage_of_the_index_is_a_typed_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, more: bytes
) -> None:
    prefix = tmp_path_factory.mktemp("damage") / "x"
    official(prefix, DOCUMENTS, [0, 1, 2, 3, 4])
    index = prefix.with_suffix(".idx")
    raw = bytearray(index.read_bytes())
    raw[place] = value
    index.write_bytes(bytes(raw) + more)
    try:
        data = open_tokens(prefix)
    except Error:
        return
    assert [token for document in documents(data) for token in document] == data.tokens.tolist()


@given(raw=st.binary(max_size=200), magic=st.booleans())
def test_any_bytes_as_an_index_are_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, magic: bool
) -> None:
    prefix = tmp_path_factory.mktemp("noise") / "x"
    prefix.with_suffix(".bin").write_bytes(bytes(24))
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" * magic + raw)
    with pytest.raises(Error):
        open_tokens(prefix)


@given(place=st.integers(0, 127), value=st.integers(0, 255), length=st.integers(0, 200))
def test_any_damage_of_a_npy_file_is_a_typed_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, length: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.npy"
    np.save(path, np.arange(20, dtype=np.uint16))
    raw = bytearray(path.read_bytes())
    raw[place] = value
    path.write_bytes(raw[:length])
    try:
        data = open_tokens(path)
    except Error:
        return
    assert data.n_tokens == len(data.tokens.tolist()) > 0


# --- vocabulary and fingerprint -----------------------------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binidx, "_BLOCK", 4)
    write(tmp_path / "x", [[1, 2, 3], [4, 5], [6, 700, 8, 900]])
    data = open_tokens(tmp_path / "x")
    data.check_vocabulary(901)
    data.check_vocabulary(65536)
    with pytest.raises(InputError, match=r"the token id 900, at position 8 in document 2.*from 0 to 899"):
        data.check_vocabulary(900)
    with pytest.raises(InputError, match="the token id 700, at position 6 in document 2"):
        data.check_vocabulary(256)
    with pytest.raises(InputError, match="the token id 4, at position 3 in document 1"):
        data.check_vocabulary(4)
    with pytest.raises(InputError, match="the token id 3, at position 2 in document 0"):
        data.check_vocabulary(3)


def test_a_negative_id_is_beyond_every_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [], [2, -1]], "int32")
    with pytest.raises(InputError, match="the token id -1, at position 2 in document 2"):
        open_tokens(tmp_path / "x").check_vocabulary(2**31)


def test_documents_are_counted_from_0_and_never_from_the_end(pair: Path) -> None:
    data = open_tokens(pair)
    for i in (-1, 4):
        with pytest.raises(InputError, match=f"document {i} of"):
            data.document(i)


def test_the_fingerprint_is_of_the_contents_alone(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "y", DOCUMENTS)
    others = {
        "token": [*DOCUMENTS[:3], [7] * 4 + [8, 0]],
        "border": [[1, 2], [0, 65535, 0], *DOCUMENTS[2:]],
        "shorter": DOCUMENTS[:3],
    }
    for name, changed in others.items():
        write(tmp_path / name, changed)
    write(tmp_path / "dtype", DOCUMENTS, "int32")
    same = {open_tokens(tmp_path / name).fingerprint() for name in ("x", "elsewhere/y")}
    different = {open_tokens(tmp_path / name).fingerprint() for name in (*others, "dtype")}
    assert len(same) == 1
    assert len(different) == 4
    assert not same & different
    assert len(same.pop()) == 64


def test_large_files_are_fingerprinted_by_samples_of_the_whole_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binidx, "_HASHED_WHOLE", 1000)
    monkeypatch.setattr(binidx, "_SAMPLES", 5)
    monkeypatch.setattr(binidx, "_SAMPLE", 20)
    tokens = list(range(1000))
    write(tmp_path / "x", [tokens])
    whole = open_tokens(tmp_path / "x").fingerprint()
    for place, seen in ((0, True), (9, True), (10, False), (250, True), (999, True)):
        changed = [*tokens[:place], 5000, *tokens[place + 1 :]]
        write(tmp_path / f"{place}", [changed])
        assert (open_tokens(tmp_path / f"{place}").fingerprint() != whole) is seen
