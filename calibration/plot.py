"""Small charts as PNG, drawn with Pillow: lines over a budget and histograms, several panels side by side.

A panel says what to show; `save_plot` places and draws. Everything is drawn at twice its size and scaled down, which
smooths the edges. Colours are Okabe and Ito's, told apart by colour-blind eyes; markers and dashes tell more series apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from leanvlm.runtime.outputs import png_bytes, write_outputs

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("circle", "square", "triangle", "diamond")
INK, GRID, PAPER = "#333333", "#DDDDDD", "#FFFFFF"

SCALE = 2
WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 52
LEGEND_WIDTH, LINE_HEIGHT, TEXT = 170, 19, 12

Point = tuple[float, float]


@dataclass(frozen=True)
class Lines:
    """A panel of lines.

    Attributes:
        title: What the panel is of.
        x_label: With its unit.
        y_label: With its unit.
        series: Name to points (x, y); x values are set at even distances.
        level: A name and a height for a horizontal line to compare with.
        ranges: Name to vertical bars (x, lowest, highest) at its points.
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[Point]]
    level: tuple[str, float] | None = None
    ranges: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """A panel of counts.

    Attributes:
        title: What the panel is of.
        x_label: With its unit.
        series: Name to values; all share the bins.
        mark: A name and a value for a vertical line.
        bins: Number of bins.
        counted: What the values are of.
    """

    title: str
    x_label: str
    series: dict[str, list[float]]
    mark: tuple[str, float] | None = None
    bins: int = 24
    counted: str = "images"


def save_plot(path: Path, panels: Sequence[Lines | Histogram]) -> None:
    """Draw panels, at least one, and write them as a PNG."""
    write_outputs({path: draw_plot(panels)})


def draw_plot(panels: Sequence[Lines | Histogram]) -> bytes:
    """Draw panels, at least one, side by side, with one legend at the right, and return a PNG file."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    canvas = Canvas(len(panels) * WIDTH + LEGEND_WIDTH, HEIGHT)
    for index, panel in enumerate(panels):
        if isinstance(panel, Lines):
            _draw_lines(canvas, index * WIDTH, panel, names)
        else:
            _draw_histogram(canvas, index * WIDTH, panel, names)
    _draw_legend(canvas, len(panels) * WIDTH, panels, names)
    return canvas.png()


class Canvas:
    """A picture in points, drawn `SCALE` times larger."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(TEXT * SCALE)

    def line(self, points: Sequence[Point], colour: str, width: float = 1, dash: float = 0) -> None:
        """Draw a line through points; `dash` is the length of its dashes, 0 for none."""
        pieces = [points] if dash == 0 else _dashes(points, dash)
        for piece in pieces:
            self.draw.line([(x * SCALE, y * SCALE) for x, y in piece], colour, round(width * SCALE), "curve")

    def box(self, low: Point, high: Point, colour: str) -> None:
        """Fill a rectangle between its top left and bottom right corner."""
        self.draw.rectangle([low[0] * SCALE, low[1] * SCALE, high[0] * SCALE, high[1] * SCALE], colour)

    def text(self, at: Point, text: str, anchor: str, colour: str = INK) -> None:
        """Write text; `anchor` is Pillow's two letters for the point of the text that lies at `at`."""
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, colour, self.font, anchor)

    def upright_text(self, at: Point, text: str) -> None:
        """Write text that reads upwards, centred at `at`."""
        width = math.ceil(self.font.getlength(text))
        strip = Image.new("RGB", (width, (TEXT + 6) * SCALE), PAPER)
        ImageDraw.Draw(strip).text((width / 2, strip.height / 2), text, INK, self.font, "mm")
        turned = strip.rotate(90, expand=True)
        self.image.paste(turned, (round(at[0] * SCALE - turned.width / 2), round(at[1] * SCALE - turned.height / 2)))

    def marker(self, at: Point, kind: str, colour: str) -> None:
        """Draw one of `MARKERS`."""
        x, y, r = at[0] * SCALE, at[1] * SCALE, 3.6 * SCALE
        if kind == "circle":
            self.draw.ellipse([x - r, y - r, x + r, y + r], colour)
            return
        corners = {"square": (45, 4), "triangle": (-90, 3), "diamond": (0, 4)}
        start, count = corners[kind]
        angles = [math.radians(start + 360 * k / count) for k in range(count)]
        self.draw.polygon([(x + 1.2 * r * math.cos(a), y + 1.2 * r * math.sin(a)) for a in angles], colour)

    def png(self) -> bytes:
        """Scale down and return a PNG file."""
        return png_bytes(self.image.resize(self.size, Image.Resampling.LANCZOS))


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """Cut a line into dashes with gaps as long."""
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / (2 * length)))
        for k in range(count):
            ends = (k / count, (k + 0.5) / count)
            pieces.append([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends])
    return pieces


@dataclass(frozen=True)
class _Frame:
    """Where a panel's values lie on the canvas."""

    left: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> Point:
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + LEFT + across * width, TOP + (1 - up) * height


def _style(name: str, names: Sequence[str]) -> tuple[str, str, float]:
    """Colour, marker and dash of a series; beyond eight, colours come again with dashes."""
    index = names.index(name)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], 5.0 * (index // len(COLOURS))


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers between two values, about `count` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with a margin."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw_frame(canvas: Canvas, frame: _Frame, panel: Lines | Histogram, y_label: str, x_ticks: dict[float, str]) -> None:
    canvas.text((frame.left + LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP / 2), panel.title, "mm")
    for value in _ticks(*frame.y):
        left, right = frame.place(frame.x[0], value), frame.place(frame.x[1], value)
        canvas.line([left, right], GRID)
        canvas.text((left[0] - 6, left[1]), f"{value:g}", "rm")
    for value, text in x_ticks.items():
        x, y = frame.place(value, frame.y[0])
        canvas.line([(x, y), (x, y + 4)], INK)
        canvas.text((x, y + 6), text, "ma")
    corners = [(frame.x[0], frame.y[1]), (frame.x[0], frame.y[0]), (frame.x[1], frame.y[0])]
    canvas.line([frame.place(*corner) for corner in corners], INK)
    canvas.text((frame.left + LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 10), panel.x_label, "ms")
    canvas.upright_text((frame.left + 12, TOP + (HEIGHT - TOP - BOTTOM) / 2), y_label)


def _draw_lines(canvas: Canvas, left: float, panel: Lines, names: Sequence[str]) -> None:
    columns = {x: k for k, x in enumerate(sorted({x for points in panel.series.values() for x, _ in points}))}
    values = [y for points in panel.series.values() for _, y in points] + ([panel.level[1]] if panel.level else [])
    values += [end for bars in panel.ranges.values() for _, *ends in bars for end in ends]
    frame = _Frame(left, (-0.3, len(columns) - 0.7), _span(values))
    _draw_frame(canvas, frame, panel, panel.y_label, {k: f"{x:g}" for x, k in columns.items()})
    if panel.level is not None:
        canvas.line([frame.place(x, panel.level[1]) for x in frame.x], INK, 1.2, dash=3)
    for name, points in panel.series.items():
        colour, marker, dash = _style(name, names)
        placed = [frame.place(columns[x], y) for x, y in sorted(points)]
        canvas.line(placed, colour, 1.8, dash)
        for point in placed:
            canvas.marker(point, marker, colour)
        for x, low, high in panel.ranges.get(name, []):
            canvas.line([frame.place(columns[x], low), frame.place(columns[x], high)], colour, 1.2)


def _draw_histogram(canvas: Canvas, left: float, panel: Histogram, names: Sequence[str]) -> None:
    low, high = _span([value for values in panel.series.values() for value in values])
    counts = {name: _count(values, low, high, panel.bins) for name, values in panel.series.items()}
    frame = _Frame(left, (low, high), (0.0, 1.08 * max(map(max, counts.values()))))
    _draw_frame(canvas, frame, panel, panel.counted, {value: f"{value:g}" for value in _ticks(low, high)})
    width = (high - low) / panel.bins
    for number, (name, heights) in enumerate(counts.items()):
        colour, _, dash = _style(name, names)
        outline = [(low + width * (k + side), height) for k, height in enumerate(heights) for side in (0, 1)]
        if number == 0:
            for (x0, y), (x1, _) in zip(outline[::2], outline[1::2], strict=True):
                if y:
                    canvas.box(frame.place(x0, y), frame.place(x1, 0), "#F3C9AC")
        canvas.line([frame.place(*point) for point in outline], colour, 1.6, dash)
    if panel.mark is not None:
        canvas.line([frame.place(panel.mark[1], y) for y in frame.y], INK, 1.4, dash=3)


def _count(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    return counts


def _draw_legend(canvas: Canvas, left: float, panels: Sequence[Lines | Histogram], names: Sequence[str]) -> None:
    y = float(TOP)
    for name in names:
        colour, marker, dash = _style(name, names)
        canvas.line([(left + 6, y), (left + 34, y)], colour, 1.8, dash)
        if any(isinstance(panel, Lines) and name in panel.series for panel in panels):
            canvas.marker((left + 20, y), marker, colour)
        canvas.text((left + 42, y), name, "lm")
        y += LINE_HEIGHT
    notes = [panel.level if isinstance(panel, Lines) else panel.mark for panel in panels]
    for note in dict.fromkeys(note[0] for note in notes if note is not None):
        canvas.line([(left + 6, y), (left + 34, y)], INK, 1.2, dash=3)
        canvas.text((left + 42, y), note, "lm")
        y += LINE_HEIGHT
