"""Horizontal bars as PNG, in the colours and sizes of `leanvlm.calibration.plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from leanvlm.calibration.plot import GRID, INK, LEGEND_WIDTH, LINE_HEIGHT, PAPER, SCALE, TEXT, TOP, Point

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
    sheet = _Sheet(WIDTH + LEGEND_WIDTH, height)
    ends = [max(sum(bar.values()), chart.marks[1].get(name, 0)) for name, bar in chart.bars.items()]
    high = max(*ends, chart.level[1] if chart.level else 0)
    axis = _Axis(NAMES, WIDTH - RIGHT, high)
    bottom = TOP + ROW * len(chart.bars)
    _draw_axis(sheet, axis, chart, bottom)
    for number, name in enumerate(chart.bars):
        _draw_bar(sheet, axis, chart, name, TOP + ROW * (number + 0.5))
    if chart.level is not None:
        _draw_level(sheet, axis.place(chart.level[1]), bottom)
    _draw_legend(sheet, chart, list(parts))
    sheet.save(path)


class _Sheet:
    """A picture in points, drawn `SCALE` times larger."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(TEXT * SCALE)

    def line(self, start: Point, end: Point, colour: str, width: float = 1) -> None:
        self.draw.line([(x * SCALE, y * SCALE) for x, y in (start, end)], colour, round(width * SCALE))

    def box(self, low: Point, high: Point, colour: str) -> None:
        self.draw.rectangle([low[0] * SCALE, low[1] * SCALE, high[0] * SCALE, high[1] * SCALE], colour)

    def text(self, at: Point, text: str, anchor: str) -> None:
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, INK, self.font, anchor)

    def save(self, path: Path) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path)


@dataclass(frozen=True)
class _Axis:
    """Values from 0 to `high`, between two places on the sheet."""

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


def _draw_axis(sheet: _Sheet, axis: _Axis, chart: Bars, bottom: float) -> None:
    middle = (axis.left + axis.right) / 2
    sheet.text((middle, TOP / 2), chart.title, "mm")
    sheet.text((middle, bottom + 40), chart.x_label, "ms")
    for value in axis.ticks():
        x = axis.place(value)
        sheet.line((x, TOP), (x, bottom), GRID)
        sheet.text((x, bottom + 6), f"{value:g}", "ma")
    sheet.line((axis.left, TOP), (axis.left, bottom), INK)


def _draw_bar(sheet: _Sheet, axis: _Axis, chart: Bars, name: str, middle: float) -> None:
    top, bottom = middle - THICK / 2, middle + THICK / 2
    sheet.text((axis.left - 8, middle), name, "rm")
    end = 0.0
    for part, length in chart.bars[name].items():
        sheet.box((axis.place(end), top), (axis.place(end + length), bottom), chart.colours[part])
        end += length
    mark = chart.marks[1].get(name)
    if mark is not None:
        sheet.line((axis.place(mark), top - 4), (axis.place(mark), bottom + 4), INK, 2.5)
    sheet.text((axis.place(max(end, mark or 0)) + 7, middle), f"{end:.3g}", "lm")


def _draw_level(sheet: _Sheet, x: float, bottom: float) -> None:
    for y in range(TOP, round(bottom), 6):
        sheet.line((x, y), (x, y + 3), INK, 1.2)


def _draw_legend(sheet: _Sheet, chart: Bars, parts: list[str]) -> None:
    left, y = WIDTH + 12, float(TOP + 6)
    for part in parts:
        sheet.box((left, y - 6), (left + 12, y + 6), chart.colours[part])
        sheet.text((left + 22, y), part, "lm")
        y += LINE_HEIGHT
    if chart.level is not None:
        for start in (-7, -1, 5):
            sheet.line((left + 6, y + start), (left + 6, y + start + 3), INK, 1.2)
        sheet.text((left + 22, y), chart.level[0], "lm")
        y += LINE_HEIGHT
    if chart.marks[1]:
        sheet.line((left + 6, y - 7), (left + 6, y + 7), INK, 2.5)
        sheet.text((left + 22, y), chart.marks[0], "lm")
