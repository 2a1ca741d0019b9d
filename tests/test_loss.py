"""The training loss: L2Wrap, targets that do not count, and the form that never holds all the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wkv.training import loss as loss_module
from wkv.training.data.batches import IGNORE
from wkv.training.loss import cross_entropy, linear_cross_entropy

N, D, V = 23, 6, 11


class Recorder(TorchDispatchMode):
    """Every operation below autograd, with the dtypes and sizes of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append((function.overloadpacket.__name__, out))
        return out

    def dtypes(self, name: str) -> set[torch.dtype]:
        return {out.dtype for made, out in self.made if made == name}

    @property
    def n_products(self) -> int:
        return sum(name in ("mm", "addmm_") for name, _ in self.made)


def example(
    dtype: torch.dtype = torch.float64, *, by_column: bool = False, ignored: bool = True, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) and weight (V, D), whose values bfloat16 holds exactly, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator).bfloat16().to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    if ignored:
        targets[torch.tensor([0, 5, 6, N - 1])] = IGNORE
    weight = weight.mT.contiguous().mT if by_column else weight
    return hidden.bfloat16().to(dtype).requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time: several chunks, the last one shorter."""
    monkeypatch.setattr(loss_module, "_rows_per_chunk", lambda n_vocab, device: 4)


# --- the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_l2wrap_adds_the_gradient_of_its_formula_and_scales_with_the_loss(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(7, (3, 4), generator=generator)

    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    formula = plain + 0.5 * 1e-4 / (3 * 4) * (logits.max(dim=-1).values ** 2).sum()
    (expected,) = torch.autograd.grad(scale * formula, logits)

    loss = cross_entropy(logits, targets)
    (found,) = torch.autograd.grad(scale * loss, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15 * scale)
    torch.testing.assert_close(loss, plain, rtol=1e-15, atol=0)  # the value leaves the pull out


def test_targets_that_do_not_count_change_neither_value_nor_gradient() -> None:
    hidden, weight, targets = example()
    counts = targets != IGNORE
    for form in (
        lambda x, y: cross_entropy(x @ weight.mT, y, l2wrap=0.1),
        lambda x, y: linear_cross_entropy(x, weight, y, l2wrap=0.1),
    ):
        whole, without = form(hidden, targets), form(hidden[counts], targets[counts])
        torch.testing.assert_close(whole, without, rtol=1e-14, atol=0)
        for a, b in zip(
            torch.autograd.grad(whole, (hidden, weight)),
            torch.autograd.grad(without, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.int64)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(logits.double(), targets).item(), rel=1e-6)


# --- the form without logits --------------------------------------------------------------------------


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("l2wrap", [0.0, 0.3])
@pytest.mark.parametrize("n_targets", [None, 40, torch.tensor(40)])
@pytest.mark.usefixtures("small_chunks")
def test_in_chunks_value_and_gradients_are_those_of_the_logits(
    by_column: bool, l2wrap: float, n_targets: int | Tensor | None
) -> None:
    hidden, weight, targets = example(by_column=by_column)
    settings: dict[str, Any] = dict(l2wrap=l2wrap, n_targets=n_targets)
    expected = cross_entropy(hidden @ weight.mT, targets, **settings)
    found = linear_cross_entropy(hidden.view(1, N, D), weight, targets.view(1, N), **settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(-3 * loss, (hidden, weight)) for loss in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_the_derivatives_are_those_of_finite_differences() -> None:
    hidden, weight, targets = example(scale=0.5)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, l2wrap=0), (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_chunks")
def test_short_formats_err_by_their_rounding_only(dtype: torch.dtype) -> None:
    hidden, weight, targets = example(torch.float32)
    exact_hidden, exact_weight, _ = example(torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
    found.backward()
    logits = exact_hidden @ exact_weight.mT
    expected = cross_entropy(logits, targets)
    expected.backward()

    # A logit errs by its rounding and by that of the sum of its D terms, so p by twice as much, relatively.
    eps, eps32, counts = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps, (targets != IGNORE)
    x, W = exact_hidden.detach().abs(), exact_weight.detach().abs()
    logit_error = (eps * logits.abs() + D * eps32 * (x @ W.mT)).max().item()
    assert abs(found.item() - expected.item()) <= 2 * logit_error + 4 * eps32 * expected.item()
    size = (logits.softmax(-1) + F.one_hot(targets.clamp_min(0), V)) * counts[:, None] / counts.sum()
    relative = 2 * logit_error + 3 * eps + (N + V) * eps32
    assert hidden.grad is not None and exact_hidden.grad is not None
    assert weight.grad is not None and exact_weight.grad is not None
    assert ((hidden.grad - exact_hidden.grad).abs() <= relative * (size @ W)).all()
    assert ((weight.grad - exact_weight.grad).abs() <= relative * (size.mT @ x)).all()


@pytest.mark.usefixtures("small_chunks")
def test_all_chunks_of_logits_and_their_gradients_share_one_memory() -> None:
    hidden, weight, targets = example()
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, targets)
    chunks = [out for _, out in recorder.made if out.shape == (4, V)]
    assert len(chunks) > 10  # of five whole chunks: logits, p and what is added to it
    assert len({out.untyped_storage().data_ptr() for out in chunks}) == 1


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_products_are_short_and_all_sums_are_float32() -> None:
    hidden, weight, targets = example(torch.float32)
    with Recorder() as recorder, torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert recorder.dtypes("mm") == {torch.bfloat16}
    assert recorder.dtypes("softmax") == {torch.float32}
    assert loss.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.usefixtures("small_chunks")
def test_many_chunks_add_up_in_float32_for_a_bfloat16_weight() -> None:
    # Each chunk adds 1/256 of the first: summed in bfloat16, whose steps are wider, all would be lost.
    hidden = torch.full((1 + 4 * 256, 1), 1 / 256).bfloat16()
    hidden[0] = 4
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), n_targets=1).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-4.0, 4.0]  # half of 4 + 1024 / 256


@pytest.mark.parametrize("learning", ["both", "hidden", "weight", "neither", "no_grad"])
@pytest.mark.usefixtures("small_chunks")
def test_only_gradients_that_somebody_wants_are_computed(learning: str) -> None:
    hidden, weight, targets = example()
    expected = torch.autograd.grad(cross_entropy(hidden @ weight.mT, targets), (hidden, weight))
    hidden.requires_grad_(learning in ("both", "hidden", "no_grad"))
    weight.requires_grad_(learning in ("both", "weight", "no_grad"))
    with Recorder() as recorder, torch.set_grad_enabled(learning != "no_grad"):
        loss = linear_cross_entropy(hidden, weight, targets)
    per_chunk = {"both": 3, "hidden": 2, "weight": 2, "neither": 1, "no_grad": 1}[learning]
    assert recorder.n_products == per_chunk * 6
    assert loss.requires_grad == (learning in ("both", "hidden", "weight"))
    if loss.requires_grad:
        loss.backward()
        for found, wanted in ((hidden, expected[0]), (weight, expected[1])):
            if found.requires_grad:
                torch.testing.assert_close(found.grad, wanted, rtol=0, atol=1e-12)


def test_no_tensor_grows_with_tokens_times_vocabulary() -> None:
    def largest(n_tokens: int) -> int:
        hidden, weight = (
            torch.randn(n_tokens, 2, requires_grad=True),
            torch.randn(65536, 2, requires_grad=True),
        )
        targets = torch.zeros(n_tokens, dtype=torch.int64)
        with Recorder() as recorder:
            linear_cross_entropy(hidden, weight, targets).backward()
        return max(out.untyped_storage().nbytes() for _, out in recorder.made)

    assert largest(260) == largest(520) <= 2**26


@pytest.mark.parametrize("l2wrap", [0.0, 1e-4])
def test_a_batch_without_a_target_costs_nothing_and_teaches_nothing(l2wrap: float) -> None:
    hidden, weight, targets = example()
    targets = torch.full_like(targets, IGNORE)
    with torch.no_grad():
        hidden[3] = torch.nan
    for loss in (
        linear_cross_entropy(hidden, weight, targets, l2wrap=l2wrap),
        cross_entropy(hidden.nan_to_num() @ weight.mT, targets, l2wrap=l2wrap),
    ):
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_target_that_is_neither_a_token_nor_ignored_is_refused() -> None:
    hidden, weight, targets = example()
    for wrong in (-1, V):
        targets[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, targets)


# --- accumulation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", sorted(CONFIGS))
def test_micro_batches_add_up_to_the_gradient_of_the_large_batch(generation: str) -> None:
    model = small_model(generation)
    tokens = random_tokens(model, 5, 9)
    targets = tokens[:, 1:].clone()
    targets[0, :6], targets[3, 2:] = IGNORE, IGNORE  # so that rows have 2, 8, 8, 2 and 8 targets
    n_targets = int((targets != IGNORE).sum())

    def gradients(*parts: slice) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        value = 0.0
        for rows in parts:
            hidden, _ = model(tokens[rows, :-1], output="hidden")
            part = linear_cross_entropy(
                hidden, model.head.weight, targets[rows], l2wrap=0.1, n_targets=n_targets
            )
            part.backward()
            value += part.item()
        return value, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, expected = gradients(slice(5))
    value, found = gradients(slice(1), slice(1, 4), slice(4, 5))
    assert value == pytest.approx(whole, rel=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
