"""Model files: what names and shapes mean, what is written, and that writing never harms what was there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faulty_disk import FAULTS, SHORT, FaultyDisk
from official import GENERATIONS, random_official, reordered

from wkv.checkpoints import (
    infer_config,
    open_checkpoint,
    read_safetensors,
    write_pth,
    write_safetensors,
)
from wkv.checkpoints.atomic import atomic_write
from wkv.config import RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import CheckpointError, CorruptFileError, Error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same(left, right):
    return set(left) == set(right) and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


SIZES = {"n_layer": 3, "n_embd": 24, "dim_att": 40, "head_size": 8, "dim_ffn": 56, "vocab_size": 50}
EXPECTED = {
    "4": RWKV4Config(vocab_size=50, n_layer=3, n_embd=24, dim_att=40, dim_ffn=56),
    "6": RWKV6Config(
        vocab_size=50, n_layer=3, n_embd=24, dim_att=40, dim_ffn=56, head_size=8, mix_rank=5, decay_rank=6
    ),
    "7": RWKV7Config(
        vocab_size=50, n_layer=3, n_embd=24, dim_att=40, dim_ffn=56, head_size=8,
        decay_rank=6, rate_rank=7, value_rank=9, gate_rank=10,
    ),
} | {
    f"5.{minor}": RWKV5Config(
        vocab_size=50, n_layer=3, n_embd=24, dim_att=40, dim_ffn=56, head_size=8, minor=minor
    )
    for minor in (0, 1, 2)
}  # fmt: skip


class TestWhatNamesAndShapesTell:
    @pytest.mark.parametrize("generation", GENERATIONS)
    @pytest.mark.parametrize("seed", [None, 1, 2])
    def test_every_size_of_every_generation_in_any_order(self, generation, seed):
        tensors = random_official(generation, **SIZES)
        if seed is not None:
            tensors = reordered(tensors, seed)
        assert infer_config(shapes_of(tensors)) == EXPECTED[generation]

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_a_single_layer_is_enough(self, generation):
        tensors = reordered(random_official(generation, **{**SIZES, "n_layer": 1}))
        expected = EXPECTED[generation].replace(n_layer=1)
        if generation == "7":
            expected = expected.replace(value_rank=RWKV7Config.value_rank)  # no tensor has it
        assert infer_config(shapes_of(tensors)) == expected

    @pytest.mark.parametrize("generation", ["5.2", "6", "7"])
    def test_a_single_head_is_enough(self, generation):
        tensors = random_official(generation, **{**SIZES, "head_size": 40})
        assert infer_config(shapes_of(tensors)) == EXPECTED[generation].replace(head_size=40)

    @pytest.mark.parametrize("rank", [0, 4])
    def test_the_unused_values_of_layer_0_have_a_rank_of_their_own(self, rank):
        config = infer_config(shapes_of(random_official("7", first_value_rank=rank, value_rank=9)))
        assert (config.first_value_rank, config.value_rank) == (rank, 9)

    def test_in_a_single_layer_the_unused_values_say_nothing_of_other_layers(self):
        config = infer_config(shapes_of(random_official("7", n_layer=1, first_value_rank=4)))
        assert (config.first_value_rank, config.value_rank) == (4, RWKV7Config.value_rank)

    @pytest.mark.parametrize("generation", ["5.0", "5.1"])
    @pytest.mark.parametrize("bonus", ["time_first", "time_faaaa"])
    def test_the_name_of_the_bonus_is_kept(self, generation, bonus):
        assert infer_config(shapes_of(random_official(generation, bonus=bonus))).bonus == bonus

    @pytest.mark.parametrize("generation", GENERATIONS[1:])
    def test_a_tuned_initial_state_is_seen(self, generation):
        assert infer_config(shapes_of(random_official(generation, time_state=True))).time_state

    @pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "_forward_module.model."])
    @pytest.mark.parametrize("generation", ["4", "7"])
    def test_wrapper_prefixes_are_dropped(self, prefix, generation, tmp_path):
        tensors = random_official(generation, **SIZES)
        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        assert infer_config(shapes_of(wrapped)) == EXPECTED[generation]
        torch.save(wrapped, tmp_path / "wrapped.pth")
        with open_checkpoint(tmp_path / "wrapped.pth") as checkpoint:
            assert checkpoint.names == tuple(tensors)
            assert same({name: checkpoint.read(name) for name in checkpoint.names}, tensors)

    def test_padded_vocabularies_are_just_sizes(self):
        assert infer_config(shapes_of(random_official("4", vocab_size=50304))).vocab_size == 50304

    def test_published_shapes_give_the_published_config(self):
        config = RWKV7Config.named("0.1B", first_value_rank=32)
        shapes = {
            "emb.weight": (65536, 768),
            "blocks.0.att.r_k": (12, 64),
            "blocks.0.att.key.weight": (768, 768),
            "blocks.0.ffn.key.weight": (3072, 768),
            "blocks.0.att.w1": (768, 64),
            "blocks.0.att.a1": (768, 64),
            "blocks.0.att.g1": (768, 128),
            "blocks.0.att.v1": (768, 32),
            "blocks.1.att.v1": (768, 32),
            **{f"blocks.{i}.ln1.weight": (768,) for i in range(12)},
        }
        assert infer_config(shapes) == config

    @pytest.mark.parametrize(
        ("generation", "name", "says"),
        [
            ("4", "blocks.0.pos_emb_x", "position embedding"),
            ("4", "blocks.0.ffnPre.key.weight", "ffnPre"),
            ("4", "blocks.1.tiny_ln.weight", "tiny attention"),
            ("4", "head_q.weight", "head-QK"),
            ("4", "copy_mask", "head-QK"),
            ("4", "blocks.0.ffn.aa.weight", "MishGLU"),
            ("4", "blocks.0.att.qq.weight", "RWKV-4a"),
            ("6", "blocks.0.att.gate_w1", "x060a"),
            ("6", "blocks.0.att.time_maa_rkvw_w1", "x060b or x060c"),
            ("7", "blocks.0.ffn.s_emb.weight", "DeepEmbed"),
            ("7", "blocks.0.ffn.s0", "DeepEmbed"),
            ("7", "blocks.0.qkv.qq.weight", "RWKV-7b"),
            ("7", "blocks.0.ffn.enn.weight", "RWKV-8"),
            ("4", "_strategy", "`rwkv` package converted"),
            ("5.2", "blocks.0.att.key.weight_mx", "8-bit"),
            ("6", "blocks.0.att.key.lora_A", "adapter"),
            ("7", "blocks.0.att.key.bone", "adapter"),
            ("7", "base_model.model.model.layers.0.attn.r_proj.lora_A.weight", "adapter"),
            ("7", "model.layers.0.attn.r_proj.weight", "flash-linear-attention"),
            ("7", "model.embeddings.weight", "flash-linear-attention"),
            ("4", "rwkv.blocks.0.attention.key.weight", "Hugging Face"),
            ("6", "blocks.0.att.time_mix_x", "web-rwkv"),
        ],
    )
    def test_what_wkv_cannot_run_is_refused_by_name(self, generation, name, says):
        shapes = shapes_of(random_official(generation)) | {name: (32, 32)}
        with pytest.raises(CheckpointError) as caught:
            infer_config(reorder_last_first(shapes))
        assert says in str(caught.value)
        assert name.removeprefix("model.") in str(caught.value)

    def test_a_state_without_its_model_is_refused_as_such(self):
        with pytest.raises(CheckpointError, match="initial state without its model"):
            infer_config({f"blocks.{i}.att.time_state": (4, 8, 8) for i in range(3)})

    def test_5_2_with_a_bonus_of_unclear_meaning_is_refused(self):
        with pytest.raises(CheckpointError, match="time_first"):
            infer_config(shapes_of(random_official("5.2", bonus="time_first")))

    def test_both_bonuses_at_once_are_refused(self):
        shapes = shapes_of(random_official("5.1")) | {"blocks.0.att.time_first": (4,)}
        with pytest.raises(CheckpointError, match="both"):
            infer_config(shapes)

    def test_other_networks_are_refused(self):
        with pytest.raises(CheckpointError, match="not those of an RWKV model"):
            infer_config({"conv1.weight": (64, 3, 7, 7), "fc.bias": (10,)})
        with pytest.raises(CheckpointError, match="not those of an RWKV model"):
            infer_config({})

    @pytest.mark.parametrize("number", ["5", "99999999999999999999", "007", "-1"])
    def test_block_numbers_with_a_gap_are_refused(self, number):
        shapes = shapes_of(random_official("7", n_layer=2))
        shapes |= {name.replace("blocks.1.", f"blocks.{number}."): s for name, s in shapes.items()}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}
        if number == "5":
            with pytest.raises(CheckpointError, match="block 1 is missing, yet there is a block 5"):
                infer_config(shapes)
        else:
            assert infer_config(shapes).n_layer == 1  # then the loader names what is left over

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_one_tensor_less_is_never_another_generation(self, generation):
        shapes = shapes_of(random_official(generation))
        for name in shapes:
            fewer = {other: shape for other, shape in shapes.items() if other != name}
            try:
                config = infer_config(fewer)
            except CheckpointError as error:
                assert name in str(error)
            else:
                assert config == infer_config(shapes)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_absurd_shapes_give_typed_errors(self, generation):
        shapes = shapes_of(random_official(generation))
        for name in shapes:
            for wrong in [(), (1,), (0,), (3, 3, 3, 3), (7,), (2**40, 2**40), (1, 0)]:
                with contextlib.suppress(Error):
                    infer_config(shapes | {name: wrong})


def reorder_last_first(shapes):
    return dict(reversed(shapes.items()))


class TestFormats:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_a_pth_file_of_torch_is_read_bit_by_bit(self, generation, dtype, tmp_path):
        tensors = random_official(generation, dtype=dtype)
        torch.save(tensors, tmp_path / "model.pth")
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            assert checkpoint.format == "pth"
            assert checkpoint.names == tuple(tensors)
            assert checkpoint.shapes == shapes_of(tensors)
            assert set(checkpoint.dtypes.values()) == {dtype}
            assert checkpoint.config == infer_config(shapes_of(tensors))
            assert same({name: checkpoint.read(name) for name in checkpoint.names}, tensors)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_plain_safetensors_file_is_read_bit_by_bit(self, dtype, tmp_path):
        tensors = random_official("7", dtype=dtype)
        safetensors.torch.save_file(tensors, tmp_path / "model.st", {"format": "pt"})
        with open_checkpoint(tmp_path / "model.st") as checkpoint:
            assert checkpoint.format == "safetensors"
            assert checkpoint.metadata == {"format": "pt"}
            assert checkpoint.config == infer_config(shapes_of(tensors))
            assert same({name: checkpoint.read(name) for name in checkpoint.names}, tensors)

    def test_the_content_tells_the_format_not_the_suffix(self, tmp_path):
        tensors = random_official("6")
        torch.save(tensors, tmp_path / "a.safetensors")
        safetensors.torch.save_file(tensors, tmp_path / "b.pth")
        with open_checkpoint(tmp_path / "a.safetensors") as a, open_checkpoint(tmp_path / "b.pth") as b:
            assert (a.format, b.format) == ("pth", "safetensors")

    def test_a_state_dict_of_parameters_with_metadata_is_read(self, tmp_path):
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in random_official("7").items()}
        ordered = OrderedDict(tensors)
        ordered._metadata = OrderedDict({"": {"version": 1, "eps": 0.5, "odd": [None, True, (1, 2, 3, 4)]}})
        torch.save(ordered, tmp_path / "model.pth")
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            read = {name: checkpoint.read(name) for name in checkpoint.names}
        assert same(read, {name: tensor.detach() for name, tensor in tensors.items()})
        assert not any(tensor.requires_grad for tensor in read.values())

    def test_windows_of_one_flat_block_are_read(self, tmp_path):
        """DeepSpeed flattens parameters into one block, and torch.save keeps it."""
        tensors = random_official("7")
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        views = {n: part.view(t.shape) for (n, t), part in zip(tensors.items(), parts, strict=True)}
        torch.save(views, tmp_path / "flat.pth")
        assert len([n for n in zipfile.ZipFile(tmp_path / "flat.pth").namelist() if "/data/" in n]) == 1
        with open_checkpoint(tmp_path / "flat.pth") as checkpoint:
            assert same({name: checkpoint.read(name) for name in checkpoint.names}, tensors)

    def test_our_safetensors_keep_tensors_of_every_dtype_and_metadata(self, tmp_path):
        tensors = {
            "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
            **{
                str(dtype): torch.arange(5).to(dtype)
                for dtype in [*DTYPES, torch.int64, torch.uint8, torch.bool]
            },
            "a view": torch.arange(12.0).reshape(3, 4).T,
        }
        metadata = {"format": "anything", "text": 'quotes " and \\ and ü and \x1b'}
        write_safetensors(tmp_path / "all.st", tensors, metadata)
        read, found = read_safetensors(tmp_path / "all.st")
        assert same(read, tensors)
        assert metadata.items() <= found.items()
        assert same(safetensors.torch.load_file(tmp_path / "all.st"), tensors)

    def test_our_safetensors_begin_every_tensor_at_a_multiple_of_its_item_size(self, tmp_path):
        tensors = {
            "a": torch.ones(3, dtype=torch.uint8),
            "b": torch.ones(3).half(),
            "c": torch.ones(3).double(),
        }
        write_safetensors(tmp_path / "x.st", tensors, {})
        data = (tmp_path / "x.st").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert all((8 + length + header[n]["data_offsets"][0]) % t.itemsize == 0 for n, t in tensors.items())

    def test_our_safetensors_hold_the_digest_of_each_tensors_bytes(self, tmp_path):
        tensors = {"a": torch.arange(5.0), "b": torch.arange(7, dtype=torch.bfloat16)}
        write_safetensors(tmp_path / "x.st", tensors, {})
        digests = json.loads(read_safetensors(tmp_path / "x.st")[1]["sha256"])
        assert digests == {
            name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }

    def test_state_tensors_outlive_their_file(self, tmp_path):
        write_safetensors(tmp_path / "x.st", {"a": torch.arange(5.0)}, {})
        read, _ = read_safetensors(tmp_path / "x.st")
        with open(tmp_path / "x.st", "r+b") as file:
            file.write(b"\0" * (tmp_path / "x.st").stat().st_size)
        assert torch.equal(read["a"], torch.arange(5.0))

    def test_what_is_written_as_pth_is_an_official_file(self, tmp_path):
        tensors = random_official("7", dtype=torch.bfloat16)
        write_pth(tmp_path / "model.pth", tensors)
        assert same(torch.load(tmp_path / "model.pth", weights_only=True), tensors)
        assert same(torch.load(tmp_path / "model.pth", weights_only=True, mmap=True), tensors)
        assert list(torch.load(tmp_path / "model.pth", weights_only=True)) == list(tensors)
        with zipfile.ZipFile(tmp_path / "model.pth") as archive:
            assert archive.testzip() is None
            digests = json.loads(archive.read("archive/wkv_sha256.json"))
            pickled = archive.read("archive/data.pkl")
        assert set(digests) == set(tensors)
        torch.save(tensors, tmp_path / "theirs.pth")
        with zipfile.ZipFile(tmp_path / "theirs.pth") as archive:
            assert pickled == archive.read("theirs/data.pkl")
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            assert same({name: checkpoint.read(name) for name in checkpoint.names}, tensors)

    def test_a_view_of_a_large_tensor_is_written_as_what_it_shows(self, tmp_path):
        tensors = random_official("4")
        large = torch.randn(100_000)
        tensors["emb.weight"] = large[: tensors["emb.weight"].numel()].view(tensors["emb.weight"].shape)
        tensors["ln_out.bias"] = large[:64:2]
        tensors["head.weight"] = torch.randn(32, 41).T
        write_pth(tmp_path / "model.pth", tensors)
        assert (tmp_path / "model.pth").stat().st_size < 300_000
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            read = {name: checkpoint.read(name) for name in checkpoint.names}
        assert same(read, tensors) and all(tensor.is_contiguous() for tensor in read.values())

    @pytest.mark.parametrize("shape", [(1700, 3001), (3, 1_700_001), (5_000_001,), (2, 1500, 1700)], ids=str)
    def test_large_tensors_in_any_memory_layout_are_written_row_by_row(self, tmp_path, shape):
        """Larger than the pieces of 4 MB in which such tensors are copied."""
        tensor = torch.arange(math.prod(shape) * 2, dtype=torch.int16)[::2].view(torch.bfloat16)
        tensors = {"x": tensor.reshape(shape[::-1]).permute(*reversed(range(len(shape))))}
        write_safetensors(tmp_path / "x.st", tensors, {})
        assert torch.equal(
            read_safetensors(tmp_path / "x.st")[0]["x"].view(torch.int16), tensors["x"].view(torch.int16)
        )
        write_pth(tmp_path / "x.pth", tensors)
        read = torch.load(tmp_path / "x.pth", weights_only=True)["x"]
        assert read.is_contiguous() and torch.equal(read.view(torch.int16), tensors["x"].view(torch.int16))

    def test_blocks_of_a_pth_begin_where_they_can_be_mapped(self, tmp_path):
        tensors = random_official("7", dtype=torch.bfloat16)
        write_pth(tmp_path / "model.pth", tensors)
        data = (tmp_path / "model.pth").read_bytes()
        for tensor in tensors.values():
            assert data.index(tensor.view(torch.uint8).numpy().tobytes()) % 64 == 0

    def test_the_same_tensors_make_the_same_file(self, tmp_path):
        for name in ("a", "b"):
            write_pth(tmp_path / f"{name}.pth", random_official("7"))
            write_safetensors(tmp_path / f"{name}.st", random_official("7"), {"x": "y"})
        for suffix in ("pth", "st"):
            assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()

    def test_changing_a_tensor_that_was_read_does_not_change_the_file(self, tmp_path):
        tensors = random_official("4")
        write_pth(tmp_path / "m.pth", tensors)
        safetensors.torch.save_file(tensors, tmp_path / "m.st")
        for name in ("m.pth", "m.st"):
            before = (tmp_path / name).read_bytes()
            with open_checkpoint(tmp_path / name) as checkpoint:
                checkpoint.read("emb.weight").zero_()
            assert (tmp_path / name).read_bytes() == before

    def test_an_unknown_name_is_an_error_that_names_file_and_tensor(self, tmp_path):
        write_pth(tmp_path / "m.pth", random_official("4"))
        with (
            open_checkpoint(tmp_path / "m.pth") as checkpoint,
            pytest.raises(CheckpointError, match=r"m\.pth: there is no tensor 'nose'"),
        ):
            checkpoint.read("nose")


def write_st(path, tensors):
    write_safetensors(path, tensors, {"note": "new"})


@pytest.mark.parametrize("write", [write_st, write_pth], ids=["safetensors", "pth"])
class TestWritingNeverHarms:
    def until_it_works(self, tmp_path, write, fault):
        """Saves over an old file with the first call failing, then the second, ... until none fails."""
        path, tensors = tmp_path / "model", random_official("4", n_layer=1, n_embd=64, vocab_size=400)
        for fail_at in range(1, 1000):
            path.write_bytes(b"old")
            with pytest.MonkeyPatch.context() as patch:
                disk = FaultyDisk(patch, fail_at, fault)
                error = None
                try:
                    write(path, tensors)
                except BaseException as raised:
                    error = raised
            assert os.listdir(tmp_path) == ["model"], f"left behind after call {fail_at}"
            yield error, path.read_bytes(), path
            if disk.calls < fail_at:
                return
        raise AssertionError("saving makes no end of calls")

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: errno.errorcode[fault.errno])
    def test_whichever_call_fails_the_old_file_stays(self, tmp_path, write, fault):
        outcomes = list(self.until_it_works(tmp_path, write, fault))
        *failures, (error, last, _) = outcomes
        assert error is None and last != b"old"
        assert len(failures) >= 6
        for error, content, path in failures[:-2]:
            assert isinstance(error, CheckpointError) and content == b"old"
            assert str(path) in str(error) and fault.strerror in str(error) and "free" in str(error)
        for error, content, _ in failures[-2:]:  # the folder's fsync: the new file is whole, and in place
            assert isinstance(error, CheckpointError) and len(content) == len(last)
            assert "did not confirm" in str(error)

    def test_a_short_write_is_continued(self, tmp_path, write):
        for error, _, path in self.until_it_works(tmp_path, write, SHORT):
            assert error is None
            read = torch.load(path, weights_only=True) if write is write_pth else read_safetensors(path)[0]
            assert same(read, random_official("4", n_layer=1, n_embd=64, vocab_size=400))

    def test_ctrl_c_at_any_call_leaves_the_old_file(self, tmp_path, write):
        *failures, _ = self.until_it_works(tmp_path, write, KeyboardInterrupt())
        for error, content, _ in failures[:-2]:
            assert type(error) is KeyboardInterrupt and content == b"old"
        assert all(type(error) is KeyboardInterrupt for error, *_ in failures)

    def test_the_file_reaches_the_disk_before_its_name_does(self, tmp_path, write, monkeypatch):
        order = []
        for name in ("fsync", "replace"):
            call = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, _n=name, _c=call: (order.append(_n), _c(*a))[1])
        write(tmp_path / "model", random_official("4"))
        assert order == ["fsync", "replace", "fsync"]

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_permissions_are_the_usual_ones(self, tmp_path, write, mask):
        before = os.umask(mask)
        try:
            write(tmp_path / "model", random_official("4"))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o666 & ~mask

    def test_a_link_keeps_pointing_at_the_file_that_is_replaced(self, tmp_path, write):
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "link").symlink_to("real")
        write(tmp_path / "link", random_official("4"))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").stat().st_size > 1000

    def test_a_missing_folder_a_folder_and_a_device_are_errors(self, tmp_path, write):
        for path in (tmp_path / "none" / "model", tmp_path, Path("/dev/null")):
            with pytest.raises(CheckpointError, match=str(path)):
                write(path, random_official("4"))
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
        assert os.listdir(tmp_path) == []


def test_an_error_of_the_caller_passes_through_unchanged(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from official import random_official
from wkv.checkpoints import write_pth, write_safetensors
from wkv.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = random_official("4", n_embd=64, vocab_size=1000)
for write in (write_pth, lambda path, tensors: write_safetensors(path, tensors, {})):
    try:
        write(sys.argv[1], tensors)
    except CheckpointError as error:
        print(error)
"""


def test_a_size_limit_of_the_system_is_one_clear_error(tmp_path):
    (tmp_path / "model").write_bytes(b"old")
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert result.stdout.count("File too large") == 2 and result.stdout.count("ulimit") == 2
    assert (tmp_path / "model").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]


def test_one_flipped_bit_in_an_official_file_of_others_is_noticed(tmp_path):
    """torch.save stores a CRC-32 per block, which torch itself never compares."""
    tensors = random_official("6")
    torch.save(tensors, tmp_path / "model.pth")
    data = bytearray((tmp_path / "model.pth").read_bytes())
    at = data.index(tensors["head.weight"].numpy().tobytes())
    data[at + 77] ^= 4
    (tmp_path / "model.pth").write_bytes(data)
    with open_checkpoint(tmp_path / "model.pth") as checkpoint:
        checkpoint.read("emb.weight")
        with pytest.raises(CorruptFileError, match=r"head\.weight"):
            checkpoint.read("head.weight")
        checkpoint.read("head.weight", verify=False)
