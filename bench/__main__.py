"""`python -m bench study|prune` measure; `python -m bench report` writes RESULTS.md and its pictures from what was measured."""

from __future__ import annotations

import argparse

from bench.prune import PruneOptions, measure_prune
from bench.report import write_report
from bench.study import BUDGETS, CAPTIONS, SCENES, StudyOptions, default_methods, study
from leanvlm.exporter.config import parse_budgets
from leanvlm.runtime.console import one_line_errors


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write RESULTS.md from bench/results")
    options = commands.add_parser("study", help="compare pruners on the built-in model (about 10 minutes on two cores)")
    options.add_argument("--scenes", type=int, default=SCENES, help="scenes of each kind")
    options.add_argument("--captions", type=int, default=CAPTIONS, help="captions of each kind")
    options.add_argument("--pruners", nargs="+", default=None, help="name, or name:field=value,…; by default all")
    options.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="image tokens kept")
    prune = commands.add_parser("prune", help="time the prune stage at LLaVA-1.5-7B's widths")
    prune.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    prune.add_argument("--budget", type=int, default=64, help="image tokens kept")
    prune.add_argument("--runs", type=int, default=20, help="counted runs")
    args = parser.parse_args()
    with one_line_errors():
        if args.command == "study":
            methods = tuple(args.pruners or default_methods())
            study(StudyOptions(args.scenes, args.captions, methods, parse_budgets(args.budgets)))
        if args.command == "prune":
            measure_prune(PruneOptions(args.device, args.budget, args.runs))
        write_report()


if __name__ == "__main__":
    main()
