"""Draw scenes with torch, a batch at a time and on any device.

A shape is a signed distance function: negative inside, positive outside, in units of the object's radius. One pixel of
blending along its zero line gives smooth edges. The functions for the star (reflections bring every edge onto one) and
the heart (two arcs on a square that stands on its corner) follow Inigo Quilez, "2D distance functions".

Shapes: B scenes, of which a layer touches R; an image is (B, 3, 336, 336), channels red, green, blue.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from leanvlm.demo.scenes import SIZE, Background, Scene, SceneObject, Sign

__all__ = ["Renderer", "render"]

_DIGITS = Path(__file__).parent / "digits.png"
_NOISE_IMAGES = 64
_NOISE_GRIDS = (7, 21, 84, 336)
_LIGHT, _DARK = 238, 18
_BORDER = 3


def _length(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-8)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.62, 0.866 * x.abs() - 0.5 * y - 0.5)


def _star(x: Tensor, y: Tensor) -> Tensor:
    cos, sin = 0.809017, 0.587785  # of 36 degrees, half the angle between two tips
    x, y = x.abs(), -y
    for normal_x, normal_y in ((cos, -sin), (-cos, -sin)):
        beyond = 2 * torch.clamp(normal_x * x + normal_y * y, min=0)
        x, y = x - beyond * normal_x, y - beyond * normal_y
    x, y = x.abs(), y - 1.0
    edge_x, edge_y = sin * 0.45, cos * 0.45 - 1.0
    along = torch.clamp((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0, 1)
    return _length(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.95, y - 0.30), torch.maximum(x - 0.30, y - 0.95))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.70).abs() - 0.25


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.62
    x, y = x.abs() / scale, (0.90 - y) / scale
    lobe = _length(x - 0.25, y - 0.75) - 0.35355
    middle = 0.5 * torch.clamp(x + y, min=0)
    squared = torch.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2)
    flank = torch.sqrt(squared + 1e-8) * torch.sign(x - y)
    return scale * torch.where(x + y > 1, lobe, flank)


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(0.866 * x + 0.5 * y, y) - 0.84


# Shape → distance of (x, y), y down, from its outline.
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "hexagon": _hexagon,
}


@functools.cache
def _noise_bank() -> Tensor:
    """Periodic noise images (64, 336, 336) of unit deviation, clipped at 3: four octaves in random proportions."""
    generator = torch.Generator().manual_seed(1234)
    bank = torch.zeros(_NOISE_IMAGES, SIZE, SIZE)
    for image in bank:
        weights = torch.rand(len(_NOISE_GRIDS), generator=generator) ** 2
        for weight, grid in zip(weights, _NOISE_GRIDS, strict=True):
            values = torch.randn(1, 1, grid, grid, generator=generator)
            # A wrapped border of one grid cell leaves no seam when the image is shifted cyclically.
            wrapped = functional.pad(values, (1, 1, 1, 1), mode="circular")
            cell = SIZE // grid
            smooth = functional.interpolate(wrapped, scale_factor=cell, mode="bilinear", align_corners=False)
            image += weight * smooth[0, 0, cell:-cell, cell:-cell]
        image /= image.std()
    return bank.clamp(-3, 3)


@functools.cache
def _digit_atlas() -> Tensor:
    """Coverage of the ten digits (10, height, width), 0-1."""
    with Image.open(_DIGITS) as picture:
        levels = np.asarray(picture.convert("L"), np.float32)
    return torch.from_numpy(levels / 255).reshape(10, -1, levels.shape[1])


class Renderer:
    """Draws scenes on one device; building it takes about a second, for the noise.

    Args:
        device: Where to draw, for example "cpu" or "cuda".
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._noise = _noise_bank().to(self._device)
        self._digits = _digit_atlas().to(self._device)
        centres = torch.arange(SIZE, device=self._device) + 0.5
        self._x, self._y = centres[None, None, :], centres[None, :, None]  # (1, 1, 336), (1, 336, 1)

    @torch.no_grad()
    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """Draw scenes, at least one.

        Returns:
            uint8 (B, 3, 336, 336) on the renderer's device. An image does not depend on the others in the batch.
        """
        image = self._ground([scene.background for scene in scenes])
        for layer in range(max(len(scene.objects) for scene in scenes)):
            for shape in _DISTANCES:
                rows = [i for i, scene in enumerate(scenes) if _shape_at(scene, layer) == shape]
                if rows:
                    image[rows] = self._with_objects(image[rows], shape, [scenes[i].objects[layer] for i in rows])
        signs = {row: scene.sign for row, scene in enumerate(scenes) if scene.sign is not None}
        if signs:
            rows = list(signs)
            image[rows] = self._with_signs(image[rows], list(signs.values()))
        return image.clamp(0, 255).round().to(torch.uint8)

    def _columns(self, rows: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
        """Numbers (R, columns) → one float tensor (R, 1, 1) for each column."""
        return torch.tensor(rows, dtype=torch.float32, device=self._device)[..., None, None].unbind(1)

    def _colors(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """Red, green, blue (R, 3) → (R, 3, 1, 1)."""
        return torch.tensor(rows, dtype=torch.float32, device=self._device)[..., None, None]

    def _ground(self, grounds: Sequence[Background]) -> Tensor:
        """Backgrounds as levels, not yet clipped: float (B, 3, 336, 336)."""
        slope_x, slope_y, amplitude, wave_x, wave_y, checks, noise = self._columns([_ground_row(g) for g in grounds])
        light = slope_x * (self._x / SIZE - 0.5) + slope_y * (self._y / SIZE - 0.5)
        wave = torch.sin(wave_x * self._x + wave_y * self._y)
        crossing = torch.sin(-wave_y * self._x + wave_x * self._y)
        pattern = torch.clamp(torch.where(checks > 0.5, wave * crossing, wave) * 4, -1, 1)
        texture = light + amplitude * pattern
        return (
            self._colors([g.base for g in grounds])
            + texture[:, None] * self._colors([g.tint for g in grounds])
            + (noise * self._shifted_noise(grounds))[:, None]
        )

    def _shifted_noise(self, grounds: Sequence[Background]) -> Tensor:
        rows = [(g.noise_index, *g.noise_shift) for g in grounds]
        index, shift_x, shift_y = torch.tensor(rows, device=self._device)[..., None, None].unbind(1)
        x, y = (self._x.long() + shift_x) % SIZE, (self._y.long() + shift_y) % SIZE
        return self._noise[index, y, x]  # (B, 336, 336)

    def _with_objects(self, image: Tensor, shape: str, objects: Sequence[SceneObject]) -> Tensor:
        """Draw one object of the given shape over each of the images (R, 3, 336, 336)."""
        cx, cy, radius, cos, sin = self._columns(
            [(o.cx, o.cy, o.radius, math.cos(o.rotation), math.sin(o.rotation)) for o in objects]
        )
        dx, dy = self._x - cx, self._y - cy
        distance = _DISTANCES[shape]((dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius)
        return _blend(image, self._colors([o.rgb for o in objects]), distance * radius)

    def _with_signs(self, image: Tensor, signs: Sequence[Sign]) -> Tensor:
        """Draw one sign over each of the images (R, 3, 336, 336)."""
        cx, cy, half_width, half_height, inverted = self._columns(
            [(s.cx, s.cy, s.half_width, s.half_height, s.inverted) for s in signs]
        )
        dx, dy = self._x - cx, self._y - cy
        distance = torch.maximum(dx.abs() - half_width, dy.abs() - half_height)
        border = torch.clamp(distance + _BORDER, 0, 1)
        ink = torch.maximum(self._digit_ink(dx, dy, signs), border)
        level = _LIGHT + ink * (_DARK - _LIGHT)
        level = torch.where(inverted > 0.5, _LIGHT + _DARK - level, level)
        return _blend(image, level[:, None], distance)

    def _digit_ink(self, dx: Tensor, dy: Tensor, signs: Sequence[Sign]) -> Tensor:
        """How much of each pixel the digits cover (R, 336, 336), given its place from the plate's centre."""
        width, height, count = self._columns([(s.digit_width, s.digit_height, len(s.text)) for s in signs])
        across = (dx + count * width / 2) / width
        slot = torch.floor(across)
        inside = (slot >= 0) & (slot < count) & (dy.abs() < height / 2)
        texts = torch.tensor([[int(digit) for digit in s.text.ljust(4, "0")] for s in signs], device=self._device)
        row = torch.arange(len(signs), device=self._device)[:, None, None]
        digit = texts[row, slot.clamp(0, 3).long()]  # (R, 1, 336)
        return self._sample_digits(digit, across - slot, dy / height + 0.5) * inside

    def _sample_digits(self, digit: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Interpolate the atlas bilinearly at u (R, 1, 336) across and v (R, 336, 1) down a digit, both 0-1."""
        height, width = self._digits.shape[1:]
        x, y = (u * width - 0.5).clamp(0, width - 1), (v * height - 0.5).clamp(0, height - 1)
        left, top = x.floor().clamp(0, width - 2).long(), y.floor().clamp(0, height - 2).long()
        right_share, low_share = x - left, y - top

        def line(at: Tensor) -> Tensor:
            first, second = self._digits[digit, at, left], self._digits[digit, at, left + 1]
            return first * (1 - right_share) + second * right_share

        return line(top) * (1 - low_share) + line(top + 1) * low_share


def _shape_at(scene: Scene, layer: int) -> str | None:
    return scene.objects[layer].shape if layer < len(scene.objects) else None


def _ground_row(ground: Background) -> tuple[float, ...]:
    frequency = 2 * math.pi / ground.period
    wave_x, wave_y = frequency * math.cos(ground.angle), frequency * math.sin(ground.angle)
    return (*ground.gradient, ground.amplitude, wave_x, wave_y, ground.checks, ground.noise)


def _blend(image: Tensor, color: Tensor, distance: Tensor) -> Tensor:
    """Lay a colour (R, 3 or 1, ...) over images where the distance (R, 336, 336), in pixels, is negative."""
    alpha = torch.clamp(0.5 - distance, 0, 1)
    return image + alpha[:, None] * (color - image)


def render(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Draw scenes, at least one, on the CPU: RGB images of 336 x 336 pixels."""
    images = Renderer("cpu").images(scenes)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
