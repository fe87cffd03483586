"""The pictures of a request: out of data URIs, or fetched (`remote`), and checked before anything is decoded."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.preprocess import image_size
from leanvlm.runtime.serving.remote import RemotePolicy, fetch

__all__ = ["FORMATS", "RemotePolicy", "check_images", "fetch", "from_data_uri"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""What browsers and cameras send. Others that `load_image` knows are for files of one's own: Pillow reads plain PPM
in Python, 0.2 s for each MB that a stranger sends."""

_HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE)


def from_data_uri(url: str, limit: int) -> bytes:
    """Return the bytes of a data URI (RFC 2397).

    Args:
        url: `data:image/TYPE;base64,DATA`; DATA of the standard alphabet, padded, without line breaks.
        limit: Bytes at most.

    Raises:
        InputError: It is not so, or larger; which is known before it is decoded.
    """
    head = _HEAD.match(url)
    if head is None:
        raise InputError("an image is sent as data:image/TYPE;base64,DATA, where TYPE is jpeg, png, webp or gif")
    coded = len(url) - head.end()
    size = coded // 4 * 3 - url.count("=", max(head.end(), len(url) - 2))
    if size > limit:
        raise InputError(f"an image has {size} bytes; at most {limit} are taken")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except ValueError:
        data = b""
    # Python passes over padding that is too much.
    if not data or len(data) != size or coded % 4:
        raise InputError("an image's data is empty or not base64 (RFC 4648, section 4: with padding, without line breaks)")
    return data


def check_images(images: Sequence[bytes], max_pixels: int) -> None:
    """Refuse pictures that would take too much to decode; reads their headers only.

    Args:
        images: Files.
        max_pixels: Of all of them together.

    Raises:
        InputError: One is in none of `FORMATS`, or they have more pixels.
    """
    total = 0
    for image in images:
        height, width = image_size(image, FORMATS)
        total += height * width
        if total > max_pixels:
            raise InputError(f"the images have more than {max_pixels / 1e6:g} megapixels together; send smaller ones")
