"""Scenes as arrays of numbers, which a batched renderer draws. numpy only: training packs in processes without torch.

Columns of the arrays, in this order (lengths in pixels, colours 0-255):

    ground  red, green, blue; gradient x, y; pattern's amplitude, its wave vector x, y, checks; noise, its index, its
            shift x, y; tint red, green, blue
    photo   red, green, blue; centre x, y; scale; cosine and sine of the angle; mirrored (-1, else 1); strength; number
    object  centre x, y; radius; cosine and sine of the rotation; shape (0-7); colour (0-7); red, green, blue
    sign    centre x, y; half width, half height; inverted; digit width, digit height; number of digits; four digits
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.demo.layout import (
    COLORS,
    HELD_OUT_PHOTOGRAPHS,
    SHAPES,
    TRAINING_PHOTOGRAPHS,
    Background,
    Photo,
    Scene,
    SceneObject,
    Sign,
)

__all__ = ["PHOTOGRAPHS", "Packed", "ground_row", "object_row", "pack", "photo_row", "sign_row"]

PHOTOGRAPHS = (*TRAINING_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS)
# Far outside of every image.
_AWAY = -1e4
_NO_OBJECT = (_AWAY, _AWAY, 1, 1, 0, 0, 0, 0, 0, 0)
_NO_SIGN = (_AWAY, _AWAY, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Packed:
    """B scenes, of which the first P have photographed ground; all arrays are float32.

    Attributes:
        photos: (P, 11).
        grounds: (B - P, 16).
        objects: (L, B, 10) in drawing order, L the most objects of a scene; absent ones lie far outside.
        signs: (B, 12); absent ones lie far outside.
    """

    photos: npt.NDArray[np.float32]
    grounds: npt.NDArray[np.float32]
    objects: npt.NDArray[np.float32]
    signs: npt.NDArray[np.float32]


def pack(scenes: Sequence[Scene]) -> Packed:
    """Pack scenes, at least one.

    Raises:
        ValueError: A scene with a photographed ground comes after one without.
    """
    photos = [scene.background for scene in scenes if isinstance(scene.background, Photo)]
    grounds = [scene.background for scene in scenes if isinstance(scene.background, Background)]
    if any(isinstance(scene.background, Background) for scene in scenes[: len(photos)]):
        raise ValueError("scenes with photographed ground must come first")
    layers = [
        [object_row(scene.objects[layer]) if layer < len(scene.objects) else _NO_OBJECT for scene in scenes]
        for layer in range(max(len(scene.objects) for scene in scenes))
    ]
    return Packed(
        photos=_array([photo_row(photo) for photo in photos], 11),
        grounds=_array([ground_row(ground) for ground in grounds], 16),
        objects=_array(layers, len(_NO_OBJECT)).reshape(len(layers), len(scenes), -1),
        signs=_array([_NO_SIGN if scene.sign is None else sign_row(scene.sign) for scene in scenes], len(_NO_SIGN)),
    )


def _array(rows: Any, columns: int) -> npt.NDArray[np.float32]:
    return np.asarray(rows, np.float32).reshape(-1, columns)


def ground_row(ground: Background) -> tuple[float, ...]:
    """The numbers of a computed ground."""
    frequency = 2 * math.pi / ground.period
    wave = (frequency * math.cos(ground.angle), frequency * math.sin(ground.angle))
    pattern = (*ground.gradient, ground.amplitude, *wave, ground.checks)
    return (*ground.base, *pattern, ground.noise, ground.noise_index, *ground.noise_shift, *ground.tint)


def photo_row(photo: Photo) -> tuple[float, ...]:
    """The numbers of a photographed ground; its own number is that of its name in `PHOTOGRAPHS`."""
    turn = (math.cos(photo.angle), math.sin(photo.angle))
    side = -1 if photo.mirrored else 1
    return (*photo.base, *photo.center, photo.scale, *turn, side, photo.strength, PHOTOGRAPHS.index(photo.name))


def object_row(item: SceneObject) -> tuple[float, ...]:
    """The numbers of an object; those of shape and colour are their indices in `SHAPES` and `COLORS`."""
    pose = (item.cx, item.cy, item.radius, math.cos(item.rotation), math.sin(item.rotation))
    return (*pose, SHAPES.index(item.shape), COLORS.index(item.color), *item.rgb)


def sign_row(sign: Sign) -> tuple[float, ...]:
    """The numbers of a sign."""
    plate = (sign.cx, sign.cy, sign.half_width, sign.half_height, sign.inverted)
    digits = [int(digit) for digit in sign.text.ljust(4, "0")]
    return (*plate, sign.digit_width, sign.digit_height, len(sign.text), *digits)
