"""The model that comes with wkv is the one that its card describes, and it is in the wheel."""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import wkv
from wkv.pretrained import MODEL, held_out_files
from wkv.training import validate
from wkv.training.data import standard_library

CARD = (MODEL.parent / "README.md").read_text(encoding="utf-8")


def test_it_is_small_and_what_the_card_says() -> None:
    model, tokenizer = wkv.load()
    assert MODEL.stat().st_size < 12_000_000
    assert model.config.generation == 7
    assert model.dtype == torch.bfloat16
    assert tokenizer is not None
    assert f"{sum(weight.numel() for weight in model.parameters()):,} weights" in CARD
    assert f"{model.config.vocab_size:,} tokens" in CARD
    assert "PSF License Version 2" in CARD


def test_it_reads_files_that_it_never_saw_far_better_than_xz() -> None:
    held_out = held_out_files()
    assert len(held_out) == 18 and all(re.fullmatch(r"[\w/]+\.py", name) for name in held_out)
    files = [file.text for file in standard_library() if file.path in held_out]
    texts = sorted(files, key=len)[:4]  # the shortest: a few seconds
    if len(texts) < 4:
        pytest.skip("another Python, with other files")
    model, tokenizer = wkv.load(dtype=torch.float32)
    documents = [[*tokenizer.encode(text.decode()), 0] for text in texts]
    n_bytes = sum(map(len, texts))
    bits = validate(model, documents, separator=0, n_bytes=n_bytes).bits_per_byte
    assert bits < 0.75 * 8 * len(lzma.compress(b"".join(texts), preset=9)) / n_bytes


def test_the_figures_of_the_card_keep_what_the_model_is_for() -> None:
    rows = dict(re.findall(r"^\| \**(.+?)\**(?:,.*?)? \| \**(\d\.\d{3})\** \|$", CARD, re.MULTILINE))
    figures = {name.strip("`* "): float(value) for name, value in rows.items()}
    assert figures["this model"] < 0.75 * figures["xz -9"]


def test_the_wheel_holds_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    # What it holds besides the compiled engine, which would take a minute to build.
    options = ["--no-deps", "--no-build-isolation", "--quiet", "-C", "wheel.cmake=false", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *options, str(root)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stored = archive.read("wkv/pretrained/model.safetensors")
    assert stored == MODEL.read_bytes()
    assert {"wkv/pretrained/tokenizer.json", "wkv/pretrained/README.md"} <= names
