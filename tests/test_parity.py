"""wkv computes what the official implementation computes: same logits, same states, step and sequence.

The oracles are PyPI `rwkv` (all generations) and `transformers` (RWKV-4), on the CPU in float32.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from official import random_official, reordered
from torch import Tensor

import wkv
from wkv import State
from wkv.training import Data, TokenData

# Of the logits' standard deviation. Where a head reads almost nothing, its GroupNorm magnifies roundings, and
# the official result itself may be further than that from the exact (float64) one: then three times as far.
TOLERANCE = 2e-5

SIZES: dict[str, dict[str, Any]] = {
    # Two heads or more, two layers or more: the official loader fails on one.
    "small": dict(n_layer=2, n_embd=128, head_size=64, vocab_size=53),
    "deep": dict(n_layer=6, n_embd=128, head_size=64, vocab_size=101),
    "wide": dict(n_layer=2, n_embd=256, head_size=64, dim_ffn=320, vocab_size=997),
}
CASES = [
    ("4", {}),
    ("5.0", {"bonus": "time_first"}),
    ("5.0", {"bonus": "time_faaaa"}),
    ("5.1", {"bonus": "time_faaaa"}),
    ("5.2", {}),
    ("6", {}),
    ("6", {"time_state": True}),
    ("7", {}),
    ("7", {"first_value_rank": 9}),
]


@pytest.fixture(scope="session")
def official() -> Iterator[dict[str, Any]]:
    """The official classes. The module reads the environment at import and later: it is imported twice."""
    classes = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("RWKV_JIT_ON", "0")
        patch.setenv("RWKV_CUDA_ON", "0")
        for v7, name in (("0", "RWKV"), ("1", "RWKV_x070")):
            patch.setenv("RWKV_V7_ON", v7)
            sys.modules.pop("rwkv.model", None)
            classes[name] = getattr(importlib.import_module("rwkv.model"), name)
        torch.set_grad_enabled(True)  # the official module may switch gradients off for everybody
        yield classes


def run_official(
    official: dict[str, Any], path: Path, pieces: list[list[int]]
) -> tuple[Tensor, list[Tensor]]:
    """Logits (T, V) of all pieces in turn, and the state after them."""
    is_v7 = "blocks.0.att.r_k" in torch.load(path, weights_only=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if is_v7:
            model = official["RWKV_x070"](str(path.with_suffix("")), "cpu fp32")
        else:
            model = official["RWKV"](str(path), "cpu fp32", verbose=False)
        state, logits = None, []
        for piece in pieces:
            out, state = model.forward(piece, state, full_output=True)
            logits.append(out.reshape(len(piece), -1))
    return torch.cat(logits).clone(), [x.clone() for x in state]


def difference_of_states(state: State, theirs: list[Tensor]) -> float:
    """Relative to each tensor's spread. Theirs is a flat list; v5 and v6 memories are K x V there."""
    worst = 0.0
    per_layer = len(theirs) // len(state.layers)
    for i, layer in enumerate(state.layers):
        att_shift, *memory, ffn_shift = theirs[i * per_layer : (i + 1) * per_layer]
        if len(memory) == 3:
            aa, bb, pp = memory
            scale = torch.exp(layer.memory[0, 2] - pp)
            pairs = [(layer.memory[0, 0] * scale, aa), (layer.memory[0, 1] * scale, bb)]
        else:
            pairs = [(layer.memory[0], memory[0])]
        for ours, expected in [(layer.att_shift[0], att_shift), *pairs, (layer.ffn_shift[0], ffn_shift)]:
            worst = max(worst, float((ours - expected).abs().max() / expected.std()))
    return worst


def transposed(generation: str, theirs: list[Tensor]) -> list[Tensor]:
    return [x.mT if x.ndim == 3 and generation[0] in "56" else x for x in theirs]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("generation", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
@torch.no_grad()
def test_logits_and_states_are_those_of_the_official_package(
    generation: str, options: dict[str, Any], size: str, official: dict[str, Any], tmp_path: Path
) -> None:
    tensors = random_official(generation, **SIZES[size], **options, seed=3)
    torch.save(tensors, tmp_path / "official.pth")
    torch.save(reordered(tensors) if size == "small" else tensors, tmp_path / "model.pth")
    model, _ = wkv.load(tmp_path / "model.pth")
    exact_model, _ = wkv.load(tmp_path / "model.pth", dtype=torch.float64)

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, SIZES[size]["vocab_size"], (40,), generator=generator).tolist()
    exact = exact_model(torch.tensor([tokens]))[0][0]
    schedules = {
        "sequence": [tokens],
        "steps": [[t] for t in tokens],
        "both": [tokens[:23], *([t] for t in tokens[23:26]), tokens[26:]],
    }
    results = [
        (pieces, *run_official(official, tmp_path / "official.pth", pieces)) for pieces in schedules.values()
    ]
    their_error = max(float((expected - exact).abs().max() / expected.std()) for _, expected, _ in results)
    allowed = max(TOLERANCE, 3 * their_error)
    for pieces, expected, theirs in results:
        state, found = None, []
        for piece in pieces:
            logits, state = model(torch.tensor([piece]), state)
            found.append(logits[0])
        assert state is not None
        assert float((torch.cat(found) - expected).abs().max() / expected.std()) <= allowed
        assert difference_of_states(state, transposed(generation, theirs)) <= 10 * allowed


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
def test_what_was_trained_on_from_an_official_file_is_official_again(
    generation: str, official: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(random_official(generation, **SIZES["small"], seed=3), tmp_path / "first.pth")
    model, _ = wkv.load(tmp_path / "first.pth")
    tokens = torch.randint(1, SIZES["small"]["vocab_size"], (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model(tokens[None])[0][0]
    data = Data(TokenData.of([tokens.numpy()] * 20), vocab_size=SIZES["small"]["vocab_size"])
    settings = wkv.TrainConfig(batch_size=2, context=16, tokens=200, learning_rate=1e-3, warmup_tokens=0)
    wkv.Trainer(model.train(), data, settings).fit()
    wkv.save(model, tmp_path / "trained.pth")
    with torch.no_grad():
        ours = model(tokens[None])[0][0]
    theirs, _ = run_official(official, tmp_path / "trained.pth", [tokens.tolist()])
    assert float((ours - before).abs().max() / before.std()) > 0.01  # it did learn
    assert float((ours - theirs).abs().max() / theirs.std()) <= 2e-4


@torch.no_grad()
def test_rwkv4_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "RwkvForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no RWKV")
    tensors = random_official("4", **SIZES["deep"], seed=1)
    config = transformers.RwkvConfig(
        vocab_size=101, hidden_size=128, num_hidden_layers=6, rescale_every=0, attention_hidden_size=128
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.RwkvForCausalLM(config).eval()
    renamed = {}
    for name, tensor in tensors.items():
        for ours, hf in [
            ("emb.", "embeddings."), ("ln0", "pre_ln"), (".att.", ".attention."), (".ffn.", ".feed_forward."),
            ("time_mix_k", "time_mix_key"), ("time_mix_v", "time_mix_value"),
            ("time_mix_r", "time_mix_receptance"),
        ]:  # fmt: skip
            name = name.replace(ours, hf)
        renamed[name if name.startswith("head") else f"rwkv.{name}"] = tensor
    theirs.load_state_dict(renamed)
    tokens = torch.randint(0, 101, (2, 50), generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(tokens).logits
    model = wkv.build(wkv.RWKV4Config(vocab_size=101, n_layer=6, n_embd=128, dim_att=128, dim_ffn=512))
    model.load_state_dict(tensors)
    logits, _ = model(tokens)
    assert float((logits - expected).abs().max() / expected.std()) <= TOLERANCE
