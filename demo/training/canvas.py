"""Draw training batches on their device, and say what lies under each patch.

The pictures are those of `leanvlm.demo.render.Renderer`. Here every object of a layer is drawn at once, whatever its shape,
so that the work does not depend on the scenes and can be compiled; on a CPU the other renderer is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanvlm.demo.packing import Packed
from leanvlm.demo.render import Tables, blend, draw_ground, draw_photo, draw_sign, object_distance, sign_slots
from leanvlm.demo.scenes import COLORS, SHAPES, SIZE

__all__ = ["COLOR_CLASSES", "DIGIT_CLASSES", "NOTHING", "PATCHES", "SHAPE_CLASSES", "Canvas", "PatchLabels"]

PATCH = 14
PATCHES = (SIZE // PATCH) ** 2
# Nothing, the shapes, the sign; nothing, the colours; nothing, a sign without a digit, the digits.
SHAPE_CLASSES = len(SHAPES) + 2
COLOR_CLASSES = len(COLORS) + 1
DIGIT_CLASSES = 12
NOTHING = -1
# Points at which a patch is probed, along a side; an object counts that covers more than this share of them.
_PROBES = 3
_LEAST_COVER = 0.2


@dataclass(frozen=True)
class PatchLabels:
    """What lies under each patch, in raster order.

    Attributes:
        shapes: (B, 576) 0 nothing, 1-8 `SHAPES`, 9 the sign.
        colors: (B, 576) 0 nothing or the sign, 1-8 `COLORS`.
        digits: (B, 576) 0 nothing, 1 a sign without a digit, 2-11 the digits.
        objects: (B, 576) 0 nothing or the sign, else the object's number in drawing order, from 1.
        centers: (B, 576) the patch in which the object or the sign has its centre; `NOTHING` where there is neither.
    """

    shapes: Tensor
    colors: Tensor
    digits: Tensor
    objects: Tensor
    centers: Tensor


class Canvas:
    """Draws packed scenes on one device.

    Args:
        device: Where to draw.
        compiled: Whether to compile the drawing; for GPUs, where all batches have the same shapes.
    """

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self._device = device
        self._tables = Tables(device)
        side = SIZE // PATCH
        probes = (torch.arange(side * _PROBES, device=device) + 0.5) * (PATCH / _PROBES)
        middles = (torch.arange(side, device=device) + 0.5) * PATCH
        self._probe_x, self._probe_y = probes[None, None, :], probes[None, :, None]
        self._middle_x, self._middle_y = middles[None, None, :], middles[None, :, None]

        def prepared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            if not compiled:
                return function
            made: Any = torch.compile(function, dynamic=False)
            return made  # type: ignore[no-any-return]

        # The distance apart from blending: fused, it would be computed for each colour channel anew.
        self._ground, self._distance, self._blend = prepared(draw_ground), prepared(object_distance), prepared(blend)
        self._sign, self._cover = prepared(draw_sign), prepared(_cover)

    @torch.no_grad()
    def images(self, scenes: Packed) -> Tensor:
        """Draw scenes: uint8 (B, 3, 336, 336), equal to `Renderer`'s up to rounding."""
        tables = self._tables
        x, y = tables.x, tables.y
        grounds = []
        if len(scenes.photos):
            grounds.append(draw_photo(self._move(scenes.photos), tables.photos, x, y))
        if len(scenes.grounds):
            grounds.append(self._ground(self._move(scenes.grounds), tables.noise, x, y))
        image = torch.cat(grounds)
        for layer in self._move(scenes.objects).unbind():
            row = layer.clone()
            image = self._blend(image, row[:, 7:10, None, None], self._distance(row, x, y))
        image = self._sign(image, self._move(scenes.signs), tables.digits, x, y)
        return image.clamp(0, 255).round().to(torch.uint8)

    @torch.no_grad()
    def labels(self, scenes: Packed) -> PatchLabels:
        """Say what lies under each patch: the object that covers most of it, or the sign where its middle is on one."""
        signs = self._move(scenes.signs)
        side = SIZE // PATCH
        most = torch.full((len(signs), side, side), _LEAST_COVER, device=self._device)
        shapes = torch.zeros(len(signs), side, side, dtype=torch.long, device=self._device)
        colors, objects, centers = torch.zeros_like(shapes), torch.zeros_like(shapes), torch.full_like(shapes, NOTHING)
        for number, layer in enumerate(self._move(scenes.objects).unbind(), 1):
            cover = self._cover(layer.clone(), self._probe_x, self._probe_y)
            more = cover > most
            most = torch.where(more, cover, most)
            shapes = torch.where(more, layer[:, 5, None, None].long() + 1, shapes)
            colors = torch.where(more, layer[:, 6, None, None].long() + 1, colors)
            objects = torch.where(more, number, objects)
            centers = torch.where(more, _patch_at(layer), centers)
        digits = _sign_digits(signs, self._middle_x, self._middle_y)
        shapes = torch.where(digits > 0, SHAPE_CLASSES - 1, shapes)
        colors, objects = (torch.where(digits > 0, 0, labels) for labels in (colors, objects))
        centers = torch.where(digits > 0, _patch_at(signs), centers)
        return PatchLabels(*(labels.flatten(1) for labels in (shapes, colors, digits, objects, centers)))

    def _move(self, rows: Any) -> Tensor:
        return to_device(rows, self._device)


def to_device(rows: Any, device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for what a GPU still does."""
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _patch_at(rows: Tensor) -> Tensor:
    """The patch, (B, 1, 1), in which each row's centre lies; rows begin with its x and y, in pixels."""
    side = SIZE // PATCH
    column, row = (rows[:, :2] / PATCH).long().clamp(0, side - 1).unbind(1)
    return (row * side + column)[:, None, None]


def _cover(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Share of each patch (B, 24, 24) that one object an image (B, 10) covers."""
    alpha = torch.clamp(0.5 - object_distance(rows, x, y), 0, 1)
    side = SIZE // PATCH
    return alpha.view(-1, side, _PROBES, side, _PROBES).mean((2, 4))


def _sign_digits(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Digit classes (B, H, W) of points, given the signs (B, 12)."""
    cx, cy, half_width, half_height = rows[:, :4, None, None].unbind(1)
    plate = ((x - cx).abs() < half_width) & ((y - cy).abs() < half_height)
    _, digit, inside = sign_slots(rows, x, y)
    return torch.where(plate & inside, digit + 2, plate.long())
