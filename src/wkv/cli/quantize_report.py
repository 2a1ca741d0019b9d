"""`wkv quantize-report`: what the smaller formats of a model save, and what they lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import CheckpointError
from .bench import decode_seconds, published_size
from .common import (
    MODEL_DEFAULTS,
    ModelFlags,
    UsageError,
    find_model,
    print_line,
    torch_dtype,
    use_device,
    use_threads,
)
from .reading import Reading, random_tokens, read_text

if TYPE_CHECKING:
    from ..config import Config
    from ..evaluation import Comparison
    from ..models import RWKV
    from ..tokenizers import Tokenizer

FULL = "float32"
TIERS = ("bfloat16", "int8", "int4")
ENOUGH = 20_000  # tokens: of fewer, the last digits are chance
UNSEEN_BITS = 0.002  # per byte: a loss that nobody notices
TOO_MUCH = 0.01  # of the bits


def quantize_report(
    model: str | None = None,
    /,
    *,
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    tokens: int = ENOUGH,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    how: ModelFlags = MODEL_DEFAULTS,
) -> None:
    """Show what a model gains and loses in 16, 8 and 4 bits.

    A row for each tier: MB of weights, decoded tokens/s, bits per byte of text, the mean KL divergence from
    float32 in nats per token, and how often its likeliest token is that of float32. Each document is read
    from a fresh state. Two models are in memory at a time: float32 and one other.

    Examples:

        wkv quantize-report
        wkv quantize-report model.pth --threads 2
        wkv quantize-report model.pth --text book.txt notes/ --tokens 100000
        wkv quantize-report rwkv7-0.1b --json

    Parameters
    ----------
    model
        a checkpoint, or the name of a published size, which is then built with random weights and reads
        random tokens; without it, the model that comes with wkv
    text
        what to read: files, folders, "patterns/**/*.txt", .jsonl; without it, files of Python's standard
        library that the model of wkv never saw
    tokens
        read this many; a shorter text is read to its end
    as_json
        print one JSON object instead
    """
    if how.quantize is not None:
        raise UsageError("--quantize has no place here: every tier is measured", "a model in full")
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}", "at least 1")
    use_threads(how.threads)
    config = published_size(model)
    path = find_model(model) if config is None else None
    full, tokenizer = load_tier(FULL, path, config, how)
    if full.quantization is not None:
        raise CheckpointError(
            f"{path} is in {full.quantization} already", "weights in full", "its original file"
        )
    if config is not None and not text:
        reading = random_tokens(config.vocab_size, tokens)
    else:
        reading = read_text(text, tokenizer, full.config.vocab_size, tokens)
    name = str(path) if path else f"{model} with random weights"
    card = describe(name, full, reading)
    card["tiers"] = measure_tiers(full, lambda tier: load_tier(tier, path, config, how)[0], reading)
    for row in card["tiers"]:
        row["verdict"] = verdict(row, untrained=config is not None)
    if as_json:
        print(json.dumps(card))
    else:
        show(card)


def load_tier(
    tier: str, path: Path | None, config: Config | None, how: ModelFlags
) -> tuple[RWKV, Tokenizer | None]:
    """The model of a file, or a random one. What 8 and 4 bits leave has the format that the flags say."""
    import torch

    from .. import tokenizers
    from ..checkpoints import QUANTIZATIONS
    from ..loading import load
    from ..models import build
    from ..models.quantized import quantize

    device = use_device(how.device)
    bits = tier if tier in QUANTIZATIONS else None
    dtype = torch_dtype(how.dtype) if bits else getattr(torch, tier)
    if path is not None:
        return load(path, device=device, dtype=dtype, tokenizer=how.tokenizer, quantize=bits)
    assert config is not None
    # Drawn in float32 whatever the tier: all tiers then round the same weights.
    model = build(config, device=device, dtype=torch.float32).to(dtype or torch.float32)
    if how.tokenizer is None:
        tokenizer = tokenizers.for_checkpoint("", config.vocab_size)
    else:
        tokenizer = tokenizers.named(how.tokenizer)
        tokenizers.check_fits(tokenizer, config.vocab_size)
    return quantize(model, bits) if bits else model, tokenizer


def describe(name: str, full: RWKV, reading: Reading) -> dict[str, Any]:
    import torch

    return {
        "model": name,
        "parameters": sum(weight.numel() for weight in full.parameters()),
        "device": str(full.device),
        "threads": torch.get_num_threads(),
        "text": reading.description,
        "documents": len(reading.documents),
        "tokens": reading.n_tokens,
        "bytes": reading.n_bytes,
    }


def measure_tiers(full: RWKV, load: Callable[[str], RWKV], reading: Reading) -> list[dict[str, Any]]:
    """A row for float32 and each tier. One tier after the other is loaded, and none is kept."""
    from ..evaluation import compare
    from .progress import ProgressLine

    line, rows = ProgressLine(), list[dict[str, Any]]()

    def show_read(step: int, n_tokens: int) -> None:
        share = (step + n_tokens / reading.n_tokens) / len(TIERS)
        line.show(share, f"{TIERS[step]}: {n_tokens:,} of {reading.n_tokens:,} tokens")

    try:
        for step, tier in enumerate(TIERS):
            line.show(step / len(TIERS), f"{tier}: loading")
            other = load(tier)
            found = compare(
                full,
                other,
                reading.documents,
                separator=reading.separator,
                n_bytes=reading.n_bytes,
                progress=partial(show_read, step),
            )
            if not rows:
                itself = replace(found, other_loss=found.loss, kl=0.0, agreement=1.0)
                rows.append(measure_tier(FULL, full, itself))
            rows.append(measure_tier(tier, other, found))
    finally:
        line.close()
    return rows


def measure_tier(tier: str, model: RWKV, found: Comparison) -> dict[str, Any]:
    more = None
    if found.bits_per_byte is not None and found.other_bits_per_byte is not None:
        more = found.other_bits_per_byte - found.bits_per_byte
    return {
        "tier": tier,
        "rest": None if model.quantization is None else str(model.dtype).removeprefix("torch."),
        "weight_bytes": sum(weight.nbytes for weight in model.state_dict().values()),
        "decode_tokens_per_second": 1 / decode_seconds(model),
        "nats_per_token": found.other_loss,
        "bits_per_byte": found.other_bits_per_byte,
        "more_bits_per_byte": more,
        "more_bits": found.lost,
        "kl": found.kl,
        "top1_agreement": found.agreement,
    }


def verdict(row: dict[str, Any], *, untrained: bool) -> str:
    """What a row means for somebody who has to choose."""
    lost, more = row["more_bits"], row["more_bits_per_byte"]
    if row["tier"] == FULL:
        return "what the others are measured by"
    if untrained:
        return "random weights know nothing that could be lost: size and speed count"
    if not lost <= TOO_MUCH:  # not a number is no small loss either
        return f"not recommended: needs {lost:.1%} more bits"
    if more is not None and more <= UNSEEN_BITS:
        return f"as good as float32, within {UNSEEN_BITS} bits per byte"
    if row["tier"] == "int4":
        return f"good: needs {lost:.2%} more bits"
    return f"usable, but needs {lost:.2%} more bits, where {UNSEEN_BITS} bits per byte are expected"


def show(card: dict[str, Any]) -> None:
    form = " and ".join({row["rest"]: "" for row in card["tiers"] if row["rest"]})
    print_line(
        f"{card['model']}: {card['parameters']:,} parameters, {card['threads']} threads on {card['device']}"
    )
    text = "" if card["bytes"] is None else f", {card['bytes']:,} bytes"
    print_line(f"  {card['text']}: {card['tokens']:,} tokens{text}")
    if card["tokens"] < ENOUGH:
        print_line(f"  fewer than {ENOUGH:,} tokens: the last digits are chance")
    print_line("")
    print_line(
        f"  {'tier':<10}{'MB':>8}{'tokens/s':>10}{'bits/byte':>11}{'more':>9}{'KL, nats':>10}{'top-1':>9}"
    )
    for row in card["tiers"]:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print_line(
            f"  {row['tier']:<10}{row['weight_bytes'] / 1e6:>8.1f}{row['decode_tokens_per_second']:>10.1f}"
            f"{bits:>11}{row['more_bits']:>+9.2%}{row['kl']:>10.5f}{row['top1_agreement']:>9.2%}"
        )
    print_line("")
    for row in card["tiers"]:
        print_line(f"  {row['tier']:<10}{row['verdict']}")
    print_line(f"  what int8 and int4 leave as it is (embedding, norms, low-rank paths) is {form}")
