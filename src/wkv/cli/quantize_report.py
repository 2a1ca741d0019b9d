"""`wkv quantize-report`: what the smaller formats of a model save, and what they lose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    find_file,
    find_model,
    no_tokenizer,
    print_line,
    torch_dtype,
    use_device,
    use_threads,
)
from .reading import Reading, random_tokens, read_text

if TYPE_CHECKING:
    import torch

    from ..config import Config
    from ..evaluation import Comparison
    from ..models import RWKV
    from ..tokenizers import Tokenizer

FULL = "float32"
TIERS = ("bfloat16", "int8", "int4")
ENOUGH = 20_000  # tokens: of fewer, the last digits are chance
UNSEEN_BITS = 0.002  # per byte: a loss that nobody notices
TOO_MUCH = 0.01  # of the bits
SPREAD = 0.05  # of what is added to random weights


def quantize_report(
    model: str | None = None,
    /,
    *,
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    tokens: int = ENOUGH,
    also: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
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
        wkv quantize-report model.pth --also calibrated.safetensors
        wkv quantize-report rwkv7-0.1b --tokens 1000 --json

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
    also
        a row for each of these files too: the same model as wkv convert has written it
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
    files = {name: find_file(name, "a checkpoint, .pth or .safetensors") for name in also}
    full, tokenizer = load_tier(FULL, path, config, how)
    if full.quantization is not None:
        raise CheckpointError(
            f"{path} is in {full.quantization} already", "weights in full", "its original file"
        )
    for file in files.values():
        check_vocabulary(file, full.config.vocab_size)
    name = str(path) if path else f"{model} with random weights"
    if config is not None and not text:
        reading = random_tokens(config.vocab_size, tokens)
    elif tokenizer is None:
        raise no_tokenizer(name, full.config.vocab_size)
    else:
        reading = read_text(text, tokenizer, full.config.vocab_size, tokens)
    others = {tier: partial(load_tier, tier, path, config, how) for tier in TIERS}
    others |= {name: partial(load_converted, file, how) for name, file in files.items()}
    card = describe(name, full, reading)
    card["tiers"] = measure_tiers(full, others, reading)
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
    from ..models.quantized import quantize

    device = use_device(how.device)
    bits = tier if tier in QUANTIZATIONS else None
    dtype = torch_dtype(how.dtype) if bits else getattr(torch, tier)
    if path is not None:
        return load(path, device=device, dtype=dtype, tokenizer=how.tokenizer, quantize=bits)
    assert config is not None
    # Drawn in float32 whatever the tier: all tiers then round the same weights.
    model = random_model(config, device).to(dtype or torch.float32)
    if how.tokenizer is None:
        tokenizer = tokenizers.for_checkpoint("", config.vocab_size)
    else:
        tokenizer = tokenizers.named(how.tokenizer)
        tokenizers.check_fits(tokenizer, config.vocab_size)
    return quantize(model, bits) if bits else model, tokenizer


def check_vocabulary(path: Path, vocab_size: int) -> None:
    """From the header, before anything takes minutes. CheckpointError when the vocabulary is another."""
    from ..checkpoints import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        found = checkpoint.config.vocab_size
    if found != vocab_size:
        raise CheckpointError(
            f"{path} has {found} tokens, the model {vocab_size}", "the same model", "what wkv convert wrote"
        )


def load_converted(path: Path, how: ModelFlags) -> tuple[RWKV, Tokenizer | None]:
    """A model as its file has it."""
    from ..loading import load

    return load(path, device=use_device(how.device), dtype=torch_dtype(how.dtype), tokenizer=how.tokenizer)


def random_model(config: Config, device: torch.device | str = "cpu") -> RWKV:
    """Weights in float32, always the same, of which every one matters to the logits.

    In the official initial ones a block's last matrices are zero: nothing that is done to the others would
    be seen.
    """
    import torch

    from ..models import build

    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=SPREAD)
    return model.to(device)


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


def measure_tiers(
    full: RWKV, others: Mapping[str, Callable[[], tuple[RWKV, object]]], reading: Reading
) -> list[dict[str, Any]]:
    """A row for float32 and for each of the others, which are loaded one after the other; none is kept."""
    from ..evaluation import compare
    from .progress import ProgressLine

    line = ProgressLine()

    def measured(step: int, name: str, load: Callable[[], tuple[RWKV, object]]) -> tuple[Comparison, Any]:
        """In a function of its own: what it has loaded is gone before the next is."""

        def show_read(n_tokens: int) -> None:
            share = (step + n_tokens / reading.n_tokens) / len(others)
            line.show(share, f"{name}: {n_tokens:,} of {reading.n_tokens:,} tokens")

        line.show(step / len(others), f"{name}: loading")
        other, _ = load()
        found = compare(
            full,
            other,
            reading.documents,
            separator=reading.separator,
            n_bytes=reading.n_bytes,
            progress=show_read,
        )
        return found, measure_tier(name, other, found)

    try:
        found = [measured(step, *each) for step, each in enumerate(others.items())]
    finally:
        line.close()
    itself = replace(found[0][0], other_loss=found[0][0].loss, kl=0.0, agreement=1.0)
    return [measure_tier(FULL, full, itself), *(row for _, row in found)]


def measure_tier(tier: str, model: RWKV, found: Comparison) -> dict[str, Any]:
    more = None
    if found.bits_per_byte is not None and found.other_bits_per_byte is not None:
        more = found.other_bits_per_byte - found.bits_per_byte
    return {
        "tier": tier,
        "quantization": model.quantization,
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


def verdict(row: dict[str, Any], *, untrained: bool) -> str | None:
    """What a row means for somebody who has to choose; None where the weights are random."""
    lost, more = row["more_bits"], row["more_bits_per_byte"]
    if untrained:
        return None
    if row["tier"] == FULL:
        return "what the others are measured by"
    if not lost <= TOO_MUCH:  # not a number is no small loss either
        return f"not recommended: needs {lost:.1%} more bits"
    if more is not None and more <= UNSEEN_BITS:
        return f"as good as float32, within {UNSEEN_BITS} bits per byte"
    if row["quantization"] == "int4":
        return f"good: needs {lost:.2%} more bits"
    return f"usable, but needs {lost:.2%} more bits, where {UNSEEN_BITS} bits per byte are expected"


def show(card: dict[str, Any]) -> None:
    rows = card["tiers"]
    print_line(
        f"{card['model']}: {card['parameters']:,} parameters, {card['threads']} threads on {card['device']}"
    )
    text = "" if card["bytes"] is None else f", {card['bytes']:,} bytes"
    print_line(f"  {card['text']}: {card['tokens']:,} tokens{text}")
    if card["tokens"] < ENOUGH:
        print_line(f"  fewer than {ENOUGH:,} tokens: the last digits are chance")
    width = max(10, *(len(row["tier"]) + 2 for row in rows))
    print_line("")
    print_line(
        f"  {'tier':<{width}}{'MB':>8}{'tokens/s':>10}"
        f"{'bits/byte':>11}{'more':>9}{'KL, nats':>10}{'top-1':>9}"
    )
    for row in rows:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print_line(
            f"  {row['tier']:<{width}}{row['weight_bytes'] / 1e6:>8.1f}"
            f"{row['decode_tokens_per_second']:>10.1f}{bits:>11}{row['more_bits']:>+9.2%}"
            f"{row['kl']:>10.5f}{row['top1_agreement']:>9.2%}"
        )
    print_line("")
    for row in rows:
        if row["verdict"] is not None:
            print_line(f"  {row['tier']:<{width}}{row['verdict']}")
    if rows[0]["verdict"] is None:
        print_line(
            "  random weights: bits mean nothing; KL and top-1 tell what rounding changes, and how much"
        )
    form = " and ".join({row["rest"]: "" for row in rows if row["rest"]})
    print_line(f"  what 8 and 4 bits leave as it is (embedding, norms, low-rank paths) is {form}")
