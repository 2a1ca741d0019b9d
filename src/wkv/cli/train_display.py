"""What a training run shows while it runs: a progress line, samples, and the report in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots import Smoothed
from ..training.callbacks import Callback
from .common import note
from .progress import ProgressLine

if TYPE_CHECKING:
    from ..training import Trainer, Validation


class Terminal(Callback):
    """Loss, speed and the time left; a line for each validation, checkpoint and event."""

    def on_start(self, trainer: Trainer) -> None:
        import torch

        from ..evaluation import matmul_peak

        self.progress = ProgressLine()
        self.loss, self.seconds, self.tokens, self.done = Smoothed(), 0.0, 0, trainer.done
        model = trainer.model
        matrices = sum(
            p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and name != "emb.weight"
        )
        # Two operations per weight and token forward, four backward; the operators' own are left out.
        precision = getattr(torch, trainer.config.precision)
        peak = trainer.group.size * matmul_peak(model.device, precision)
        self.peak_tokens = peak / (6 * matrices)
        parameters = sum(p.numel() for p in model.parameters())
        step = trainer.progress.step
        self._say(f"RWKV-{model.config.generation} of {parameters:,} parameters, from step {step:,}")
        self._say("Ctrl-C saves a checkpoint and stops; the same command goes on from it")

    def on_step(self, trainer: Trainer, metrics: Mapping[str, Any], seconds: float) -> None:
        if metrics["loss"] is not None:
            self.loss.add(metrics["loss"])
        self.seconds += seconds
        self.tokens += trainer.config.tokens_per_step
        speed = self.tokens / self.seconds
        # By the speed of this process: the run may have begun on a busier machine.
        done = trainer.done - self.done
        left = self.seconds * (1 - trainer.done) / done if done > 0 else math.inf
        line = (
            f"step {metrics['step']:,}  loss {self.loss.value:.3f}  {speed:,.0f} tokens/s "
            f"({speed / self.peak_tokens:.0%} of peak)  {duration(left)} left"
        )
        self.progress.show(trainer.done, line)

    def on_validation(self, trainer: Trainer, result: Validation) -> None:
        per_byte = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.3f} bits/byte"
        tokens = f"{trainer.progress.tokens:,} tokens"
        self._say(f"{tokens}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f}{per_byte}")

    def on_event(self, trainer: Trainer, text: str) -> None:
        self._say(text)

    def on_end(self, trainer: Trainer) -> None:
        self.progress.close()

    def _say(self, line: str) -> None:
        if hasattr(self, "progress"):
            self.progress.say(line)
        else:
            note(line)  # an event on the way to the first step


class Samples(Callback):
    """At every validation, what the model makes of a prompt: on the screen, and in the folder `samples`."""

    def __init__(self, prompt: str, n_tokens: int = 100) -> None:
        self.prompt, self.n_tokens = prompt, n_tokens

    def on_validation(self, trainer: Trainer, result: Validation) -> None:
        try:
            self._sample(trainer)
        except Exception as error:  # not worth a run
            trainer.announce(f"no sample: {error}")

    def _sample(self, trainer: Trainer) -> None:
        from ..checkpoints import atomic_write
        from ..inference import Session
        from ..tokenizers import named

        if trainer.data.tokenizer is None:
            return
        session = Session(trainer.model, named(trainer.data.tokenizer))
        session.feed(self.prompt)
        text = self.prompt + session.generate(self.n_tokens, temperature=0.8, top_p=0.9, seed=0)
        trainer.announce(f"it writes {text[:200]!r}")
        if trainer.run:
            folder = trainer.run.path / "samples"
            folder.mkdir(exist_ok=True)
            with atomic_write(folder / f"step-{trainer.progress.step:09}.txt") as file:
                file.write(text.encode())


class Report(Callback):
    """Writes report.md in the run's folder: at the end, and ten times before, as each reads all records."""

    def on_start(self, trainer: Trainer) -> None:
        self.next = trainer.done + 0.1

    def on_save(self, trainer: Trainer, path: Path) -> None:
        if trainer.done >= self.next:
            self.next = trainer.done + 0.1
            self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        from ..viz import write_report

        if trainer.run and trainer.progress.step:
            try:
                write_report(trainer.run.path)
            except Exception as error:  # nor is a picture
                trainer.announce(f"no report: {error}")


def duration(seconds: float) -> str:
    """`1:02:03`, `4:05`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
