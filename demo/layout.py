"""What a scene is, and how one is drawn from a seed. Plain Python: no torch, no numpy.

A scene holds up to 12 coloured shapes on a plain or textured ground and, in 42 % of the cases, a sign with two to four
digits. `(seed, kind)` determines it fully. The order in which random numbers are drawn is part of the format: the
built-in model's measured accuracy belongs to exactly these scenes, so a change of that order makes a new data set.

Each kind of scene also exists on photographed ground: `simple-photo` has the objects of `simple` at the same seed, so that
the two differ in nothing but the ground.

Positions and lengths are pixels of a 336 x 336 image, x to the right and y down. Seeds below 10**9 are held out from
training, and so are the photographs that stand behind them.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "COLORS",
    "HELD_OUT_PHOTOGRAPHS",
    "KINDS",
    "MOST_OBJECTS",
    "PHOTO_KINDS",
    "SHAPES",
    "SIGN_SHARE",
    "SIZE",
    "TRAINING_PHOTOGRAPHS",
    "TRAINING_SEED",
    "Background",
    "Kind",
    "Photo",
    "Scene",
    "SceneObject",
    "Sign",
    "make_scene",
    "plain_kind",
]

Kind = Literal["simple", "medium", "complex", "simple-photo", "medium-photo", "complex-photo"]
RGB = tuple[float, float, float]

SIZE = 336
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "hexagon")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
KINDS: tuple[Kind, ...] = ("simple", "medium", "complex")
PHOTO_KINDS: tuple[Kind, ...] = ("simple-photo", "medium-photo", "complex-photo")
# The least seed of a training scene.
TRAINING_SEED = 10**9
# Files in demo/photographs; the two lists never mix, so a held-out ground was never trained on.
TRAINING_PHOTOGRAPHS = ("astronaut", "brick", "coffee", "grass", "hubble", "retina", "rocket")
HELD_OUT_PHOTOGRAPHS = ("camera", "chelsea", "gravel")

_RGB: dict[str, RGB] = {
    "red": (214, 38, 38),
    "green": (38, 158, 58),
    "blue": (42, 78, 214),
    "yellow": (240, 216, 48),
    "purple": (142, 48, 172),
    "orange": (242, 132, 24),
    "black": (22, 22, 22),
    "white": (246, 246, 246),
}
SIGN_SHARE = 0.42


@dataclass(frozen=True)
class Background:
    """A computed ground: a colour, plus a linear gradient, a stripe or check pattern and noise, each possibly absent.

    Attributes:
        base: Colour at the centre, 0-255.
        gradient: Change of brightness across the image's width and height, in levels of 0-255.
        amplitude: Height of the pattern in levels; 0 for none.
        period: Width of a stripe pair or of a pair of checks, in pixels.
        angle: Direction of the pattern, in radians.
        checks: Whether the pattern is checks rather than stripes.
        noise: Standard deviation of the noise in levels; 0 for none.
        noise_index: Which of the renderer's 64 noise images, 0-63.
        noise_shift: Cyclic shift of the noise image, in pixels (x, y).
        tint: How strongly gradient and pattern act on each colour channel, 0.7-1.
    """

    base: RGB
    gradient: tuple[float, float]
    amplitude: float
    period: float
    angle: float
    checks: bool
    noise: float
    noise_index: int
    noise_shift: tuple[int, int]
    tint: RGB


@dataclass(frozen=True)
class Photo:
    """A photographed ground: a turned and scaled part of a photograph, which is mirrored at its edges.

    Attributes:
        name: Which photograph.
        center: What lies at the image's centre, in shares of the photograph's width and height (x, y), 0-1.
        scale: Width of the image in widths of the photograph, 0.4-1.
        angle: Direction in the photograph of the image's x axis, in radians.
        mirrored: Whether left and right are exchanged.
        base: Mean colour, 0-255.
        strength: Standard deviation in levels, 12-30.
    """

    name: str
    center: tuple[float, float]
    scale: float
    angle: float
    mirrored: bool
    base: RGB
    strength: float


@dataclass(frozen=True)
class Sign:
    """A plate with a number on it.

    Attributes:
        text: Two to four digits.
        cx: Centre of the plate, x.
        cy: Centre of the plate, y.
        digit_height: Height of a digit.
        digit_width: Distance from one digit to the next.
        half_width: Half the width of the plate.
        half_height: Half the height of the plate.
        inverted: Light digits on dark instead of dark on light.
    """

    text: str
    cx: float
    cy: float
    digit_height: float
    digit_width: float
    half_width: float
    half_height: float
    inverted: bool


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        cx: Centre, x.
        cy: Centre, y.
        radius: Half the side of the square that holds the shape before its rotation.
        rotation: Angle in radians, -0.3 to 0.3, clockwise.
        rgb: The shade drawn, within 10 levels of the colour's standard one, 0-255.
    """

    shape: str
    color: str
    cx: float
    cy: float
    radius: float
    rotation: float
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """What one image shows; `kind` and `seed` are what `make_scene` was given, `objects` are in drawing order."""

    kind: Kind
    seed: int
    background: Background | Photo
    sign: Sign | None
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class _Layout:
    """What a kind of scene draws from: textures, and (least, most) of the number and the sizes."""

    textures: tuple[str, ...]
    objects: tuple[int, int]
    radius: tuple[float, float]
    digit_height: tuple[float, float]


_LAYOUTS: dict[Kind, _Layout] = {
    "simple": _Layout(("plain", "gradient", "gradient", "plain", "noise"), (1, 2), (26, 75), (28, 60)),
    "medium": _Layout(("plain", "gradient", "noise", "stripes"), (3, 4), (20, 52), (28, 60)),
    "complex": _Layout(("noise", "noise", "stripes", "checks", "gradient+noise"), (5, 12), (14, 32), (24, 36)),
}
MOST_OBJECTS = max(layout.objects[1] for layout in _LAYOUTS.values())
_SMALL_RADIUS = (14, 30)


class _Box(NamedTuple):
    cx: float
    cy: float
    half_width: float
    half_height: float


def plain_kind(kind: Kind) -> Kind:
    """The kind of the same objects on computed ground."""
    plain: Kind = kind.removesuffix("-photo")  # type: ignore[assignment]
    return plain


def make_scene(seed: int, kind: Kind) -> Scene:
    """Draw the scene that a seed stands for.

    Args:
        seed: Any integer; the same one gives another scene in each kind.
        kind: "simple" (1-2 objects, quiet ground), "medium" (3-4) or "complex" (5-12 small ones, textured ground), or
            one of these with "-photo". An object for which no free place is found is left out.

    Raises:
        ValueError: `kind` is not one of `KINDS` and `PHOTO_KINDS`.
    """
    plain = plain_kind(kind)
    if kind not in (*KINDS, *PHOTO_KINDS):
        raise ValueError(f"unknown kind of scene {kind!r}; known: {', '.join((*KINDS, *PHOTO_KINDS))}")
    layout = _LAYOUTS[plain]
    rng = random.Random(f"{plain}-{seed}")
    background: Background | Photo = _draw_background(rng, layout.textures)
    if kind != plain:
        names = HELD_OUT_PHOTOGRAPHS if seed < TRAINING_SEED else TRAINING_PHOTOGRAPHS
        background = _draw_photo(random.Random(f"{kind}-{seed}"), names)
    count = rng.randint(*layout.objects)
    radius = _SMALL_RADIUS if plain == "simple" and rng.random() < 0.25 else layout.radius
    shapes, colors = _draw_palette(rng, count)
    taken: list[_Box] = []
    sign = _draw_sign(rng, taken, layout.digit_height) if rng.random() < SIGN_SHARE else None
    drawn = [_draw_object(rng, taken, radius, shapes, colors) for _ in range(count)]
    return Scene(kind, seed, background, sign, tuple(item for item in drawn if item is not None))


def _draw_background(rng: random.Random, textures: Sequence[str]) -> Background:
    hue, saturation, value = rng.random(), rng.uniform(0, 0.25), rng.uniform(0.36, 0.74)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    texture = rng.choice(textures)
    noise_index, noise_shift = rng.randrange(64), (rng.randrange(SIZE), rng.randrange(SIZE))
    tint = (rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0))
    gradient, noise, amplitude, period, angle = (0.0, 0.0), 0.0, 0.0, 40.0, 0.0
    if "gradient" in texture:
        gradient = (rng.uniform(-60, 60), rng.uniform(-60, 60))
    if "noise" in texture:
        noise = rng.uniform(8, 26)
    if texture in ("stripes", "checks"):
        amplitude, period, angle = rng.uniform(8, 28), rng.uniform(10, 60), rng.uniform(0, math.pi)
        noise = rng.uniform(0, 10) if rng.random() < 0.5 else 0.0
    return Background(
        base=(255 * red, 255 * green, 255 * blue),
        gradient=gradient,
        amplitude=amplitude,
        period=period,
        angle=angle,
        checks=texture == "checks",
        noise=noise,
        noise_index=noise_index,
        noise_shift=noise_shift,
        tint=tint,
    )


def _draw_photo(rng: random.Random, names: Sequence[str]) -> Photo:
    # Lightness and strength leave black and white shapes visible.
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.42, 0.68))
    return Photo(
        name=rng.choice(names),
        center=(rng.random(), rng.random()),
        scale=rng.uniform(0.4, 1.0),
        angle=rng.uniform(-math.pi, math.pi),
        mirrored=rng.random() < 0.5,
        base=(255 * red, 255 * green, 255 * blue),
        strength=rng.uniform(12, 30),
    )


def _draw_palette(rng: random.Random, count: int) -> tuple[Sequence[str], Sequence[str]]:
    """Shapes and colours to choose from; few of them in some scenes, for larger counts and more look-alikes."""
    shapes: Sequence[str] = SHAPES
    colors: Sequence[str] = COLORS
    if count > 2 and rng.random() < 0.5:
        if rng.random() < 0.5:
            shapes = rng.sample(SHAPES, rng.randint(1, 3))
        if rng.random() < 0.5:
            colors = rng.sample(COLORS, rng.randint(1, 3))
    return shapes, colors


def _place(rng: random.Random, taken: list[_Box], half_width: float, half_height: float) -> tuple[float, float] | None:
    """Draw a centre whose box is clear of the taken ones and take it; None after 40 failures."""
    for _ in range(40):
        cx = rng.uniform(half_width + 2, SIZE - 2 - half_width)
        cy = rng.uniform(half_height + 2, SIZE - 2 - half_height)
        if all(
            abs(cx - box.cx) > 0.97 * (half_width + box.half_width) + 1
            or abs(cy - box.cy) > 0.97 * (half_height + box.half_height) + 1
            for box in taken
        ):
            taken.append(_Box(cx, cy, half_width, half_height))
            return cx, cy
    return None


def _draw_sign(rng: random.Random, taken: list[_Box], digit_height: tuple[float, float]) -> Sign | None:
    digits = rng.randint(2, 4)
    height = rng.uniform(*digit_height)
    width = 0.62 * height
    half_width, half_height = digits * width / 2 + 0.22 * height, height / 2 + 0.16 * height
    centre = _place(rng, taken, half_width, half_height)
    if centre is None:
        return None
    text = "".join(rng.choice("0123456789") for _ in range(digits))
    return Sign(text, *centre, height, width, half_width, half_height, inverted=rng.random() < 0.3)


def _draw_object(
    rng: random.Random, taken: list[_Box], radii: tuple[float, float], shapes: Sequence[str], colors: Sequence[str]
) -> SceneObject | None:
    """Draw an object, at a smaller size when no place is free; None after three sizes."""
    least, most = radii
    for failures in range(3):
        radius = rng.uniform(least, max(least, most * (1 - 0.3 * failures)))
        centre = _place(rng, taken, radius, radius)
        if centre is not None:
            break
    else:
        return None
    color = rng.choice(colors)
    shape, rotation = rng.choice(shapes), rng.uniform(-0.3, 0.3)
    red, green, blue = (min(255.0, max(0.0, level + rng.uniform(-10, 10))) for level in _RGB[color])
    return SceneObject(shape, color, *centre, radius, rotation, (red, green, blue))
