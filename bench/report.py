"""RESULTS.md from the JSON files in `results/`: tables, pictures, and what the numbers say of the paper's claims.

Nothing here is written by hand but the questions: every statement is chosen by an interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.cells import Cells, budgets_of, cells_of, kinds_of, methods_of, table, unpruned
from bench.counting_report import counting_section
from bench.decode_report import decode_section
from bench.families_report import families_section
from bench.host_report import host_section
from bench.latency_report import latency_pictures, latency_section
from bench.peers_report import peers_section
from bench.rounded_vision import rounded_vision_section
from bench.rows_report import load_section, rows_section
from bench.seeds_report import SEEDS_PICTURE, seeds_picture, seeds_section
from bench.serving_report import serving_section
from bench.sizes_report import sizes_section
from bench.soak_report import soak_section
from bench.statistics import Interval, chair_difference, mean_difference, right_difference
from leanvlm.calibration.scores import Result, Scores
from leanvlm.calibration.tables import plot_results

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
REPORT = FOLDER / "RESULTS.md"

DETAIL_BUDGET = 64
HEAD = """# Results

Written by `python -m bench report` from the JSON files in `results/`, which hold the raw counts and the conditions that they
were taken under. Do not edit; what was tried and why is in [LOG.md](LOG.md).
"""


def write_report() -> None:
    """Write RESULTS.md, and the pictures beside each JSON file that has some."""
    for path, data in _files():
        if data["kind"] in PICTURES and not _is_other_seed(data):
            PICTURES[data["kind"]](path.with_suffix(".png"), data)
    seeds_picture(SEEDS_PICTURE, _seeds())
    REPORT.write_text(render_report(), encoding="utf-8")


def render_report() -> str:
    """Return the text of RESULTS.md."""
    parts = [HEAD, *(SECTIONS[data["kind"]](path, data) for path, data in _files() if not _is_other_seed(data))]
    return "\n".join([*parts, *seeds_section(_seeds())])


def _is_other_seed(data: dict[str, Any]) -> bool:
    """Whether it is a study of a model that is not built in: it has its place in the comparison of seeds alone."""
    return data["kind"] == "study" and not data["model"]["id"].startswith("leanvlm-")


def _seeds() -> list[tuple[Path, dict[str, Any]]]:
    """The studies of the shipped model and of models that differ from it in their seed, by seed."""
    studies = [(path, data) for path, data in _files() if data["kind"] == "study" and data["model"].get("size") == "base"]
    return sorted(studies, key=lambda study: int(study[1]["model"]["seed"]))


def _files() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") in SECTIONS:
            yield path, data


def study_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter of a study: conditions, accuracy, captions, complexity and claims."""
    cells = cells_of(data)
    parts = [
        "## Study: which pruner keeps the answers\n",
        _conditions(path, data, cells),
        f"![Accuracy over budget](results/{path.stem}.png)\n",
        _claims(cells, data["complexity"]),
        *(_accuracy(kind, cells) for kind in kinds_of(cells)),
        *(_families(kind, cells) for kind in kinds_of(cells)),
        *(_captions(kind, cells) for kind in kinds_of(cells)),
        _complexity(data["complexity"]),
    ]
    return "\n".join(part for part in parts if part)


def study_picture(path: Path, data: dict[str, Any]) -> None:
    """Draw accuracy over budget."""
    path.write_bytes(plot_results([Result.from_dict(row) for row in data["results"]]))


def prune_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter of a prune-stage measurement: medians, and the cost as a share or as a difference."""
    medians = {name: median(values) for name, values in data["samples_ms"].items()}
    count = len(next(iter(data["samples_ms"].values())))
    where = f"{data['device']}, ONNX Runtime {data['versions']['onnxruntime']}, {count} samples"
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in medians.items())
    if "prune" in medians:
        share = medians["prune"] / sum(medians.values())
        verdict = f"`agile` at K = {data['budget']} takes {share:.1%} of the vision graph's node time."
    else:
        cost = medians["agile"] - medians["attention"]
        verdict = (
            f"`agile` at K = {data['budget']}, gate included, takes {cost:.3f} ms more than a plain top-k in a CUDA graph."
        )
    return f"""## Prune stage on {data["device"]}

{verdict} {where}; `{data["command"]}`, commit `{str(data["commit"])[:7]}`, [{path.name}](results/{path.name}).

| part or graph | median ms |
|---|--:|
{rows}
"""


SECTIONS: dict[str, Callable[[Path, dict[str, Any]], str]] = {
    "study": study_section,
    "prune": prune_section,
    "latency": latency_section,
    "counting": counting_section,
    "families": families_section,
    "sizes": sizes_section,
    "host": host_section,
    "decode": decode_section,
    "rows": rows_section,
    "load": load_section,
    "peers": peers_section,
    "serving": serving_section,
    "soak": soak_section,
    "rounded vision": rounded_vision_section,
}
PICTURES: dict[str, Callable[[Path, dict[str, Any]], None]] = {"study": study_picture, "latency": latency_pictures}


def _conditions(path: Path, data: dict[str, Any], cells: Cells) -> str:
    run, model = data["conditions"], data["model"]
    first = {kind: unpruned(cells, kind)[1] for kind in kinds_of(cells)}
    counts = ", ".join(
        f"{len(s.right)} {kind} scenes with {sum(s.asked)} short questions and {len(s.captions)} captions"
        for kind, s in first.items()
    )
    tools = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        f"Model `{model['id']}` (weights {model['sha256'][:12]}…, reference rank {model['erank_ref']}), evaluated in torch, "
        f"fp32, on {counts}: held out from training, the same for every method. An answer is right when greedy decoding "
        "gives exactly the expected text. Numbers in parentheses are 95 % intervals: Wilson's for shares, which takes "
        "questions as independent; for differences, a bootstrap over scenes with both methods on the same scenes.\n\n"
        f"Raw counts: [results/{path.name}](results/{path.name}). Commit {run['commit']}, {run['date']}; {run['machine']}; "
        f"Python {run['python']}, {tools}; {run['seconds']} s. Command:\n\n    {run['command']}\n"
    )


def _accuracy(kind: str, cells: Cells) -> str:
    budgets = budgets_of(cells)
    count, whole = unpruned(cells, kind)
    rows = [[method, *(_share(cells[kind, method, budget]) for budget in budgets)] for method in methods_of(cells, kind)]
    title = f"### {kind.capitalize()} scenes: right answers, %\n\nUnpruned, {count} tokens: {_share(whole)}.\n\n"
    return title + table(["tokens kept", *map(str, budgets)], rows)


def _share(scores: Scores) -> str:
    low, high = scores.interval
    return f"{100 * scores.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _families(kind: str, cells: Cells) -> str:
    budgets = budgets_of(cells)
    budget = DETAIL_BUDGET if DETAIL_BUDGET in budgets else budgets[-1]
    families = list(unpruned(cells, kind)[1].kinds)
    rows = []
    for method in methods_of(cells, kind):
        counts = [cells[kind, method, budget].kinds[family] for family in families]
        rows.append([method, *(f"{100 * right / asked:.1f}" for right, asked in counts)])
    asked = [f"{family} ({unpruned(cells, kind)[1].kinds[family][1]})" for family in families]
    title = f"### {kind.capitalize()} scenes at {budget} tokens, by kind of question (and how many): right answers, %\n\n"
    return title + table(["", *asked], rows)


def _captions(kind: str, cells: Cells) -> str:
    budgets = [budget for budget in budgets_of(cells) if budget <= DETAIL_BUDGET] or budgets_of(cells)
    if not unpruned(cells, kind)[1].captions:
        return ""
    rows = [["none", *_caption_columns(unpruned(cells, kind)[1]) * len(budgets)]]
    for method in methods_of(cells, kind):
        rows.append([method, *(text for budget in budgets for text in _caption_columns(cells[kind, method, budget]))])
    heads = [f"{name} at {budget}" for budget in budgets for name in ("absent", "captions", "recall")]
    title = (
        f"### {kind.capitalize()} scenes: hallucination in captions, %\n\nAbsent: share of the mentioned objects that are not "
        "there (CHAIR-i). Captions: share of captions that mention such an object (CHAIR-s). Recall: share of the objects "
        "mentioned.\n\n"
    )
    return title + table(["", *heads], rows)


def _caption_columns(scores: Scores) -> list[str]:
    return [f"{100 * share:.1f}" for share in (scores.chair_i, scores.chair_s, scores.recall)]


def _complexity(complexity: dict[str, dict[str, list[float]]]) -> str:
    rows = []
    for kind, values in complexity.items():
        rows.append([kind, *(_mean_sd(values[name]) for name in ("effective_rank", "entropy"))])
    return "### Complexity of the scenes, mean ± standard deviation\n\n" + table(
        ["", "effective rank", "attention entropy, nats"], rows
    )


def _mean_sd(values: list[float]) -> str:
    mean = sum(values) / len(values)
    sd = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{mean:.2f} ± {sd:.2f}"


def _claims(cells: Cells, complexity: dict[str, dict[str, list[float]]]) -> str:
    budgets = budgets_of(cells)
    rows = [*_order_claims(cells, budgets), *_best_claims(cells, budgets), *_hallucination_claims(cells, budgets)]
    if not rows:
        return ""
    heads = ["claim", "difference", *(f"at {budget}" for budget in budgets), "all budgets", "verdict"]
    intervals = len(rows) * (len(budgets) + 1)
    text = (
        "### What is true here of the paper's claims (AgilePruner, arXiv 2603.01236)\n\n"
        "Differences in percentage points. The verdict is that of all budgets together: a claim holds where the interval lies "
        f"above 0, the opposite where it lies below. Of {intervals} such intervals about {intervals / 20:.0f} miss the truth "
        "by chance alone. The best other method is chosen after looking, which favours it.\n\n"
    )
    return text + table(heads, rows) + "\n" + "\n".join(_complexity_claims(complexity)) + "\n"


def _order_claims(cells: Cells, budgets: list[int]) -> Iterator[list[str]]:
    compared = (
        ("attention beats diversity on simple scenes", "simple", "attention", "divprune"),
        ("diversity beats attention on complex scenes", "complex", "divprune", "attention"),
        ("the gate helps agile on simple scenes", "simple", "agile", "agile:gate=none"),
        ("the gate helps agile on complex scenes", "complex", "agile", "agile:gate=none"),
        ("the gate helps the mixture on simple scenes", "simple", "hybrid:gate=erank", "hybrid"),
        ("the gate helps the mixture on complex scenes", "complex", "hybrid:gate=erank", "hybrid"),
    )
    for claim, kind, better, worse in compared:
        if all((kind, method, budgets[0]) in cells for method in (better, worse)):
            pairs = [(cells[kind, better, budget], cells[kind, worse, budget]) for budget in budgets]
            yield _claim(claim, f"{better} - {worse}", right_difference, pairs)


def _best_claims(cells: Cells, budgets: list[int]) -> Iterator[list[str]]:
    for kind in kinds_of(cells):
        others = [method for method in methods_of(cells, kind) if not method.startswith("agile")]
        if (kind, "agile", budgets[0]) in cells and others:
            best = others[0]
            pairs = [(cells[kind, "agile", budget], cells[kind, best, budget]) for budget in budgets]
            yield _claim(f"agile is best on {kind} scenes", f"agile - {best}", right_difference, pairs)


def _hallucination_claims(cells: Cells, budgets: list[int]) -> Iterator[list[str]]:
    for kind in kinds_of(cells):
        methods = ("divprune", "attention")
        if all((kind, method, budgets[0]) in cells and cells[kind, method, budgets[0]].captions for method in methods):
            pairs = [(cells[kind, "divprune", budget], cells[kind, "attention", budget]) for budget in budgets]
            claim = f"diversity hallucinates more than attention on {kind} scenes (CHAIR-i)"
            yield _claim(claim, "divprune - attention", chair_difference, pairs)


def _claim(claim: str, difference: str, compare: Callable[..., Interval], pairs: Sequence[tuple[Scores, Scores]]) -> list[str]:
    together = compare(pairs)
    return [claim, difference, *(compare([pair]).percent() for pair in pairs), together.percent(), together.verdict()]


def _complexity_claims(complexity: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    if {"simple", "complex"} <= complexity.keys():
        for name, words in (("effective_rank", "effective rank"), ("entropy", "attention entropy")):
            found = mean_difference(complexity["complex"][name], complexity["simple"][name])
            yield f"- Complex scenes have the higher {words}: {found.verdict()} (difference {found.plain()})."
