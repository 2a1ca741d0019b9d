"""From files to models and back: bit by bit, in little memory, and never a wrong model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from official import GENERATIONS, random_official, reordered

import wkv
from wkv import tokenizers
from wkv.checkpoints import model_metadata, open_checkpoint, write_safetensors
from wkv.config import RWKV4Config, RWKV7Config
from wkv.errors import CheckpointError, ConfigError, CorruptFileError, Error, TokenizerError
from wkv.loading import load, save

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def same(left, right):
    return set(left) == set(right) and all(
        left[n].dtype == right[n].dtype and left[n].shape == right[n].shape and torch.equal(left[n], right[n])
        for n in left
    )


def saved(path, tensors):
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_pth_to_safetensors_to_pth_keeps_every_bit(generation, dtype, tmp_path):
    tensors = random_official(generation, dtype=dtype, first_value_rank=3 if generation == "7" else 0)
    model, _ = load(saved(tmp_path / "1.pth", reordered(tensors)))
    save(model, tmp_path / "2.safetensors")
    again, _ = load(tmp_path / "2.safetensors")
    save(again, tmp_path / "3.pth")
    assert same(torch.load(tmp_path / "3.pth", weights_only=True), tensors)
    assert load(tmp_path / "3.pth")[0].config == again.config == model.config
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    "options", [{"n_layer": 1}, {"dim_att": 48}, {"dim_ffn": 44}, {"head_size": 32}], ids=str
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_unusual_sizes_load_and_come_back(generation, options, tmp_path):
    tensors = random_official(generation, **options)
    model, _ = load(saved(tmp_path / "1.pth", tensors))
    save(model, tmp_path / "2.pth")
    assert same(torch.load(tmp_path / "2.pth", weights_only=True), tensors)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_was_built_and_saved_is_what_is_loaded(generation, tmp_path, device):
    config = load(saved(tmp_path / "1.pth", random_official(generation)))[0].config
    config = config.replace(norm="rmsnorm", ffn_activation="relu")
    if generation != "4":
        config = config.replace(group_norm_eps=1e-5, time_state=True)
    model = wkv.build(config, seed=3, device=device).eval()
    save(model, tmp_path / "2.safetensors")
    again, _ = load(tmp_path / "2.safetensors", device=device)
    tokens = torch.randint(config.vocab_size, (2, 9), device=device)
    assert again.config == config and again.device == model.device
    assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_loaded_model_is_ready_to_run_and_to_train(suffix, tmp_path, device):
    save(
        load(saved(tmp_path / "1.pth", random_official("7", first_value_rank=3)))[0], tmp_path / f"2.{suffix}"
    )
    model, _ = load(tmp_path / f"2.{suffix}", device=device)
    assert not model.training
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())
    logits, _ = model(torch.arange(10, device=device)[None])
    logits.square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_weights_are_in_memory_of_their_own(tmp_path):
    path = saved(tmp_path / "1.pth", random_official("4"))
    model, _ = load(path)
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert same(dict(model.state_dict()), random_official("4"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_converts_as_torch_does(dtype, tmp_path):
    tensors = random_official("6", dtype=torch.bfloat16)
    model, _ = load(saved(tmp_path / "1.pth", tensors), dtype=dtype)
    assert same(dict(model.state_dict()), {name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_a_mixed_file_takes_the_dtype_of_most_of_its_numbers(tmp_path):
    tensors = random_official("4", dtype=torch.bfloat16)
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if tensor.ndim == 1}
    model, _ = load(saved(tmp_path / "1.pth", tensors))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_axes_of_length_one_do_not_matter(generation, tmp_path):
    tensors = random_official(generation)
    squeezed = {name: tensor.squeeze() for name, tensor in tensors.items()}
    widened = {n: t[None, None] if t.ndim == 1 and "ln" in n else t for n, t in tensors.items()}
    columns = {n: t[..., None] if t.ndim == 1 and "time_" in n else t for n, t in tensors.items()}
    for other in (squeezed, widened, columns):
        model, _ = load(saved(tmp_path / "1.pth", other))
        assert same(dict(model.state_dict()), tensors)


class TestTensorsThatDoNotFit:
    def refused(self, tmp_path, tensors, match):
        for path in (tmp_path / "bad.pth", tmp_path / "bad.safetensors"):
            if path.suffix == ".pth":
                torch.save(tensors, path)
            else:
                safetensors.torch.save_file(tensors, path)
            with pytest.raises(CheckpointError, match=match) as caught:
                load(path)
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_every_single_missing_tensor_is_named(self, generation, tmp_path):
        tensors = random_official(generation, n_layer=1)
        for name in tensors:
            fewer = {other: tensor for other, tensor in tensors.items() if other != name}
            with pytest.raises(CheckpointError, match=f"'{name}'") as caught:
                load(saved(tmp_path / "bad.pth", fewer))
            assert "missing" in str(caught.value)

    def test_an_extra_tensor_is_named(self, tmp_path):
        tensors = random_official("7") | {"blocks.1.att.nose": torch.ones(3)}
        self.refused(tmp_path, tensors, r"1 unknown \('blocks\.1\.att\.nose'\)")

    def test_half_of_the_unused_values_of_layer_0_is_named(self, tmp_path):
        tensors = random_official("7", first_value_rank=4)
        del tensors["blocks.0.att.v1"]
        self.refused(tmp_path, tensors, r"2 unknown \('blocks\.0\.att\.v0', 'blocks\.0\.att\.v2'\)")

    def test_a_misshapen_tensor_is_named_with_both_shapes(self, tmp_path):
        tensors = random_official("6")
        tensors["blocks.1.ffn.value.weight"] = torch.ones(32, 5)
        self.refused(tmp_path, tensors, r"blocks\.1\.ffn\.value\.weight' \[32, 5\] instead of \[32, 96\]")

    def test_a_transposed_tensor_is_named(self, tmp_path):
        tensors = random_official("7")
        tensors["blocks.0.att.w1"] = tensors["blocks.0.att.w1"].T.contiguous()
        self.refused(tmp_path, tensors, r"misshapen.*'blocks\.0\.att\.w1'")

    def test_all_problems_are_counted_and_the_first_few_named(self, tmp_path):
        tensors = random_official("7", n_layer=3)
        wrong = {name: tensor for name, tensor in tensors.items() if ".ln2." not in name}
        wrong |= {f"extra.{i}": torch.ones(1) for i in range(9)}
        self.refused(
            tmp_path, wrong,
            r"6 missing \('blocks\.0\.ln2\.weight', .* and 3 more\); 9 unknown \('extra\.0', .* and 6 more\)",
        )  # fmt: skip

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite_are_named(self, tmp_path, value):
        for dtype in DTYPES:
            tensors = random_official("5.2", dtype=dtype)
            tensors["blocks.1.att.gate.weight"][3, 4] = value
            self.refused(tmp_path, tensors, r"'blocks\.1\.att\.gate\.weight' has values that are not finite")
        model, _ = load(tmp_path / "bad.pth", verify=False)
        assert not model.blocks[1].att.gate.weight.isfinite().all()

    def test_values_too_large_for_the_dtype_are_named(self, tmp_path):
        tensors = random_official("4")
        tensors["head.weight"][0, 0] = 1e5
        path = saved(tmp_path / "1.pth", tensors)
        with pytest.raises(
            CheckpointError, match=r"'head\.weight' reaches 1e\+05, which float16 cannot hold"
        ):
            load(path, dtype=torch.float16)
        load(path, dtype=torch.bfloat16)

    def test_integer_weights_are_named(self, tmp_path):
        tensors = random_official("4") | {"blocks.0.att.key.weight": torch.ones(32, 32, dtype=torch.uint8)}
        self.refused(tmp_path, tensors, r"'blocks\.0\.att\.key\.weight' holds uint8")

    def test_an_empty_tensor_is_named(self, tmp_path):
        self.refused(
            tmp_path, random_official("4") | {"ln_out.bias": torch.ones(0)}, r"'ln_out\.bias' is empty"
        )


class TestAConfigThatDisagreesWithItsTensors:
    def stored(self, tmp_path, config, tensors=None):
        path = tmp_path / "model.safetensors"
        write_safetensors(path, tensors or random_official("7"), model_metadata(config))
        return path

    def test_rwkv_7_tensors_under_an_rwkv_4_config_name_both(self, tmp_path):
        config = RWKV4Config(vocab_size=41, n_layer=2, n_embd=32, dim_att=32, dim_ffn=128)
        with pytest.raises(CheckpointError, match=r"RWKV-4.*RWKV-7"):
            load(self.stored(tmp_path, config))

    @pytest.mark.parametrize(
        "field", ["n_layer", "vocab_size", "n_embd", "dim_att", "head_size", "gate_rank"]
    )
    def test_a_wrong_size_is_named_before_any_memory_is_taken(self, tmp_path, field):
        with open_checkpoint(saved(tmp_path / "1.pth", random_official("7"))) as checkpoint:
            config = checkpoint.config
        right = getattr(config, field)
        wrong = 2**30 if field in ("n_layer", "vocab_size", "gate_rank") else right * 2
        with pytest.raises(CheckpointError, match=f"{field}={wrong}, the tensors make it {right}"):
            load(self.stored(tmp_path, config.replace(**{field: wrong})))

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "1", '{"generation": 9}', '{"generation": 7, "nose": 1}', '{"generation": [[]]}'],
    )
    def test_a_config_that_is_none_is_a_typed_error(self, tmp_path, text):
        metadata = {"format": "wkv-model", "version": "1", "config": text}
        write_safetensors(tmp_path / "x.safetensors", random_official("7"), metadata)
        with pytest.raises((CheckpointError, ConfigError), match=r"x\.safetensors: "):
            load(tmp_path / "x.safetensors")

    def test_a_later_version_of_the_format_asks_for_a_newer_wkv(self, tmp_path):
        metadata = model_metadata(RWKV7Config.named("0.1B")) | {"version": "2"}
        write_safetensors(tmp_path / "x.safetensors", random_official("7"), metadata)
        with pytest.raises(CheckpointError, match="newer wkv"):
            load(tmp_path / "x.safetensors")

    def test_a_saved_session_is_no_model(self, tmp_path):
        write_safetensors(tmp_path / "x.state", {"blocks.0.memory": torch.ones(3)}, {"format": "wkv-state"})
        with pytest.raises(CheckpointError, match="'wkv-state', not a model"):
            load(tmp_path / "x.state")


class TestWhatAnOfficialFileCannotSay:
    @pytest.mark.parametrize(
        ("field", "value"), [("norm", "rmsnorm"), ("ffn_activation", "relu"), ("group_norm_eps", 1e-5)]
    )
    def test_is_refused_with_the_way_out(self, tmp_path, field, value):
        config = load(saved(tmp_path / "1.pth", random_official("6")))[0].config
        model = wkv.build(config.replace(**{field: value}))
        with pytest.raises(CheckpointError, match=rf"{field} is {value!r}.*\.safetensors"):
            save(model, tmp_path / "2.pth")
        assert not (tmp_path / "2.pth").exists()
        save(model, tmp_path / "2.safetensors")

    def test_a_value_rank_that_no_tensor_has_does_not_matter(self, tmp_path):
        config = load(saved(tmp_path / "1.pth", random_official("7", n_layer=1)))[0].config
        save(wkv.build(config.replace(value_rank=64)), tmp_path / "2.pth")
        save(wkv.build(config.replace(value_rank=64)), tmp_path / "2.safetensors")
        load(tmp_path / "2.pth")
        assert load(tmp_path / "2.safetensors")[0].config.value_rank == 64


class TestTokenizers:
    def test_none_is_fine(self, tmp_path):
        assert load(saved(tmp_path / "1.pth", random_official("4")))[1] is None

    def test_the_vocabulary_size_tells(self, tmp_path):
        assert load(saved(tmp_path / "1.pth", random_official("4", vocab_size=256)))[1].name == "bytes"

    def test_by_name_or_as_an_object(self, tmp_path):
        path = saved(tmp_path / "1.pth", random_official("4", vocab_size=300))
        assert load(path, tokenizer="bytes")[1].name == "bytes"
        tokenizer = tokenizers.named("bytes")
        assert load(path, tokenizer=tokenizer)[1] is tokenizer

    def test_one_that_does_not_fit_is_refused(self, tmp_path):
        path = saved(tmp_path / "1.pth", random_official("4", vocab_size=41))
        for tokenizer in ("bytes", tokenizers.named("bytes")):
            with pytest.raises(TokenizerError, match="vocabulary of 41"):
                load(path, tokenizer=tokenizer)

    def test_an_unknown_name_is_refused(self, tmp_path):
        with pytest.raises(TokenizerError, match="'byts'"):
            load(saved(tmp_path / "1.pth", random_official("4")), tokenizer="byts")


def test_verify_false_skips_the_digests_and_only_them(tmp_path):
    model, _ = load(saved(tmp_path / "1.pth", random_official("4")))
    for path in (tmp_path / "2.safetensors", tmp_path / "2.pth"):
        save(model, path)
        data = bytearray(path.read_bytes())
        at = data.index(model.state_dict()["head.weight"].numpy().tobytes())
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=r"'head\.weight' is damaged"):
            load(path)
        other, _ = load(path, verify=False)
        assert other.fingerprint() != model.fingerprint()


MEASURE = """
import json, sys, threading
import torch
import wkv

def rss_anon():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def growth(function, *arguments, **options):
    before, samples, done = rss_anon(), [0], threading.Event()

    def sample():
        while not done.wait(0.001):
            samples.append(rss_anon())

    thread = threading.Thread(target=sample)
    thread.start()
    result = function(*arguments, **options)
    done.set()
    thread.join()
    return result, max(samples) - before

dtype, small, *paths = sys.argv[1:]
wkv.save(wkv.load(small)[0], small)  # everything is imported, the allocator warm
for path in paths:
    (model, _), loading = growth(wkv.load, path, dtype=getattr(torch, dtype))
    _, saving = growth(wkv.save, model, path)
    size = sum(weight.nbytes for weight in model.parameters())
    del model
    print(json.dumps({"size": size, "loading": loading, "saving": saving}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is in /proc")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_loading_takes_the_memory_of_the_weights_and_saving_next_to_none(dtype, tmp_path):
    """51 million weights, half of them in one tensor, stored as bfloat16: 204 MB in float32."""
    small = saved(tmp_path / "small.pth", random_official("4"))
    config = RWKV4Config(vocab_size=24_000, n_layer=1, n_embd=1024, dim_att=1024, dim_ffn=128)
    model = wkv.build(config, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(0.5)
    paths = [tmp_path / "large.pth", tmp_path / "large.safetensors"]
    for path in paths:
        save(model, path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype, small, *paths], capture_output=True, text=True
    )
    assert result.stderr == ""
    for path, line in zip(paths, result.stdout.splitlines(), strict=True):
        measured = json.loads(line)
        stays = (
            dtype == "bfloat16" and path.suffix == ".safetensors"
        )  # the embedding, half of it, in the file
        assert measured["size"] > (200e6 if dtype == "float32" else 100e6)
        assert measured["loading"] <= 1.25 * measured["size"] + 100e6
        assert measured["loading"] > (0.4 if stays else 0.9) * measured["size"]  # the sampler sees it
        assert not stays or measured["loading"] < 0.7 * measured["size"]
        assert measured["saving"] < 40e6


def files_at(address: int) -> list[str]:
    """What the memory at that address is a map of."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            found += path
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_only_the_embedding_of_a_safetensors_stays_in_its_file_and_every_storage_ends_with_its_weight(
    quantize, tmp_path
):
    model = wkv.build(RWKV4Config(vocab_size=70, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64))
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"model.{suffix}"
        save(model, path)
        for dtype in (torch.float32, torch.bfloat16):
            before = path.read_bytes()
            loaded, _ = load(path, dtype=dtype, quantize=quantize)
            stays = suffix == "safetensors" and dtype == torch.float32
            for name, weight in loaded.state_dict().items():
                assert weight.untyped_storage().nbytes() == weight.nbytes
                is_there = str(path) in files_at(weight.data_ptr())
                assert is_there == (stays and name == "emb.weight"), name
            loaded.emb.weight.data.fill_(0)
            assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["none.pth", "."])
def test_a_file_that_is_not_there_is_a_typed_error(tmp_path, name):
    with pytest.raises(Error, match=str(tmp_path)):
        load(tmp_path / name)
