"""Optimizers and schedules: who is stepped how, and how the learning rate goes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small_models import CONFIGS, random_tokens
from torch import nn

from wkv.config import RWKV7Config
from wkv.errors import InputError
from wkv.models import build
from wkv.training import optim
from wkv.training.loss import linear_cross_entropy
from wkv.training.optim import learning_rate, make_optimizers, parameter_groups, set_learning_rate

# What the official trainers' rules on names come to (spec: v4neo, v5 and train_temp of v7).
ATT = ["att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight"]
MULTIPLES: dict[str, dict[str, float]] = {
    "4": {"att.time_decay": 2.0, "att.time_first": 3.0},
    "5.0": {"att.time_decay": 2.0, "att.time_first": 3.0},
    "5.1": {"att.time_decay": 2.0},
    "5.2": {"att.time_decay": 2.0},
    "6": {"att.time_decay": 2.0},
    "7": {"att.w0": 2.0},
}
GATED_FFN = ["ffn.key.weight", "ffn.receptance.weight", "ffn.value.weight"]
DECAYED: dict[str, list[str]] = {
    "4": [*ATT, *GATED_FFN],
    "5.0": [*ATT, *GATED_FFN],
    "5.1": [*ATT, *GATED_FFN, "att.gate.weight"],
    "5.2": [*ATT, *GATED_FFN, "att.gate.weight"],
    "6": [*ATT, *GATED_FFN, "att.gate.weight"],
    "7": [*ATT, "ffn.key.weight", "ffn.value.weight"],
}


def in_block(name: str) -> str:
    """blocks.1.att.w0 -> att.w0; emb.weight stays."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def grouped(optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Any]]:
    return {name: group for o in optimizers for group in o.param_groups for name in group["param_names"]}


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(noise)


# --- groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_each_generation_has_its_official_multiples_and_decays(generation: str) -> None:
    model = build(CONFIGS[generation])
    groups = grouped(make_optimizers(model, lr=0.5, weight_decay=0.1))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        multiple = MULTIPLES[generation].get(in_block(name), 1.0)
        decays = in_block(name) in (*DECAYED[generation], "emb.weight", "head.weight")
        assert (group["lr"], group["weight_decay"]) == (0.5 * multiple, 0.1 if decays else 0.0), name
        assert group["initial_lr"] == group["lr"]


@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_muon_steps_the_matrices_between_hidden_vectors_and_adamw_the_rest(generation: str) -> None:
    model = build(CONFIGS[generation])
    adamw, muon = make_optimizers(model, optimizer="muon", lr=0.5, weight_decay=0.1)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    assert {in_block(name) for name in grouped([muon])} == set(DECAYED[generation])
    names = [name for o in (adamw, muon) for group in o.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    multiples = {in_block(name): group["lr"] / 0.5 for name, group in grouped([adamw]).items()}
    assert {name: x for name, x in multiples.items() if x != 1} == MULTIPLES[generation]
    assert {group["lr"] for group in muon.param_groups} == {0.5}


def test_muon_may_have_a_rate_of_its_own_and_steps_as_far_as_adamw_on_average() -> None:
    model = build(RWKV7Config.of_size(vocab_size=8, n_layer=1, n_embd=128))
    matrix = model.blocks[0].att.key.weight
    before = matrix.detach().clone()
    matrix.grad = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    _, muon = make_optimizers(model, optimizer="muon", lr=1e-3, weight_decay=0, muon_lr=0.01)
    set_learning_rate(muon, 0.5)
    muon.step()
    step = (matrix.detach() - before).square().mean().sqrt().item()
    # Orthogonal, with singular values about 1, and scaled to a root mean square of 0.2.
    assert step == pytest.approx(0.5 * 0.01 * 0.2, rel=0.25)


def test_a_module_that_muon_has_nothing_to_do_with_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter's recipe asks for Muon"):
        make_optimizers(nn.Linear(3, 3), optimizer="muon", lr=1e-3, weight_decay=0)
    with pytest.raises(InputError, match=r"optimizer 'sgd'.*adamw or muon"):
        make_optimizers(nn.Linear(3, 3), optimizer="sgd", lr=1e-3, weight_decay=0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no parameter of the module is trainable"):
        make_optimizers(nn.Linear(3, 3).requires_grad_(False), lr=1e-3, weight_decay=0)


def test_frozen_parameters_are_in_no_optimizer() -> None:
    model = build(CONFIGS["7"])
    model.blocks.requires_grad_(False)
    (only,) = make_optimizers(model, lr=1e-3, weight_decay=0)
    assert set(grouped([only])) == {"emb.weight", "ln_out.weight", "ln_out.bias", "head.weight"}


# --- steps --------------------------------------------------------------------------------------------


def test_adamw_has_the_official_settings_and_takes_the_step_of_its_formula() -> None:
    model = build(CONFIGS["7"])
    (optimizer,) = make_optimizers(model, lr=0.1, weight_decay=0.5)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.99), 1e-18)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-12)  # however small, it moves a weight at full rate
    optimizer.step()
    groups = grouped([optimizer])
    for name, parameter in model.named_parameters():
        lr, decay = groups[name]["lr"], groups[name]["weight_decay"]
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * decay) - lr, msg=name)


def test_without_a_fused_kernel_adamw_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.AdamW

    def missing(*args: Any, fused: bool = False, **kwargs: Any) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on a supported device")
        return real(*args, **kwargs)

    models = [build(CONFIGS["7"]) for _ in range(2)]
    optimizers = make_optimizers(models[0], lr=1e-2, weight_decay=0.1)
    assert optimizers[0].defaults["fused"]
    monkeypatch.setattr(optim.torch.optim, "AdamW", missing)
    optimizers += make_optimizers(models[1], lr=1e-2, weight_decay=0.1)
    assert not optimizers[1].defaults["fused"]
    for step, (model, optimizer) in itertools.product(range(3), zip(models, optimizers, strict=True)):
        give_gradients(model, seed=step)
        optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("generation", "optimizer"), [("4", "adamw"), ("7", "adamw"), ("7", "muon")])
def test_either_optimizer_learns_a_batch_by_heart(generation: str, optimizer: Any) -> None:
    model = build(CONFIGS[generation])
    tokens = random_tokens(model, 2, 17)
    optimizers = make_optimizers(model, optimizer=optimizer, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        hidden, _ = model(tokens[:, :-1], output="hidden")
        loss = linear_cross_entropy(hidden, model.head.weight, tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert losses[0] > 4 and losses[-1] < 0.5 * losses[0]


def test_multiples_survive_the_schedule_and_one_of_torch() -> None:
    model = build(CONFIGS["7"])
    for optimizer in make_optimizers(model, optimizer="muon", lr=1e-3, weight_decay=0.1):
        for factor in (0.01, 1.0, 0.3):
            set_learning_rate(optimizer, factor)
            for name, group in grouped([optimizer]).items():
                expected = 1e-3 * factor * (2 if name.endswith("w0") else 1)
                assert group["lr"] == pytest.approx(expected), name

    torch_optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: 0.5)
    torch_optimizer.step()
    scheduler.step()
    rates = {name: group["lr"] for name, group in grouped([torch_optimizer]).items()}
    assert rates["blocks.0.att.w0"] == pytest.approx(1e-3)
    assert rates["blocks.0.att.key.weight"] == pytest.approx(5e-4)


# --- schedules ----------------------------------------------------------------------------------------

FORMULAS: dict[Any, Any] = {  # of p from 0 to 1, and of f, the share of the rate that is left at the end
    "cosine": lambda p, f: (0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * p),
    "linear": lambda p, f: 1 - p * (1 - f),
    "exponential": lambda p, f: math.exp(math.log(f) * p),
    "wsd": lambda p, f: 1 if p <= 7 / 9 else 1 - (1 - f) * (p - 7 / 9) / (2 / 9),  # from 800 of 1000 tokens
    "constant": lambda p, f: 1,
}


@pytest.mark.parametrize("schedule", sorted(FORMULAS))
def test_a_schedule_is_its_formula_after_a_straight_warm_up(schedule: Any) -> None:
    for tokens in range(0, 1200, 7):
        found = learning_rate(schedule, tokens, total_tokens=1000, warmup_tokens=100, final=0.2)
        if tokens < 100:
            assert found == pytest.approx(0.01 + 0.99 * tokens / 100)
        else:
            assert found == pytest.approx(FORMULAS[schedule](min((tokens - 100) / 900, 1), 0.2)), tokens


@pytest.mark.parametrize("schedule", sorted(FORMULAS))
def test_a_schedule_starts_at_one_ends_at_the_last_rate_and_stays_there(schedule: Any) -> None:
    def rate(tokens: float) -> float:
        return learning_rate(schedule, tokens, total_tokens=50, final=0.1)

    assert rate(0) == 1
    last = 1 if schedule == "constant" else 0.1
    assert rate(50) == rate(51) == rate(10**15) == pytest.approx(last)
    rates = [rate(tokens) for tokens in range(51)]
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_the_warm_up_of_rwkv_4_starts_at_a_fifth() -> None:
    rates = [
        learning_rate("cosine", t, total_tokens=100, warmup_tokens=10, warmup_start=0.2) for t in (0, 5, 10)
    ]
    assert rates == pytest.approx([0.2, 0.6, 1.0])


def test_the_last_share_in_which_a_stable_rate_falls_can_be_chosen() -> None:
    def rate(tokens: float, **settings: float) -> float:
        return learning_rate("wsd", tokens, total_tokens=100, final=0, decay_share=0.5, **settings)

    assert [rate(tokens) for tokens in (49, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])
    # A warm-up that takes longer comes first.
    assert [rate(tokens, warmup_tokens=80) for tokens in (79.999, 80, 90)] == pytest.approx(
        [1, 1, 0.5], abs=1e-3
    )


def test_a_schedule_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"schedule 'cosin'\..*cosine, linear, exponential, wsd, constant"):
        learning_rate("cosin", 1, total_tokens=2)  # type: ignore[arg-type]
