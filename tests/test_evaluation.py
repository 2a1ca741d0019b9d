"""What is measured of a model, and what it is measured against."""

from __future__ import annotations

import gzip
import lzma

import pytest
import torch
from torch import Tensor

from wkv.config import RWKV7Config
from wkv.evaluation import (
    gzip_bits_per_byte,
    longest_run,
    matmul_peak,
    measure_compression,
    parallel_recurrent_difference,
    parses,
    seconds_per_token,
    whole_lines,
)
from wkv.models import RWKV, build
from wkv.training import standard_library

LINES = [f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(400)]
TEXT = b"".join(LINES)


def small_model(device: torch.device) -> RWKV:
    config = RWKV7Config(
        vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16,
        decay_rank=8, rate_rank=8, value_rank=8, gate_rank=8,
    )  # fmt: skip
    return build(config, seed=1, device=device)


@pytest.fixture
def model(device: torch.device) -> RWKV:
    """A model whose every layer matters: the official initialisation has zero matrices."""
    model = small_model(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.to(device)
    return model


def test_the_compressors_are_gzip_9_and_xz_9() -> None:
    library = b"".join(document.text for document in standard_library())
    primer, text = library[:200_000], library[200_000:400_000]
    found = measure_compression(text, primer=primer)
    assert found.gzip == gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)
    sizes = [len(lzma.compress(read, preset=9)) for read in (text, primer, primer + text)]
    assert found.xz == 8 * sizes[0] / len(text)
    assert found.xz_primed == 8 * (sizes[2] - sizes[1]) / len(text)


def test_a_long_primer_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wkv.evaluation.compression._XZ_9_DICTIONARY_BYTES", 1 << 16)
    noise = torch.randint(256, (200_000,), generator=torch.Generator().manual_seed(0))
    text = bytes(noise[:20_000].tolist())
    assert measure_compression(text, primer=bytes(noise.tolist())).xz_primed < 0.2


def test_a_primed_compressor_knows_the_text_that_it_has_read() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(256, (20_000,), generator=generator).tolist())
    found = measure_compression(noise, primer=noise + bytes(1000))
    assert found.gzip > 7.9 and found.xz > 7.9
    assert found.xz_primed < 0.1


def test_both_forms_differ_by_rounding_only_and_a_broken_model_is_noticed(model: RWKV) -> None:
    tokens = torch.tensor([list(TEXT[:200])], device=model.device)
    assert 0 < parallel_recurrent_difference(model, tokens) < 1e-4

    honest = type(model).forward

    def forgetful(self: RWKV, tokens: Tensor, state: object = None, **kwargs: object) -> object:
        return honest(self, tokens, None, **kwargs)

    broken = type("Forgetful", (type(model),), {"forward": forgetful})
    model.__class__ = broken
    assert parallel_recurrent_difference(model, tokens) > 1e-2


def test_the_time_per_token_is_measured_at_every_position(model: RWKV) -> None:
    tokens = torch.tensor([list(TEXT[:2000])], device=model.device)
    seen: list[int] = []
    read = type(model).forward

    def counting(self: RWKV, tokens: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(tokens.shape[1])
        return read(self, tokens, *args, **kwargs)

    model.__class__ = type("Counting", (type(model),), {"forward": counting})
    timings = seconds_per_token(model, tokens, [100, 1500], repeats=5)
    assert len(timings) == 2 and all(0 < seconds < 1 for seconds in timings)
    assert sum(n for n in seen if n > 1) == 1500
    assert seen.count(1) == 10


def test_the_peak_is_of_the_order_of_this_machine(device: torch.device) -> None:
    assert 1e9 < matmul_peak(device, seconds=0.05) < 1e16


@pytest.mark.parametrize(
    ("lines", "is_python"),
    [
        (["def f(x):", "    return x"], True),
        (["    return x", "", "    # so"], True),  # out of the middle of a function
        (["def f(x):"], False),
        (["x = ("], False),
        (["x = '\\d'"], True),  # a warning, not an error
        (["x = '\0'"], False),
        ([], True),
    ],
)
def test_python_is_what_the_parser_takes(lines: list[str], is_python: bool) -> None:
    assert parses(lines) is is_python


def test_a_line_that_was_cut_off_does_not_count() -> None:
    assert whole_lines("a = 1\nb = (") == ["a = 1"]
    assert whole_lines("a = 1\n") == ["a = 1"]
    assert whole_lines("a = 1") == []


def test_the_longest_run_is_of_neighbours_that_parse_together() -> None:
    assert longest_run(["x = (", "def f():", "    y = 1", "", "    return y", "z = )"]) == 4
    assert longest_run(["x = 1", "y = ("]) == 1
    assert longest_run(["x = (", ""]) == 0
