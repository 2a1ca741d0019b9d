"""A model is one function, however its tokens are cut, batched or padded."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONFIGS, random_tokens, small_model
from torch import Tensor

from wkv import State, ops
from wkv.config import RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from wkv.errors import Error, InputError, StateError
from wkv.models import RWKV, build

GENERATIONS = list(CONFIGS)
EXACT = 1e-9  # float64, absolute, on logits of order 1 to 10


def difference(a: State, b: State) -> float:
    """The largest difference of two states. RWKV-4 holds its sums over e^pp: compare them over one pp."""

    def meaning(state: State, other: State) -> list[Tensor]:
        tensors = []
        for layer, theirs in zip(state.layers, other.layers, strict=True):
            memory = layer.memory
            if memory.ndim == 3:
                pp = torch.maximum(memory[:, 2:], theirs.memory[:, 2:])
                memory = memory[:, :2] * torch.exp(memory[:, 2:] - pp)
            tensors += [layer.att_shift, memory, layer.ffn_shift]
        return tensors

    return max(float((x - y).detach().abs().max()) for x, y in zip(meaning(a, b), meaning(b, a), strict=True))


def run_in_pieces(model: RWKV, tokens: Tensor, cuts: list[int]) -> tuple[Tensor, State]:
    state, pieces = None, []
    for start, stop in pairwise([0, *cuts, tokens.shape[1]]):
        logits, state = model(tokens[:, start:stop], state)
        pieces.append(logits)
    assert state is not None
    return torch.cat(pieces, dim=1), state


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_the_parallel_form_is_the_recurrent_form(generation: str, device: torch.device) -> None:
    model = small_model(generation, device=device)
    tokens = random_tokens(model, 2, 100)
    logits, state = model(tokens)
    stepwise, last = run_in_pieces(model, tokens, list(range(1, 100)))
    assert float((logits - stepwise).abs().max()) < EXACT
    assert difference(state, last) < EXACT
    with ops.use_backend("reference"):
        by_definition, _ = model(tokens)
    assert float((logits - by_definition).abs().max()) < EXACT


@pytest.mark.parametrize("generation", GENERATIONS)
@given(cuts=st.lists(st.integers(1, 79), max_size=5, unique=True).map(sorted), seed=st.integers(0, 3))
def test_any_split_gives_the_same_logits_and_state(generation: str, cuts: list[int], seed: int) -> None:
    model = small_model(generation, seed=seed)
    tokens = random_tokens(model, 1, 80, seed)
    with torch.no_grad():
        logits, state = model(tokens)
        pieces, last = run_in_pieces(model, tokens, cuts)
    assert float((logits - pieces).abs().max()) < EXACT
    assert difference(state, last) < EXACT


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_padding_changes_nothing_for_any_row(generation: str, device: torch.device) -> None:
    model = small_model(generation, device=device)
    tokens = random_tokens(model, 4, 50)
    lengths = torch.tensor([1, 50, 17, 33], device=device)
    _, start = model(random_tokens(model, 4, 5, seed=1))
    logits, state = model(tokens, start, lengths=lengths)
    last, _ = model(tokens, start, lengths=lengths, output="last")
    for row, length in enumerate(lengths.tolist()):
        alone, after = model(tokens[row : row + 1, :length], start[row])
        assert float((logits[row, :length] - alone[0]).abs().max()) < EXACT
        assert float((last[row, 0] - alone[0, -1]).abs().max()) < EXACT
        assert difference(state[row], after) < EXACT


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_are_those_of_the_recurrence_and_reach_the_initial_state(
    generation: str, device: torch.device
) -> None:
    model = small_model(generation, device=device)
    tokens = random_tokens(model, 2, 40)
    with torch.no_grad():
        _, start = model(random_tokens(model, 2, 7, seed=1))

    def gradients(cuts: list[int]) -> list[Tensor]:
        state = start.map(lambda x: x.detach().requires_grad_())
        inputs = [*model.parameters(), *state.tensors().values()]
        total = torch.zeros((), dtype=torch.float64, device=device)
        current = state
        for begin, end in pairwise([0, *cuts, 40]):
            logits, current = model(tokens[:, begin:end], current)
            total = total + torch.log_softmax(logits, -1)[..., 3].sum()
        for layer in current.layers:  # what a later call would make of the final state
            memory = layer.memory
            if memory.ndim == 3:
                memory = memory[:, :2] * torch.exp(memory[:, 2:].detach())
            total = total + layer.att_shift.sum() + memory.sum() + layer.ffn_shift.sum()
        return list(torch.autograd.grad(total, inputs, materialize_grads=True))

    parallel, stepwise = gradients([]), gradients(list(range(1, 40)))
    for x, y in zip(parallel, stepwise, strict=True):
        assert float((x - y).abs().max()) <= 1e-9 * max(1.0, float(y.abs().max()))
    memory_of_layer_1 = list(start.tensors()).index("blocks.1.memory") - len(list(start.tensors()))
    assert parallel[memory_of_layer_1].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_the_memory_is_never_kept_in_a_short_format(
    generation: str, dtype: torch.dtype, device: torch.device
) -> None:
    model = small_model(generation, dtype=dtype, device=device)
    tokens = random_tokens(model, 2, 30)
    logits, state = model(tokens)
    assert logits.dtype == dtype
    memory = torch.float64 if dtype == torch.float64 else torch.float32
    for layer in state.layers:
        assert (layer.att_shift.dtype, layer.memory.dtype, layer.ffn_shift.dtype) == (dtype, memory, dtype)
    exact, _ = copy.deepcopy(model).double()(tokens)  # the same rounded weights, computed exactly
    spread, eps = float(exact.std()), torch.finfo(dtype).eps
    # Some 20 roundings a layer over 3 layers, each of which may double before the head.
    assert float((logits.double() - exact).abs().max()) < 120 * eps * spread


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_the_outputs_are_views_of_one_computation(generation: str, device: torch.device) -> None:
    model = small_model(generation, device=device)
    tokens = random_tokens(model, 2, 12)
    logits, state = model(tokens)
    last, _ = model(tokens, output="last")
    hidden, _ = model(tokens, output="hidden")
    assert last.shape == (2, 1, model.config.vocab_size)
    assert float((last - logits[:, -1:]).abs().max()) < EXACT
    assert float((model.head(hidden) - logits).abs().max()) < EXACT
    assert state.nbytes == sum(x.nbytes for x in state.tensors().values())


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_a_state_is_a_value(generation: str, device: torch.device) -> None:
    model = small_model(generation, device=device)
    _, state = model(random_tokens(model, 3, 9))
    kept = state.clone()
    one, _ = model(random_tokens(model, 3, 5), state)
    assert difference(state, kept) == 0  # not changed by the call
    again, _ = model(random_tokens(model, 3, 5), state)
    assert torch.equal(one, again)
    rebuilt = State.stack([state[2], state[0:2]])[torch.tensor([1, 2, 0])]
    assert difference(rebuilt, state) == 0
    assert difference(State.from_tensors(state.tensors()), state) == 0
    assert state[-1].batch_size == 1


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("ffn_activation", ["relu2", "relu"])
@torch.no_grad()
def test_the_knobs_of_new_models_change_the_function(norm: str, ffn_activation: str) -> None:
    model = small_model(CONFIGS["7"].replace(norm=norm, ffn_activation=ffn_activation))
    plain = small_model("7")
    tokens = random_tokens(model, 1, 20)
    official = norm == "layernorm" and ffn_activation == "relu2"
    names = set(dict(model.named_parameters()))
    assert ("ln_out.bias" in names) == (norm == "layernorm")
    if norm == "layernorm":
        assert torch.equal(model(tokens)[0], plain(tokens)[0]) == official
    stepwise, _ = run_in_pieces(model, tokens, list(range(1, 20)))
    assert float((model(tokens)[0] - stepwise).abs().max()) < EXACT


def test_published_sizes_have_their_published_parameter_counts() -> None:
    published = {
        RWKV4Config: [169342464, 430397440, 1515106304, 2984627200, 7392649216, 14148597760],
        RWKV5Config: [192807936, 461721600, 1577754624, 3062999040, 7518044160],
        RWKV6Config: [196955136, 472780800, 1599873024, 3099863040, 7635746816, 14069088256],
        RWKV7Config: [191034624, 450767872, 1527404544, 2947735040, 7199141888, 13269245952],
    }
    for config, counts in published.items():
        models = (build(config.named(name), device="meta") for name in config.sizes)
        assert [sum(p.numel() for p in model.parameters()) for model in models] == counts
    # Peng et al. 2023, appendix: 2 V D + 13 D^2 L + D (11 L + 4).
    for name in RWKV4Config.sizes:
        c = RWKV4Config.named(name)
        V, D, L = c.vocab_size, c.n_embd, c.n_layer
        assert 2 * V * D + 13 * D * D * L + D * (11 * L + 4) in published[RWKV4Config]


def test_a_new_model_is_reproducible_and_a_meta_model_takes_no_memory() -> None:
    config = CONFIGS["7"]
    assert build(config, seed=1).fingerprint() == build(config, seed=1).fingerprint()
    assert build(config, seed=1).fingerprint() != build(config, seed=2).fingerprint()
    assert all(p.is_meta for p in build(RWKV7Config.named("13.3B"), device="meta").parameters())
    assert all(torch.isfinite(p).all() for p in build(config).parameters())


def test_the_fingerprint_follows_every_weight_and_the_dtype() -> None:
    model = small_model("7", dtype=torch.float32)
    before = model.fingerprint()
    assert copy.deepcopy(model).fingerprint() == before
    assert copy.deepcopy(model).bfloat16().fingerprint() != before
    with torch.no_grad():
        model.blocks[1].att.k_k[0, 0, 3] += 1e-3
    assert model.fingerprint() != before


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[3, -1]]), "token id -1"),
        (torch.tensor([[3, 61]]), "token id 61.*0 to 60"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(B, T\)"),
        (torch.zeros(1, 3), "int64"),
    ],
)
def test_bad_tokens_are_refused(tokens: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        small_model("7")(tokens)


def test_bad_lengths_are_refused() -> None:
    model = small_model("4")
    tokens = random_tokens(model, 2, 5)
    for lengths in (torch.tensor([0, 5]), torch.tensor([6, 1]), torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(InputError, match="lengths"):
            model(tokens, lengths=lengths)


def test_a_foreign_state_is_refused() -> None:
    model = small_model("7")
    tokens = random_tokens(model, 2, 3)
    _, good = model(tokens)
    wrong = {
        "1 rows": good[0],
        "2 layers": State(good.layers[:2]),
        "torch.float32": good.map(torch.Tensor.float),
        "memory is": model_state("4"),
        "is a dict": good.tensors(),
        "on meta": good.to("meta"),
    }
    for words, state in wrong.items():
        with pytest.raises(StateError, match=f"{words}.*Expected"):
            model(tokens, state)
    with pytest.raises(StateError):
        good[2]
    with pytest.raises(Error):
        State.stack([])
    with pytest.raises(Error):
        State.from_tensors({"blocks.0.memory": torch.zeros(1)})


def model_state(generation: str) -> State:
    model = small_model(generation)
    return model(random_tokens(model, 2, 3))[1]


def test_a_tuned_initial_state_is_where_a_fresh_start_begins() -> None:
    model = small_model(CONFIGS["6"].replace(time_state=True))
    tokens = random_tokens(model, 2, 9)
    state = model.initial_state(2)
    assert torch.equal(state.layers[1].memory[1], model.blocks[1].att.time_state)
    assert torch.equal(model(tokens)[0], model(tokens, state)[0])
    (gradient,) = torch.autograd.grad(model(tokens)[0].sum(), [model.blocks[0].att.time_state])
    assert gradient.abs().max() > 0
