"""Who listens to a run: progress bars, samples, TensorBoard, reports, and whatever else is wanted.

    class Ring(Callback):
        def on_end(self, trainer):
            print("\\a")

`Trainer(..., callbacks=[Ring()])` then rings when the run is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from .trainer import Trainer
    from .validation import Validation


class Callback:
    """Every method may be left out. They may look at the trainer and its model, and change neither."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process; `trainer.progress.step` is not 0 in a run taken up again."""

    def on_step(self, trainer: Trainer, metrics: Mapping[str, Any], seconds: float) -> None:
        """After each step, with the line that went to metrics.jsonl."""

    def on_validation(self, trainer: Trainer, result: Validation) -> None:
        """After each validation."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint has reached the disk."""

    def on_event(self, trainer: Trainer, text: str) -> None:
        """When something happens beside the plan: a skipped step, a return to a checkpoint."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process, also when the run was stopped early."""


class TensorBoard(Callback):
    """Writes the metrics for TensorBoard. MissingExtraError without the extra `wkv[tensorboard]`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "tensorboard is not installed",
                "the extra that writes for it",
                "pip install 'wkv[tensorboard]'",
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_step(self, trainer: Trainer, metrics: Mapping[str, Any], seconds: float) -> None:
        for name, value in metrics.items():
            if name not in ("step", "tokens") and isinstance(value, int | float):
                self._writer.add_scalar(name, value, metrics["tokens"])

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()
