"""`wkv generate`: write on from a prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..errors import InputError
from .common import (
    CODE_SAMPLING,
    MODEL_DEFAULTS,
    MODEL_SUFFIXES,
    NO_SAMPLING_FLAGS,
    ModelFlags,
    SamplingFlags,
    UsageError,
    note,
    open_model,
    write_out,
)

if TYPE_CHECKING:
    from ..inference import Step


def generate(
    model: str | None = None,
    prompt: str | None = None,
    /,
    *,
    stdin: Annotated[bool, Parameter(name=["--stdin", "-"])] = False,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    logprobs: int | None = None,
    sampling: SamplingFlags = NO_SAMPLING_FLAGS,
    how: ModelFlags = MODEL_DEFAULTS,
) -> int:
    """Write on from a prompt.

    The text goes to stdout as it is made, the speed to stderr. Ctrl-C stops it.

    Examples:

        wkv generate "def "
        wkv generate model.pth "Once upon a time" --max-tokens 100
        wkv generate model.pth "Q: 2 + 2?  A:" --stop "Q:" --temperature 0 --json
        cat notes.txt | wkv generate model.pth -
        wkv generate model.pth -- "-- begins with a hyphen"

    Parameters
    ----------
    model
        a .pth or .safetensors; without it, the one that comes with wkv
    prompt
        the text to continue; a single argument is the prompt
    stdin
        read the prompt from stdin, exactly as it comes
    max_tokens
        stop after this many tokens
    stop
        stop before this text; may be given several times
    as_json
        print one JSON object: text, tokens, finish, timings
    logprobs
        with --json: log probabilities, and this many rivals
    """
    model, prompt = _model_and_prompt(model, prompt, stdin)
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs has no place in plain text", advice="--json as well")
    path, network, tokenizer = open_model(model, how)
    from ..inference import Session

    chosen = sampling.over(**CODE_SAMPLING if model is None else {})
    session = Session(network, tokenizer)
    clock = time.perf_counter
    start = clock()
    session.feed(prompt)
    fed, n_prompt = clock(), session.n_tokens
    steps: list[Step] = []
    interrupted = False
    try:
        for step in session.steps(max_tokens, stop, logprobs=logprobs, **dataclasses.asdict(chosen)):
            steps.append(step)
            if not as_json:
                write_out(step.text)
    except KeyboardInterrupt:
        interrupted = True
    end = clock()
    text = "".join(step.text for step in steps)
    finish = "interrupted" if interrupted else steps[-1].finish if steps else "length"
    timings = {
        "prompt_tokens": n_prompt,
        "prompt_seconds": fed - start,
        "prompt_tokens_per_second": n_prompt / (fed - start),
        "generated_tokens": len(steps),
        "generation_seconds": end - fed,
        "generated_tokens_per_second": len(steps) / (end - fed),
    }
    if as_json:
        result: dict[str, Any] = {
            "model": str(path),
            "text": text,
            "tokens": [step.token for step in steps],
            "finish": finish,
            "timings": timings,
        }
        if logprobs is not None:
            result["logprobs"] = [{"logprob": step.logprob, "top": step.top} for step in steps]
        write_out(json.dumps(result) + "\n")
    elif not text.endswith("\n"):
        write_out("\n")
    note(
        f"prompt: {n_prompt} tokens, {timings['prompt_tokens_per_second']:.1f}/s; "
        f"written: {len(steps)} tokens, {timings['generated_tokens_per_second']:.1f}/s; finish: {finish}"
    )
    return 130 if interrupted else 0


def _model_and_prompt(model: str | None, prompt: str | None, stdin: bool) -> tuple[str | None, str]:
    """One text is the prompt; two are a model and a prompt; with -, one is the model."""
    if stdin:
        if prompt is not None:
            raise UsageError(f"both a prompt, {prompt!r}, and - for stdin", "one of them")
        return model, _read_stdin()
    if prompt is None:
        model, prompt = None, model
    if prompt is None:
        raise UsageError("no prompt", "wkv generate [MODEL] PROMPT", 'wkv generate "def "')
    if model is None and prompt.endswith(MODEL_SUFFIXES) and Path(prompt).is_file():
        raise UsageError(
            f"{prompt} is a model, and no prompt follows it", advice=f'wkv generate {prompt} "def "'
        )
    return model, prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} of stdin is not UTF-8: {error.reason}", "text in UTF-8"
        ) from None
