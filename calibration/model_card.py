"""`python -m leanvlm.calibration.model_card`: what the built-in model's card says of its answers, measured again.

The questions about held-out scenes of each kind are asked in torch: with all image tokens, and with those that a
pruner keeps. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from leanvlm.calibration.evaluate import Exam, parse_kinds
from leanvlm.calibration.scores import Result
from leanvlm.exporter.config import ExportConfig
from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.manifest import parse_budgets

KINDS = "simple,complex,simple-photo,complex-photo"


def evaluate(model: str, exam: Exam, pruners: list[str], budgets: tuple[int, ...]) -> list[Result]:
    """Ask a checkpoint the questions of an exam.

    Args:
        model: `demo`, or a folder that training wrote.
        exam: The scenes.
        pruners: Spec strings; the unpruned model is added.
        budgets: Image tokens kept.

    Raises:
        LeanVLMError: The checkpoint cannot be read, or a pruner or a budget is not possible.
    """
    from leanvlm.calibration.study import Examinee, run_study
    from leanvlm.exporter.checkpoint import load_model, open_checkpoint

    checkpoint = open_checkpoint(ExportConfig(model=model))
    return run_study(Examinee(checkpoint, load_model(checkpoint)), exam, pruners, budgets).results


def summary(results: list[Result]) -> dict[str, Any]:
    """Accuracies in % as the last line has them: kind of scenes, then method and budget, to what was right."""
    found: dict[str, Any] = {}
    for result in results:
        scores = result.scores
        families = {family: _percent(right / asked) for family, (right, asked) in sorted(scores.kinds.items())}
        captions = {"recall": _percent(scores.recall), "absent": _percent(scores.chair_i)}
        row = {"answers": _percent(scores.accuracy), **families, **captions}
        found.setdefault(result.kind, {})[f"{result.method} {result.budget}"] = row
    return found


def _percent(share: float) -> float:
    return round(100 * share, 2)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m leanvlm.calibration.model_card", description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, or a folder that training wrote (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of each kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first scene (default: %(default)s)")
    parser.add_argument("--kinds", default=KINDS, help="kinds of scenes (default: %(default)s)")
    parser.add_argument("--pruner", action="append", help="beside the unpruned model; may be repeated (default: attention)")
    parser.add_argument("--budget", default="64", help="image tokens kept, such as 64,128 (default: %(default)s)")
    args = parser.parse_args()
    with one_line_errors():
        from leanvlm.calibration.tables import print_results

        exam = Exam(args.scenes, parse_kinds(args.kinds), first=args.first)
        results = evaluate(args.model, exam, args.pruner or ["attention"], parse_budgets(args.budget))
        print_results(results)
        asked = {"model": args.model, "first": args.first, "scenes": args.scenes}
        print(json.dumps({**asked, "right": summary(results)}), flush=True)


if __name__ == "__main__":
    main()
