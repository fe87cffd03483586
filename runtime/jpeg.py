"""JPEG files: refused if decoding takes for ever, and decoded to levels that lie as a device takes them.

The latter takes two thirds of Pillow's time, with the same levels. Pillow, too, decodes with libjpeg-turbo. It keeps pixels of
four bytes, though, and packs them again for whoever wants three; `simplejpeg` has the library write those at once. Pillow still
opens the file and says what it is.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from leanvlm.runtime.errors import InputError, MissingExtraError
from leanvlm.runtime.optional import require

SCAN = b"\xff\xda"


def check_scans(image: Image.Image, file: Path | BytesIO, most: int, name: str) -> None:
    """Refuse a JPEG file of very many scans: each goes over all pixels, and one that changes nothing takes less than 100 bytes.

    A progressive file has about ten.

    Args:
        image: The file, opened by Pillow and not decoded yet.
        file: The file.
        most: Pixels times scans.
        name: Of the image, for messages.

    Raises:
        InputError: It has more.
    """
    if image.format not in ("JPEG", "MPO"):
        return
    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    # Within a scan no level is coded so; a thumbnail and a second picture of the file count too.
    scans = data.count(SCAN)
    if scans * image.width * image.height > most:
        raise InputError(f"{name} has {scans} scans of {image.width} x {image.height} pixels; save it again, as a usual JPEG")


def jpeg_levels(image: Image.Image, file: Path | BytesIO) -> npt.NDArray[np.uint8] | None:
    """Return the levels (H, W, 3) of a JPEG file that needs nothing but decoding.

    Args:
        image: The file, opened by Pillow and not decoded yet.
        file: The file.

    Returns:
        None for a file of another kind, one that is to be turned, one that is damaged in the least (some of them Pillow
        decodes), or without `simplejpeg`: Pillow has to decode it, or to say why it cannot.
    """
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        decoder: Any = require("simplejpeg", "gpu")
    except MissingExtraError:
        return None
    data = file.read_bytes() if isinstance(file, Path) else file.getbuffer()
    try:
        levels: npt.NDArray[np.uint8] = decoder.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return levels if levels.shape == (image.height, image.width, 3) else None
