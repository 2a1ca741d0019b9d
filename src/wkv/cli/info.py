"""`wkv info`: what a file holds, from its header alone."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import CheckpointError
from .common import find_file, find_model, human_bytes, print_line


def info(file: str | None = None, /, *, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Say what a checkpoint or state file holds.

    Reads names and shapes, not the weights, and runs nothing: any .pth, .safetensors or state file.

    Examples:

        wkv info
        wkv info model.pth
        wkv info RWKV-x070-World-0.1B.pth --json
        wkv info chat.state

    Parameters
    ----------
    file
        a checkpoint, or a state that wkv chat or Session.save wrote; without it, the model of wkv
    as_json
        print one JSON object instead
    """
    expected = "a checkpoint (.pth, .safetensors) or a state file"
    path = find_model(None) if file is None else find_file(file, expected)
    facts = state_facts(path) or model_facts(path)
    if as_json:
        print(json.dumps(facts))
    elif facts["kind"] == "state":
        _print_state(facts)
    else:
        _print_model(facts)


def state_facts(path: Path) -> dict[str, Any] | None:
    """What a state file says of itself; None when the file is something else."""
    from ..checkpoints.safetensors import read_header

    header = None
    with contextlib.suppress(CheckpointError):
        header = read_header(path)
    if header is None or header.metadata.get("format") != "wkv-state":
        return None
    n_tokens = header.metadata.get("n_tokens", "")
    return {
        "kind": "state",
        "file": str(path),
        "tokens_read": int(n_tokens) if re.fullmatch(r"\d{1,18}", n_tokens) else None,
        "tokenizer": header.metadata.get("tokenizer") or None,
        "model_fingerprint": header.metadata.get("model"),
        "layers": len({name.split(".")[1] for name in header.tensors if name.startswith("blocks.")}),
        "bytes": path.stat().st_size,
    }


def model_facts(path: Path) -> dict[str, Any]:
    """What the names and shapes of a checkpoint say. CheckpointError when it is none."""
    from .. import tokenizers
    from ..checkpoints import open_checkpoint
    from ..models import build

    with open_checkpoint(path) as checkpoint:
        config, dtypes = checkpoint.config, Counter(checkpoint.dtypes.values())
        form, quantization = checkpoint.format, checkpoint.quantization
    common = next(dtype for dtype, _ in dtypes.most_common() if dtype.is_floating_point)
    shell = build(config, device="meta", dtype=common)  # no memory, no weights
    parameters = sum(weight.numel() for weight in shell.parameters())
    state_bytes = shell.initial_state().nbytes
    known = tokenizers.for_checkpoint(path, config.vocab_size)
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    return {
        "kind": "model",
        "file": str(path),
        "format": form,
        "generation": config.generation,
        "minor": getattr(config, "minor", None),
        "config": config.to_dict(),
        "parameters": parameters,
        "quantization": quantization,
        "dtypes": {str(dtype).removeprefix("torch."): count for dtype, count in dtypes.items()},
        "state_bytes": state_bytes,
        "vocab_size": config.vocab_size,
        "tokenizer": known.name if known else None,
        "memory_bytes": {name: parameters * size + state_bytes for name, size in sizes.items()},
    }


def _print_state(facts: dict[str, Any]) -> None:
    _print_table(
        {
            facts["file"]: "a saved state: what a model remembers of a text",
            "tokens read": str(facts["tokens_read"]),
            "size": f"{human_bytes(facts['bytes'])}, {facts['layers']} layers",
            "tokenizer": facts["tokenizer"] or "none",
            "of the model": f"with fingerprint {facts['model_fingerprint']}",
        }
    )


def _print_model(facts: dict[str, Any]) -> None:
    config = facts["config"]
    minor = "" if facts["minor"] is None else f".{facts['minor']}"
    size = config.get("head_size")
    heads = f", {config['dim_att'] // size} heads of {size}" if size else ""
    memory = facts["memory_bytes"]
    _print_table(
        {
            facts["file"]: f"RWKV-{facts['generation']}{minor}, as .{facts['format']}",
            "parameters": f"{facts['parameters']:,}",
            "layers": f"{config['n_layer']} of width {config['n_embd']}{heads}, ffn {config['dim_ffn']}",
            "dtype": ", ".join(f"{name} ({n} tensors)" for name, n in facts["dtypes"].items())
            + (f"; quantised: {facts['quantization']}" if facts["quantization"] else ""),
            "vocabulary": f"{facts['vocab_size']:,} tokens; tokenizer: {facts['tokenizer'] or 'not known'}",
            "state": f"{human_bytes(facts['state_bytes'])} per conversation, at any length",
            "memory": ", ".join(f"{name} {human_bytes(n)}" for name, n in memory.items()),
        }
    )


def _print_table(rows: dict[str, str]) -> None:
    (title, subtitle), *rest = rows.items()
    print_line(f"{title}: {subtitle}")
    for name, value in rest:
        print_line(f"  {name:<13}{value}")
