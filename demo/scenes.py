"""Seeded synthetic scenes and questions whose answers follow from the scene. Plain Python: no torch, no numpy.

`leanvlm.demo.layout` says what a scene is; its public names are repeated here, so that this one import serves scenes
and questions. As there, the order in which random numbers are drawn is part of the format.

A question is only asked where people would agree on the answer: a colour only of a shape that occurs once, a position
only away from the borders of the 3 x 3 cells, a relation only where one object is clearly the nearest. Existence
questions are half negative, and of those about half name a colour and a shape that are both there but not together:
the adversarial setting of POPE (Li et al., 2023, arXiv 2305.10355). `mentioned` and `present` give the two lists of
object names that a caption's hallucination rate needs (CHAIR; Rohrbach et al., 2018, arXiv 1809.02156).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from leanvlm.demo.layout import (
    COLORS,
    KINDS,
    PHOTO_KINDS,
    SHAPES,
    SIGN_SHARE,
    SIZE,
    TRAINING_SEED,
    Background,
    Kind,
    Photo,
    Scene,
    SceneObject,
    Sign,
    make_scene,
    plain_kind,
)

__all__ = [
    "COLORS",
    "FAMILIES",
    "KINDS",
    "PHOTO_KINDS",
    "SHAPES",
    "SIZE",
    "TRAINING_SEED",
    "Background",
    "Kind",
    "Photo",
    "Question",
    "Scene",
    "SceneObject",
    "Sign",
    "caption",
    "held_out_questions",
    "make_scene",
    "mentioned",
    "present",
    "question_rng",
    "questions",
]

FAMILIES = ("exist", "count", "color", "shape", "position", "relation", "sign", "caption")


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: One of `FAMILIES`.
        text: The question.
        answer: The one right answer, exactly as the built-in model was trained to give it.
        subtype: exist: pos, adversarial, partial, random or sign; count: all, shape or color; relation: the direction;
            sign: the number of digits; empty otherwise.
    """

    kind: str
    text: str
    answer: str
    subtype: str = ""


class _Item(NamedTuple):
    """Anything that can be named and located: an object or the sign."""

    name: str
    cx: float
    cy: float


def _items(scene: Scene) -> list[_Item]:
    items = [_Item(f"{item.color} {item.shape}", item.cx, item.cy) for item in scene.objects]
    if scene.sign is not None:
        items.append(_Item("sign", scene.sign.cx, scene.sign.cy))
    return items


def _unique_items(scene: Scene) -> list[_Item]:
    names = present(scene)
    return [item for item in _items(scene) if names.count(item.name) == 1]


def _with_article(name: str) -> str:
    return f"an {name}" if name.startswith("o") else f"a {name}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def caption(scene: Scene) -> str:
    """Name everything in the scene from left to right: "a red circle, a sign, an orange star"."""
    return ", ".join(_with_article(item.name) for item in sorted(_items(scene), key=lambda item: item.cx))


def present(scene: Scene) -> list[str]:
    """Names of what the scene holds, such as "red circle" and "sign", one for each object."""
    return [item.name for item in _items(scene)]


def mentioned(text: str) -> list[str]:
    """Names that a caption mentions, repetitions included; the first word of each part is taken for its article."""
    parts = (part.strip() for part in text.replace(" and ", ", ").split(","))
    return [part.split(" ", 1)[-1] for part in parts if part]


def _ask_exist(scene: Scene, rng: random.Random) -> Question | None:
    # A scene without a sign is asked for it less often, so that as many answers are yes as no.
    if rng.random() < 0.12 and (scene.sign is not None or rng.random() < SIGN_SHARE / (1 - SIGN_SHARE)):
        text = rng.choice(("Is there a sign?", "Do you see a sign?"))
        return Question("exist", text, "no" if scene.sign is None else "yes", "sign")
    if not scene.objects:
        return None
    if rng.random() < 0.5:
        item, subtype = rng.choice(scene.objects), "pos"
        pair = (item.color, item.shape)
    else:
        absent = _draw_absent(scene, rng)
        if absent is None:
            return None
        pair, subtype = absent
    name = _with_article(" ".join(pair))
    text = rng.choice((f"Is there {name}?", f"Is there {name} in the image?", f"Do you see {name}?"))
    return Question("exist", text, "yes" if subtype == "pos" else "no", subtype)


def _draw_absent(scene: Scene, rng: random.Random) -> tuple[tuple[str, str], str] | None:
    """A (colour, shape) that the scene does not hold, and how near it is to one that it holds; None if none was met."""
    there = {(item.color, item.shape) for item in scene.objects}
    colors, shapes = {color for color, _ in there}, {shape for _, shape in there}
    mixed = [(c, s) for c in COLORS if c in colors for s in SHAPES if s in shapes and (c, s) not in there]
    share = rng.random()
    if share < 0.55 and mixed:
        return rng.choice(mixed), "adversarial"
    like = rng.choice(scene.objects) if share < 0.8 else None
    for _ in range(20):
        if like is None:
            pair = (rng.choice(COLORS), rng.choice(SHAPES))
        else:
            pair = (like.color, rng.choice(SHAPES)) if rng.random() < 0.5 else (rng.choice(COLORS), like.shape)
        if pair not in there:
            return pair, "random" if like is None else "partial"
    return None


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    share = rng.random()
    if share < 0.2:
        text = rng.choice(("How many shapes are there?", "How many shapes do you see?"))
        return Question("count", text, str(len(scene.objects)), "all")
    by = "shape" if share < 0.6 else "color"
    if by == "shape":
        counts = {shape: sum(item.shape == shape for item in scene.objects) for shape in SHAPES}
    else:
        counts = {color: sum(item.color == color for item in scene.objects) for color in COLORS}
    # The number first, then one of its names: else nearly every answer of a simple scene would be 0.
    count = rng.choice(sorted(set(counts.values())))
    name = rng.choice([name for name, number in counts.items() if number == count])
    things = _plural(name) if by == "shape" else f"{name} shapes"
    text = rng.choice((f"How many {things} are there?", f"How many {things} do you see?"))
    return Question("count", text, str(count), by)


def _ask_color(scene: Scene, rng: random.Random) -> Question | None:
    shapes = [item.shape for item in scene.objects]
    unique = [item for item in scene.objects if shapes.count(item.shape) == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    text = rng.choice((f"What color is the {item.shape}?", f"What is the color of the {item.shape}?"))
    return Question("color", text, item.color)


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    colors = [item.color for item in scene.objects]
    unique = [item for item in scene.objects if colors.count(item.color) == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    text = rng.choice((f"What shape is the {item.color} object?", f"What is the {item.color} object?"))
    return Question("shape", text, item.shape)


_CELLS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_THIRD = SIZE // 3


def _ask_position(scene: Scene, rng: random.Random) -> Question | None:
    # A centre within 8 pixels of a border between two cells could be called either.
    clear = [
        item
        for item in _unique_items(scene)
        if all(abs(value - border) > 8 for value in (item.cx, item.cy) for border in (_THIRD, 2 * _THIRD))
    ]
    if not clear:
        return None
    item = rng.choice(clear)
    text = rng.choice((f"Where is the {item.name}?", f"In which part of the image is the {item.name}?"))
    return Question("position", text, _CELLS[int(item.cy // _THIRD)][int(item.cx // _THIRD)])


_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    items = _items(scene)
    if len(items) < 2:
        return None
    references = _unique_items(scene)
    rng.shuffle(references)
    for reference in references[:4]:
        directions = list(_DIRECTIONS)
        rng.shuffle(directions)
        for direction in directions:
            nearest = _nearest(reference, items, *_DIRECTIONS[direction])
            if nearest is None:
                continue
            vertical = direction in ("above", "below")
            where = direction if vertical else rng.choice((direction, f"to the {direction}"))
            text = f"What is {where} the {reference.name}?"
            return Question("relation", text, _with_article(nearest.name), direction)
    return None


def _nearest(reference: _Item, items: Sequence[_Item], dx: int, dy: int) -> _Item | None:
    """The item nearest to the reference in a cone around (dx, dy), or None where people could disagree.

    That is: where the nearest lies at the cone's edge, or the second is less than 1.2 times as far as the first.
    """
    candidates: list[tuple[float, bool, _Item]] = []
    for item in items:
        x, y = item.cx - reference.cx, item.cy - reference.cy
        along, aside = x * dx + y * dy, abs(x * dy) + abs(y * dx)
        if along > 0 and aside < 1.15 * along:
            candidates.append((math.hypot(x, y), along > 16 and aside < 0.9 * along, item))
    candidates.sort(key=lambda candidate: candidate[0])
    if not candidates or not candidates[0][1]:
        return None
    if len(candidates) > 1 and candidates[1][0] < 1.2 * candidates[0][0]:
        return None
    return candidates[0][2]


def _ask_sign(scene: Scene, rng: random.Random) -> Question | None:
    if scene.sign is None:
        return None
    text = rng.choice(("What number is on the sign?", "Read the sign.", "What does the sign say?"))
    return Question("sign", text, scene.sign.text, str(len(scene.sign.text)))


def _ask_caption(scene: Scene, rng: random.Random) -> Question:
    text = rng.choice(("Describe the image.", "What is in the image?", "List all objects."))
    return Question("caption", text, caption(scene))


# How often each family is tried.
_MIX: tuple[Callable[[Scene, random.Random], Question | None], ...] = (
    *[_ask_exist] * 5,
    *[_ask_count] * 5,
    *[_ask_color] * 2,
    *[_ask_shape] * 2,
    *[_ask_position] * 3,
    *[_ask_relation] * 5,
)


def questions(scene: Scene, rng: random.Random, slots: int = 8) -> list[Question]:
    """Draw short questions about a scene, no two alike.

    Args:
        scene: What is asked about.
        rng: Advanced by a number of draws that depends on the scene.
        slots: How many questions to aim for; fewer come back when 80 tries do not give as many.

    Returns:
        The questions. Where there is a sign, the first one asks to read it.
    """
    sign = _ask_sign(scene, rng)
    asked = [] if sign is None else [sign]
    for _ in range(80):
        if len(asked) >= slots:
            break
        question = rng.choice(_MIX)(scene, rng)
        if question is not None and all(question.text != other.text for other in asked):
            asked.append(question)
    return asked


def question_rng(scene: Scene) -> random.Random:
    """The generator with which a scene's questions are drawn; the ground makes no difference to them."""
    return random.Random(f"q-{plain_kind(scene.kind)}-{scene.seed}")


def held_out_questions(scene: Scene, slots: int = 8) -> list[Question]:
    """The questions that the built-in model is evaluated on: `slots` short ones, then the caption."""
    rng = question_rng(scene)
    asked = questions(scene, rng, slots)
    return [*asked, _ask_caption(scene, rng)]
