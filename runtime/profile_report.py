"""The figures of `profile` as a table in the terminal and as a page with a chart."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from leanvlm.runtime.answer import STAGES

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
SHARED_NOTE = "share of the vision graph's wall time, from a separate pass"


def print_table(figures: dict[str, Any]) -> None:
    """Print the stages of all budgets side by side on standard output."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"{figures['bundle']}: ms, p50 (p90) of {figures['runs']} runs", title_justify="left")
    table.add_column("stage")
    budgets = figures["budgets"]
    for values in budgets.values():
        kept, total = values["image_tokens"]["kept"], values["image_tokens"]["total"]
        table.add_column(f"{kept} of {total} tokens", justify="right")
    for stage in STAGES:
        mark = " *" if stage in SHARED else ""
        table.add_row(stage + mark, *(_both(v["stages_ms"][stage]) for v in budgets.values()))
    table.add_section()
    for title, key in (("time to first token", "time_to_first_token_ms"), ("between tokens", "inter_token_latency_ms")):
        table.add_row(title, *(f"{v[key]:.2f}" for v in budgets.values()))
    table.add_row("tokens per second", *(f"{v['output_tokens_per_s']:.1f}" for v in budgets.values()))
    table.add_row("peak memory, MB", *(f"{v['peak_memory_bytes'] / 1e6:.0f}" for v in budgets.values()))
    if any(v["peak_device_bytes"] for v in budgets.values()):
        table.add_row("peak GPU memory, MB", *(_megabytes(v["peak_device_bytes"]) for v in budgets.values()))
    console.print(table)
    print(f"* {SHARED_NOTE}")
    print(f"{figures['device']}; {figures['threads']} threads; {_versions(figures)}")
    print(f"time to first token: {figures['speedup']:.2f} times sooner than unpruned")


def write_html(figures: dict[str, Any], path: Path) -> None:
    """Write one self-contained page: the stages of the median run up to its first token, stacked, and the table below."""
    budgets = figures["budgets"]
    longest = max(v["time_to_first_token_ms"] for v in budgets.values())
    bars = "\n".join(_bar(values, longest) for values in budgets.values())
    legend = " ".join(f'<span><i style="background:{c}"></i>{s}</span>' for s, c in COLOURS.items())
    rows = "\n".join(_row(stage, [v["stages_ms"][stage] for v in budgets.values()]) for stage in STAGES)
    heads = "".join(f"<th>{v['image_tokens']['kept']} of {v['image_tokens']['total']}</th>" for v in budgets.values())
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>leanvlm profile</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
.bar{{display:flex;height:2.2rem;margin:.2rem 0 1rem}} .bar div{{height:100%}}
i{{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .8rem}}
td,th{{padding:.15rem 1rem;text-align:right}} td:first-child,th:first-child{{text-align:left}}
</style><h1>{escape(figures["bundle"])}</h1>
<p>{escape(figures["device"])}; {figures["threads"]} threads; {escape(_versions(figures))}; {figures["runs"]} runs.
The first token comes <b>{figures["speedup"]:.2f} times</b> sooner than unpruned.</p>
<h2>Time to first token of the median run, ms</h2>{bars}<p>{legend}</p>
<h2>Stages, ms: p50 (p90)</h2><table><tr><th>stage</th>{heads}</tr>{rows}</table>
<p>vision, project and prune: {SHARED_NOTE}.</p>
</html>
""",
        encoding="utf-8",
    )


def _bar(values: dict[str, Any], longest: float) -> str:
    parts = "".join(
        f'<div style="width:{100 * time / longest:.3f}%;background:{COLOURS[stage]}" title="{stage} {time:.2f} ms"></div>'
        for stage, time in values["first_token_stages_ms"].items()
    )
    kept, total = values["image_tokens"]["kept"], values["image_tokens"]["total"]
    first = values["time_to_first_token_ms"]
    return f'<p>{kept} of {total} image tokens: {first:.1f} ms</p><div class="bar">{parts}</div>'


def _row(stage: str, values: list[dict[str, float]]) -> str:
    return f"<tr><td>{stage}</td>{''.join(f'<td>{_both(v)}</td>' for v in values)}</tr>"


def _megabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:.0f}"


def _both(value: dict[str, float]) -> str:
    return f"{value['p50']:.2f} ({value['p90']:.2f})"


def _versions(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
