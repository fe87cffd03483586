"""Horizontal bars as PNG, in the colours and sizes of `leanvlm.calibration.plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from leanvlm.calibration.plot import GRID, INK, LEGEND_WIDTH, LINE_HEIGHT, TOP, Canvas

WIDTH, NAMES, RIGHT, BOTTOM = 640, 112, 46, 50
ROW, THICK = 30, 18


@dataclass(frozen=True)
class Bars:
    """A chart of horizontal bars.

    Attributes:
        title: What it is of.
        x_label: With its unit.
        bars: Name to the lengths of its parts by name, drawn one behind the other; the first bar is on top.
        colours: Of the parts.
        level: A name and a value for a dashed line across all bars.
        marks: A name for the upright strokes, and a value for each bar that has one.
    """

    title: str
    x_label: str
    bars: Mapping[str, Mapping[str, float]]
    colours: Mapping[str, str]
    level: tuple[str, float] | None = None
    marks: tuple[str, Mapping[str, float]] = field(default=("", {}))


def save_bars(path: Path, chart: Bars) -> None:
    """Draw a chart with its legend at the right, and write it.

    Args:
        path: The file; its suffix names the format.
        chart: With at least one bar.
    """
    parts = dict.fromkeys(part for bar in chart.bars.values() for part in bar)
    height = TOP + BOTTOM + max(ROW * len(chart.bars), LINE_HEIGHT * (len(parts) + 2))
    canvas = Canvas(WIDTH + LEGEND_WIDTH, height)
    ends = [max(sum(bar.values()), chart.marks[1].get(name, 0)) for name, bar in chart.bars.items()]
    high = max(*ends, chart.level[1] if chart.level else 0)
    axis = _Axis(NAMES, WIDTH - RIGHT, high)
    bottom = TOP + ROW * len(chart.bars)
    _draw_axis(canvas, axis, chart, bottom)
    for number, name in enumerate(chart.bars):
        _draw_bar(canvas, axis, chart, name, TOP + ROW * (number + 0.5))
    if chart.level is not None:
        level = axis.place(chart.level[1])
        canvas.line(((level, TOP), (level, bottom)), INK, 1.2, dash=3)
    _draw_legend(canvas, chart, list(parts))
    path.write_bytes(canvas.png())


@dataclass(frozen=True)
class _Axis:
    """Values from 0 to `high`, between two points on the canvas."""

    left: float
    right: float
    high: float

    def place(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.high

    def ticks(self, count: int = 8) -> list[float]:
        """Round numbers from 0, at most about `count`."""
        rough = self.high / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * k for k in range(math.floor(self.high / step) + 1)]


def _draw_axis(canvas: Canvas, axis: _Axis, chart: Bars, bottom: float) -> None:
    middle = (axis.left + axis.right) / 2
    canvas.text((middle, TOP / 2), chart.title, "mm")
    canvas.text((middle, bottom + 40), chart.x_label, "ms")
    for value in axis.ticks():
        x = axis.place(value)
        canvas.line(((x, TOP), (x, bottom)), GRID)
        canvas.text((x, bottom + 6), f"{value:g}", "ma")
    canvas.line(((axis.left, TOP), (axis.left, bottom)), INK)


def _draw_bar(canvas: Canvas, axis: _Axis, chart: Bars, name: str, middle: float) -> None:
    top, bottom = middle - THICK / 2, middle + THICK / 2
    canvas.text((axis.left - 8, middle), name, "rm")
    end = 0.0
    for part, length in chart.bars[name].items():
        canvas.box((axis.place(end), top), (axis.place(end + length), bottom), chart.colours[part])
        end += length
    mark = chart.marks[1].get(name)
    if mark is not None:
        canvas.line(((axis.place(mark), top - 4), (axis.place(mark), bottom + 4)), INK, 2.5)
    canvas.text((axis.place(max(end, mark or 0)) + 7, middle), f"{end:.3g}", "lm")


def _draw_legend(canvas: Canvas, chart: Bars, parts: list[str]) -> None:
    left, y = WIDTH + 12, float(TOP + 6)
    for part in parts:
        canvas.box((left, y - 6), (left + 12, y + 6), chart.colours[part])
        canvas.text((left + 22, y), part, "lm")
        y += LINE_HEIGHT
    if chart.level is not None:
        for start in (-7, -1, 5):
            canvas.line(((left + 6, y + start), (left + 6, y + start + 3)), INK, 1.2)
        canvas.text((left + 22, y), chart.level[0], "lm")
        y += LINE_HEIGHT
    if chart.marks[1]:
        canvas.line(((left + 6, y - 7), (left + 6, y + 7)), INK, 2.5)
        canvas.text((left + 22, y), chart.marks[0], "lm")
