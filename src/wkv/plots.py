"""Numbers to pictures. Needs matplotlib, the extra `wkv[plots]`; nothing here knows a model."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

MEMORY = 0.97  # of the smoothed course: about the last 33 values
BINS = 1000  # about as many as a picture has columns


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
    figure = _figure(height=4.5)
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
    return _png(figure)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One curve of `stacked`, (N,) like its x axis. A value that is not finite is left out."""

    name: str  # what the values are, and their unit
    values: ArrayLike  # drawn faint where there is a smoothed course to draw bold
    smooth: ArrayLike | None = None
    points: tuple[str, ArrayLike, ArrayLike] | None = None  # their name, x and y
    log: bool = False


def stacked(x: ArrayLike, panels: Sequence[Panel], *, xlabel: str) -> bytes:
    """A PNG of the panels one below the other, on one x axis (N,), ascending.

    Time and size of the picture do not grow with N: of a long curve, the extremes of every stretch are
    drawn, which looks the same. MissingExtraError without matplotlib.
    """
    figure = _figure(height=2 + 2.4 * len(panels))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        faint = dict(alpha=0.3, linewidth=0.8) if panel.smooth is not None else dict(linewidth=2)
        curves = [(panel.values, faint, "each step")]
        if panel.smooth is not None:
            curves.append((panel.smooth, dict(linewidth=2), "smoothed"))
        for values, style, label in curves:
            xs, ys = outline(x, values, positive=panel.log)
            marker = "." if len(xs) == 1 else ""  # one point alone makes no line
            axes.plot(xs, ys, color="tab:blue", marker=marker, label=label, **style)
            if panel.log and len(xs):
                axes.set_yscale("log")
        if panel.points is not None:
            label, *points = panel.points
            axes.plot(*outline(*points), "o-", color="tab:red", markersize=3, linewidth=1, label=label)
        axes.set(ylabel=panel.name)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    rows[-1].set(xlabel=xlabel)
    return _png(figure)


def outline(
    x: ArrayLike, y: ArrayLike, *, positive: bool = False, bins: int = BINS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most 2 x `bins` of the points (N,), (N,) with the look of all: the extremes of each stretch.

    Points that are not finite are left out, and with `positive` those that a log axis cannot show.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    shown = np.isfinite(xs) & np.isfinite(ys)
    if positive:
        shown &= ys > 0
    xs, ys = xs[shown], ys[shown]
    if len(ys) <= 2 * bins:
        return xs, ys
    borders = np.linspace(0, len(ys), bins + 1, dtype=np.int64)
    stretches = [(start, ys[start:stop]) for start, stop in itertools.pairwise(borders)]
    kept = np.unique(
        [start + extreme(part) for start, part in stretches for extreme in (np.argmin, np.argmax)]
    )
    return xs[kept], ys[kept]


class Smoothed:
    """The exponential average so far, with its start corrected as in Adam: no lag towards zero.

    Values that are not finite are passed over; before the first that is, the average is NaN.
    """

    def __init__(self, memory: float = MEMORY) -> None:
        self.memory, self._total, self._weight = memory, 0.0, 0.0

    @property
    def value(self) -> float:
        return self._total / self._weight if self._weight else math.nan

    def add(self, value: float) -> float:
        """Take in the next value; return the average with it."""
        if math.isfinite(value):
            self._total = self.memory * self._total + (1 - self.memory) * value
            self._weight = self.memory * self._weight + (1 - self.memory)
        return self.value


def smoothed(values: Iterable[float], memory: float = MEMORY) -> list[float]:
    """The course of `Smoothed` over the values."""
    course = Smoothed(memory)
    return [course.add(value) for value in values]


def _figure(height: float) -> Figure:
    """Empty, 8 inches wide. MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no window system
    except ImportError as error:
        raise MissingExtraError(
            "matplotlib is not installed", "the extra that draws", "pip install 'wkv[plots]'"
        ) from error
    return Figure(figsize=(8, height), dpi=120, layout="constrained")


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
