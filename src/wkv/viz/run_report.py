"""The report of a training run, out of the files in its folder alone: report.md, loss.png, rates.png.

The same files give the same report. Whatever text comes out of them is shown as indented code, where
Markdown has no meaning, and without control characters.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import atomic_write
from ..errors import CheckpointError, MissingExtraError
from ..plots import MEMORY, Panel, smoothed, stacked
from ..training.run_folder import read_records

Record = dict[str, Any]
Numbers = NDArray[np.float64]

VALIDATIONS, EVENTS, SAMPLES = 20, 50, 3  # the newest so many are shown
SAMPLE_CHARACTERS = 2000


def write_report(folder: Path) -> Path:
    """Write report.md and its pictures into the folder of a run; return the path of report.md.

    Each file is replaced as a whole. Without matplotlib the report says how to get pictures, and none of
    an earlier report stays. CheckpointError when `folder` is no run's, a file in it cannot be read, or
    nothing can be written.
    """
    run = _read(folder)
    sections = [
        f"# A run of wkv train: {_standing(run)}",
        _figures(run),
        _pictures(run),
        _validations(run),
        _samples(run),
        _events(run),
        _next(run),
        _settings(run),
    ]
    path = folder / "report.md"
    with atomic_write(path) as file:
        file.write(("\n\n".join(filter(None, sections)) + "\n").encode())
    return path


@dataclass(frozen=True)
class _Run:
    """What the folder holds; the columns are (steps,) float64, NaN where a step has no such figure."""

    folder: Path
    config: str
    settings: Record  # the table [training] of `config`
    origin: Record  # run.json
    events: list[Record]
    validations: list[Record]
    steps: Numbers
    tokens: Numbers
    seconds: Numbers
    learning_rate: Numbers
    gradient_norm: Numbers
    loss: Numbers  # of the steps that were learnt from
    smooth_loss: list[float]
    memory: float  # of everything smoothed

    @property
    def step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def best(self) -> Record:
        return min(self.validations, key=lambda record: record["validation_loss"])


def _read(folder: Path) -> _Run:
    config = _parsed(folder / "config.toml", lambda path: path.read_text("utf-8"))
    steps, timings, events = (
        _parsed(folder / f"{name}.jsonl", read_records) for name in ("metrics", "timings", "events")
    )
    seconds = dict(zip(_column(timings, "step"), _column(timings, "seconds"), strict=True))
    loss = _column(steps, "loss")
    loss[["skipped" in record for record in steps]] = math.nan
    # A curve of a million steps needs a longer memory to look as smooth as one of a thousand.
    memory = max(MEMORY, 1 - 100 / max(len(steps), 1))
    return _Run(
        folder=folder,
        config=config,
        settings=_parsed(folder / "config.toml", lambda _: tomllib.loads(config).get("training", {})),
        origin=_parsed(folder / "run.json", lambda path: dict(json.loads(path.read_bytes()))),
        events=events,
        validations=[record for record in steps if math.isfinite(_number(record, "validation_loss"))],
        steps=_column(steps, "step"),
        tokens=_column(steps, "tokens"),
        seconds=np.array([seconds.get(step, math.nan) for step in _column(steps, "step")]),
        learning_rate=_column(steps, "learning_rate"),
        gradient_norm=_column(steps, "gradient_norm"),
        loss=loss,
        smooth_loss=smoothed(loss.tolist(), memory),
        memory=memory,
    )


def _parsed(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "the folder of a run, as wkv train writes it"
        ) from error


def _column(records: Sequence[Record], name: str) -> Numbers:
    return np.array([_number(record, name) for record in records], dtype=np.float64)


def _number(record: Record, name: str) -> float:
    """NaN where there is none; JSON lines say null for what is not finite."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _standing(run: _Run) -> str:
    if not run.step:
        return "no step yet"
    of = f" of {run.settings['tokens']:,}" if "tokens" in run.settings else ""
    return f"{run.step:,} step{'' if run.step == 1 else 's'}, {run.tokens[-1]:,.0f}{of} tokens"


def _figures(run: _Run) -> str:
    """The last losses, the best one, and the speed, in a paragraph."""
    lines = []
    if run.step and math.isfinite(loss := run.smooth_loss[-1]):
        lines.append(f"Training: {loss:.4f} nats per token (smoothed), perplexity {_perplexity(loss)}.")
    if run.validations:
        last, best = run.validations[-1], run.best
        loss, per_byte = last["validation_loss"], _per_byte(last)
        lines.append(
            f"Held-out documents at step {last['step']:,}: {loss:.4f} nats per token, "
            f"perplexity {_perplexity(loss)}{per_byte and f', {per_byte} bits per byte'}."
        )
        lines.append(f"Best held-out loss: {best['validation_loss']:.4f}, at step {best['step']:,}.")
    timed = np.isfinite(run.seconds)
    if total := run.seconds[timed].sum():
        speed = _learnt(run)[timed].sum() / total
        lines.append(f"{timedelta(seconds=round(total))} of training, {speed:,.0f} tokens/s.")
    return "\n".join(lines)


def _learnt(run: _Run) -> Numbers:
    """Tokens that each step learnt from (steps,)."""
    return np.diff(run.tokens, prepend=0.0)


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _per_byte(record: Record) -> str:
    """Empty where no tokenizer could tell how many bytes there were."""
    per_byte = _number(record, "bits_per_byte")
    return f"{per_byte:.4f}" if math.isfinite(per_byte) else ""


def _pictures(run: _Run) -> str:
    """Draw, and return what shows the pictures or stands in their place."""
    pngs, text = {}, ""
    if run.step:
        try:
            for name, panels in (("loss.png", [_loss_panel(run)]), ("rates.png", _rate_panels(run))):
                pngs[name] = stacked(run.tokens, panels, xlabel="tokens learnt from")
            text = "![loss](loss.png)\n\n![learning rate, gradient norm, tokens/s](rates.png)"
        except MissingExtraError as error:
            text = f"No pictures: {error}"
    for name in ("loss.png", "rates.png"):
        if name in pngs:
            with atomic_write(run.folder / name) as file:
                file.write(pngs[name])
        else:  # one of an earlier report would not belong to this one
            (run.folder / name).unlink(missing_ok=True)
    return text


def _loss_panel(run: _Run) -> Panel:
    held_out = _column(run.validations, "tokens"), _column(run.validations, "validation_loss")
    return Panel(
        name="loss (nats per token)",
        values=run.loss,
        smooth=run.smooth_loss,
        points=("held-out documents", *held_out) if run.validations else None,
    )


def _rate_panels(run: _Run) -> list[Panel]:
    learnt, seconds = _learnt(run), np.where(run.seconds > 0, run.seconds, math.nan)
    norms = run.gradient_norm
    return [
        Panel(name="learning rate", values=run.learning_rate),
        Panel(name="gradient norm", values=norms, smooth=smoothed(norms.tolist(), run.memory), log=True),
        Panel(
            name="tokens/s",
            values=learnt / seconds,
            smooth=np.divide(
                smoothed(np.where(np.isfinite(seconds), learnt, math.nan), run.memory),
                smoothed(seconds, run.memory),
            ),
        ),
    ]


def _validations(run: _Run) -> str:
    if not run.validations:
        return ""
    best = run.best
    rows = ["| step | tokens | loss | perplexity | bits per byte |", "|---:|---:|---:|---:|---:|"]
    for record in reversed(run.validations[-VALIDATIONS:]):
        cells = [
            f"{record['step']:,}{' (best)' if record is best else ''}",
            f"{record['tokens']:,}",
            f"{record['validation_loss']:.4f}",
            _perplexity(record["validation_loss"]),
            _per_byte(record),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return _section("Held-out documents" + _newest(run.validations, VALIDATIONS), "\n".join(rows))


def _samples(run: _Run) -> str:
    """What the model wrote at the newest validations; those of steps that were undone are left out."""
    named = [
        (re.fullmatch(r"step-(\d+)\.txt", path.name), path)
        for path in sorted(run.folder.glob("samples/*.txt"))
    ]
    files = {int(match[1]): path for match, path in named if match and int(match[1]) <= run.step}
    shown = []
    for step in sorted(files, reverse=True)[:SAMPLES]:
        text = _parsed(files[step], lambda path: path.read_bytes().decode("utf-8", errors="replace"))
        cut = " ..." if len(text) > SAMPLE_CHARACTERS else ""
        shown.append(f"After step {step:,}:\n\n{_code(text[:SAMPLE_CHARACTERS] + cut)}")
    return _section("Samples" + _newest(files, SAMPLES), "\n\n".join(shown)) if shown else ""


def _events(run: _Run) -> str:
    lines = []
    for event in reversed(run.events[-EVENTS:]):
        what = event.get("what", "")
        what = "; ".join(map(str, what)) if isinstance(what, list) else str(what)
        lines.append(f"{event.get('time', '')}  {event.get('event', '')}: {what}".replace("\n", " "))
    return _section("Events" + _newest(run.events, EVENTS), _code("\n".join(lines))) if lines else ""


def _next(run: _Run) -> str:
    folder = run.folder
    commands = [
        ("to go on where it stopped", f"wkv train --out {shlex.quote(str(folder))}"),
        ("once it is complete", f'wkv generate {shlex.quote(str(folder / "model.safetensors"))} "The "'),
    ]
    if run.validations:
        best = folder / "checkpoints" / f"step-{run.best['step']:09}" / "model.safetensors"
        if best.is_file():
            commands.append(("the best so far", f'wkv generate {shlex.quote(str(best))} "The "'))
    return _section("What to type next", _code("\n".join(f"{line}  # {why}" for why, line in commands)))


def _settings(run: _Run) -> str:
    facts = {**run.origin, **run.origin.get("identity", {})}
    facts.pop("identity", None)
    lines = [
        f"{name:<10}  {shlex.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts.items()
    ]
    origin = _section("Versions, command and fingerprints", _code("\n".join(lines)))
    return f"{_section('Settings', _code(run.config))}\n\n{origin}"


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}"


def _newest(things: Any, limit: int) -> str:
    return f": the newest {limit} of {len(things):,}" if len(things) > limit else ""


def _code(text: str) -> str:
    """Indented code, in which nothing can be Markdown, and no character a command to a terminal."""
    plain = text.replace("\r\n", "\n").strip("\n")
    harmless = "".join(c if _harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return "\n".join(f"    {line}".rstrip() for line in harmless.split("\n"))


def _harmless(c: str) -> bool:
    return c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs"
