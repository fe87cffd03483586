"""The chapter and the pictures of a latency measurement, from its raw samples: no median, ratio or verdict is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.latency_plot import Bars, save_bars
from bench.roofline import Shapes, arithmetic_ms, floors, memory_ms, work
from leanvlm.calibration.plot import COLOURS, Lines, save_plot
from leanvlm.runtime.commands.profile_report import COLOURS as STAGE_COLOURS

FLOOR = "floor of "
SIZES = ("peak_device_bytes_64", "weights_bytes")


@dataclass(frozen=True)
class Bound:
    """A ratio of two figures, and where it has to lie.

    Attributes:
        text: What is divided by what.
        over: Name of the figure that is divided.
        under: Name of the figure that divides it.
        value: The largest ratio that is right, or the smallest.
        least: Whether it is the smallest.
        optional: Whether the row is left out when something was not measured.
    """

    text: str
    over: str
    under: str
    value: float
    least: bool = False
    optional: bool = False

    def ratio(self, found: Mapping[str, float]) -> float | None:
        """Return the ratio, None when one of the figures was not measured."""
        return found[self.over] / found[self.under] if {self.over, self.under} <= found.keys() else None

    def verdict(self, ratio: float) -> str:
        """Return `holds`, or by how much of the bound the ratio misses it."""
        missed = (1 - ratio / self.value) if self.least else (ratio / self.value - 1)
        if missed <= 0:
            return "holds"
        return f"missed by {100 * missed:.1f} %" if missed >= 0.001 else "missed by less than 0.1 %"


BOUNDS = (
    Bound("vision at 64 tokens over PyTorch's as a CUDA graph", "vision_64", "torch_graph_vision", 1.25),
    Bound("prefill, fp16, over its floor", "prefill_104_fp16", FLOOR + "prefill_104_fp16", 1.5),
    Bound("prefill, int4 over fp16", "prefill_104_int4", "prefill_104_fp16", 1.0),
    Bound("decode step, fp16, over its floor", "decode_fp16", FLOOR + "decode_fp16", 1.35),
    Bound("decode step, int4, over its floor", "decode_int4", FLOOR + "decode_int4", 2.0),
    Bound("decode step, fp16: share outside the graph's replay", "decode_fp16_outside", "decode_fp16", 0.1),
    Bound("decode step, int4: share outside the graph's replay", "decode_int4_outside", "decode_int4", 0.1, optional=True),
    Bound("first token, unpruned over 64 tokens", "ttft_576", "ttft_64", 2.0, least=True),
    Bound("first token, unpruned in transformers over 64 tokens", "transformers_ttft_576", "ttft_64", 3.0, least=True),
    Bound("preprocess over Pillow's decode and resize", "preprocess", "pillow_decode_resize", 1.1),
    Bound("device memory at 64 tokens over the weights", *SIZES, 1.15),
)


def figures(data: Mapping[str, Any]) -> dict[str, float]:
    """Return what bounds compare: medians of the samples and floors in ms, sizes in bytes."""
    found = {name: median(values) for name, values in data["samples_ms"].items() if values}
    found |= {FLOOR + name: value for name, value in floors(data).items()}
    found |= {name: data[name] for name in SIZES if name in data}
    for name in ("decode_fp16", "decode_int4"):
        if {name, f"{name}_graph_only"} <= found.keys():
            found[f"{name}_outside"] = found[name] - found[f"{name}_graph_only"]
    return found


def latency_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter of a latency measurement: conditions, bounds, pictures, stages, samples, agreement and floors."""
    found = figures(data)
    links = [f"![{chart.title}](results/{_picture(path, name).name})\n" for name, chart in charts(data).items()]
    parts = [
        f"## Latency of {data['model']}, on {data['gpu']}\n",
        _conditions(path, data, found),
        _bounds(found),
        *links,
        *(_stages(data, precision) for precision in data.get("stages_ms", {})),
        _samples(data),
        _agreement(data.get("agreement", {})),
        _floors(data, found),
    ]
    return "\n".join(part for part in parts if part)


def latency_pictures(path: Path, data: dict[str, Any]) -> None:
    """Draw the stages, the time to the first token and the distance from the floors, each beside `path` under its own name."""
    for name, chart in charts(data).items():
        if isinstance(chart, Bars):
            save_bars(_picture(path, name), chart)
        else:
            save_plot(_picture(path, name), [chart])


def charts(data: dict[str, Any]) -> dict[str, Bars | Lines]:
    """Return the pictures that there are samples for, by the end of their file's name."""
    found = figures(data)
    every = {"stages": _stage_chart(data), "ttft": _first_token_chart(data, found), "floors": _floor_chart(data, found)}
    return {name: chart for name, chart in every.items() if chart is not None}


def _picture(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}.png")


def _conditions(path: Path, data: dict[str, Any], found: dict[str, float]) -> str:
    first = _gains(found, "", "pixels of the model's own size") + _gains(
        found, "_pixels", "the whole picture, resizing included"
    )
    count = min((len(values) for values in data["samples_ms"].values() if values), default=0)
    warm_up = f" after {data['warm_up']} runs that do not count" if "warm_up" in data else ""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    image = data.get("image")
    photo = f"an image of {image['width']} by {image['height']} pixels in {image['bytes'] / 1e3:.0f} kB, " if image else ""
    return (
        f"{first}{data['gpu']}, {versions}; {photo}at least {count} samples of each time{warm_up}; "
        f"`{data['command']}`, commit `{str(data['commit'])[:7]}`, {data['date']}, [{path.name}](results/{path.name}).\n"
    )


def _bounds(found: dict[str, float]) -> str:
    rows, held, missed = [], 0, 0
    for bound in BOUNDS:
        ratio = bound.ratio(found)
        if ratio is None and bound.optional:
            continue
        verdict = "not measured" if ratio is None else bound.verdict(ratio)
        held, missed = held + (verdict == "holds"), missed + verdict.startswith("missed")
        sides = [_amount(name, found.get(name)) for name in (bound.over, bound.under)]
        limit = f"{'at least' if bound.least else 'at most'} {bound.value:g}"
        rows.append([bound.text, *sides, "" if ratio is None else f"{ratio:.3f}", limit, verdict])
    counts = f"Bounds that hold: {held} of {len(rows)}; missed: {missed}; not measured: {len(rows) - held - missed}"
    text = f"### Bounds\n\n{counts}. A ratio is that of two medians.\n\n"
    return text + _table(["ratio of", "median", "to", "ratio", "bound", "verdict"], rows)


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if name in SIZES else f"{value:.3f} ms"


def _stages(data: dict[str, Any], precision: str) -> str:
    budgets = _by_budget(data["stages_ms"][precision])
    names = dict.fromkeys(stage for stages in budgets.values() for stage in stages)
    rows = [[name, *(_median_p90(stages.get(name)) for stages in budgets.values())] for name in names]
    sums = [sum(median(values) for values in stages.values()) for stages in budgets.values()]
    rows.append(["sum of the medians", *(f"{value:.3f}" for value in sums)])
    first = [data["samples_ms"].get(_first_token(f"{budget}_jpeg", precision)) for budget in budgets]
    if any(first):
        rows.append(["time to first token", *map(_median_p90, first)])
    return f"### Stages from JPEG bytes to the first token, {precision}: median (p90), ms\n\n" + _table(
        ["image tokens", *map(str, budgets)], rows
    )


def _gains(found: dict[str, float], beginning: str, words: str) -> str:
    """Say how much sooner the first token comes with 64 image tokens, from one of the beginnings."""
    pairs = ((f"ttft_576{beginning}", "unpruned"), (f"transformers_ttft_576{beginning}", "unpruned in transformers"))
    ours = found.get(f"ttft_64{beginning}")
    gains = [f"{found[name] / ours:.2f} times sooner than {peer}" for name, peer in pairs if ours and name in found]
    return f"From {words}, the first token with 64 image tokens comes {' and '.join(gains)}. " if gains else ""


def _by_budget(stages: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[int, Mapping[str, Sequence[float]]]:
    return {budget: stages[str(budget)] for budget in sorted(map(int, stages))}


def _first_token(budget: int | str, precision: str) -> str:
    return f"ttft_{budget}" if precision == "fp16" else f"ttft_{budget}_{precision}"


def _median_p90(values: Sequence[float] | None) -> str:
    return f"{median(values):.3f} ({np.percentile(values, 90):.3f})" if values else ""


def _samples(data: dict[str, Any]) -> str:
    rows = []
    for name, values in data["samples_ms"].items():
        if values:
            low, middle, high = np.percentile(values, [10, 50, 90])
            rows.append([f"`{name}`", f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", str(len(values))])
    prompt = data["shapes"]["prompt_tokens"]
    text = (
        f"### All times, ms\n\nA number in a name is that of the image tokens; {prompt} is the whole prompt with 64 of them. "
        "`graph_only` is the graph's replay alone.\n\n"
    )
    return text + _table(["", "median", "p10", "p90", "samples"], rows)


def _agreement(data: dict[str, Any]) -> str:
    """Show nested figures whatever their names: a row for each innermost group, a column for each name in it."""
    groups = dict(_groups(data))
    if not groups:
        return ""
    heads = list(dict.fromkeys(name for group in groups.values() for name in group))
    rows = [[label, *(_plain(group.get(head)) for head in heads)] for label, group in groups.items()]
    return "### Agreement of the results\n\n" + _table(["", *(head.replace("_", " ") for head in heads)], rows)


def _groups(data: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    leaves = {name: value for name, value in data.items() if not isinstance(value, Mapping)}
    if leaves:
        yield ", ".join(path) or "all", leaves
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _groups(value, (*path, name))


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _floors(data: dict[str, Any], found: dict[str, float]) -> str:
    bandwidth, rate = data["copy_bandwidth_bytes_per_s"], data["matmul_flop_per_s"]
    rows = []
    for name, (moved, flops) in work(Shapes.from_dict(data["shapes"]), data["decoder_weights_bytes"]).items():
        floor, measured = found[FLOOR + name], found.get(_measured(name))
        times = [f"{moved / 1e9:.3f}", f"{memory_ms(moved, bandwidth):.3f}"]
        times += [f"{flops / 1e9:.1f}", f"{arithmetic_ms(flops, rate):.3f}", f"{floor:.3f}"]
        rows.append([name, *times, *(("", "") if measured is None else (f"{measured:.3f}", f"{measured / floor:.2f}"))])
    text = (
        f"### Floors, ms\n\nWeights once through memory at {bandwidth / 1e12:.2f} TB/s of a copy, and operations at "
        f"{rate / 1e12:.0f} TFLOP/s of a matrix product, both measured here. The vision graph's floor is the larger time; the "
        "decoder's floors are the first. The formulas are in [roofline.py](roofline.py).\n\n"
    )
    heads = ["", "weights, GB", "through memory", "GFLOP", "arithmetic", "floor", "median", "over the floor"]
    return text + _table(heads, rows)


def _measured(floor: str) -> str:
    """Return the name of the samples that a floor is for."""
    return "vision_64" if floor == "vision" else floor


def _stage_chart(data: dict[str, Any]) -> Bars | None:
    bars = {
        f"{precision}, {budget}": {stage: median(values) for stage, values in stages.items()}
        for precision, budgets in data.get("stages_ms", {}).items()
        for budget, stages in _by_budget(budgets).items()
    }
    title = "stages to the first token, by precision and image tokens"
    return Bars(title, "sum of the medians, ms", bars, STAGE_COLOURS) if bars else None


def _first_token_chart(data: dict[str, Any], found: dict[str, float]) -> Lines | None:
    series: dict[str, list[tuple[float, float]]] = {}
    for name, value in found.items():
        match = re.fullmatch(r"ttft_(\d+)(?:_(int4))?", name)
        if match:
            series.setdefault(match[2] or "fp16", []).append((int(match[1]), value))
    unpruned = data["shapes"]["image_tokens"]
    time = found.get(f"transformers_ttft_{unpruned}")
    level = None if time is None else (f"transformers, {unpruned}", time)
    return Lines("time to first token", "image tokens", "median, ms", series, level) if series else None


def _floor_chart(data: dict[str, Any], found: dict[str, float]) -> Bars | None:
    bars: dict[str, dict[str, float]] = {}
    limits: dict[str, float] = {}
    for name in work(Shapes.from_dict(data["shapes"]), data["decoder_weights_bytes"]):
        measured, floor = _measured(name), found[FLOOR + name]
        if measured in found:
            words = name.replace("_", " ")
            bars[words] = {"measured": found[measured] / floor}
            bound = next((bound for bound in BOUNDS if bound.over == measured and bound.under in found), None)
            if bound is not None:
                limits[words] = bound.value * found[bound.under] / floor
    if not bars:
        return None
    colours = {"measured": COLOURS[1]}
    return Bars("distance from the floor", "median / floor", bars, colours, ("floor", 1.0), ("bound", limits))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (heads, *rows)]
    rule = "|".join(["---", *["--:"] * (len(heads) - 1)])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"
