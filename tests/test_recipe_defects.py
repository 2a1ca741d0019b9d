"""Mistakes that other RWKV trainers make, and that this one does not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONFIGS, SIZES, random_tokens, small_model
from torch import Tensor, nn

import wkv
from wkv.models import RWKV4Block, RWKV5Block, RWKV6Block, RWKV7Block, build, initialize
from wkv.training.data.batches import IGNORE
from wkv.training.loss import cross_entropy, linear_cross_entropy
from wkv.training.optim import learning_rate, make_optimizers

BLOCKS: dict[str, Any] = {"4": RWKV4Block, "5.2": RWKV5Block, "6": RWKV6Block, "7": RWKV7Block}


# RWKV-PEFT and older trainers: L2Wrap ignores the gradient that comes in, so that scaling the loss, or
# dividing it for accumulation, changes how strong the pull is.


@pytest.mark.parametrize("scale", [1 / 8, 2.0**16])
def test_scaling_the_loss_scales_every_gradient_with_l2wrap_in_it(scale: float) -> None:
    model = small_model("7")
    tokens = random_tokens(model, 2, 12)

    def gradients(factor: float) -> list[Tensor]:
        model.zero_grad()
        hidden, _ = model(tokens[:, :-1], output="hidden")
        loss = linear_cross_entropy(hidden, model.head.weight, tokens[:, 1:], l2wrap=0.5)
        (factor * loss).backward()
        return [p.grad.clone() / factor for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(scale), gradients(1.0), strict=True):
        assert torch.equal(a, b)  # powers of two round nothing


# Several trainers average the means of micro-batches, which counts a token more where few others stand by.


def test_micro_batches_weigh_their_targets_and_not_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    targets = torch.randint(9, (4, 6), generator=generator)
    targets[0, 1:] = IGNORE  # one target in the first row
    n_targets = int((targets != IGNORE).sum())
    whole = cross_entropy(logits, targets)
    parts = sum(cross_entropy(x, y, n_targets=n_targets) for x, y in zip(logits, targets, strict=True))
    mean_of_means = sum(cross_entropy(x, y) / 4 for x, y in zip(logits, targets, strict=True))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    assert not torch.isclose(torch.as_tensor(mean_of_means), whole, rtol=1e-3)


# RWKV-PEFT fine-tunes RWKV-7 by the name rules of RWKV-5: w0 loses its double rate, and every matrix decays.


def test_fine_tuning_a_loaded_rwkv_7_decays_only_its_weight_matrices(tmp_path: Path) -> None:
    wkv.save(small_model(CONFIGS["7"].replace(vocab_size=256), dtype=torch.float32), tmp_path / "model.pth")
    model, _ = wkv.load(tmp_path / "model.pth")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = make_optimizers(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = torch.equal(parameter, before[name])
        factor = name.split(".")[-1]
        if factor in {"w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "r_k"} or ".ln" in f".{name}":
            assert kept, name
        if name.endswith(("key.weight", "emb.weight", "head.weight")):
            assert not kept, name
    rates = {n: group["lr"] for group in optimizer.param_groups for n in group["param_names"]}
    assert {name for name, rate in rates.items() if rate == 0.2} == {
        f"blocks.{layer}.att.w0" for layer in range(3)
    }


# fla initialises a float32 copy of a bfloat16 matrix and drops it; and a later pass overwrites the zeros of
# the output matrix.


@pytest.mark.parametrize("generation", sorted(BLOCKS))
def test_a_block_built_in_bfloat16_has_the_orthogonal_matrices_and_the_zeros(generation: str) -> None:
    def block() -> nn.Module:
        return BLOCKS[generation](CONFIGS[generation], 1)

    exact = block().state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        short = block()
    finally:
        torch.set_default_dtype(before)
    for name, value in short.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].bfloat16()), name
    W = exact["att.value.weight"]
    torch.testing.assert_close(W.mT @ W / (W.mT @ W)[0, 0], torch.eye(W.shape[1]), rtol=0, atol=1e-5)
    assert not exact["att.output.weight"].any() and not exact["ffn.value.weight"].any()


# transformers initialises RWKV-4's time_first with ones.


def test_the_bonus_of_rwkv_4_is_a_zigzag_around_the_logarithm_of_0_3() -> None:
    first = build(CONFIGS["4"]).blocks[1].att.time_first
    steps = torch.tensor([0.0, 0.5, -0.5]).repeat(16)
    torch.testing.assert_close(first.detach(), math.log(0.3) + steps)


# The table in RWKV-7's README is older than its training code, and prints the wrong width of the channel mix.


def test_rwkv_7_starts_from_the_values_of_the_training_code_and_not_of_its_readme() -> None:
    config = wkv.RWKV7Config.of_size(vocab_size=61, n_layer=3, n_embd=128)
    att = build(config).blocks[1].att
    assert config.dim_ffn == 4 * config.n_embd
    assert (att.r_k == -0.04).all() and (att.k_a == 1.02).all()
    ends = {"k_k": (0.71 + 0.05, 0.71 - 0.05), "v0": (0.73 + 0.2, 0.73 - 0.2), "a0": (-0.69, 0.31)}
    for name, (first, last) in ends.items():
        value = att.get_parameter(name).flatten()
        assert value[0].item() == pytest.approx(first), name
        assert value[-1].item() == pytest.approx(last), name


# RWKV-7's initialisation, and fla's, divide by n_layer - 1.


@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_a_model_of_one_layer_starts_finite_and_learns(generation: str) -> None:
    model = build(CONFIGS[generation].replace(n_layer=1))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokens = random_tokens(model, 2, 9)
    (optimizer,) = make_optimizers(model, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        hidden, _ = model(tokens[:, :-1], output="hidden")
        loss = linear_cross_entropy(hidden, model.head.weight, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_sizes_of_one_channel_start_finite_too() -> None:
    sizes: dict[str, Any] = {**SIZES, "n_embd": 1, "dim_att": 1, "dim_ffn": 1, "n_layer": 1}
    for config in (wkv.RWKV4Config(**sizes), wkv.RWKV7Config(**sizes, head_size=1)):
        assert all(torch.isfinite(p).all() for p in build(config).parameters())


# train_temp leaves the learning rate undefined when no end is set, or a negative one.


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential", "wsd", "constant"])
def test_the_learning_rate_is_a_number_from_0_to_1_whatever_the_settings(schedule: Any) -> None:
    for tokens, total, warmup, final in itertools.product(
        (0, 1, 10), (0, 1, 10), (0, 1, 10), (0.0, 0.5, 1.0)
    ):
        rate = learning_rate(schedule, tokens, total_tokens=total, warmup_tokens=warmup, final=final)
        assert 0 <= rate <= 1


# "There is no good RWKV-7 layer" for networks of other kinds: its recipe lives in the trainer.


class Foreign(nn.Module):
    def __init__(self, generation: str) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, 32)
        self.norm = nn.BatchNorm1d(3)
        self.blocks = nn.ModuleList(BLOCKS[generation](CONFIGS[generation], layer) for layer in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, v_first = self.inlet(x), None
        for block in self.blocks:
            x, v_first, _ = block(x, v_first)
        return x


@pytest.mark.parametrize("generation", sorted(BLOCKS))
def test_blocks_in_a_foreign_network_compute_what_they_do_in_a_model(generation: str) -> None:
    network, model = Foreign(generation).double(), small_model(generation)
    network.blocks.load_state_dict(model.blocks.state_dict())
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    nn.init.zeros_(model.emb.weight)
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        model.emb.weight[:18] = network.inlet(x).flatten(0, 1)
    model.ln_out = nn.Identity()
    torch.testing.assert_close(network(x), model(tokens, output="hidden")[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("generation", sorted(BLOCKS))
def test_blocks_in_a_foreign_network_have_a_start_of_their_own_and_one_for_each_layer(
    generation: str,
) -> None:
    network = Foreign(generation)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    first, second = (block.att.value.weight for block in list(network.blocks)[:2])
    assert not torch.equal(first, second)
    network(torch.randn(2, 5, 3)).square().mean().backward()
    assert all(p.grad is not None for p in network.blocks.parameters())


def test_initialising_a_foreign_network_leaves_what_is_not_ours_alone() -> None:
    network = Foreign("7")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    initialize(network, seed=7)
    for name, value in network.state_dict().items():
        if not name.startswith("blocks."):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(
        network.state_dict()["blocks.1.att.value.weight"], before["blocks.1.att.value.weight"]
    )
