"""The parts of training: what is read, what is minimised, what is measured, and the loop around them."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.config import RWKV7Config
from wkv.errors import DivergenceError, InputError
from wkv.evaluation import (
    gzip_bits_per_byte,
    measure_compression,
    parallel_recurrent_difference,
    seconds_per_token,
)
from wkv.models import RWKV, build
from wkv.training import (
    Document,
    adamw,
    bits_per_byte,
    cross_entropy,
    parameter_groups,
    set_learning_rate,
    split,
    standard_library,
    train,
    warmup_cosine,
    windows,
)

LINES = [f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(400)]
TEXT = b"".join(LINES)


def small_model(device: torch.device) -> RWKV:
    config = RWKV7Config(
        vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16,
        decay_rank=8, rate_rank=8, value_rank=8, gate_rank=8,
    )  # fmt: skip
    return build(config, seed=1, device=device)


@pytest.fixture
def model(device: torch.device) -> RWKV:
    """A model whose every layer matters: the official initialisation has zero matrices."""
    model = small_model(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.to(device)
    return model


# --- text ---------------------------------------------------------------------------------------------


def test_the_corpus_is_the_library_of_this_interpreter_without_tests_and_tables() -> None:
    documents = standard_library()
    paths = [document.path for document in documents]
    assert paths == sorted(paths)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "unittest/case.py"} <= set(paths)
    folders = {folder for path in paths for folder in path.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"})
    assert all(document.text for document in documents)
    assert 350 < len(documents) < 600
    assert 6e6 < sum(len(document.text) for document in documents) < 12e6
    assert dict(documents)["argparse.py"] == Path(argparse.__file__).read_bytes()


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(InputError, match=r"holds 1 Python files"):
        standard_library(tmp_path)


def test_the_split_holds_out_whole_files_chosen_by_the_seed() -> None:
    documents = [Document(f"{i:03}.py", b"%d" % i) for i in range(100)]
    read, held_out = split(documents, seed=1)
    assert len(held_out) == 5
    assert sorted(read + held_out) == documents
    assert read == sorted(read) and held_out == sorted(held_out)
    assert split(documents, seed=1) == (read, held_out)
    assert split(documents, seed=2)[1] != held_out


def test_windows_are_stretches_of_single_documents() -> None:
    documents = [
        Document("a", bytes(range(50))),
        Document("b", bytes(range(100, 200))),
        Document("c", b"short"),
    ]
    batches = windows(documents, batch_size=7, length=10, seed=0)
    for batch in itertools.islice(batches, 50):
        assert batch.shape == (7, 11) and batch.dtype == torch.int64
        for row in batch.tolist():
            assert any(bytes(row) in document.text for document in documents)


def test_windows_reach_every_place_equally_often() -> None:
    documents = [Document("a", bytes(range(12))), Document("b", bytes(range(100, 120)))]
    batches = windows(documents, batch_size=100, length=8, seed=0)
    starts = [row[0] for batch in itertools.islice(batches, 64) for row in batch.tolist()]
    places = [0, 1, 2, 3, *range(100, 112)]
    assert sorted(set(starts)) == places
    for place in places:
        assert starts.count(place) == pytest.approx(400, abs=100)


def test_windows_repeat_with_the_seed_and_refuse_what_is_too_short() -> None:
    documents = [Document("a", TEXT)]
    one, two, other = (next(windows(documents, batch_size=2, length=20, seed=s)) for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    with pytest.raises(InputError, match="no document has more than 20 bytes"):
        next(windows([Document("a", bytes(20))], batch_size=2, length=20, seed=0))


# --- loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_l2wrap_adds_the_gradient_of_its_formula_and_scales_with_the_loss(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(7, (3, 4), generator=generator)

    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    formula = plain + 0.5 * 1e-4 / (3 * 4) * (logits.max(dim=-1).values ** 2).sum()
    (expected,) = torch.autograd.grad(scale * formula, logits)

    loss = cross_entropy(logits, targets)
    (found,) = torch.autograd.grad(scale * loss, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert loss.item() == plain.item()  # the value leaves the pull out


def test_accumulating_two_halves_gives_the_gradient_of_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 11, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(11, (4, 5), generator=generator)
    (whole,) = torch.autograd.grad(cross_entropy(logits, targets, l2wrap=0.1), logits)
    halves = sum(
        0.5 * cross_entropy(logits[rows], targets[rows], l2wrap=0.1) for rows in (slice(2), slice(2, 4))
    )
    (accumulated,) = torch.autograd.grad(halves, logits)
    torch.testing.assert_close(accumulated, whole)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.int64)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(logits.double(), targets).item(), rel=1e-6)


# --- held-out loss ------------------------------------------------------------------------------------


def bits_of_one(model: RWKV, text: bytes) -> float:
    """The definition: log2(256) for the first byte, then each byte given all before it."""
    tokens = torch.tensor([list(text)], device=model.device)
    with torch.no_grad():
        logits, _ = model(tokens)
    logp = logits[0, :-1].double().log_softmax(-1)
    costs = -logp.gather(-1, tokens[0, 1:, None]) / math.log(2)
    return 8 + costs.sum().item()


def test_bits_per_byte_do_not_depend_on_batches_padding_or_chunks(model: RWKV) -> None:
    texts = [TEXT[:37], TEXT[100:300], b"x", b"", TEXT[40:42], TEXT[:129], TEXT[5:134], TEXT[7:71]]
    expected = sum(bits_of_one(model, text) for text in texts if text) / sum(map(len, texts))
    for batch_size, chunk_tokens in [(1, 1000), (8, 64), (3, 16), (8, 1), (2, 128)]:
        found = bits_per_byte(model, texts, batch_size=batch_size, chunk_tokens=chunk_tokens)
        assert found == pytest.approx(expected, rel=1e-6)


def test_an_untrained_model_needs_eight_bits_per_byte(device: torch.device) -> None:
    model = small_model(device)
    nn.init.zeros_(model.head.weight)
    assert bits_per_byte(model, LINES[:9]) == pytest.approx(8, abs=1e-6)


# --- compressors --------------------------------------------------------------------------------------


def test_the_compressors_are_gzip_9_and_xz_9() -> None:
    library = b"".join(document.text for document in standard_library())
    primer, text = library[:200_000], library[200_000:400_000]
    found = measure_compression(text, primer=primer)
    assert found.gzip == gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)
    sizes = [len(lzma.compress(read, preset=9)) for read in (text, primer, primer + text)]
    assert found.xz == 8 * sizes[0] / len(text)
    assert found.xz_primed == 8 * (sizes[2] - sizes[1]) / len(text)


def test_a_long_primer_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wkv.evaluation.compression._XZ_9_DICTIONARY_BYTES", 1 << 16)
    noise = torch.randint(256, (200_000,), generator=torch.Generator().manual_seed(0))
    text = bytes(noise[:20_000].tolist())
    assert measure_compression(text, primer=bytes(noise.tolist())).xz_primed < 0.2


def test_a_primed_compressor_knows_the_text_that_it_has_read() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(256, (20_000,), generator=generator).tolist())
    found = measure_compression(noise, primer=noise + bytes(1000))
    assert found.gzip > 7.9 and found.xz > 7.9
    assert found.xz_primed < 0.1


# --- optimizer ----------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    factor = [warmup_cosine(done / 100, warmup=0.1, final=0.2) for done in range(101)]
    assert factor[0] == 0.01
    assert factor[5] == pytest.approx(0.505)
    assert factor[10] == 1
    assert factor[55] == pytest.approx(0.6)  # half-way down
    assert factor[100] == pytest.approx(0.2)
    assert all(a < b for a, b in itertools.pairwise(factor[:11]))
    assert all(a > b for a, b in itertools.pairwise(factor[10:]))
    assert warmup_cosine(1.7, warmup=0.1, final=0.2) == pytest.approx(0.2)
    assert warmup_cosine(0, warmup=0, final=0.2) == 1


def test_learning_rate_multiples_survive_the_schedule(device: torch.device) -> None:
    optimizer = adamw(small_model(device), lr=1e-3, weight_decay=0.1)
    for factor in (0.01, 1.0, 0.3):
        set_learning_rate(optimizer, factor)
        rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
        assert rates["blocks.0.att.w0"] == pytest.approx(2e-3 * factor)
        assert rates["blocks.0.att.key.weight"] == rates["blocks.1.ln1.bias"] == pytest.approx(1e-3 * factor)


def test_learning_rate_multiples_survive_a_scheduler_of_torch(device: torch.device) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(small_model(device), lr=1e-3, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step()
    scheduler.step()
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["blocks.0.att.w0"] == pytest.approx(1e-3)
    assert rates["blocks.0.att.key.weight"] == pytest.approx(5e-4)


def test_adamw_has_the_official_settings_and_decays_what_the_recipe_decays(device: torch.device) -> None:
    model = small_model(device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-18}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = name.endswith("weight") and ".ln" not in f".{name}"
        expected = before[name] * (0.95 if decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


# --- loop ---------------------------------------------------------------------------------------------


def batches(seed: int = 0) -> Iterator[Tensor]:
    return windows([Document("a", TEXT)], batch_size=4, length=32, seed=seed)


def test_a_hundred_steps_of_training_lower_the_loss(device: torch.device) -> None:
    model = small_model(device)
    before = bits_per_byte(model, [TEXT[:500]])
    steps = train(model, batches(), adamw(model, lr=1e-2, weight_decay=0.1), minutes=1e6, warmup=0)
    history = list(itertools.islice(steps, 100))
    assert history[0].loss > 5.5
    assert bits_per_byte(model, [TEXT[:500]]) < 0.5 * before
    assert [progress.step for progress in history] == list(range(1, len(history) + 1))
    assert history[-1].tokens == 100 * 4 * 32


def test_the_schedule_follows_training_time_and_not_what_the_caller_does_in_between(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    paused = 0.0
    # The clock moves a second whenever somebody looks, and training looks at both ends of a step.
    monkeypatch.setattr("wkv.training.loop.perf_counter", lambda: next(ticks) + paused)
    optimizer = adamw(small_model(device), lr=1e-3, weight_decay=0.0)
    factors, seconds = [], []
    for progress in train(small_model(device), batches(), optimizer, minutes=10 / 60, warmup=0.2, final=0.1):
        factors.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"])
        seconds.append(progress.seconds)
        paused += 1000  # a long look at the samples
    assert seconds == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert progress.done == 1
    assert factors == pytest.approx([warmup_cosine(i / 10, warmup=0.2, final=0.1) for i in range(10)])


def test_training_stops_before_a_step_when_the_loss_is_not_finite(device: torch.device) -> None:
    model = small_model(device)
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    with torch.no_grad():
        model.blocks[1].ffn.value.weight[0, 0] = math.inf
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"at step 1 the loss is nan.*Try: a smaller learning rate"):
        list(train(model, batches(), optimizer, minutes=1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_training_repeats_exactly_with_the_same_seeds(device: torch.device) -> None:
    def losses() -> list[float]:
        model = small_model(device)
        optimizer = adamw(model, lr=1e-2, weight_decay=0.1)
        steps = train(model, batches(seed=5), optimizer, minutes=1e6, warmup=0)  # time hardly moves the rate
        return [progress.loss for progress in itertools.islice(steps, 5)]

    first, again = losses(), losses()
    assert first == pytest.approx(again, abs=1e-4 if device.type == "cuda" else 0)


# --- what RWKV promises -------------------------------------------------------------------------------


def test_both_forms_differ_by_rounding_only_and_a_broken_model_is_noticed(model: RWKV) -> None:
    tokens = torch.tensor([list(TEXT[:200])], device=model.device)
    assert 0 < parallel_recurrent_difference(model, tokens) < 1e-4

    honest = type(model).forward

    def forgetful(self: RWKV, tokens: Tensor, state: object = None, **kwargs: object) -> object:
        return honest(self, tokens, None, **kwargs)

    broken = type("Forgetful", (type(model),), {"forward": forgetful})
    model.__class__ = broken
    assert parallel_recurrent_difference(model, tokens) > 1e-2


def test_the_time_per_token_is_measured_at_every_position(model: RWKV) -> None:
    tokens = torch.tensor([list(TEXT[:2000])], device=model.device)
    seen: list[int] = []
    read = type(model).forward

    def counting(self: RWKV, tokens: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(tokens.shape[1])
        return read(self, tokens, *args, **kwargs)

    model.__class__ = type("Counting", (type(model),), {"forward": counting})
    timings = seconds_per_token(model, tokens, [100, 1500], repeats=5)
    assert len(timings) == 2 and all(0 < seconds < 1 for seconds in timings)
    assert sum(n for n in seen if n > 1) == 1500
    assert seen.count(1) == 10


def test_progress_is_a_plain_frozen_value() -> None:
    from wkv.training import Progress

    progress = Progress(step=1, tokens=2, seconds=3.0, done=0.5, loss=1.0, gradient_norm=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        progress.step = 2  # type: ignore[misc]
