"""What a tier loses, told right: against sums by hand, over documents apart, and on the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor

import wkv
from wkv.cli import bench, main
from wkv.cli import quantize_report as report
from wkv.cli.common import ModelFlags
from wkv.config import RWKV7Config
from wkv.errors import InputError
from wkv.evaluation import Comparison, compare, comparison
from wkv.models import RWKV
from wkv.models.quantized import quantize
from wkv.pretrained import held_out_files

CONFIG = RWKV7Config(
    vocab_size=256, n_layer=2, n_embd=32, dim_att=32, dim_ffn=64, head_size=16,
    decay_rank=6, rate_rank=5, value_rank=4, gate_rank=7,
)  # fmt: skip
DOCUMENTS = [list(b"def f(x):\n    return x\n"), [7], list(b"import wkv\n\nwkv.load()\n")]


def model_of(seed: int = 0, **changes: Any) -> RWKV:
    return small_model(CONFIG.replace(**changes), seed=seed, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a byte-level model in float32, as the current one; speed is measured in no time."""
    wkv.save(model_of(), tmp_path / "model.safetensors")
    (tmp_path / "text.txt").write_text("for i in range(9):\n    print(i)\n" * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "BUDGET", 0.0)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    status = main(["quantize-report", *map(str, arguments)])
    captured = capsys.readouterr()
    return SimpleNamespace(status=status, out=captured.out, err=captured.err)


# The library.


def chances(model: RWKV, read: list[int]) -> Tensor:
    """The probabilities of what follows `read`, token by token from a fresh state."""
    state = None
    for token in read:
        logits, state = model(torch.tensor([[token]]), state)
    return logits[0, 0].double().softmax(dim=0)


@torch.inference_mode()
def test_losses_divergence_and_agreement_are_those_of_sums_by_hand() -> None:
    model, other = model_of(), model_of(seed=1)
    loss = other_loss = kl = agreed = 0.0
    for document in DOCUMENTS:
        for t, target in enumerate(document):
            p, q = (chances(each, [9, *document[:t]]) for each in (model, other))
            loss -= math.log(p[target])
            other_loss -= math.log(q[target])
            kl += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            agreed += int(p.argmax()) == int(q.argmax())
    n = sum(map(len, DOCUMENTS))
    found = compare(model, other, DOCUMENTS, separator=9, n_bytes=100)
    assert found.n_tokens == n
    assert found.loss == pytest.approx(loss / n, rel=1e-4)
    assert found.other_loss == pytest.approx(other_loss / n, rel=1e-4)
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.agreement == agreed / n
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) / 100, rel=1e-4)
    assert found.other_bits_per_byte == pytest.approx(other_loss / math.log(2) / 100, rel=1e-4)
    assert found.lost == pytest.approx(other_loss / loss - 1, rel=1e-3)


def test_the_divergence_is_from_the_model_to_the_other_one() -> None:
    model, other = model_of(), model_of(seed=1)
    there, back = (compare(*pair, DOCUMENTS, separator=0) for pair in ((model, other), (other, model)))
    assert there.loss == pytest.approx(back.other_loss)
    assert abs(there.kl - back.kl) > 1e-3


def test_equal_models_lose_nothing_and_agree_everywhere() -> None:
    found = compare(model_of(), model_of(), DOCUMENTS, separator=0)
    assert (found.kl, found.agreement, found.lost) == (0.0, 1.0, 0.0)
    assert found.bits_per_byte is None


def test_documents_leak_nothing_into_each_other() -> None:
    model, other = model_of(), quantize(model_of(), "int4")
    alone = [compare(model, other, [document], separator=0) for document in DOCUMENTS]
    together = compare(model, other, DOCUMENTS[::-1], separator=0)
    for name in ("loss", "other_loss", "kl", "agreement"):
        total = sum(each.n_tokens * getattr(each, name) for each in alone)
        assert getattr(together, name) == pytest.approx(total / together.n_tokens, rel=1e-9)


def test_pieces_of_any_size_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = model_of(), quantize(model_of(), "int4")
    whole = compare(model, other, DOCUMENTS, separator=0)
    sizes: list[int] = []
    honest = type(model).forward

    def counting(self: RWKV, tokens: Tensor, *args: object) -> object:
        sizes.append(tokens.numel())
        return honest(self, tokens, *args)

    model.__class__ = type("Counting", (type(model),), {"forward": counting})
    monkeypatch.setattr(comparison, "LOGITS", 5 * 256)
    seen: list[int] = []
    pieces = compare(model, other, DOCUMENTS, separator=0, progress=seen.append)
    assert max(sizes) == 5
    assert seen[-1] == pieces.n_tokens and seen == sorted(set(seen))
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-3)
    assert pieces.other_loss == pytest.approx(whole.other_loss, rel=1e-5)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_nothing_to_read_is_an_error(documents: list[list[int]]) -> None:
    with pytest.raises(InputError, match="no token"):
        compare(model_of(), model_of(), documents, separator=0)


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(InputError, match="256 and 300"):
        compare(model_of(), model_of(vocab_size=300), DOCUMENTS, separator=0)


# The command.


def test_the_card_has_a_row_and_a_verdict_for_each_tier(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, "model.safetensors", "--text", "text.txt", "--tokens", 300)
    assert result.status == 0
    lines = [line.split() for line in result.out.splitlines()]
    for tier in ("float32", "bfloat16", "int8", "int4"):
        rows = [line for line in lines if line[:1] == [tier]]
        assert len(rows) == 2, result.out
        assert len(rows[0]) == 7 and rows[0][-1].endswith("%")
    assert "text.txt: 300 tokens, 300 bytes" in result.out
    assert "fewer than 20,000 tokens" in result.out
    assert "int4: 300 of 300 tokens" in result.err


def test_json_holds_what_the_library_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "model.safetensors", "--text", "text.txt", "--tokens", 300, "--json")
    card = json.loads(result.out)
    rows = {row["tier"]: row for row in card["tiers"]}
    assert list(rows) == ["float32", "bfloat16", "int8", "int4"]
    assert (card["tokens"], card["bytes"], card["documents"]) == (300, 300, 1)
    full = rows["float32"]
    assert (full["kl"], full["top1_agreement"], full["more_bits"]) == (0.0, 1.0, 0.0)
    assert full["weight_bytes"] == 4 * card["parameters"] == 2 * rows["bfloat16"]["weight_bytes"]
    document = list((folder / "text.txt").read_bytes()[:300])
    for tier in ("int8", "int4"):
        other, _ = wkv.load("model.safetensors", quantize=tier)
        expected = compare(model_of(), other, [document], separator=0, n_bytes=300)
        assert rows[tier]["kl"] == pytest.approx(expected.kl)
        assert rows[tier]["bits_per_byte"] == pytest.approx(expected.other_bits_per_byte)
        assert rows[tier]["weight_bytes"] == sum(weight.nbytes for weight in other.state_dict().values())
        assert rows[tier]["decode_tokens_per_second"] > 0
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"]


def test_a_text_ends_with_a_separator_and_its_bytes_are_those_of_the_text(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "a.txt").write_text("ab")
    (folder / "more" / "b.txt").write_text("cde")
    tokenizer = wkv.load("model.safetensors")[1]
    read = report.read_text(("more",), tokenizer, 256, 100)
    assert (read.documents, read.n_bytes) == ([[97, 98, 0], [99, 100, 101, 0]], 5)
    cut = report.read_text(("more",), tokenizer, 256, 5)
    assert (cut.documents, cut.n_bytes) == ([[97, 98, 0], [99, 100]], 4)


def test_the_model_that_comes_with_wkv_reads_files_that_it_never_saw() -> None:
    model, tokenizer = wkv.load()
    read = report.read_text((), tokenizer, model.config.vocab_size, 1000)
    first = min(held_out_files())
    assert tokenizer is not None and tokenizer.decode(read.documents[0])
    assert first == "asyncio/__main__.py"
    assert "import asyncio" in tokenizer.decode(read.documents[0])
    assert read.n_tokens == 1000


def test_random_weights_read_random_tokens_and_are_not_judged(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RWKV7Config.sizes, "0.1M", dataclasses.asdict(CONFIG) | {"vocab_size": 300})
    result = run(capsys, "rwkv7-0.1m", "--tokens", 50)
    assert result.status == 0
    assert "random tokens, which are no text" in result.out
    assert "random weights: bits mean nothing; KL and top-1 tell" in result.out
    assert "not recommended" not in result.out and "as good as" not in result.out
    card = json.loads(run(capsys, "rwkv7-0.1m", "--tokens", 50, "--json").out)
    assert card["bytes"] is None
    assert all(row["bits_per_byte"] is None and row["verdict"] is None for row in card["tiers"])
    kl = {row["tier"]: row["kl"] for row in card["tiers"]}
    assert kl["int4"] > 5 * kl["int8"] > 0  # the blocks count, not the head alone, which has 8 bits in both


def test_two_models_are_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[RWKV]] = []
    most = 0

    def load(tier: str) -> tuple[RWKV, None]:
        nonlocal most
        model = model_of()
        alive.append(weakref.ref(model))
        most = max(most, sum(each() is not None for each in alive))
        return model, None

    others = {tier: partial(load, tier) for tier in report.TIERS}
    rows = report.measure_tiers(model_of(), others, report.random_tokens(256, 9))
    assert [row["tier"] for row in rows] == ["float32", *report.TIERS]
    assert most == 1 and len(alive) == 3  # besides the one in float32


def test_a_converted_file_gets_a_row_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wkv.save(quantize(model_of(), "int4"), folder / "plain.safetensors")
    wkv.save(quantize(model_of(seed=1), "int8"), folder / "another.safetensors")
    files = "plain.safetensors", "another.safetensors"
    line = "model.safetensors", "--text", "text.txt", "--tokens", 300
    card = json.loads(run(capsys, *line, "--json", "--also", *files).out)
    rows = {row["tier"]: row for row in card["tiers"]}
    assert list(rows) == ["float32", "bfloat16", "int8", "int4", *files]
    assert rows[files[0]]["kl"] == rows["int4"]["kl"] and rows[files[0]]["quantization"] == "int4"
    assert rows[files[1]]["kl"] > 10 * rows["int4"]["kl"]
    lines = run(capsys, *line, "--also", *files).out.splitlines()
    assert sum(line.startswith(f"  {files[0]}  ") for line in lines) == 2
    assert len({len(line) for line in lines if line.endswith("%")}) == 1  # columns stay columns


def test_all_tiers_of_random_weights_are_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    flags = ModelFlags(tokenizer="bytes")
    full, bf16 = (report.load_tier(tier, None, CONFIG, flags)[0] for tier in ("float32", "bfloat16"))
    for name, weight in full.state_dict().items():
        assert torch.equal(weight.bfloat16(), bf16.state_dict()[name])


WRONG = [
    ("modle.safetensors", 1, "model.safetensors"),
    ("rwkv7-0.2b", 1, "0.1B"),
    ("model.safetensors --text nowhere.txt", 1, "nowhere.txt"),
    ("model.safetensors --text empty.txt", 1, "there is no text"),
    ("model.safetensors --tokens 0", 2, "at least 1"),
    ("model.safetensors --quantize int8", 2, "every tier is measured"),
    ("small.safetensors --text text.txt", 1, "its original file"),
    ("model.safetensors --also smal.safetensors", 1, "small.safetensors"),
    ("model.safetensors --text text.txt --also odd.safetensors", 1, "3000 tokens, the model 256"),
    ("odd.safetensors --text text.txt", 1, "--tokenizer"),
]


@pytest.mark.parametrize(("line", "status", "advice"), WRONG, ids=[line for line, *_ in WRONG])
def test_a_wrong_command_line_gets_one_line_with_a_way_out(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, status: int, advice: str
) -> None:
    (folder / "empty.txt").touch()
    wkv.save(quantize(model_of(), "int8"), folder / "small.safetensors")
    wkv.save(model_of(vocab_size=3000), folder / "odd.safetensors")
    result = run(capsys, *line.split())
    assert result.status == status
    assert result.out == ""
    assert result.err.count("\n") == 1 and advice in result.err


def test_convert_calibrates_on_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for flags in ([], ["--calibrate", "text.txt"]):
        files.append(f"{len(flags)}.safetensors")
        assert main(["convert", "model.safetensors", files[-1], "--quantize", "int4", *flags]) == 0
    assert "calibrating on 512 tokens" in capsys.readouterr().err
    document = list((folder / "text.txt").read_bytes()[:512])
    plain, calibrated = (compare(model_of(), wkv.load(file)[0], [document], separator=0) for file in files)
    assert calibrated.kl < 0.8 * plain.kl
    assert main(["convert", "model.safetensors", "x.safetensors", "--calibrate", "text.txt"]) == 2
    assert "--quantize int4" in capsys.readouterr().err


def test_convert_names_no_flag_that_it_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wkv.save(model_of(vocab_size=3000), folder / "odd.safetensors")
    (folder / "empty.txt").touch()
    line = ["x.safetensors", "--quantize", "int4", "--calibrate"]
    assert main(["convert", "odd.safetensors", *line, "text.txt"]) == 1
    told = capsys.readouterr().err
    assert "tokenizer.json in its folder" in told and "--" not in told
    assert main(["convert", "model.safetensors", *line, "empty.txt"]) == 1
    told = capsys.readouterr().err
    assert "there is no text" in told and "--" not in told


SAME = Comparison(n_tokens=1000, n_bytes=1000, loss=1.0, other_loss=1.0, kl=0.0, agreement=1.0)


@pytest.mark.parametrize(
    ("tier", "other_loss", "n_bytes", "expected"),
    [
        ("float32", 1.0, 1000, "measured by"),
        ("int8", 1.001, 1000, "as good as float32"),
        ("int8", 1.002, 1000, "where 0.002 bits per byte are expected"),  # 0.0029 bits per byte
        ("int4", 1.009, 1000, "good: needs 0.90%"),
        ("int4", 1.011, 1000, "not recommended: needs 1.1%"),
        ("int4", 1.011, None, "not recommended"),
        ("int4", float("nan"), 1000, "not recommended"),
        ("int4", 0.99, 1000, "as good as float32"),
    ],
)
def test_the_verdict_follows_the_loss(
    tier: str, other_loss: float, n_bytes: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "decode_seconds", lambda _: 1.0)
    found = dataclasses.replace(SAME, other_loss=other_loss, n_bytes=n_bytes)
    model = model_of() if tier == "float32" else quantize(model_of(), tier)
    row = report.measure_tier(tier, model, found)
    assert expected in report.verdict(row, untrained=False)
