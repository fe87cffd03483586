"""Why counting suffers most from pruning: objects that leave no token, or a model that miscounts those that it is given.

Every question how many there are is answered from the tokens that a pruner keeps. What was drawn says which patches each
object covers, so a wrong answer is either one where an asked object has no kept token, or the model's own. An oracle, which
takes the patches of all objects in turn, shows what the model makes of the best choice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import hypot
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench.study import RESULTS, conditions, default_methods, described, open_examinee, write_lines
from leanvlm.calibration.evaluate import Exam
from leanvlm.calibration.study import BATCH, Examinee, pruners_of
from leanvlm.demo.packing import pack
from leanvlm.demo.render import render
from leanvlm.demo.scenes import Question, Scene
from leanvlm.demo.training.canvas import PATCH, PATCHES, Canvas
from leanvlm.exporter.pruners.base import ScoredBlock, gather_tokens

COUNTING = RESULTS / "counting-demo.json"
ORACLE = "oracle"
_SIDE = int(PATCHES**0.5)


@dataclass(frozen=True)
class CountingOptions:
    """What is counted.

    Attributes:
        scenes: Complex scenes, those of the seeds from 0.
        budget: Image tokens kept.
        methods: Pruners as spec strings; the unpruned model and the oracle are added.
    """

    scenes: int = 300
    budget: int = 64
    methods: tuple[str, ...] = field(default_factory=default_methods)

    @property
    def command(self) -> str:
        """The command line that asks for it."""
        return f"python -m bench counting --scenes {self.scenes} --budget {self.budget} --pruners {' '.join(self.methods)}"


@dataclass(frozen=True)
class Answer:
    """One answer to how many there are.

    Attributes:
        right: Whether it was right.
        objects: How many there are.
        least: Kept tokens of the asked object that has fewest; all of the budget where nothing is to be counted.
    """

    right: bool
    objects: int
    least: int


def asked_objects(scene: Scene, question: Question) -> list[int]:
    """Places in drawing order, from 1, of the objects that a question asks to count."""
    word = question.text.split()[2]  # How many red shapes, how many crosses
    return [
        number
        for number, item in enumerate(scene.objects, 1)
        if question.subtype == "all" or item.color == word or (question.subtype == "shape" and word.startswith(item.shape))
    ]


def oracle(scene: Scene, owners: Sequence[int], keep: int) -> list[int]:
    """Choose patches by what was drawn: one of each object in turn, those nearest to its centre first.

    Args:
        scene: What was drawn.
        owners: Which object each patch belongs to, from 1; 0 for none.
        keep: How many to choose; where the objects have fewer, chance adds others.

    Returns:
        Patches in ascending order.
    """
    turns: list[tuple[int, int, int]] = []
    for number, item in enumerate(scene.objects, 1):
        own = [patch for patch, owner in enumerate(owners) if owner == number]
        own.sort(key=lambda patch: hypot((patch % _SIDE + 0.5) * PATCH - item.cx, (patch // _SIDE + 0.5) * PATCH - item.cy))
        turns += [(turn, number, patch) for turn, patch in enumerate(own)]
    chosen = [patch for *_, patch in sorted(turns)]
    others = [patch for patch, owner in enumerate(owners) if owner == 0]
    random.Random(scene.seed).shuffle(others)
    return sorted((chosen + others)[:keep])


def count(examinee: Examinee, options: CountingOptions) -> dict[str, list[Answer]]:
    """Ask a model how many there are, with the tokens of each pruner.

    Returns:
        Method to answers, all to the same questions; the unpruned model is `none`, the oracle `oracle`.
    """
    pruners = {
        name: pruner for (name, _), pruner in pruners_of(examinee.side.checkpoint, options.methods, [options.budget]).items()
    }
    blocks: dict[ScoredBlock, None] = {"feature": None, **{pruner.scored_block: None for pruner in pruners.values()}}
    canvas = Canvas(torch.device("cpu"), compiled=False)
    answers: dict[str, list[Answer]] = {name: [] for name in (*pruners, ORACLE)}
    for _, drawn in Exam(options.scenes, ("complex",)).batches(BATCH):
        asked = [(scene, questions) for scene in drawn if (questions := _count_questions(scene))]
        if not asked:
            continue
        scenes = [scene for scene, _ in asked]
        images, owners = render(scenes), canvas.labels(pack(scenes)).objects
        tokens = {block: examinee.side.tokens(images, block) for block in blocks}
        for name, pruner in pruners.items():
            seen = tokens[pruner.scored_block]
            answers[name] += _answers(examinee, asked, owners, pruner(seen).indices, examinee.side.keep(pruner, seen))
        chosen = torch.tensor([oracle(s, row, options.budget) for s, row in zip(scenes, owners.tolist(), strict=True)])
        kept = gather_tokens(tokens["feature"].features, chosen)
        answers[ORACLE] += _answers(examinee, asked, owners, chosen, kept)
    return answers


def _count_questions(scene: Scene) -> list[Question]:
    short, _ = Exam().questions(scene)
    return [question for question in short if question.kind == "count"]


def _answers(
    examinee: Examinee, asked: Sequence[tuple[Scene, list[Question]]], owners: Tensor, chosen: Tensor, kept: Tensor
) -> Iterator[Answer]:
    outcomes = examinee.check(kept, [examinee.script(questions) for _, questions in asked])
    kept_owners: list[list[int]] = torch.gather(owners, 1, chosen).tolist()
    for (scene, questions), rights, there in zip(asked, outcomes, kept_owners, strict=True):
        for question, right in zip(questions, rights, strict=True):
            numbers = asked_objects(scene, question)
            yield Answer(right, len(numbers), min((there.count(number) for number in numbers), default=len(there)))


def measure_counting(options: CountingOptions, path: Path = COUNTING) -> None:
    """Count, and write every answer as JSON.

    Args:
        options: What is counted.
        path: The file to write.
    """
    found_under, start = conditions(), perf_counter()
    examinee = open_examinee("demo")
    answers = count(examinee, options)
    data: dict[str, Any] = {
        "schema": 1,
        "kind": "counting",
        "model": described(examinee.side.checkpoint),
        "conditions": {**found_under, "command": options.command, "seconds": round(perf_counter() - start)},
        "scenes": options.scenes,
        "budget": options.budget,
    }
    rows = [{"method": name, "answers": [[int(a.right), a.objects, a.least] for a in found]} for name, found in answers.items()]
    write_lines(path, data, rows)
