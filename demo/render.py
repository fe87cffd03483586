"""Draw scenes with torch, a batch at a time and on any device.

A shape is a signed distance function: negative inside, positive outside, in units of the object's radius. One pixel of
blending along its zero line gives smooth edges. The functions for the star (reflections bring every edge onto one) and
the heart (two arcs on a square that stands on its corner) follow Inigo Quilez, "2D distance functions".

Shapes: B scenes, of which a layer touches R; an image is (B, 3, 336, 336), channels red, green, blue. What is drawn comes
as rows of numbers, whose columns `leanvlm.demo.packing` lists; x (1, 1, W) and y (1, H, 1) are the points to draw.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from leanvlm.demo.packing import PHOTOGRAPHS, ground_row, object_row, photo_row, sign_row
from leanvlm.demo.scenes import SHAPES, SIZE, Background, Photo, Scene

__all__ = [
    "Renderer",
    "Tables",
    "blend",
    "draw_ground",
    "draw_object",
    "draw_photo",
    "draw_sign",
    "object_distance",
    "render",
    "sign_slots",
]

_DIGITS = Path(__file__).parent / "digits.png"
_PHOTOGRAPHS = Path(__file__).parent / "photographs"
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


# Shape → distance of (x, y), y down, from its outline; in the order of SHAPES.
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


@functools.cache
def _photo_bank() -> Tensor:
    """The photographs of `PHOTOGRAPHS` (10, 3, side, side), of mean 0 in each channel and unit deviation, clipped at 2.5."""
    bank = []
    for name in PHOTOGRAPHS:
        with Image.open(_PHOTOGRAPHS / f"{name}.jpg") as picture:
            levels = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32)).permute(2, 0, 1)
        levels = levels - levels.mean((1, 2), keepdim=True)
        bank.append(levels / levels.std())
    return torch.stack(bank).clamp(-2.5, 2.5)


class Tables:
    """What drawing looks up, on one device; building the first takes about a second, for the noise.

    Attributes:
        noise: (64, 336, 336).
        digits: (10, height, width).
        photos: (10, 3, side, side).
        x: (1, 1, 336) centres of the pixels.
        y: (1, 336, 1) centres of the pixels.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.noise = _noise_bank().to(device)
        self.digits = _digit_atlas().to(device)
        self.photos = _photo_bank().to(device)
        centres = torch.arange(SIZE, device=device) + 0.5
        self.x, self.y = centres[None, None, :], centres[None, :, None]


def _columns(rows: Tensor) -> tuple[Tensor, ...]:
    """Numbers (R, C) → C tensors (R, 1, 1)."""
    return rows[:, :, None, None].unbind(1)


def draw_ground(rows: Tensor, noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Computed grounds (R, 16) as levels, not yet clipped: float (R, 3, 336, 336)."""
    slope_x, slope_y, amplitude, wave_x, wave_y, checks, strength, index, shift_x, shift_y = _columns(rows[:, 3:13])
    light = slope_x * (x / SIZE - 0.5) + slope_y * (y / SIZE - 0.5)
    wave = torch.sin(wave_x * x + wave_y * y)
    crossing = torch.sin(-wave_y * x + wave_x * y)
    pattern = torch.clamp(torch.where(checks > 0.5, wave * crossing, wave) * 4, -1, 1)
    texture = light + amplitude * pattern
    at_x, at_y = (x.long() + shift_x.long()) % SIZE, (y.long() + shift_y.long()) % SIZE
    grain = strength * noise[index.long(), at_y, at_x]
    return rows[:, 0:3, None, None] + texture[:, None] * rows[:, 13:16, None, None] + grain[:, None]


def draw_photo(rows: Tensor, photos: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Photographed grounds (R, 11) as levels, not yet clipped: float (R, 3, 336, 336)."""
    center_x, center_y, scale, cos, sin, side, strength = _columns(rows[:, 3:10])
    # grid_sample's coordinates run from -1 to 1 over the photograph.
    u, v = 2 * scale * side * (x / SIZE - 0.5), 2 * scale * (y / SIZE - 0.5)
    grid = torch.stack([2 * center_x - 1 + cos * u - sin * v, 2 * center_y - 1 + sin * u + cos * v], dim=-1)
    chosen = photos[rows[:, 10].long()]
    drawn = functional.grid_sample(chosen, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return rows[:, 0:3, None, None] + strength[:, None] * drawn


def object_distance(rows: Tensor, x: Tensor, y: Tensor, shape: str | None = None) -> Tensor:
    """Distance in pixels (R, H, W) of each point from the outline of one object an image (R, 10), negative inside.

    Args:
        rows: The objects.
        x: Points.
        y: Points.
        shape: The shape of all of them; None reads each one's from its row, which costs as much as all shapes together.
    """
    cx, cy, radius, cos, sin, number = _columns(rows[:, :6])
    dx, dy = x - cx, y - cy
    across, down = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
    if shape is not None:
        return _DISTANCES[shape](across, down) * radius
    distance = _DISTANCES[SHAPES[0]](across, down)
    for index, name in enumerate(SHAPES[1:], 1):
        distance = torch.where(number == index, _DISTANCES[name](across, down), distance)
    return distance * radius


def draw_object(image: Tensor, rows: Tensor, x: Tensor, y: Tensor, shape: str | None = None) -> Tensor:
    """Draw one object (R, 10) over each of the images (R, 3, 336, 336); for `shape` see `object_distance`."""
    return blend(image, rows[:, 7:10, None, None], object_distance(rows, x, y, shape))


def draw_sign(image: Tensor, rows: Tensor, digits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw one sign (R, 12) over each of the images (R, 3, 336, 336)."""
    cx, cy, half_width, half_height, inverted = _columns(rows[:, :5])
    distance = torch.maximum((x - cx).abs() - half_width, (y - cy).abs() - half_height)
    border = torch.clamp(distance + _BORDER, 0, 1)
    ink = torch.maximum(_digit_ink(rows, digits, x, y), border)
    level = _LIGHT + ink * (_DARK - _LIGHT)
    level = torch.where(inverted > 0.5, _LIGHT + _DARK - level, level)
    return blend(image, level[:, None], distance)


def sign_slots(rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which digit of a sign (R, 12) each point is on.

    Returns:
        Place of the point in digits from the first one's left side (R, 1, W); the digit drawn there, 0-9 (R, 1, W);
        whether a digit is there (R, H, W).
    """
    cx, cy, _, _, _, width, height, count = _columns(rows[:, :8])
    across = (x - cx + count * width / 2) / width
    slot = torch.floor(across)
    inside = (slot >= 0) & (slot < count) & ((y - cy).abs() < height / 2)
    row = torch.arange(len(rows), device=rows.device)[:, None, None]
    return across, rows[:, 8:12].long()[row, slot.clamp(0, 3).long()], inside


def _digit_ink(rows: Tensor, digits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel the digits cover (R, 336, 336)."""
    across, digit, inside = sign_slots(rows, x, y)
    cy, digit_height = rows[:, 1, None, None], rows[:, 6, None, None]
    return _sample_digits(digits, digit, across - torch.floor(across), (y - cy) / digit_height + 0.5) * inside


def _sample_digits(digits: Tensor, digit: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Interpolate the atlas bilinearly at u (R, 1, 336) across and v (R, 336, 1) down a digit, both 0-1."""
    height, width = digits.shape[1:]
    x, y = (u * width - 0.5).clamp(0, width - 1), (v * height - 0.5).clamp(0, height - 1)
    left, top = x.floor().clamp(0, width - 2).long(), y.floor().clamp(0, height - 2).long()
    right_share, low_share = x - left, y - top

    def line(at: Tensor) -> Tensor:
        first, second = digits[digit, at, left], digits[digit, at, left + 1]
        return first * (1 - right_share) + second * right_share

    return line(top) * (1 - low_share) + line(top + 1) * low_share


def blend(image: Tensor, color: Tensor, distance: Tensor) -> Tensor:
    """Lay a colour (R, 3 or 1, ...) over images where the distance (R, 336, 336), in pixels, is negative."""
    alpha = torch.clamp(0.5 - distance, 0, 1)
    return image + alpha[:, None] * (color - image)


class Renderer:
    """Draws scenes on one device.

    Args:
        device: Where to draw, for example "cpu" or "cuda".
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._tables = Tables(device)

    @torch.no_grad()
    def images(self, scenes: Sequence[Scene]) -> Tensor:
        """Draw scenes, at least one.

        Returns:
            uint8 (B, 3, 336, 336) on the renderer's device. An image does not depend on the others in the batch.
        """
        tables = self._tables
        x, y = tables.x, tables.y
        image = torch.empty(len(scenes), 3, SIZE, SIZE, device=self._device)
        grounds = {i: scene.background for i, scene in enumerate(scenes) if isinstance(scene.background, Background)}
        if grounds:
            image[list(grounds)] = draw_ground(self._rows(map(ground_row, grounds.values())), tables.noise, x, y)
        photos = {i: scene.background for i, scene in enumerate(scenes) if isinstance(scene.background, Photo)}
        if photos:
            image[list(photos)] = draw_photo(self._rows(map(photo_row, photos.values())), tables.photos, x, y)
        for layer in range(max(len(scene.objects) for scene in scenes)):
            for shape in SHAPES:
                here = [i for i, scene in enumerate(scenes) if _shape_at(scene, layer) == shape]
                if here:
                    rows = self._rows(object_row(scenes[i].objects[layer]) for i in here)
                    image[here] = draw_object(image[here], rows, x, y, shape)
        signs = {i: scene.sign for i, scene in enumerate(scenes) if scene.sign is not None}
        if signs:
            rows = self._rows(map(sign_row, signs.values()))
            image[list(signs)] = draw_sign(image[list(signs)], rows, tables.digits, x, y)
        return image.clamp(0, 255).round().to(torch.uint8)

    def _rows(self, rows: Iterable[Sequence[float]]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.float32, device=self._device)


def _shape_at(scene: Scene, layer: int) -> str | None:
    return scene.objects[layer].shape if layer < len(scene.objects) else None


def render(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Draw scenes, at least one, on the CPU: RGB images of 336 x 336 pixels."""
    images = Renderer("cpu").images(scenes)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
