"""Images to pixel values: what a checkpoint's image processor does, in Pillow and NumPy.

The arithmetic follows the Pillow backend of transformers' image processors: white under transparency, resize,
centre crop with black beyond the border, scale, normalise.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from leanvlm.runtime.cuts import Cut, Picture, Piece, Raster, as_image, centred, cut_pieces
from leanvlm.runtime.errors import InputError, UnsupportedModelError
from leanvlm.runtime.jpeg import check_scans, jpeg_levels
from leanvlm.runtime.records import Between

Edge = Annotated[int, Between(1, 4096)]
"""Pixels of an image once resized or cropped; a vision tower of 4096 would have 85,000 tokens."""
Scale = Annotated[float, Between(1e-6, 1e6)]
"""A factor of levels of 0 to 255, or a divisor: fp32 then neither overflows nor divides by zero."""
Mean = Annotated[float, Between(-1e6, 1e6)]
ImageSource = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[np.uint8]
PixelValues = npt.NDArray[np.float32] | npt.NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""The largest image that is decoded, and the largest that resizing may make: 192 MB as RGB."""
MAX_SCANS = 20
"""How often a JPEG file of as many pixels may go over them, and smaller ones more often. A scan of 62 megapixels that changes
nothing takes 92 bytes and 40 ms."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF")
"""What files are opened as, of Pillow's formats: pictures from cameras and programs. Others call a program (EPS runs
Ghostscript), draw, or take nearly any bytes for theirs. HEIF is there where a plugin has registered it."""


@dataclass(frozen=True)
class ImageSpec:
    """An image processor as data; `(level * rescale_factor - image_mean) / image_std` is what the model sees.

    A step that the processor leaves out is the identity here: None for `resize` and `crop`, 1 for `rescale_factor`,
    zeros and ones for `image_mean` and `image_std`. An image is always converted to RGB first.

    Attributes:
        resize: The shorter edge in pixels (the aspect ratio is kept), or (height, width), or None.
        crop: (height, width) cut from the centre; a smaller image is padded with black. None for no crop.
        resample: Pillow's number of the resampling filter, 0 to 5; 3 is bicubic.
        rescale_factor: What a level of 0 to 255 is multiplied by.
        image_mean: Subtracted per channel, after rescaling.
        image_std: Divided by per channel, after `image_mean` is subtracted.
        layout: `float32` for normalised values, `uint8` for levels that the vision graph itself normalises.

    Raises:
        UnsupportedModelError: The output size would vary with the image, or a value is out of range.
    """

    resize: Edge | tuple[Edge, Edge] | None
    crop: tuple[Edge, Edge] | None
    resample: Annotated[int, Between(0, 5)] = 3
    rescale_factor: Scale = 1 / 255
    image_mean: tuple[Mean, Mean, Mean] = (0.0, 0.0, 0.0)
    image_std: tuple[Scale, Scale, Scale] = (1.0, 1.0, 1.0)
    layout: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        if self.crop is None and not isinstance(self.resize, tuple):
            raise UnsupportedModelError(
                "the image processor's output size varies with the image; it needs a centre crop or a fixed size"
            )

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of every preprocessed image, in pixels."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, tuple)
        return self.resize


def load_image(source: ImageSource) -> Image.Image:
    """Open an image as RGB, as `transformers` would: files are turned upright by their EXIF orientation.

    One thing is not as there. A picture of more than 8 bits a level (Pillow's modes I;16, I and F) is clipped at 255 by
    `transformers`, by way of Pillow's `convert`, and what a 16-bit camera sees is white but for the deepest shadows. Here
    0 to 65535 becomes 0 to 255: the high byte, as Pillow itself takes it of 16-bit colour, so that grey and colour files of one
    scene look alike. A picture without a level over 255, where nothing would be clipped, is the same as there. A sensor of 10
    or 12 bits that leaves the upper bits empty is dark; shift its levels up before.

    Args:
        source: A path, the bytes of an image file, an open binary file (read from its start), a Pillow image of any mode (taken
            as it lies, EXIF ignored), or levels (H, W, 3) uint8.

    Returns:
        The image in mode RGB; transparent pixels are blended with white. An opaque Pillow image in RGB is returned
        itself, not a copy.

    Raises:
        InputError: The file does not exist or is no image in one of `FORMATS`, it cannot be decoded, it has no pixels or more
            than `MAX_PIXELS`, levels of no finite number or over 65535, or a JPEG file goes over its pixels too often.
    """
    return as_image(_load(source, direct=False))


def load_raster(source: ImageSource) -> Raster:
    """As `load_image`, but an image that is no Pillow image, and need not become one to be decoded, stays an array.

    Returns:
        The image in mode RGB; or its levels (H, W, 3), for an array and for most JPEG files, which are decoded sooner so.
    """
    return _load(source, direct=True)


def _load(source: ImageSource, direct: bool) -> Raster:
    """Load an image; `direct`: a JPEG file to levels, where that is possible."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
            raise InputError(f"an image array must be (H, W, 3) uint8, not {source.shape} {source.dtype}")
        _check_size(source.shape[1], source.shape[0], "the image array")
        return source
    if isinstance(source, Image.Image):
        with _one_line_errors("the image"):
            _check_size(source.width, source.height, "the image")
            return _to_rgb(source, "the image")
    name = f"image {str(source)[:200]!r}" if isinstance(source, (str, Path)) else "the image"
    with _one_line_errors(name), _open(file := _file(source, name)) as image:
        _check_size(image.width, image.height, name)
        check_scans(image, file, MAX_SCANS * MAX_PIXELS, name)
        levels = jpeg_levels(image, file) if direct else None
        if levels is not None:
            return levels
        ImageOps.exif_transpose(image, in_place=True)  # Nobody else holds it, so it needs no copy.
        return _to_rgb(image, name)


def image_size(data: bytes, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """Return the (height, width) of an image file as its header states it, and decode nothing.

    Raises:
        InputError: It is no image in one of `formats`, or `load_image` would refuse it for its size.
    """
    with _one_line_errors("the image", formats), _open(BytesIO(data), formats) as image:
        _check_size(image.width, image.height, "the image")
        check_scans(image, BytesIO(data), MAX_SCANS * MAX_PIXELS, "the image")
        return image.height, image.width


def image_list(images: Any) -> list[ImageSource]:
    """Return one image, of any kind that `load_image` takes, or several as a list."""
    kinds = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return [images] if isinstance(images, kinds) or hasattr(images, "read") else list(images)


def preprocess(images: Sequence[ImageSource], spec: ImageSpec) -> PixelValues:
    """Make the vision graph's input from images.

    Args:
        images: B images, each as `load_image` takes it; at least one.
        spec: The checkpoint's image processor.

    Returns:
        Contiguous pixel values (B, 3, H, W) with (H, W) = `spec.size`: float32 normalised, or uint8 levels, as
        `spec.layout` says.

    Raises:
        InputError: There is no image, or one cannot be used.
    """
    if not images:
        raise InputError("there is no image to preprocess; give at least one")
    levels = np.empty((len(images), 3, *spec.size), np.uint8)
    for row, image in zip(levels, images, strict=True):
        row[:] = image_levels(load_image(image), spec).transpose(2, 0, 1)
    return normalised(levels, spec)


def normalised(levels: npt.NDArray[np.uint8], spec: ImageSpec) -> PixelValues:
    """Return what a vision graph takes of levels (B, 3, H, W): the levels, or what the processor makes of them."""
    if spec.layout == "uint8":
        return levels
    mean = np.asarray(spec.image_mean, np.float32).reshape(3, 1, 1)
    std = np.asarray(spec.image_std, np.float32).reshape(3, 1, 1)
    values: npt.NDArray[np.float32] = np.multiply(levels, spec.rescale_factor, dtype=np.float32)
    values -= mean
    values /= std
    return values


def image_levels(image: Image.Image, spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """Resize and crop an RGB image to levels (H, W, 3)."""
    (levels,) = cut_pieces([Piece(Picture(image, spec.resample), centre((image.height, image.width), spec))])
    return levels


def centre(size: tuple[int, int], spec: ImageSpec) -> Cut:
    """Return what a processor makes of an image (height, width) as one crop.

    Raises:
        InputError: As `resized_size`.
    """
    return centred(size, resized_size(size, spec), spec.size)


def resized_size(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Return the (height, width) of the whole image once resized, before it is cropped.

    Args:
        size: The image's (height, width).
        spec: The image processor.

    Raises:
        InputError: More than `MAX_PIXELS`, since the image is so narrow.
    """
    if spec.resize is None:
        return size
    height, width = _resized(*size, spec.resize)
    if height * width > MAX_PIXELS:
        raise InputError(
            f"an image of {size[1]} x {size[0]} is too narrow: resizing it for the model would make {width} x {height} pixels"
        )
    return height, width


def _resized(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(resize, tuple):
        return resize
    longer = int(resize * max(height, width) / min(height, width))
    return (longer, resize) if width <= height else (resize, longer)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()  # Some formats know their mode only then.
    if image.mode.partition(";")[0] in ("I", "F"):
        image = _high_byte(image, name)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _high_byte(image: Image.Image, name: str) -> Image.Image:
    """Turn a picture of 16-bit levels into one of 8 (L), transparent ones into white; leave one without a level over 255."""
    levels = np.asarray(image)
    most = levels.max()
    if not most <= 65535:  # Nor is a NaN.
        raise InputError(f"{name} has levels up to {most}; pictures of 8 and 16 bits are supported")
    if most <= 255:
        return image
    high = np.divide(levels.clip(0, None), 256, dtype=np.float32).astype(np.uint8)
    high[levels == image.info.get("transparency")] = 255
    return Image.fromarray(high)


def _open(file: Path | BytesIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Open a picture of one of some formats."""
    Image.preinit()
    try:
        return Image.open(file, formats=_formats(formats))
    except UnidentifiedImageError:
        Image.init()  # The rarer formats, which take longer to import than a picture to decode.
        return Image.open(file, formats=_formats(formats))


def _formats(formats: Sequence[str] = FORMATS) -> list[str]:
    """Return those of some formats that Pillow has imported."""
    return [name for name in formats if name in Image.OPEN]


def _file(source: Any, name: str) -> Path | BytesIO:
    """Return what Pillow can open as often as it likes."""
    if isinstance(source, (str, Path)):
        return _existing_file(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source)
    if not hasattr(source, "read"):
        kinds = "a path, bytes, an open binary file, a Pillow image or an array"
        raise InputError(f"an image must be {kinds}, not {type(source).__name__}")
    if hasattr(source, "seekable") and source.seekable():
        source.seek(0)
    data = source.read()
    if not isinstance(data, bytes):
        raise InputError("an image is read from a binary file; open it with mode 'rb'")
    return BytesIO(data)


def _existing_file(path: str | Path, name: str) -> Path:
    # os.path answers False where Path raises: for a name that is too long or holds a null character.
    if os.path.isfile(path):
        return Path(path)
    if str(path).startswith(("http://", "https://", "data:")):
        raise InputError(f"{name} is not a file; images are read from files, so download it first")
    raise InputError(f"{name} is not a file" if os.path.exists(path) else f"{name} does not exist")


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} megapixels are decoded")


@contextmanager
def _one_line_errors(name: str, formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Turn whatever Pillow raises while it opens or decodes `name` into an InputError."""
    with warnings.catch_warnings():
        # Ours is the smaller limit, and it is an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels") from error
        except UnidentifiedImageError as error:
            raise InputError(
                f"{name} is not an image in a format that Pillow reads here: {', '.join(_formats(formats))}"
            ) from error
        except Exception as error:  # On damaged data Pillow's decoders raise nearly anything.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} cannot be decoded: {reason}") from error
