"""bfloat16 products with float32 weights: what is short, what stays float32, and how far the loss moves."""

from __future__ import annotations

import pytest
import torch
from operators import OPERATORS, arguments
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor

from wkv.models import RWKV
from wkv.ops import use_backend
from wkv.training.loss import linear_cross_entropy


def loss_and_state(model: RWKV, tokens: Tensor, *, autocast: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, state = model(tokens[:, :-1], output="hidden")
        loss = linear_cross_entropy(hidden, model.head.weight, tokens[:, 1:])
    return loss, [x for layer in state.layers for x in layer]


def gradients(model: RWKV) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_weights_gradients_and_states_stay_float32_and_the_loss_stays_close(generation: str) -> None:
    model = small_model(generation, dtype=torch.float32)
    tokens = random_tokens(model, 3, 50)
    exact, _ = loss_and_state(model, tokens, autocast=False)
    exact.backward()
    expected = gradients(model)
    model.zero_grad()

    loss, state = loss_and_state(model, tokens, autocast=True)
    loss.backward()
    assert {loss.dtype, *(x.dtype for x in state)} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert loss.item() != exact.item()  # products were rounded
    assert loss.item() == pytest.approx(exact.item(), rel=2**-7)

    # Closer to the gradient in float32 than a model is whose weights are bfloat16 as well.
    short = small_model(generation, dtype=torch.bfloat16)
    loss_and_state(short, tokens, autocast=False)[0].backward()
    error, error_of_short = (gradients(x).sub(expected).norm().item() for x in (model, short))
    assert error < error_of_short


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operators_sum_as_they_do_without_autocast(name: str, backend: str | None) -> None:
    inputs = arguments(name, 2, 40, dtype=torch.float32)
    operator = OPERATORS[name]

    def outputs() -> tuple[Tensor, Tensor]:
        if backend is None:
            return operator.run(*inputs)
        with use_backend(backend):
            return operator.run(*inputs)

    expected = outputs()
    gradients = torch.autograd.grad(sum(x.sum() for x in expected), inputs, allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs()
    found_gradients = torch.autograd.grad(sum(x.sum() for x in found), inputs, allow_unused=True)
    for a, b in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_backward_inside_autocast_sums_in_float32_too(name: str) -> None:
    inputs = arguments(name, 2, 40, dtype=torch.float32)
    expected = torch.autograd.grad(OPERATORS[name].run(*inputs)[0].sum(), inputs, allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(OPERATORS[name].run(*inputs)[0].sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
