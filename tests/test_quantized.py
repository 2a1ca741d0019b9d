"""8 and 4 bits: what is lost is what rounding loses, and a quantised file needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_tokens, small_model
from torch import Tensor, nn

import wkv
from wkv.checkpoints import write_safetensors
from wkv.cli import main
from wkv.config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import CheckpointError, ConfigError, Error, InputError, UnsafeFileError
from wkv.models import RWKV, build, quantized
from wkv.models.base import Block
from wkv.models.layers import Linear
from wkv.models.quantized import QuantizedLinear, quantize
from wkv.ops import native, use_backend
from wkv.state import LayerState, State

SIZES = dict(vocab_size=61, n_layer=2, n_embd=80, dim_att=80, dim_ffn=200)
RANKS = dict(decay_rank=6, rate_rank=5, value_rank=4, gate_rank=7)
SHAPES: dict[str, Config] = {
    "4": RWKV4Config(**SIZES),
    "5.0": RWKV5Config(**SIZES, head_size=16, minor=0, bonus="time_first"),
    "5.2": RWKV5Config(**SIZES, head_size=16),
    "6": RWKV6Config(**SIZES, head_size=16, mix_rank=7, decay_rank=11),
    "7": RWKV7Config(**SIZES, head_size=16, **RANKS),
}
TIERS = ["int8", "int4"]
needs_engine = pytest.mark.skipif(native.why_not() is not None, reason=f"no engine: {native.why_not()}")


def linear(n_in: int, n_out: int, bits: int, by_input: bool, seed: int = 0) -> tuple[QuantizedLinear, Tensor]:
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    made = QuantizedLinear(n_in, n_out, bits, by_input=by_input)
    made.store(weight)
    return made, weight


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (63, 65), (64, 64), (130, 70), (200, 4200)])
def test_every_weight_is_rounded_to_the_nearest_step(n_in: int, n_out: int, by_input: bool) -> None:
    made, weight = linear(n_in, n_out, 8, by_input)
    for start in range(0, n_in, 64):
        group = weight[:, start : start + 64]
        step = group.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-7)  # rounded up, to bfloat16
        lost = (made.dequantized()[:, start : start + 64] - group).abs()
        assert (lost <= step / 2 + 1e-7).all()
    assert made.weight.nbytes == (-(-n_out // 64) * n_in if by_input else -(-n_in // 64) * n_out) * 64


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (63, 65), (64, 64), (130, 70), (200, 4200)])
def test_4_bits_take_the_nearest_of_16_numbers_and_a_scale_that_beats_the_plain_one(
    n_in: int, n_out: int, by_input: bool
) -> None:
    made, weight = linear(n_in, n_out, 4, by_input)
    scales = (made.scales.mT if by_input else made.scales).float()
    error = plain_error = 0.0
    for g, start in enumerate(range(0, n_in, 64)):
        group = weight[:, start : start + 64]
        lost = (made.dequantized()[:, start : start + 64] - group).abs()
        levels = scales[:, g, None] * torch.arange(-8, 8)
        nearest = (group[:, :, None] - levels[:, None]).abs().amin(dim=2)
        torch.testing.assert_close(lost, nearest, rtol=0, atol=1e-5)
        plain = (group.abs().amax(dim=1, keepdim=True) / 7).bfloat16().float()
        of_plain = (torch.round(group / plain) * plain - group).square().sum(dim=1)
        assert (lost.square().sum(dim=1) <= 1.0001 * of_plain + 1e-9).all()
        error, plain_error = error + float(lost.square().sum()), plain_error + float(of_plain.sum())
    assert error < 0.75 * plain_error or n_in < 63
    assert made.weight.nbytes == (-(-n_out // 64) * n_in if by_input else -(-n_in // 64) * n_out) * 32


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outlier", [-3e30, 3e30, 3e-39, -1e-30])
def test_zeros_and_a_single_outlier_survive(outlier: float, bits: int) -> None:
    made = QuantizedLinear(128, 2, bits, by_input=False)
    weight = torch.zeros(2, 128)
    weight[1, 5] = outlier
    made.store(weight)
    assert made.dequantized()[0].eq(0).all() and made.dequantized()[1, 6:].eq(0).all()
    assert float(made.dequantized()[1, 5]) == pytest.approx(outlier, rel=0.01, abs=1e-36)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_stays_so(bad: float, bits: int) -> None:
    made = QuantizedLinear(128, 2, bits, by_input=False)
    weight = torch.ones(2, 128)
    weight[1, 70] = bad
    made.store(weight)
    lost = ~made.dequantized().isfinite()
    assert lost[1, 64:].any() and not lost[0].any() and not lost[1, :64].any()


@pytest.mark.parametrize("by_input", [False, True])
def test_on_correlated_inputs_compensated_rounding_loses_less(by_input: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 150, generator=generator)
    x += 0.1 * torch.randn(x.shape, generator=generator)
    x[:, 70] = 0  # an input that the text never uses
    plain, weight = linear(150, 1100, 4, by_input)
    made, again = (QuantizedLinear(150, 1100, 4, by_input=by_input) for _ in range(2))
    for each in (made, again):
        each.store(weight, x.mT @ x)
    lost = [float((x @ (each.dequantized() - weight).mT).norm()) for each in (made, plain)]
    assert lost[0] < 0.5 * lost[1]
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name))
        assert (buffer.dtype, buffer.shape) == (plain.get_buffer(name).dtype, plain.get_buffer(name).shape)


def test_inputs_that_have_nothing_in_common_are_rounded_as_without_a_text() -> None:
    made, weight = linear(130, 70, 4, False)
    before = made.dequantized()
    made.store(weight, 3 * torch.eye(130))
    assert torch.equal(made.dequantized(), before)


@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
@torch.no_grad()
def test_a_calibrated_model_is_nearer_to_the_exact_one_and_its_file_is_like_any_other(
    name: str, tmp_path: Path
) -> None:
    exact, model, plain = (small_model(name, dtype=torch.float32) for _ in range(3))
    text = random_tokens(model, 12, 40)
    quantize(model, "int4", text)
    quantize(plain, "int4")
    described = [
        {key: (part.dtype, part.shape) for key, part in m.state_dict().items()} for m in (model, plain)
    ]
    assert described[0] == described[1] and model.quantization == "int4"
    lost = [float((m(text)[0] - exact(text)[0]).norm()) for m in (model, plain)]
    assert lost[0] < 0.95 * lost[1]
    wkv.save(model, tmp_path / "small.safetensors")
    loaded, _ = wkv.load(tmp_path / "small.safetensors")
    assert torch.equal(loaded(text)[0], model(text)[0])


def test_every_block_is_calibrated_on_what_the_rounded_ones_before_it_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model("7", dtype=torch.float32)
    text, read, found = random_tokens(model, 6, 20), list[Tensor](), list[Tensor]()
    honest = quantized._moments

    def watched(block: Block, rows: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        read.append(rows[0][0])
        return honest(block, rows)

    monkeypatch.setattr(quantized, "_moments", watched)
    quantize(model, "int4", text)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(text)
    assert len(read) == len(found) == model.config.n_layer
    for x, expected in zip(read, found, strict=True):
        torch.testing.assert_close(x, expected)


def test_8_bits_are_not_calibrated() -> None:
    model = small_model("7", dtype=torch.float32)
    with pytest.raises(ConfigError, match="int4"):
        quantize(model, "int8", random_tokens(model, 1, 9))
    assert model.quantization is None


def test_a_calibration_that_cannot_be_read_is_refused() -> None:
    model = small_model("7", dtype=torch.float32)
    for wrong in (torch.zeros(0, 5, dtype=torch.int64), torch.tensor([[model.config.vocab_size]])):
        with pytest.raises(InputError, match="token"):
            quantize(model, "int4", wrong)
    with torch.no_grad():
        model.blocks[1].ln1.bias[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        quantize(model, "int4", random_tokens(model, 2, 9))


@needs_engine
@pytest.mark.parametrize("name", native.engines())
@pytest.mark.parametrize("bits", [8, 4])
@given(data=st.data())
def test_products_are_those_of_the_stored_weights(name: str, bits: int, data: st.DataObject) -> None:
    n_in, n_out = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    rows, by_input = data.draw(st.integers(1, 70)), data.draw(st.booleans())
    rows += data.draw(st.sampled_from([0, 0, 90]))  # more than are rounded at a time
    made, _ = linear(n_in, n_out, bits, by_input, data.draw(st.integers(0, 9)))
    x = torch.randn(rows, n_in, generator=torch.Generator().manual_seed(1))
    if data.draw(st.booleans()):
        x = x.relu()
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "engines", lambda: [name])
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        y = made(x)
        torch.set_num_threads(data.draw(st.integers(1, 4)))
        row = data.draw(st.integers(0, rows - 1))
        assert torch.equal(made(x[row : row + 1])[0], y[row])  # a row's bits depend on the row alone
    torch.set_num_threads(before)
    weight = made.dequantized().double()
    # Each group of x is rounded to 127 steps a side, and the sum of the groups is float32.
    bound = torch.zeros_like(y, dtype=torch.float64)
    for start in range(0, n_in, 64):
        group = slice(start, start + 64)
        bound += x.double()[:, group].abs().amax(dim=1, keepdim=True) * weight[:, group].abs().sum(dim=1)
    assert ((y.double() - x.double() @ weight.mT).abs() <= bound * (0.5 / 127 + 2e-6)).all()


def in_steps(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """x as the engine's products take it: each group in 127 steps a side."""
    x = F.pad(inputs[0], (0, -inputs[0].shape[-1] % 64)).unflatten(-1, (-1, 64))
    step = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((x / step).round() * step).flatten(-2)[..., : inputs[0].shape[-1]]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_quantised_model_is_the_model_of_its_stored_weights(shape: str, tier: str) -> None:
    model = quantize(small_model(SHAPES[shape], dtype=torch.float32), tier)
    exact = small_model(SHAPES[shape], dtype=torch.float64)
    for name, module in exact.named_modules():
        if isinstance(module, Linear):
            stored = model.get_submodule(name)
            assert isinstance(stored, QuantizedLinear)
            assert stored.bits == (8 if tier == "int8" or name == "head" else 4)
            module.weight.copy_(stored.dequantized())
            if native.why_not() is None:
                module.register_forward_pre_hook(in_steps)
    tokens = random_tokens(model, 2, 9)
    expected = exact(tokens)[0]
    for backend in ["reference"] if native.why_not() else ["reference", "native"]:
        with use_backend(backend):
            logits, state = model(tokens)
            one, _ = model(tokens[:, :1], state)
        # Mostly 1e-7; now and then an x in the middle of two steps goes the other way.
        assert float((logits - expected).norm() / expected.norm()) < 0.01
        assert one.isfinite().all()


@needs_engine
@pytest.mark.parametrize("name", native.engines())
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_a_row_makes_its_products_nan_and_no_others(
    name: str, bits: int, by_input: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "engines", lambda: [name])
    made, _ = linear(130, 70, bits, by_input)
    for rows in (1, 2, 35):
        x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(rows))
        expected = made(x)
        for row, column in ((0, 0), (rows - 1, 129), (rows // 2, 77)):
            spoilt = x.clone()
            spoilt[row, column] = bad
            y = made(spoilt)
            assert y[row].isnan().all()
            others = torch.arange(rows) != row
            assert torch.equal(y[others], expected[others])


@needs_engine
@pytest.mark.parametrize("name", native.engines())
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_numbers_too_small_for_a_scale_are_nothing(
    name: str, by_input: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "engines", lambda: [name])
    made, _ = linear(130, 70, 8, by_input)
    x = torch.zeros(rows, 130)
    x[:, ::3] = 1e-39  # 127 over it is infinite
    assert made(x).eq(0).all()


PLACES = {
    "4": ["emb.weight", "blocks.1.ln1.bias", "blocks.0.att.time_decay", "blocks.1.ffn.key.weight"],
    "7": ["emb.weight", "blocks.1.ln2.weight", "blocks.0.att.w0", "blocks.1.ffn.key.weight", "ln_out.bias"],
}


@needs_engine
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tier", [None, *TIERS])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_model_with_weights_or_a_state_that_are_not_finite_says_nan(
    shape: str, tier: str | None, bad: float
) -> None:
    def spoilt(place: str | None) -> RWKV:
        model = small_model(SHAPES[shape], dtype=torch.float32)
        if place is not None:
            model.get_parameter(place).view(-1)[20 if place == "emb.weight" else 3] = bad
        return model if tier is None else quantize(model, tier)

    def is_hidden(model: RWKV, state: State | None = None) -> bool:
        """Whether the engine's logits look well where those of the equations do not."""
        found = []
        for backend in ("reference", "native"):
            with use_backend(backend):
                found.append(model(tokens, state)[0].isfinite().all(dim=2))
        return bool((found[1] & ~found[0]).any())

    tokens = torch.tensor([[0, 5, 9], [7, 2, 0]])
    for place in PLACES["7" if shape == "7" else "4"]:
        assert not is_hidden(spoilt(place)), place
    model = spoilt(None)
    for name in LayerState._fields:
        _, state = model(tokens)
        getattr(state.layers[1], name)[0].view(-1)[5] = bad
        assert not is_hidden(model, state), name
        with use_backend("native"):
            logits, after = model(tokens, state)
        clean, own = model(tokens[1:], state[1])
        assert torch.equal(logits[1:], clean) and not logits[0].isfinite().all()  # the other row is whole
        assert all(torch.equal(a[1:], b) for x, y in zip(after.layers, own.layers, strict=True)
                   for a, b in zip(x, y, strict=True))  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_quantised_file_loads_without_its_original(shape: str, tier: str, tmp_path: Path) -> None:
    model = small_model(SHAPES[shape], dtype=torch.float32)
    wkv.save(model, tmp_path / "full.safetensors")
    small, _ = wkv.load(tmp_path / "full.safetensors", quantize=tier)
    tokens = random_tokens(model, 1, 7)
    expected, _ = small(tokens)
    wkv.save(small, tmp_path / "small.safetensors")
    (tmp_path / "full.safetensors").unlink()
    for again in (None, tier):
        loaded, _ = wkv.load(tmp_path / "small.safetensors", quantize=again)
        assert loaded.quantization == tier
        assert torch.equal(loaded(tokens)[0], expected)
    assert torch.equal(quantize(model, tier)(tokens)[0], expected)
    other = TIERS[1 - TIERS.index(tier)]
    with pytest.raises(CheckpointError, match=f"is in {tier}, not in {other}"):
        wkv.load(tmp_path / "small.safetensors", quantize=other)
    with pytest.raises(CheckpointError, match=r"\.pth file cannot hold"):
        wkv.save(small, tmp_path / "small.pth")
    with pytest.raises(ConfigError, match="already"):
        quantize(small, tier)
    with pytest.raises(ConfigError, match="int8, int4"):
        wkv.load(tmp_path / "small.safetensors", quantize=None) and quantize(build(SHAPES[shape]), "int5")


def test_the_command_line_converts_says_so_and_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RWKV7Config(**{**SIZES, "vocab_size": 256}, head_size=16, **RANKS)
    wkv.save(small_model(config, dtype=torch.float32), tmp_path / "full.safetensors")
    target = str(tmp_path / "small.safetensors")
    assert main(["convert", str(tmp_path / "full.safetensors"), target, "--quantize", "int8"]) == 0
    assert "in int8 and float32" in capsys.readouterr().out
    assert main(["info", target]) == 0
    assert "quantised: int8" in capsys.readouterr().out
    assert main(["generate", target, "x", "--max-tokens", "3", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    flags = ["--quantize", "int8", "--max-tokens", "3", "--seed", "1"]
    assert main(["generate", str(tmp_path / "full.safetensors"), "x", *flags]) == 0
    assert capsys.readouterr().out == first
    again = ["convert", target, str(tmp_path / "again.safetensors"), "--quantize", "int4"]
    assert main(again) == 1
    assert "not in int4" in capsys.readouterr().err


def damaged(model: RWKV, change: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from wkv.checkpoints import model_metadata

    tensors = dict(model.state_dict())
    metadata = model_metadata(model.config, model.quantization)
    name = "blocks.0.att.key"
    match change:
        case "bytes cut off":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :-1].contiguous()
        case "scales of other groups":
            tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :-1].contiguous()
        case "no scales":
            del tensors[f"{name}.scales"]
        case "scales that are not finite":
            tensors[f"{name}.scales"] = tensors[f"{name}.scales"] * float("inf")
        case "an unknown tier":
            metadata["quantization"] = "int3"
        case "no tier":
            del metadata["quantization"]
        case "a norm in bytes":
            tensors["blocks.0.ln1.weight"] = tensors["blocks.0.ln1.weight"].to(torch.uint8)
        case "another tier":
            metadata["quantization"] = "int4"
    return tensors, metadata


CHANGES = [
    "bytes cut off",
    "scales of other groups",
    "no scales",
    "scales that are not finite",
    "an unknown tier",
]


@pytest.mark.parametrize("change", [*CHANGES, "no tier", "another tier", "a norm in bytes"])
def test_a_damaged_quantised_file_is_refused(change: str, tmp_path: Path) -> None:
    model = quantize(small_model(SHAPES["7"], dtype=torch.float32), "int8")
    write_safetensors(tmp_path / "bad.safetensors", *damaged(model, change))
    with pytest.raises(Error):
        wkv.load(tmp_path / "bad.safetensors")


def test_a_truncated_quantised_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    wkv.save(quantize(small_model(SHAPES["7"], dtype=torch.float32), "int4"), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UnsafeFileError, match="the end of the file"):
        wkv.load(path)
