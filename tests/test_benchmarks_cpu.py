"""The pure parts of `benchmarks/cpu.py`: noise, medians, ratios, and the GGUF that llama.cpp is given."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from official import random_official

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cpu")


@pytest.fixture
def rwkv7_gguf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("rwkv7_gguf")


# noise


def process(user: int, system: int) -> str:
    return f"42 (a (program) b) S 1 42 42 0 -1 4194304 100 0 0 0 {user} {system} 7 7 20 0 3 0 12345"


def test_noise_is_what_neither_idled_nor_was_spent_by_the_own_processes(cpu: ModuleType) -> None:
    #            user nice system idle iowait irq softirq steal guest
    before = cpu.read_clock("cpu  100 10 50 1000 40 1 2 3 9 9\ncpu0 1 1", [process(20, 5), process(0, 0)])
    after = cpu.read_clock("cpu  170 10 60 1095 50 1 2 8 9 9\ncpu0 1 1", [process(60, 10), process(20, 0)])
    # Of 190 ticks 105 idled or waited; of the other 85, 5 of them stolen, 65 were the own processes'.
    assert cpu.others(before, after) == pytest.approx((85 - 65) / 190)


def test_noise_is_never_negative_and_unknown_without_a_clock(cpu: ModuleType) -> None:
    assert cpu.others(cpu.Clock(100, 10, 0), cpu.Clock(200, 60, 51)) == 0
    assert cpu.others(None, cpu.Clock(1, 1, 1)) is None


# tables


def records(cpu: ModuleType, engine: tuple[str, str], decode: list[float], **more: object) -> list[object]:
    usual: dict[str, object] = dict(prefill=200.0, bytes=10**8, bandwidth=1e10, noise=0.01)
    return [
        cpu.Record("v7-191M", cpu.Engine(*engine), 2, round=i, decode=speed, **usual | more)
        for i, speed in enumerate(decode)
    ]


def cells(table: str) -> list[list[str]]:
    """The rows below the heads."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_the_table_has_medians_and_the_largest_noise(cpu: ModuleType) -> None:
    found = [
        *records(cpu, ("wkv", "int8"), [30.0, 90.0]),
        *records(cpu, ("wkv", "int8"), [50.0], noise=0.03),
        *records(cpu, ("wkv", "int8"), [900.0], wanted_zeros=0.87, zeros=0.86),
        *records(cpu, ("llama.cpp", "Q8_0"), [40.0], noise=0.07, prefill=None),
    ]
    assert cells(cpu.speeds(found)) == [
        ["v7-191M", "wkv", "int8", "2", "50.0", "200.0", "100", "0.50", "3%"],  # 1e8 / 1e10 x 50
        ["v7-191M", "llama.cpp", "Q8_0", "2", "40.0", "-", "100", "0.40", "7%"],
    ]
    assert "1 of 5" in cpu.warning(found) and "7%" in cpu.warning(found)
    assert cpu.warning(found[:4]) == ""


def test_a_ratio_is_the_median_of_the_rounds_ratios_at_the_same_bits(cpu: ModuleType) -> None:
    ours = records(cpu, ("wkv", "int4"), [30.0, 90.0, 50.0])
    theirs = records(cpu, ("llama.cpp", "Q4_0"), [10.0, 20.0, 50.0], prefill=100.0)  # ratios 3, 4.5, 1
    others = records(cpu, ("llama.cpp", "Q8_0"), [1.0, 1.0, 1.0])
    engines = ("wkv", "int4"), ("llama.cpp", "Q4_0"), ("llama.cpp", "f16")
    agree = {("v7-191M", cpu.Engine(*engine)): 0.99999 for engine in engines}
    assert cells(cpu.ratios([*ours, *theirs, *others], agree)) == [
        ["v7-191M", "wkv int4", "llama.cpp Q4_0", "2", "3.00", "2.00", "0.99999 / 0.99999"]
    ]


@pytest.mark.parametrize("wrong", [("wkv", "int8"), ("llama.cpp", "Q8_0"), ("llama.cpp", "f16")])
def test_no_ratio_where_the_logits_disagree(cpu: ModuleType, wrong: tuple[str, str]) -> None:
    found = records(cpu, ("wkv", "int8"), [30.0]) + records(cpu, ("llama.cpp", "Q8_0"), [10.0])
    engines = ("wkv", "int8"), ("llama.cpp", "Q8_0"), ("llama.cpp", "f16")
    cosines = {("v7-191M", cpu.Engine(*e)): 0.9 if e == wrong else 1.0 for e in engines}
    (row,) = cells(cpu.ratios(found, cosines))
    assert row[4] == row[5] == "not the same function"


def test_zeros_are_compared_with_none(cpu: ModuleType) -> None:
    many = records(cpu, ("wkv", "bf16"), [30.0, 60.0], wanted_zeros=0.87, zeros=0.865, prefill=None)
    none = records(cpu, ("wkv", "bf16"), [20.0, 30.0], wanted_zeros=0.0, zeros=0.0, prefill=None)
    (row,) = cells(cpu.zeros_table([*many, *none]))
    assert row == ["v7-191M", "bf16", "2", "45.0", "25.0", "1.75", "100", "100", "86% / 0%"]


def test_the_least_cosine_is_that_of_the_worst_row(cpu: ModuleType) -> None:
    expected = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert cpu.least_cosine(3 * expected, expected) == pytest.approx(1)
    assert cpu.least_cosine(np.array([[2.0, 0.0], [3.0, 4.0]]), expected) == pytest.approx(0.8)


def test_engines_that_are_compared_are_kept_together_within_the_memory(cpu: ModuleType) -> None:
    groups = [[cpu.Engine("wkv", f), cpu.Engine(*cpu.PEERS[f])] for f in cpu.PEERS]
    full, half, *_ = groups
    small = cpu.batches(groups, parameters=10**6)
    assert small == [[engine for group in groups for engine in group]]
    large = cpu.batches(groups, parameters=450 * 10**6)
    assert large[0] == full and large[1][:2] == half
    assert [engine for batch in large for engine in batch] == small[0]


# GGUF


@pytest.fixture
def weights() -> Mapping[str, np.ndarray]:
    tensors = random_official("7", n_layer=3, vocab_size=64, n_embd=32, head_size=16)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_the_low_rank_pairs_are_transposed_and_layer_0_gets_its_dummies(
    rwkv7_gguf: ModuleType, weights: Mapping[str, np.ndarray]
) -> None:
    found = dict(rwkv7_gguf.converted(weights))
    np.testing.assert_array_equal(found["blk.1.time_mix_w1.weight"], weights["blocks.1.att.w1"].T)
    np.testing.assert_array_equal(
        found["blk.2.channel_mix_value.weight"], weights["blocks.2.ffn.value.weight"].astype(np.float16)
    )
    for part in "012":
        np.testing.assert_array_equal(
            found[f"blk.0.time_mix_v{part}.weight"], found[f"blk.0.time_mix_a{part}.weight"]
        )
    mixes = found["blk.1.time_mix_lerp_fused.weight"]
    assert mixes.shape == (6, 1, 1, 32)
    for mix, name in zip(mixes, "rwkvag", strict=True):
        np.testing.assert_array_equal(mix.ravel(), weights[f"blocks.1.att.x_{name}"].ravel())
    assert found["blk.1.time_mix_w1.weight"].dtype == np.float32  # as llama.cpp's converter has it
    assert found["blk.1.time_mix_a1.weight"].dtype == np.float16


def test_the_names_are_those_that_gguf_knows_for_rwkv7_and_the_file_reads_back(
    rwkv7_gguf: ModuleType, weights: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.RWKV7]}
    rwkv7_gguf.write_gguf(tmp_path / "f16.gguf", weights)
    reader = gguf.GGUFReader(tmp_path / "f16.gguf")
    read = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(rwkv7_gguf.converted(weights))
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert re.sub(r"blk\.\d+\.", "blk.{bid}.", name).rpartition(".")[0] in known, name
        np.testing.assert_array_equal(tensor.data.ravel(), expected[name].ravel())
    assert reader.fields["rwkv7.attention.value_residual_mix_lora_rank"].contents() == 9
    assert reader.fields["rwkv7.block_count"].contents() == 3
