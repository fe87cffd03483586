"""`python -m bench.photographs` makes demo/photographs from scikit-image's sample pictures; their sources are listed there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data

FOLDER = Path(__file__).parent.parent / "demo" / "photographs"
SIDE = 448
QUALITY = 80
PICTURES: dict[str, Callable[[], Any]] = {
    "astronaut": data.astronaut,
    "brick": data.brick,
    "camera": data.camera,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "grass": data.grass,
    "gravel": data.gravel,
    "hubble": data.hubble_deep_field,
    "retina": data.retina,
    "rocket": data.rocket,
}
# Share of the shorter side that is used: the retina is a disc on black.
USED = {"retina": 0.68}


def main() -> None:
    """Write every photograph as a square JPEG."""
    for name, load in PICTURES.items():
        picture = Image.fromarray(load())
        side = min(picture.size) * USED.get(name, 1.0)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        square = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        square.save(FOLDER / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
