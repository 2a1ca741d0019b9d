"""Files that lie, are damaged, or want to run code: each gives one typed error, quickly, and nothing else."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import time
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official import random_official

from wkv.checkpoints import open_checkpoint, read_safetensors, write_pth, write_safetensors
from wkv.checkpoints.pickled import read_state_dict
from wkv.checkpoints.safetensors import parse_header
from wkv.config import RWKV4Config
from wkv.errors import CheckpointError, CorruptFileError, Error, UnsafeFileError
from wkv.loading import load, save
from wkv.models import build

TINY = {"n_layer": 1, "n_embd": 2, "dim_ffn": 3, "vocab_size": 3}


def open_and_read(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def refused(path, match=None, kind=CheckpointError):
    """The file gives an error of that kind: one line that names the file and matches."""
    with pytest.raises(kind, match=match) as caught:
        open_and_read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 1000
    with pytest.raises(kind):
        load(path)
    return message


def short(value):
    return str(value)[:40]


def written(path, data):
    path.write_bytes(data)
    return path


# ---------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"\0" * 1000, "zeros"),
        (b"hello, world\n" * 100, "unknown"),
        (b"GGUF" + b"\3\0\0\0" * 100, "GGUF"),
        (struct.pack("<6i", 0x67676D66, 101, 65536, 768, 12, 1) + b"x" * 100, r"rwkv\.cpp"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (pickle.dumps({"a": 1}), "bare pickle"),
        (b"PK\3\4", "zip archive cannot be read"),
        (b"PK\3\4" + b"x" * 1000, "zip archive cannot be read"),
        (b"\xff" * 8 + b"{", "header claims"),
        (b"\x02\0\0\0\0\0\0\0{}", "not those of an RWKV model"),
    ],
    ids=short,
)
def test_files_that_are_no_checkpoint_are_told_apart(content, match, tmp_path):
    refused(written(tmp_path / "model.pth", content), match)


def test_a_folder_a_pipe_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        refused(path, "not a regular file")
    refused(tmp_path / "none", "No such file")


def test_a_legacy_file_of_torch_is_refused_with_the_way_out(tmp_path):
    torch.save(random_official("4"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", r"legacy torch file.*torch\.save")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    refused(tmp_path / "x.pth", r"without the one data\.pkl")


@pytest.mark.parametrize("suffix", ["pth", "st", "plain"])
def test_a_file_cut_off_anywhere_is_refused(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    if suffix == "plain":
        safetensors.torch.save_file(random_official("4"), path)
    else:
        torch.save(random_official("4"), tmp_path / "1.pth")
        save(load(tmp_path / "1.pth")[0], path if suffix == "pth" else path.with_suffix(".safetensors"))
        path = path if suffix == "pth" else path.with_suffix(".safetensors")
    data = path.read_bytes()
    for length in [*range(200), *range(200, len(data), len(data) // 60), len(data) - 1]:
        refused(written(path, data[:length]))


# ---------------------------------------------------------------------------------------- pickles


class Code:
    """A pickle of this creates the file `ran`."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


def archive_with(path, pickled, blocks=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, block in enumerate(blocks):
            archive.writestr(f"archive/data/{key}", block)
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_wants_code_is_named_and_not_run(protocol, tmp_path):
    ran = tmp_path / "ran"
    evil = pickle.dumps({"emb.weight": Code(ran)}, protocol)
    message = refused(archive_with(tmp_path / "x.pth", evil))
    if protocol == 2:
        assert "'posix.mkdir', and nothing of it was run" in message
    refused(written(tmp_path / "y.pth", evil))
    torch.save(random_official("4") | {"emb.weight": Code(ran)}, tmp_path / "z.pth")
    refused(tmp_path / "z.pth", r"'posix\.mkdir', and nothing of it was run", UnsafeFileError)
    assert not ran.exists()
    pickle.loads(evil)
    assert ran.exists()  # the pickle does what it was made for


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.", "builtins.eval"),
        (b"(S'true'\nios\nsystem\n.", ""),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", ""),
        (b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.", "os.system"),
        (b"\x80\x02}q\0(ios\nsystem\n.", "os.system"),
        (b"\x80\x02ctorch.serialization\nload\n.", "torch.serialization.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", "torch._utils._rebuild_tensor"),
        (b"\x80\x02cargparse\nNamespace\n)\x81}b.", "argparse.Namespace"),
        (b"\x80\x02c\x1b[31m\nred\n.", "x1b[31m.red"),
    ],
    ids=short,
)
def test_whatever_a_pickle_asks_for_is_named(pickled, name, tmp_path):
    message = refused(archive_with(tmp_path / "x.pth", pickled))
    assert name in message
    with pytest.raises(UnsafeFileError if name else CheckpointError):
        read_state_dict(pickled)


PAIRS = b")" + b"q\0h\0\x86" * 60  # a pair of one pair of one pair ...: its hash and its text take 2^60 steps


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"}" + PAIRS + b"K\x01s.", "key of its dict is a tuple"),
        (b"}(" + PAIRS + b"K\x01u.", "key of its dict is a tuple"),
        (b"ccollections\nOrderedDict\n)R}" + PAIRS + b"K\x01sb.", "key of its dict is a tuple"),
        (b"}X\1\0\0\0x" + PAIRS + b"s.", "'x' is a tuple"),
        (PAIRS + b".", "it holds a tuple"),
        (PAIRS + b"h\0\x93.", "'a tuple.a tuple'"),
        (PAIRS + b"h\0R.", "torch.save does not write"),
        (PAIRS + b"Q.", "torch.save does not write"),
        (PAIRS + b"h\0a.", "an entry for a tuple"),
    ],
    ids=short,
)
def test_a_pickle_that_would_keep_python_busy_for_ever_is_refused_at_once(pickled, match, tmp_path):
    started = time.process_time()
    refused(archive_with(tmp_path / "x.pth", b"\x80\x02" + pickled), match)
    assert time.process_time() - started < 1


def test_a_file_that_torch_reads_differently_is_refused(tmp_path, monkeypatch):
    torch.save(random_official("4"), tmp_path / "x.pth")
    monkeypatch.setattr(torch, "load", lambda *_, **options: random_official("4", n_embd=64))
    refused(tmp_path / "x.pth", "other tensors than it announces", UnsafeFileError)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02", "cannot be read"),
        (b"\x80\x02}", "cannot be read"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02}(X\x01\0\0\0au.", "cannot be read"),
        (b"\x80\x02h\x07.", "cannot be read"),
        (b"\x80\x02t.", "cannot be read"),
        (b"\x80\x02)R.", "cannot be read"),
        (b"\x80\x02}Q.", "cannot be read"),
        (b"\x80\x02K\x01K\x02s.", "cannot be read"),
        (b"\x80\x02K\x01.", "it holds an int"),
        (b"\x80\x02].", "it holds a list"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "it holds a class"),
        (b"\x80\x02}K\x01K\x02s.", "key of its dict is an int"),
        (b"\x80\x02}X\x05\0\0\0epochK\x02s.", "'epoch' is an int"),
        (b"\x80\x02}X\x05\0\0\0model}s.", "'model' is a dict"),
        (b"\x80\x02}X\x09\0\0\0_strategyX\x01\0\0\0xs.", "converted for one strategy"),
        (b"\x80\x02}X\x01\0\0\0aK\x01sX\x01\0\0\0aK\x02s.", "stored twice"),
        (b"\x80\x05}.", "protocol 5"),
        (b"}.", "not those of an RWKV model"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "cannot be read"),
        (b"\x80\x02" + b")\x85" * 100_000 + b".", "holds a tuple"),
    ],
)
def test_pickles_that_hold_no_tensors_are_refused(pickled, match, tmp_path):
    refused(archive_with(tmp_path / "x.pth", pickled), match)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tensor_pickle(key, length, offset, shape, strides, storage="FloatStorage", hooks=b""):
    """What torch.save writes for a tensor."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + f"ctorch\n{storage}\n".encode()
        + text(key) + text("cpu") + number(length) + b"tQ" + number(offset)
        + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
        + b"\x89ccollections\nOrderedDict\n)R" + hooks + b"tR"
    )  # fmt: skip


def dict_pickle(**entries):
    return b"\x80\x02}(" + b"".join(text(name) + entry for name, entry in entries.items()) + b"u."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"x": ("0", 4, 0, [10**9], [0])}, r"'x' repeats few numbers .*strides \[0\]"),
        ({"x": ("0", 4, 0, [2, 2], [0, 1])}, "'x' repeats"),
        ({"x": ("0", 4, 0, [2, 2], [1, 2])}, "'x' is stored out of order"),
        ({"x": ("0", 4, 0, [2], [2])}, "'x' is stored out of order"),
        ({"x": ("0", 4, 0, [8], [1])}, "'x' claims 32 bytes where the file holds 16"),
        ({"x": ("0", 8, 0, [8], [1])}, "'x' claims 32 bytes where the file holds 16"),
        ({"x": ("0", 4, 1, [4], [1])}, "'x' claims 20 bytes"),
        ({"x": ("0", 4, 0, [2**31 - 1, 2**31 - 1], [2**31 - 1, 1])}, "'x' claims"),
        ({"x": ("0", 3, 0, [3], [1])}, "'x' claims"),
        ({"x": ("0", 4, -1, [2], [1])}, "'x' has a negative"),
        ({"x": ("0", 4, 0, [-4], [1])}, "'x' has a negative"),
        ({"x": ("7", 4, 0, [4], [1])}, "the file holds 0"),
        ({"x": ("0", 4, 0, [4], [1]), "y": ("0", 4, 0, [4], [1])}, "'x' and 'y' share numbers"),
        ({"x": ("0", 4, 0, [3], [1]), "y": ("0", 4, 2, [2], [1])}, "'x' and 'y' share numbers"),
        ({"x": ("0", 4, 0, [3], [1]), "y": ("0", 8, 7, [1], [1], "HalfStorage")}, "RWKV"),
        ({"x": ("0", 4, 0, [3], [1]), "y": ("0", 8, 5, [1], [1], "HalfStorage")}, "share numbers"),
        ({"x": ("0", 4, 0, [4], [1], "FloatStorage", b"}")}, "a call that torch.save does not write"),
        ({"x": ("0", 4, 0, [4], [1, 1])}, "a call that torch.save does not write"),
        ({"x": ("0", 4, 0, [1] * 9, [1] * 9)}, "a call that torch.save does not write"),
        ({"x": ("0", 4, 0, [4], [1], "ComplexFloatStorage")}, r"'torch\.ComplexFloatStorage'"),
    ],
)
def test_tensors_that_are_not_what_the_file_holds_are_refused_by_name(tensors, match, tmp_path):
    pickled = dict_pickle(**{name: tensor_pickle(*tensor) for name, tensor in tensors.items()})
    refused(archive_with(tmp_path / "x.pth", pickled, [FOUR]), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["head.weight"].expand(7, *t["head.weight"].shape), "'head.weight' repeats"),
        (lambda t: t["emb.weight"], "'emb.weight' and 'head.weight' share"),
        (lambda t: t["head.weight"].T.contiguous().T, "'head.weight' is stored out of order"),
        (lambda t: t["head.weight"].to_sparse(), "_rebuild_sparse_tensor"),
        (lambda t: t["head.weight"].to(torch.complex64), "ComplexFloatStorage"),
        (lambda t: t["head.weight"].to(torch.float8_e4m3fn), "_rebuild_tensor_v3"),
        (lambda t: torch.quantize_per_tensor(t["head.weight"], 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (lambda t: t["head.weight"].to("meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda t: t["head.weight"].numpy(), "numpy"),
        (lambda t: [t["head.weight"]], "'head.weight' is a list"),
        (lambda t: "text", "'head.weight' is a str"),
        (lambda t: None, "'head.weight' is a NoneType"),
        (lambda t: 3.5, "'head.weight' is a float"),
        (lambda t: {"weight": t["head.weight"]}, "'head.weight' is a dict"),
    ],
)
def test_what_torch_would_save_but_is_no_plain_tensor_is_refused_by_name(change, match, tmp_path):
    tensors = random_official("4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated, yet files hold them
        tensors["head.weight"] = change(tensors)
        torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", match)


def test_a_compressed_archive_is_refused(tmp_path):
    path = archive_with(tmp_path / "x.pth", b" " * 10**6, compression=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed", UnsafeFileError)


def test_a_record_of_many_megabytes_is_not_read(tmp_path):
    pickled = dict_pickle(x=tensor_pickle("0", 4, 0, [4], [1]))
    refused(archive_with(tmp_path / "x.pth", pickled + b"\0" * 5_000_000), "5,000,149 bytes", UnsafeFileError)


def test_a_directory_of_many_megabytes_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for i in range(80):
            archive.writestr(f"{i}" + "x" * 60_000, b"")
    refused(tmp_path / "x.pth", "directory of many megabytes", UnsafeFileError)


def test_the_same_record_twice_is_refused(tmp_path):
    pickled = dict_pickle(x=tensor_pickle("0", 4, 0, [4], [1]))
    archive_with(tmp_path / "x.pth", pickled, [FOUR])
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", FOUR)
    refused(tmp_path / "x.pth", "there twice", UnsafeFileError)


def test_records_that_overlap_are_refused(tmp_path):
    """Two names in the directory for the same bytes."""
    pickled = dict_pickle(x=tensor_pickle("0", 4, 0, [4], [1]), y=tensor_pickle("1", 4, 0, [4], [1]))
    archive_with(tmp_path / "x.pth", pickled, [FOUR, FOUR])
    data = (tmp_path / "x.pth").read_bytes()
    infos = {info.filename: info for info in zipfile.ZipFile(io.BytesIO(data)).infolist()}
    first, second = (struct.pack("<I", infos[f"archive/data/{key}"].header_offset) for key in "01")
    at = data.rindex(second + b"archive/data/1")
    refused(written(tmp_path / "x.pth", data[:at] + first + data[at + 4 :]), "overlap", UnsafeFileError)


# ---------------------------------------------------------------------------------------- safetensors


def safetensors_bytes(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


EIGHT = bytes(8)
NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"x": entry()}, EIGHT, "not those of an RWKV model"),  # nothing wrong with the format
        ({"x": entry()}, EIGHT + b"x", "'x' and 'the end of the file' leave a hole"),
        ({"x": entry()}, EIGHT[:-1], "'x' and 'the end of the file' overlap"),
        ({"x": entry(offsets=(1, 9))}, bytes(9), "'the start' and 'x' leave a hole"),
        ({"x": entry(offsets=(-8, 0))}, b"", "cannot be true"),
        ({"x": entry(offsets=(8, 0))}, EIGHT, "cannot be true"),
        ({"x": entry(), "y": entry()}, EIGHT, "'x' and 'y' overlap"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "'x' and 'y' overlap"),
        ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "'x' and 'y' leave a hole"),
        ({"x": entry(shape=(3,))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(2**40, 2**40))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(2**62, 4))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(-2, -1))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(True, 2))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(2.0,))}, EIGHT, "cannot be true"),
        ({"x": entry(shape=[1] * 9 + [2])}, EIGHT, "cannot be true"),
        ({"x": entry(shape=[[2]])}, EIGHT, "cannot be true"),
        ({"x": entry(shape=(0,), offsets=(0, 0))}, b"", "'x' is empty"),
        ({"x": entry(dtype="I64", shape=(1,))}, EIGHT, "'x' holds int64"),
        ({"x": entry(dtype="F8_E4M3", shape=(8,))}, EIGHT, "'x' has the dtype 'F8_E4M3'"),
        ({"x": entry(dtype="f32")}, EIGHT, "'x' has the dtype 'f32'"),
        ({"x": entry(dtype=3)}, EIGHT, "cannot be true"),
        ({"x": entry(offsets=(0, 8, 8))}, EIGHT, "cannot be true"),
        ({"x": entry(offsets=(False, 8))}, EIGHT, "cannot be true"),
        ({"x": entry(offsets=(0.0, 8.0))}, EIGHT, "cannot be true"),
        ({"x": entry(extra=1)}, EIGHT, "cannot be true"),
        ({"x": {"dtype": "F32"}}, EIGHT, "cannot be true"),
        ({"x": 3}, b"", "cannot be true"),
        ({"x" * 10**6: 3}, b"", r"'xxx[^']*\.\.\.' cannot be true"),
        ({"\x1b[31m\n\ud800": 3}, b"", r"x1b\[31m"),
        ({"__metadata__": {"a": 1}, "x": entry()}, EIGHT, "metadata"),
        ({"__metadata__": [], "x": entry()}, EIGHT, "metadata"),
        ([], b"", "unknown"),
        (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', EIGHT, "not JSON"),
        (b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT, "twice"),
        (b'{"x":1,"x":1}', b"", "twice"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "twice"),
        (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT, "not JSON"),
        (b'{"x":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', EIGHT, "cannot be true"),
        (b'{"x":' + b"9" * 100_000 + b"}", b"", "not JSON"),
        (b'{"x":' + NESTED + b"}", b"", "not JSON"),
        (b'{"x":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, b"", "not JSON"),
        (b'{"\xff":1}', b"", "not JSON"),
        (b"{" + b" " * 4_000_000 + b"}", b"", "4,000,002 bytes"),
    ],
    ids=short,
)
def test_headers_that_lie_are_refused(header, data, match, tmp_path):
    path = written(tmp_path / "x.safetensors", safetensors_bytes(header, data))
    started = time.process_time()
    refused(path, match)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("length", [0, 1, 9, 2**31, 2**32, 2**63, 2**64 - 1])
def test_header_lengths_that_lie_are_refused(length, tmp_path):
    data = safetensors_bytes({"x": entry()}, EIGHT)
    refused(written(tmp_path / "x.safetensors", length.to_bytes(8, "little") + data[8:]))


@pytest.mark.parametrize(
    "metadata",
    [
        {"sha256": "{}"},
        {"digest": "0" * 64},
        {"digest": ""},
        {"digest": "x", "sha256": "{}"},
        {"digest": "\ud800", "sha256": "{"},
        {"sha256": "[" * 100_000},
    ],
    ids=short,
)
def test_half_a_set_of_digests_is_refused(metadata, tmp_path):
    header = {"__metadata__": metadata, "x": entry()}
    refused(written(tmp_path / "x.safetensors", safetensors_bytes(header, EIGHT)), None, CorruptFileError)


# ---------------------------------------------------------------------------------------- flipped bits


def flips(data, step=1):
    """(bit, data with that bit flipped), for every bit or every step-th one."""
    for bit in range(0, len(data) * 8, step):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


def test_every_flipped_bit_in_a_state_file_is_noticed(tmp_path):
    path = tmp_path / "x.state"
    write_safetensors(path, {"a": torch.tensor([1.5, -2.0])}, {"format": "wkv-state"})
    for bit, data in flips(path.read_bytes()):
        with pytest.raises(Error):
            read_safetensors(written(path, data))
            pytest.fail(f"bit {bit} was not noticed")


@pytest.mark.parametrize("step", [101, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_every_flipped_bit_in_a_model_of_ours_is_noticed(tmp_path, step):
    path = tmp_path / "model.safetensors"
    torch.save(random_official("4", **TINY), tmp_path / "1.pth")
    save(load(tmp_path / "1.pth")[0], path)
    for bit, data in flips(path.read_bytes(), step):
        with pytest.raises(Error):
            open_and_read(written(path, data))
            pytest.fail(f"bit {bit} was not noticed")


@pytest.mark.parametrize("step", [211, pytest.param(13, marks=pytest.mark.slow)])
def test_every_flipped_bit_in_a_pth_of_ours_is_noticed_or_harmless(tmp_path, step):
    """The steps are odd, so that they meet every bit of a byte. Padding between records may change."""
    path, tensors = tmp_path / "model.pth", random_official("4", **TINY)
    write_pth(path, tensors)
    noticed = 0
    for bit, data in flips(path.read_bytes(), step):
        try:
            read = open_and_read(written(path, data))
        except Error:
            noticed += 1
        else:
            assert set(read) == set(tensors)
            assert all(torch.equal(read[name], tensors[name]) for name in tensors), f"bit {bit}"
    assert noticed > len(data) * 8 / step / 10


def test_every_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path, tensors = tmp_path / "model.pth", random_official("4", **TINY)
    write_pth(path, tensors)
    data = path.read_bytes()
    block = tensors["blocks.0.att.key.weight"].numpy().tobytes()
    start = data.index(block) * 8
    for bit in range(start, start + len(block) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptFileError, match=r"'blocks\.0\.att\.key\.weight' is damaged"):
            open_and_read(written(path, flipped))


# ---------------------------------------------------------------------------------------- fuzzing


def quick_and_slow(test):
    """Runs a few hundred examples always, and five thousand with `-m slow`."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    @pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.slow)])
    def parametrised(examples, tmp_path):
        settings(max_examples=examples, suppress_health_check=quiet, database=None)(test)(tmp_path=tmp_path)

    parametrised.__name__ = test.__name__
    return parametrised


def only_typed_errors(function, *arguments):
    started = time.process_time()
    try:
        function(*arguments)
    except Error as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    assert time.process_time() - started < 1


@functools.cache
def small_files():
    """Valid files of both formats, the seventh generation in as few bytes as possible."""
    tensors = random_official("7", n_layer=1, n_embd=8, dim_ffn=4, vocab_size=3)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue(), safetensors.torch.save(tensors, {"format": "pt"})


# A few bytes changed, cut out or inserted: (where, from the end if negative; how many; what instead).
edits = st.lists(
    st.tuples(st.integers(-2000, 4000), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=5
)


def damaged(data, edits):
    data = bytearray(data)
    for where, length, new in edits:
        where %= len(data) + 1
        data[where : where + length] = new
    return bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
        "more": json_values,
    },
)
headers = st.dictionaries(
    st.sampled_from(["emb.weight", "blocks.0.att.r_k", "x", "__metadata__"]) | st.text(max_size=5),
    entries | json_values,
    max_size=4,
)


@quick_and_slow
@given(st.binary(max_size=300))
def test_random_bytes_are_a_typed_error(tmp_path, data):
    only_typed_errors(open_and_read, written(tmp_path / "x", data))
    only_typed_errors(open_and_read, written(tmp_path / "x", b"PK\3\4" + data))
    only_typed_errors(read_safetensors, written(tmp_path / "x", len(data).to_bytes(8, "little") + data))
    only_typed_errors(read_state_dict, b"\x80\x02" + data)


@quick_and_slow
@given(edits)
def test_damaged_files_are_typed_errors(tmp_path, edits):
    for data in small_files():
        only_typed_errors(open_and_read, written(tmp_path / "x", damaged(data, edits)))


@quick_and_slow
@given(headers, st.integers(0, 64))
def test_random_headers_are_typed_errors(tmp_path, header, data_size):
    only_typed_errors(parse_header, json.dumps(header).encode(), data_size)
    path = written(tmp_path / "x", safetensors_bytes(header, bytes(data_size)))
    only_typed_errors(read_safetensors, path)
    only_typed_errors(open_and_read, path)


INSTRUCTIONS = [
    *(bytes([code]) for code in b"}()]ustRQbaeN.02\x85\x86\x87\x88"),
    b"q\0", b"q\1", b"h\0", b"h\1", b"K\1", text("a"), text("storage"), text("0"), text("cpu"),
    b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    tensor_pickle("0", 4, 0, [4], [1]),
]  # fmt: skip


@quick_and_slow
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))
def test_random_programs_are_typed_errors(tmp_path, program):
    pickled = b"\x80\x02" + b"".join(program) + b"."
    only_typed_errors(read_state_dict, pickled)
    only_typed_errors(open_and_read, archive_with(tmp_path / "x", pickled, [FOUR]))


def test_the_files_that_are_fuzzed_are_valid_before(tmp_path):
    for data in small_files():
        open_and_read(written(tmp_path / "x", data))


def test_an_official_config_survives_the_trip_through_metadata(tmp_path):
    model = build(RWKV4Config(vocab_size=3, n_layer=1, n_embd=2, dim_att=2, dim_ffn=3))
    save(model, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.config == model.config
