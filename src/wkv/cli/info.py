"""`wkv info`: what a file holds, from its header alone; what computes on this machine."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..errors import CheckpointError
from .common import UsageError, find_file, find_model, human_bytes, print_line


def info(
    file: str | None = None,
    /,
    *,
    backends: bool = False,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Say what a checkpoint or state file holds, or what computes here.

    Reads names and shapes, not the weights, and runs nothing: any .pth, .safetensors or state file.

    Examples:

        wkv info
        wkv info model.pth
        wkv info RWKV-x070-World-0.1B.pth --json
        wkv info chat.state
        wkv info --backends

    Parameters
    ----------
    file
        a checkpoint, or a state that wkv chat or Session.save wrote; without it, the model of wkv
    backends
        of this machine instead: the compiled engine, every operator's backends, and why one would refuse
    as_json
        print one JSON object instead
    """
    if backends:
        if file is not None:
            raise UsageError(f"--backends and {file}", "one of them: --backends is about this machine")
        machine = backend_facts()
        if as_json:
            print(json.dumps(machine))
        else:
            _print_backends(machine)
        return
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


def backend_facts() -> dict[str, Any]:
    """What computes here: the engine, or why there is none; of each operator, what its backends answer."""
    import torch

    from ..ops import OPERATORS, native
    from ..ops.dispatch import Call

    reason = native.why_not()
    calls = {
        name: Call(T, head_size=64, dtype=torch.float32, device=torch.device("cpu"), needs_grad=False)
        for name, T in (("a prompt", 512), ("a token", 1))
    }
    return {
        "engine": {
            "refuses": reason,
            "instruction_sets": native.instruction_sets(),
            "runs": None if reason else native.engines()[0],
            "threads": None if reason else native.threads(),
            "shares_torch_threads": None if reason else native.borrows(),
            "handover_seconds": None if reason else native.handover(),
        },
        "torch_threads": torch.get_num_threads(),
        "operators": {
            name: {what: operator.verdicts(call) for what, call in calls.items()}
            for name, operator in OPERATORS.items()
        },
    }


def _print_backends(facts: dict[str, Any]) -> None:
    engine = facts["engine"]
    if engine["refuses"]:
        print_line(f"the compiled engine does not run: {engine['refuses']}")
    else:
        micros = engine["handover_seconds"] * 1e6
        whose = "torch's" if engine["shares_torch_threads"] else "own"
        print_line(
            f"the compiled engine: {engine['runs']}, {engine['threads']} threads ({whose}), "
            f"{micros:.1f} us to hand them a job"
        )
    for name, reason in engine["instruction_sets"].items():
        verdict = f"refuses: {reason}" if reason else "runs" if name == engine["runs"] else "would run"
        print_line(f"  {name:<10} {verdict}")
    print_line(
        f"operators, where the engine does not run a whole model: torch, {facts['torch_threads']} threads"
    )
    for operator, calls in facts["operators"].items():
        for what, verdicts in calls.items():
            print_line(f"  {operator}, {what}")
            for name, verdict in verdicts.items():
                print_line(f"    {name:<10} {verdict}")


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
