"""Ask bundles the questions of held-out scenes: what a bundle answers, as a user would get it.

Every image is encoded once per budget; its features serve all questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image

from leanvlm.calibration.scores import CAPTION, Result, Scores, score_caption
from leanvlm.demo.scenes import KINDS, PHOTO_KINDS, TRAINING_SEED, Question, Scene, held_out_questions, make_scene
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.session import Session, load, user_message

BATCH = 8
# The longest short answer takes 6 tokens of the built-in model; the longest caption, of 13 objects, 52.
SHORT, LONG = 12, 64

Step = Callable[[str, int], None]


@dataclass(frozen=True)
class Exam:
    """Which scenes are asked about.

    Attributes:
        scenes: Scenes of each kind, at least 1: those of the seeds from `first`, which training never saw.
        kinds: Kinds of scenes, such as simple and complex.
        captions: For how many scenes of each kind a caption is asked for; None for all.
        first: Seed of the first scene, at least 0.

    Raises:
        InputError: An unknown kind, or none; no scene, or one of the seeds that training draws from.
    """

    scenes: int = 100
    kinds: tuple[str, ...] = ("simple", "complex")
    captions: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        if self.scenes < 1:
            raise InputError(f"--scenes {self.scenes} is not possible; give at least 1")
        if not 0 <= self.first <= TRAINING_SEED - self.scenes:
            asked = f"--first {self.first} with --scenes {self.scenes}"
            raise InputError(f"{asked} is not possible; held-out scenes are those of the seeds 0 to {TRAINING_SEED - 1}")
        known = (*KINDS, *PHOTO_KINDS)
        if not self.kinds or not set(self.kinds) <= set(known):
            raise InputError(f"--kinds {','.join(self.kinds)!r} is not possible; known: {', '.join(known)}")

    def batches(self, size: int) -> Iterator[tuple[str, list[Scene]]]:
        """Yield the scenes, up to `size` of one kind at a time."""
        for kind in self.kinds:
            end = self.first + self.scenes
            for start in range(self.first, end, size):
                seeds = range(start, min(start + size, end))
                yield kind, [make_scene(seed, known) for known in (*KINDS, *PHOTO_KINDS) if known == kind for seed in seeds]

    def questions(self, scene: Scene) -> tuple[list[Question], Question | None]:
        """Return a scene's short questions, and the one for a caption if it is to be asked."""
        asked = held_out_questions(scene)
        short = [question for question in asked if question.kind != CAPTION]
        caption = next(question for question in asked if question.kind == CAPTION)
        return short, caption if self.captions is None or scene.seed < self.first + self.captions else None


def parse_kinds(text: str) -> tuple[str, ...]:
    """Read `simple,complex`, each kind once."""
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


def evaluate(
    bundles: Sequence[Path],
    exam: Exam,
    budgets: Sequence[int] | None,
    threads: int | None,
    on_step: Step,
    provider: str | None = None,
) -> list[Result]:
    """Ask bundles all questions of an exam.

    Args:
        bundles: Folders that `leanvlm export` wrote.
        exam: The scenes.
        budgets: Image tokens kept; None takes all that a bundle holds.
        threads: Processor threads; None leaves the choice to whatever runs the graphs.
        on_step: Told what is done, and how many scenes more, for a progress display.
        provider: As `load` takes it.

    Raises:
        LeanVLMError: A bundle cannot be used, or does not hold a budget.
    """
    wanted = {bundle: budgets_of(bundle, budgets) for bundle in bundles}
    pictures = list(_drawn(exam, on_step))
    results: list[Result] = []
    for bundle, chosen in wanted.items():
        with load(bundle, threads=threads, provider=provider, cache_mb=0) as session:
            for budget in chosen:
                results += _examine(session, bundle.resolve().name, exam, pictures, budget, on_step)
    return results


def budgets_of(bundle: Path, budgets: Sequence[int] | None) -> list[int]:
    """Return the budgets to evaluate in a bundle, largest first: those asked for, or all that it holds.

    Raises:
        LeanVLMError: It is no bundle, or does not hold a budget.
    """
    manifest = read_manifest(bundle)
    asked: Sequence[int] = manifest.budgets if budgets is None else budgets
    return sorted({manifest.budget(budget) for budget in asked}, reverse=True)


def _drawn(exam: Exam, on_step: Step) -> Iterator[tuple[str, list[Scene], list[Image.Image]]]:
    from leanvlm.demo.render import render

    for kind, scenes in exam.batches(BATCH):
        yield kind, scenes, render(scenes)
        on_step("draw scenes", len(scenes))


def _examine(
    session: Session,
    name: str,
    exam: Exam,
    pictures: Sequence[tuple[str, list[Scene], list[Image.Image]]],
    budget: int,
    on_step: Step,
) -> Iterator[Result]:
    """Yield one budget's result for each kind of scenes."""
    total = session.manifest.tokens_per_crop
    method = "none" if budget == total else session.manifest.pruner.name
    for kind, batches in groupby(pictures, key=lambda batch: batch[0]):
        scores = Scores()
        for _, scenes, images in batches:
            for scene, features in zip(scenes, session.encode_images(images, budget, among=1), strict=True):
                _ask(session, features, scene, exam, scores)
            on_step(f"{name}, {budget} tokens", len(scenes))
        yield Result(method, budget, kind, scores, name)


def _ask(session: Session, features: ImageFeatures, scene: Scene, exam: Exam, scores: Scores) -> None:
    def answer(question: Question, length: int) -> str:
        options = session.settings.options(max_new_tokens=length)
        return session.respond([user_message(question.text, 1)], [features], options).answer.text

    short, caption = exam.questions(scene)
    scores.add_scene([(question.kind, answer(question, SHORT) == question.answer) for question in short])
    if caption is not None:
        scores.captions.append(score_caption(answer(caption, LONG), scene))
