"""The training recipe of every parameter against the official one, written down a second time here.

Sources: BlinkDL/RWKV-LM, RWKV-v4neo, RWKV-v5 and RWKV-v7/train_temp (`generate_init_weight`, the
constructors of the layers, `configure_optimizers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wkv.config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import Error
from wkv.models import build
from wkv.training import parameter_groups

SIZES = {"vocab_size": 100, "n_embd": 48, "dim_att": 48, "dim_ffn": 160}
CONFIGS: dict[str, Callable[[int], Config]] = {
    "4": lambda n: RWKV4Config(**SIZES, n_layer=n),
    "4 of another width": lambda n: RWKV4Config(**SIZES | {"dim_att": 80, "dim_ffn": 40}, n_layer=n),
    "5.0 time_first": lambda n: RWKV5Config(**SIZES, n_layer=n, head_size=8, minor=0, bonus="time_first"),
    "5.0 time_faaaa": lambda n: RWKV5Config(**SIZES, n_layer=n, head_size=8, minor=0),
    "5.1": lambda n: RWKV5Config(**SIZES, n_layer=n, head_size=16, minor=1),
    "5.2": lambda n: RWKV5Config(**SIZES, n_layer=n, head_size=16),
    "5.2 of another width": lambda n: RWKV5Config(**SIZES | {"dim_att": 80}, n_layer=n, head_size=16),
    "6": lambda n: RWKV6Config(**SIZES, n_layer=n, head_size=16, mix_rank=8, decay_rank=12),
    "7": lambda n: RWKV7Config(
        **SIZES, n_layer=n, head_size=16, decay_rank=8, rate_rank=12, value_rank=4, gate_rank=64
    ),
    "7 with a small vocabulary": lambda n: RWKV7Config(**SIZES | {"vocab_size": 40}, n_layer=n, head_size=8),
}  # fmt: skip
EVERY_MODEL = [
    pytest.param(make(n_layer), id=f"{name}, {n_layer} layers")
    for name, make in CONFIGS.items()
    for n_layer in (1, 3)
]


@dataclass(frozen=True)
class Orthogonal:
    gain: float


@dataclass(frozen=True)
class Uniform:
    bound: float


Expected = Orthogonal | Uniform | np.ndarray | float


def expected_value(config: Config, name: str, shape: tuple[int, ...]) -> Expected:
    """What the official code fills the parameter `name` with."""
    generation, L = config.generation, config.n_layer
    C, A, V = config.n_embd, config.dim_att, config.vocab_size
    if name == "emb.weight":
        return Uniform(6e-4 if generation == 4 else 1e-4)
    if name == "head.weight":
        return Orthogonal(0.5 * math.sqrt(V / C) if V > C else 0.5)
    if name.startswith("ln_out"):
        return 1.0 if name.endswith("weight") else 0.0
    _, number, rest = name.split(".", 2)
    layer = int(number)
    if rest == "att.ln_x.weight":
        return ((1 + layer) / L) ** 0.7
    if ".ln" in f".{rest}":
        return 1.0 if rest.endswith("weight") else 0.0

    up = layer / (L - 1) if L > 1 else 0.0  # 0 to 1
    down = 1 - layer / L  # 1 to almost 0
    t = np.arange(C) / C
    n = np.arange(math.prod(shape))
    h = np.arange(math.prod(shape)) / max(math.prod(shape) - 1, 1)
    zigzag3 = (n + 1) % 3 - 1
    if generation == 4:
        return {
            "att.time_decay": lambda: -5 + 8 * h ** (0.7 + 1.3 * up),
            "att.time_first": lambda: np.log(0.3) + 0.5 * zigzag3,
            "att.time_mix_k": lambda: t**down,
            "att.time_mix_v": lambda: t**down + 0.3 * up,
            "att.time_mix_r": lambda: t ** (0.5 * down),
            "att.receptance.weight": lambda: 0.0,
            "att.key.weight": lambda: 0.0,
            "att.value.weight": lambda: Orthogonal(math.sqrt(max(1, A / C))),
            "att.output.weight": lambda: 0.0,
            "ffn.time_mix_k": lambda: t**down,
            "ffn.time_mix_r": lambda: t**down,
            "ffn.key.weight": lambda: Orthogonal(math.sqrt(max(1, config.dim_ffn / C))),
            "ffn.receptance.weight": lambda: 0.0,
            "ffn.value.weight": lambda: 0.0,
        }[rest]()
    matrices: dict[str, Expected] = {
        "att.receptance.weight": Orthogonal(1),
        "att.key.weight": Orthogonal(0.1),
        "att.value.weight": Orthogonal(1),
        "att.gate.weight": Orthogonal(0.1),
        "att.output.weight": 0.0,
        "ffn.key.weight": Orthogonal(1),
        "ffn.receptance.weight": 0.0,
        "ffn.value.weight": 0.0,
    }
    if rest in matrices:
        return matrices[rest]
    if generation == 5:
        per_channel = config.minor == 2
        return {
            "att.time_decay": lambda: -6 + 5 * h ** (0.7 + 1.3 * up),
            "att.time_first": lambda: -3.0,
            "att.time_faaaa": lambda: up * (1 - h) + (0.1 * zigzag3 if per_channel else 0),
            "att.time_mix_k": lambda: t**down,
            "att.time_mix_v": lambda: t**down + 0.3 * up,
            "att.time_mix_r": lambda: t ** (0.5 * down),
            "att.time_mix_g": lambda: t ** (0.5 * down),
            "ffn.time_mix_k": lambda: t**down,
            "ffn.time_mix_r": lambda: t**down,
        }[rest]()
    if generation == 6:
        return {
            "att.time_maa_x": lambda: 1 - t**down,
            "att.time_maa_w": lambda: 1 - t**down,
            "att.time_maa_k": lambda: 1 - t**down,
            "att.time_maa_v": lambda: 1 - (t**down + 0.3 * up),
            "att.time_maa_r": lambda: 1 - t ** (0.5 * down),
            "att.time_maa_g": lambda: 1 - t ** (0.5 * down),
            "att.time_maa_w1": lambda: 0.0,
            "att.time_maa_w2": lambda: Uniform(0.01),
            "att.time_decay": lambda: -6 + 5 * h ** (0.7 + 1.3 * up),
            "att.time_decay_w1": lambda: 0.0,
            "att.time_decay_w2": lambda: Uniform(0.01),
            "att.time_faaaa": lambda: up * (1 - h) + 0.1 * zigzag3,
            "ffn.time_maa_k": lambda: 1 - t ** (down**3),
            "ffn.time_maa_r": lambda: 1 - t ** (down**3),
        }[rest]()
    N = config.head_size
    s = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zz, lin = s * np.abs(s), h - 0.5
    small = Orthogonal(0.1 * math.sqrt(max(1, shape[0] / shape[-1])))
    return {
        "att.x_r": lambda: 1 - t ** (0.2 * down),
        "att.x_w": lambda: 1 - t ** (0.9 * down),
        "att.x_k": lambda: 1 - t ** (0.7 * down),
        "att.x_v": lambda: 1 - t ** (0.7 * down),
        "att.x_a": lambda: 1 - t ** (0.9 * down),
        "att.x_g": lambda: 1 - t ** (0.2 * down),
        "att.w0": lambda: -6 + 6 * h ** (1 + up**0.3) + 0.5 + 2.5 * zz,
        "att.a0": lambda: -0.19 + 0.3 * zz + 0.4 * lin,
        "att.v0": lambda: 0.73 - 0.4 * lin,
        "att.k_k": lambda: 0.71 - 0.1 * lin,
        "att.k_a": lambda: 1.02,
        "att.r_k": lambda: -0.04,
        **{f"att.{letter}1": lambda: 0.0 for letter in "wavg"},
        **{f"att.{letter}2": lambda: small for letter in "wavg"},
        "ffn.x_k": lambda: 1 - t ** (down**4),
    }[rest]()


def expected_group(generation: int, name: str, shape: tuple[int, ...]) -> tuple[float, bool]:
    """(multiple of the learning rate, decayed?): the official rules on names, the first that matches."""
    is_matrix = sum(size > 1 for size in shape) >= 2
    if generation == 7:
        if "att.w0" in name:
            return 2.0, False
        return 1.0, is_matrix and ".weight" in name
    if "_w1" in name or "_w2" in name:
        return 1.0, False
    if "time_sta" in name:
        return 1.0, True
    if "time_mix" in name or "time_maa" in name:
        return 1.0, False
    if "time_decay" in name:
        return 2.0, False
    if "time_faaaa" in name:
        return 1.0, False
    if "time_first" in name:
        return 3.0, False
    return 1.0, is_matrix and (generation == 4 or ".weight" in name)


def check_value(value: Tensor, expected: Expected, tolerance: float = 1e-6) -> None:
    weights = value.detach().double().numpy()
    if isinstance(expected, Uniform):
        assert 0.8 * expected.bound < np.abs(weights).max() <= (1 + tolerance) * expected.bound
        assert weights.std() == pytest.approx(expected.bound / math.sqrt(3), rel=0.15)
    elif isinstance(expected, Orthogonal):
        rows, columns = weights.shape
        product = weights.T @ weights if rows >= columns else weights @ weights.T
        scale = expected.gain**2
        np.testing.assert_allclose(product / scale, np.eye(min(rows, columns)), atol=10 * tolerance)
    else:
        wanted = np.broadcast_to(np.reshape(expected, -1), weights.size)
        np.testing.assert_allclose(weights.reshape(-1), wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("config", EVERY_MODEL)
def test_every_parameter_starts_with_the_official_value(config: Config) -> None:
    for name, parameter in build(config, seed=3).named_parameters():
        try:
            check_value(parameter, expected_value(config, name, tuple(parameter.shape)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("config", EVERY_MODEL)
def test_every_parameter_has_the_official_learning_rate_and_decay(config: Config) -> None:
    model = build(config)
    groups = parameter_groups(model, lr=0.5, weight_decay=0.1)
    found = {
        name: (group["initial_lr"] / 0.5, {0.1: True, 0.0: False}[group["weight_decay"]])
        for group in groups
        for name in group["param_names"]
    }
    assert found == {
        name: expected_group(config.generation, name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }


def test_a_bfloat16_model_starts_from_orthogonal_matrices_too() -> None:
    config = CONFIGS["7"](2)
    model = build(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        check_value(parameter, expected_value(config, name, tuple(parameter.shape)), tolerance=2**-8)
    exact = build(config).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, exact[name].bfloat16()), name


def test_the_seed_alone_decides_the_initial_weights() -> None:
    config = CONFIGS["6"](2)
    torch.manual_seed(1)
    first = build(config, seed=5).state_dict()
    torch.manual_seed(2)
    again, other = build(config, seed=5).state_dict(), build(config, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("generation", ["5.2", "6"])
def test_a_tuned_initial_state_decays(generation: str) -> None:
    model = build(CONFIGS[generation](2).replace(time_state=True))
    groups = {
        name: group
        for group in parameter_groups(model, lr=1.0, weight_decay=0.1)
        for name in group["param_names"]
    }
    assert groups["blocks.1.att.time_state"]["weight_decay"] == 0.1
    assert groups["blocks.1.att.time_state"]["initial_lr"] == 1.0


def test_a_block_inside_another_network_keeps_its_recipe() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Linear(3, 48)
            self.block = build(CONFIGS["7"](2)).blocks[1]
            self.norm = nn.LayerNorm(48)

    groups = parameter_groups(Classifier(), lr=1.0, weight_decay=0.1)
    rule = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    assert rule["block.att.w0"] == (2.0, 0.0)
    assert rule["block.att.w2"] == (1.0, 0.0)
    assert rule["block.ffn.key.weight"] == (1.0, 0.1)
    assert rule["inlet.weight"] == (1.0, 0.1)
    assert rule["inlet.bias"] == rule["norm.weight"] == (1.0, 0.0)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = build(CONFIGS["6"](2))
    model.emb.requires_grad_(False)
    model.head.weight = model.blocks[0].att.key.weight  # one tensor, two names
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("place", ["blocks.0.att", "blocks.0.att.key"])
def test_a_parameter_without_a_recipe_is_an_error_that_names_it(place: str) -> None:
    model = build(CONFIGS["7"](1))
    model.get_submodule(place).register_parameter("x_new", nn.Parameter(torch.zeros(3)))
    with pytest.raises(Error, match=rf"parameter {place}\.x_new has no recipe"):
        parameter_groups(model, lr=1.0, weight_decay=0.1)
