"""Numbers to pictures. Needs matplotlib, the extra `wkv[plots]`; nothing here knows a model."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence

from .errors import MissingExtraError


def loss_curve(
    tokens: Sequence[int],
    bits_per_byte: Sequence[float],
    *,
    title: str,
    levels: Mapping[str, float],
    end: tuple[str, float] | None = None,
) -> bytes:
    """A PNG of `bits_per_byte` against `tokens`: every step faint, the smoothed course bold.

    `levels` are labelled lines to compare with, in bits per byte; `end` is one labelled point after the
    last step. MissingExtraError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no window system
    except ImportError as error:
        raise MissingExtraError(
            "matplotlib is not installed", "the extra that draws", "pip install 'wkv[plots]'"
        ) from error

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, bits_per_byte, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smoothed(bits_per_byte), color="tab:blue", linewidth=2, label="training")
    for (label, level), style in zip(levels.items(), itertools.cycle(("--", "-.", ":")), strict=False):
        axes.axhline(level, color="tab:gray", linestyle=style, label=f"{label} {level:.2f}")
    if end is not None:
        label, value = end
        axes.plot(tokens[-1:], [value], "o", color="tab:red", label=f"{label} {value:.2f}", clip_on=False)
    axes.set(title=title, xlabel="tokens seen", ylabel="bits per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def smoothed(values: Sequence[float], memory: float = 0.97) -> list[float]:
    """The exponential average so far, with its start corrected as in Adam: no lag towards zero."""
    course, total, weight = [], 0.0, 0.0
    for value in values:
        total = memory * total + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        course.append(total / weight)
    return course
