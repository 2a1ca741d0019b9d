"""Sampling: the official distribution, the reasons to differ from it, and the same text for the same seed."""

import math
import warnings

import numpy as np
import pytest
import torch

from wkv.errors import InputError
from wkv.inference.sampling import (
    Sampler,
    Sampling,
    candidates,
    distribution,
    draw,
    is_exempt,
    log_probabilities,
    penalise,
)

WORLD = 65536


def logits_like(kind: str, size: int, seed: int = 0) -> torch.Tensor:
    """Logits of a sure model (a small nucleus), an unsure one, or an untrained one (most of the tokens)."""
    scale = {"sure": 6.0, "unsure": 3.0, "untrained": 0.5}[kind]
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def plain(**settings) -> Sampling:
    """Settings with everything off but what is named."""
    off = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return Sampling(**{**off, **settings})


@pytest.fixture(scope="module")
def official():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("rwkv.utils")


def official_distribution(official, monkeypatch, logits, **settings) -> torch.Tensor:
    """What PIPELINE.sample_logits would draw from: the weights that it hands to NumPy."""
    seen = []
    monkeypatch.setattr(official.np.random, "choice", lambda a, p: seen.append(p.copy()) or 0)
    official.PIPELINE.sample_logits(None, logits.clone(), **settings)
    return torch.from_numpy(seen[0])


@pytest.mark.parametrize("size", [300, WORLD])
@pytest.mark.parametrize("kind", ["sure", "unsure", "untrained"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.3, "top_p": 0.5},
        {"temperature": 2.0, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.95, "top_k": 40},
        {"top_k": 5},
        {"top_p": 0.0},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_official_package(official, monkeypatch, settings, kind, size):
    logits = logits_like(kind, size)
    expected = official_distribution(official, monkeypatch, logits, **settings)
    got = distribution(logits, Sampling(**settings))
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [1, 300, WORLD])
@pytest.mark.parametrize("kind", ["sure", "unsure", "untrained"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"top_p": 0.0},
        {"top_p": 0.5, "temperature": 0.3},
        {"top_p": 0.9999, "temperature": 2.0},
        {"top_k": 40},
        {"top_k": 5, "top_p": 0.9},
        {"min_p": 0.05},
        {"min_p": 0.2, "top_p": 0.99, "top_k": 1000},
    ],
    ids=str,
)
def test_the_candidates_are_the_tokens_of_the_distribution(settings, kind, size):
    logits = logits_like(kind, size)
    logits[size // 2 + 1 :] = -torch.inf
    expected = distribution(logits, plain(**settings))
    ids, probabilities = candidates(logits, plain(**settings))
    assert ids.equal(ids.sort().values)
    assert ids[probabilities > 0].equal(expected.nonzero()[:, 0])
    torch.testing.assert_close(probabilities, expected[ids], rtol=1e-5, atol=1e-12)


def test_greedy_text_under_penalties_is_that_of_the_official_package(official):
    vocab_size = 40
    table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(1))

    class Model:
        def forward(self, tokens, state):
            return table[tokens[-1]].clone(), None

    class Letters:
        def encode(self, text):
            return [ord(letter) - 200 for letter in text]

        def decode(self, ids):
            return "".join(chr(200 + token) for token in ids)

    pipeline = official.PIPELINE.__new__(official.PIPELINE)
    pipeline.model, pipeline.tokenizer = Model(), Letters()
    args = official.PIPELINE_ARGS(temperature=0, alpha_presence=0.3, alpha_frequency=0.4, alpha_decay=0.97)
    expected = pipeline.generate(chr(200), token_count=400, args=args)

    sampler = Sampler(
        Sampling(temperature=0, presence_penalty=0.3, frequency_penalty=0.4, penalty_decay=0.97), vocab_size
    )
    tokens = [0]
    for _ in range(400):
        tokens.append(sampler.pick(table[tokens[-1]]))
        sampler.record(tokens[-1])
    assert Letters().decode(tokens[1:]) == expected
    assert len(set(expected)) > 10  # the penalties did bite


@pytest.mark.parametrize("kind", ["sure", "unsure", "untrained"])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.85, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(kind, top_p):
    logits = logits_like(kind, WORLD, seed=2)
    kept = distribution(logits, plain(top_p=top_p)) > 0
    exact = logits.double().softmax(-1)[kept]
    rounding = 1e-5  # of a float32 softmax over this many
    assert exact.sum() - exact.min() - rounding < top_p <= exact.sum() + rounding
    assert logits[kept].min() > logits[~kept].max()


def test_tokens_that_tie_with_the_last_of_the_nucleus_stay():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, -9.0])
    assert distribution(logits, plain(top_p=0.75)).gt(0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("kind", ["sure", "unsure", "untrained"])
def test_top_p_one_keeps_every_token_although_float32_sums_miss_one_on_either_side(kind):
    logits = logits_like(kind, WORLD)
    assert distribution(logits, plain(top_p=1.0)).gt(0).all()


def test_heat_does_not_let_more_tokens_into_the_nucleus():
    logits = logits_like("unsure", 1000)
    cold, hot = (distribution(logits, plain(top_p=0.5, temperature=t)) for t in (0.5, 5.0))
    assert torch.equal(cold > 0, hot > 0)
    assert cold.max() > hot.max()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_those_that_tie(k):
    logits = torch.tensor([0.0, 2.0, 5.0, 2.0, 2.0, -1.0])
    kept = distribution(logits, plain(top_k=k)).gt(0).nonzero().flatten().tolist()
    assert kept == sorted([2, 1, 3, 4, 0][:k])


def test_top_k_of_more_than_all_is_all():
    assert distribution(torch.zeros(5), plain(top_k=9)).tolist() == pytest.approx([0.2] * 5)


def test_min_p_is_measured_by_the_best_token():
    probabilities = torch.tensor([0.5, 0.26, 0.14, 0.1])
    kept = distribution(probabilities.log(), plain(min_p=0.25))
    assert kept.tolist() == pytest.approx([0.5 / 0.9, 0.26 / 0.9, 0.14 / 0.9, 0.0])


def test_rows_do_not_affect_each_other():
    rows = torch.stack([logits_like(kind, 2000) for kind in ("sure", "untrained", "unsure")])
    for settings in (Sampling(), Sampling(temperature=0), Sampling(top_k=7, min_p=0.01, temperature=0.4)):
        alone = torch.stack([distribution(row, settings) for row in rows])
        assert torch.equal(distribution(rows, settings), alone)


def test_greedy_takes_the_lowest_id_of_equals_after_bias_and_penalties():
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert Sampler(plain(temperature=0), 4).pick(logits) == 1
    assert Sampler(plain(temperature=0, logit_bias={3: 1.0}), 4).pick(logits) == 1
    assert Sampler(plain(temperature=0, logit_bias={3: 1.5}), 4).pick(logits) == 3
    sampler = Sampler(plain(temperature=0, presence_penalty=0.5), 4)
    sampler.record(1)
    assert sampler.pick(logits) == 2


@pytest.mark.parametrize("settings", [{"temperature": 1e-4}, {"temperature": 100.0}, {"top_p": 0.0}])
@pytest.mark.parametrize("bias", [{}, {3: 1e30}, {3: -1e30}, dict.fromkeys(range(9), -1e30)])
def test_extreme_settings_give_probabilities(settings, bias):
    sampler = Sampler(plain(**settings, logit_bias=bias, seed=0), 10)
    logits = torch.tensor([1e4, -1e4, 0.0, 5.0, -math.inf, 80.0, 80.0, 1.0, 2.0, 3.0])
    chosen = distribution(logits + torch.tensor([bias.get(i, 0.0) for i in range(10)]), plain(**settings))
    assert chosen.sum() == pytest.approx(1.0, abs=1e-5)
    assert chosen[sampler.pick(logits)] > 0


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    n = 40_000
    tokens = draw(probabilities.expand(n, 5), torch.Generator().manual_seed(0))
    frequency = tokens.bincount(minlength=5) / n
    assert frequency[1] == 0
    assert (frequency - probabilities).abs().max() < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_no_random_number_can_draw_a_token_of_probability_zero(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, uniform, dtype=torch.float64))
    for total in (0.9999, 1.0, 1.0001):
        probabilities = torch.tensor([0.0, 0.1, 0.0, 0.9, 0.0]) * total
        assert int(draw(probabilities, torch.Generator())) in (1, 3)


def test_the_same_seed_draws_the_same_tokens_whatever_else_is_random():
    logits = logits_like("unsure", 500)

    def text(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), 500)
        return [sampler.pick(logits) for _ in range(30)]

    first = text(7)
    torch.manual_seed(123)
    np.random.seed(123)
    assert text(7) == first
    assert text(8) != first
    assert text(None) != text(None)


def test_the_global_random_generator_is_left_alone():
    before = torch.get_rng_state()
    for seed in (3, None):
        Sampler(Sampling(seed=seed), 50).pick(torch.zeros(50))
    assert torch.equal(torch.get_rng_state(), before)


def test_penalties_count_occurrences_that_fade():
    sampler = Sampler(plain(presence_penalty=1.0, frequency_penalty=10.0, penalty_decay=0.5), 4)
    for token in (2, 1, 2):
        sampler.record(token)
    scores = penalise(torch.zeros(4), sampler._seen, sampler._counts, sampler.sampling)
    assert scores.tolist() == [0.0, -1 - 10 * 0.5, -1 - 10 * (0.25 + 1), 0.0]


def test_an_exempt_token_ages_the_others_and_is_not_penalised_itself():
    sampler = Sampler(plain(presence_penalty=1.0, frequency_penalty=10.0, penalty_decay=0.5), 2)
    sampler.record(0)
    sampler.record(1, penalised=False)
    scores = penalise(torch.zeros(2), sampler._seen, sampler._counts, sampler.sampling)
    assert scores.tolist() == [-1 - 10 * 0.5, 0.0]


@pytest.mark.parametrize("piece", [b"1", b"12", b"21", b" 7", b"  ", b"\t\t", b""])
def test_blanks_and_digits_are_exempt(piece):
    assert is_exempt(piece)


@pytest.mark.parametrize("piece", [b"a1", b"\n", b" a", b"1.", b"\xe4", "１".encode()])
def test_everything_else_is_penalised(piece):
    assert not is_exempt(piece)


def test_the_repetition_penalty_pulls_seen_logits_down_on_both_sides_of_zero():
    seen = torch.tensor([1.0, 1.0, 0.0])
    scores = penalise(torch.tensor([4.0, -4.0, 4.0]), seen, torch.zeros(3), plain(repetition_penalty=2.0))
    assert scores.tolist() == [2.0, -8.0, 4.0]


def test_a_forbidden_token_is_never_drawn_and_a_forced_one_always():
    forbidden = Sampler(plain(logit_bias={0: -1e10}, seed=0), 3)
    forced = Sampler(plain(logit_bias={2: 1e10}, seed=0), 3)
    logits = torch.tensor([50.0, 0.0, 0.0])
    assert {forbidden.pick(logits) for _ in range(50)} == {1, 2}
    assert {forced.pick(logits) for _ in range(50)} == {2}


def test_ids_without_text_are_never_drawn():
    sampler = Sampler(plain(seed=0), 8, n_known=5)
    assert {sampler.pick(torch.tensor([0.0] * 5 + [9.0] * 3)) for _ in range(60)} == set(range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_are_sampled_and_not_changed(dtype):
    logits = torch.randn(100).to(dtype)
    before = logits.clone()
    sampler = Sampler(Sampling(seed=1, logit_bias={4: 2.0}), 100)
    sampler.record(3)
    assert 0 <= sampler.pick(logits) < 100
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(bad):
    logits = torch.zeros(9)
    logits[4] = bad
    with pytest.raises(InputError, match=f"best logit is {bad}"):
        Sampler(Sampling(), 9).pick(logits)
    with pytest.raises(InputError, match="best logit is -inf"):
        Sampler(Sampling(), 9).pick(torch.full((9,), -math.inf))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-6},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"top_k": -1},
        {"top_k": 2.0},
        {"min_p": 2},
        {"presence_penalty": math.inf},
        {"frequency_penalty": 1e9},
        {"penalty_decay": 1.5},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 0.5},
        {"logit_bias": [1, 2]},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**settings)


def test_a_bias_for_a_token_that_the_model_lacks_is_refused():
    with pytest.raises(InputError, match=r"logit_bias names token 10\. Expected: an id below 10"):
        Sampler(Sampling(logit_bias={10: 1.0}), 10)


def test_settings_do_not_change_when_the_callers_dictionary_does():
    bias = {1: 2.0}
    settings = Sampling(logit_bias=bias)
    bias[1] = 3.0
    assert settings.logit_bias == {1: 2.0}


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = torch.tensor([0.1, 0.2, 0.6, 0.1]).log() + 3
    chosen, top = log_probabilities(logits, 1, k=2)
    assert chosen == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in top] == [2, 1]
    assert [value for _, value in top] == pytest.approx([math.log(0.6), math.log(0.2)], abs=1e-6)
    assert log_probabilities(logits, 1, k=0)[1] == ()
    assert len(log_probabilities(logits, 1, k=99)[1]) == 4
