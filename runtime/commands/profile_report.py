"""The figures of `profile` as a table in the terminal and as a page with a chart."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from leanvlm.runtime.answer import STAGES
from leanvlm.runtime.outputs import PAGE_MARK

# One colour a stage, told apart by colour-blind eyes too (Okabe and Ito's palette).
COLOURS = {
    "preprocess": "#999999",
    "vision": "#0072B2",
    "project": "#56B4E9",
    "prune": "#D55E00",
    "splice": "#F0E442",
    "prefill": "#009E73",
    "sample": "#CC79A7",
}
SHARED = ("vision", "project", "prune")
WHOLE_NOTE = "the whole vision engine, with project and prune in it"
SHARED_NOTE = "share of the vision graph's wall time, from a separate pass"
# Title, the figure that must be known, and how a board's figures are written.
BOARD_ROWS = (
    ("memory in use, MB", "ram_peak_mb", "{ram_peak_mb} of {ram_total_mb}"),
    ("swap in use, MB", "swap_peak_mb", "{swap_peak_mb}"),
    ("GPU load, %", "gpu_load_mean", "{gpu_load_mean:.0f} ({gpu_load_peak:.0f})"),
    ("GPU clock, MHz", "gpu_mhz_mean", "{gpu_mhz_mean:.0f}"),
    ("memory clock, MHz", "emc_mhz_mean", "{emc_mhz_mean:.0f}"),
    ("power, W", "power_mean_w", "{power_mean_w:.1f} ({power_peak_w:.1f})"),
    ("energy per answer, J", "energy_per_answer_j", "{energy_per_answer_j:.2f}"),
    ("hottest sensor, °C", "temperature_peak_c", "{temperature_peak_c:.1f} ({hottest_sensor})"),
)
BOARD_NOTE = "figures of the whole board, from a separate pass with tegrastats; load and power: mean (peak)"


def print_table(figures: dict[str, Any]) -> None:
    """Print the stages of all budgets side by side on standard output."""
    console = Console(highlight=False, markup=False)
    columns = _columns(figures)
    title = f"{figures['bundle']}: ms, p50 (p90) of {_runs(figures)}"
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for provider, values in columns:
        table.add_column(f"{_kept(values)}\n{provider}" if provider else f"{_kept(values)} tokens", justify="right")
    stages, note = _stages(figures)
    for stage in stages:
        mark = " *" if stage in SHARED else ""
        table.add_row(stage + mark, *(_both(v["stages_ms"][stage]) for _, v in columns))
    table.add_section()
    for title, key in (("time to first token", "time_to_first_token_ms"), ("between tokens", "inter_token_latency_ms")):
        table.add_row(title, *(f"{v[key]:.2f}" for _, v in columns))
    table.add_row("tokens per second", *(f"{v['output_tokens_per_s']:.1f}" for _, v in columns))
    table.add_row("peak memory, MB", *(f"{v['peak_memory_bytes'] / 1e6:.0f}" for _, v in columns))
    if any(v["peak_device_bytes"] for _, v in columns):
        table.add_row("peak GPU memory, MB", *(_megabytes(v["peak_device_bytes"]) for _, v in columns))
    board = _board_rows(figures)
    table.add_section()
    for title, cells in board:
        table.add_row(f"board: {title}", *cells)
    console.print(table)
    print(f"* {note}")
    if board:
        print(f"board: {BOARD_NOTE}")
    for name, one in _each(figures):
        print(_conditions(one))
        print(f"time to first token{f' with {name}' if name else ''}: {_compared(one)}")


def _each(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures of each provider with its name; of one alone without."""
    return list(figures["providers"].items()) if "providers" in figures else [("", figures)]


def _columns(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures of each budget and provider, those of a budget side by side."""
    return [(name, one["budgets"][budget]) for budget in figures["budgets"] for name, one in _each(figures)]


def _kept(values: dict[str, Any]) -> str:
    return f"{values['image_tokens']['kept']} of {values['image_tokens']['total']}"


def _compared(figures: dict[str, Any]) -> str:
    """Say how the first token comes beside the unpruned model's."""
    speedup = figures["speedup"]
    if len(figures["budgets"]) == 1:
        return "measured of the unpruned model alone"
    return f"{speedup:.2f} times sooner than unpruned" if speedup >= 1 else f"{1 / speedup:.2f} times later than unpruned"


def _stages(figures: dict[str, Any]) -> tuple[list[str], str]:
    """Return the stages that were told apart, in order, and what is to be said of those of the vision graph."""
    measured = next(iter(figures["budgets"].values()))["stages_ms"]
    return [stage for stage in STAGES if stage in measured], SHARED_NOTE if "prune" in measured else WHOLE_NOTE


def page(figures: dict[str, Any]) -> str:
    """Return one self-contained page: the stages of the median run up to its first token, stacked, and the table below."""
    columns = _columns(figures)
    longest = max(v["time_to_first_token_ms"] for _, v in columns)
    bars = "\n".join(_bar(provider, values, longest) for provider, values in columns)
    stages, note = _stages(figures)
    legend = " ".join(f'<span><i style="background:{c}"></i>{s}</span>' for s, c in COLOURS.items())
    rows = "\n".join(_row(stage, [v["stages_ms"][stage] for _, v in columns]) for stage in stages)
    heads = "".join(f"<th>{_kept(v)}{f'<br>{escape(provider)}' if provider else ''}</th>" for provider, v in columns)
    conditions = "<br>".join(
        f"{escape(_conditions(one))}. Time to first token{f' with {escape(name)}' if name else ''}: <b>{_compared(one)}</b>."
        for name, one in _each(figures)
    )
    board = "\n".join(f"<tr><td>{title}</td>{_cells(cells)}</tr>" for title, cells in _board_rows(figures))
    if board:
        board = f"<h2>Board</h2><table><tr><th></th>{heads}</tr>{board}</table><p>{BOARD_NOTE}.</p>\n"
    return f"""{PAGE_MARK}<style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
.bar{{display:flex;height:2.2rem;margin:.2rem 0 1rem}} .bar div{{height:100%}}
i{{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .8rem}}
td,th{{padding:.15rem 1rem;text-align:right}} td:first-child,th:first-child{{text-align:left}}
</style><h1>{escape(figures["bundle"])}</h1>
<p>{_runs(figures)}. {conditions}</p>
<h2>Time to first token of the median run, ms</h2>{bars}<p>{legend}</p>
<h2>Stages, ms: p50 (p90)</h2><table><tr><th>stage</th>{heads}</tr>{rows}</table>
<p>{", ".join(stage for stage in stages if stage in SHARED)}: {note}.</p>
{board}</html>
"""


def _bar(provider: str, values: dict[str, Any], longest: float) -> str:
    parts = "".join(
        f'<div style="width:{100 * time / longest:.3f}%;background:{COLOURS[stage]}" title="{stage} {time:.2f} ms"></div>'
        for stage, time in values["first_token_stages_ms"].items()
    )
    first, named = values["time_to_first_token_ms"], f", {escape(provider)}" if provider else ""
    return f'<p>{_kept(values)} image tokens{named}: {first:.1f} ms</p><div class="bar">{parts}</div>'


def _row(stage: str, values: list[dict[str, float]]) -> str:
    return f"<tr><td>{stage}</td>{_cells([_both(v) for v in values])}</tr>"


def _cells(values: list[str]) -> str:
    return "".join(f"<td>{value}</td>" for value in values)


def _board_rows(figures: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return a Jetson's own figures as titles and their values at each budget; empty on other machines."""
    boards = [values.get("board", {}) for _, values in _columns(figures)]
    return [
        (title, [form.format_map(board) if board.get(key) is not None else "not known" for board in boards])
        for title, key, form in BOARD_ROWS
        if any(board.get(key) is not None for board in boards)
    ]


def _megabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:.0f}"


def _both(value: dict[str, float]) -> str:
    return f"{value['p50']:.2f} ({value['p90']:.2f})"


def _runs(figures: dict[str, Any]) -> str:
    """Say how many runs there were, and of how many crops where the image is cut."""
    crops = next(iter(figures["budgets"].values()))["crops"]
    return f"{figures['runs']} runs" + (f", {crops} crops an image" if crops > 1 else "")


def _conditions(figures: dict[str, Any]) -> str:
    mode = f"power mode {figures['power_mode']}; " if "power_mode" in figures else ""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    return f"{figures['device']}; {figures['threads']} threads; {mode}{versions}"
