"""A checkpoint's image processor as data: what the runtime does to a picture before the tower sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import read, shorten


class ProcessorError(UnsupportedModelError):
    """What an image processor's own file says is not handled."""


PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorPil",
    "CLIPImageProcessorFast",
    "CLIPFeatureExtractor",
    "LlavaImageProcessor",
    "LlavaImageProcessorPil",
    "LlavaImageProcessorFast",
)

# What the processors above use for a key that their configuration leaves out.
PROCESSOR_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_convert_rgb": True,
}


def read_image_processor(config: Mapping[str, Any]) -> ImageSpec:
    """Read the content of `preprocessor_config.json`, or of a `processor_config.json` that embeds it.

    Raises:
        ProcessorError: The processor is of another kind, or has a step or a size that is not handled.
    """
    config = config.get("image_processor") or config
    if not isinstance(config, Mapping):
        raise ProcessorError(f"the image processor's configuration is no object: {shorten(config)}")
    check_processor(config, PROCESSORS, PROCESSOR_DEFAULTS)
    options = PROCESSOR_DEFAULTS | dict(config)
    resize = _edges("size", options["size"], options["default_to_square"]) if options["do_resize"] else None
    crop = pair("crop_size", options["crop_size"]) if options["do_center_crop"] else None
    return _spec(options, resize, crop)


def read_tile_processor(
    config: Mapping[str, Any], kinds: Sequence[str], steps: Sequence[str], tile: tuple[int, int]
) -> ImageSpec:
    """Read what an image processor that cuts tiles does to one of them; its sizes and its way to cut are the family's to read.

    Args:
        config: Its configuration, resolved.
        kinds: The processor's names, without the suffix of a backend.
        steps: Its own switches, beside those that all have.
        tile: (height, width) of what the tower takes.

    Raises:
        ProcessorError: The processor is of another kind, or has a step that is not handled.
    """
    check_processor(config, [kind + suffix for kind in kinds for suffix in ("", "Pil", "Fast")], {*PROCESSOR_DEFAULTS, *steps})
    options = {name: config.get(name, default) for name, default in PROCESSOR_DEFAULTS.items()}
    if not options["do_resize"]:
        raise ProcessorError("the image processor's do_resize is off; images would not be of the tower's size")
    return _spec(options, list(tile), None)


def check_processor(config: Mapping[str, Any], kinds: Sequence[str], known: Collection[str]) -> None:
    """Refuse another kind of image processor, and a switch that is on and not known.

    Raises:
        ProcessorError: It is, or has.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    if kind not in kinds:
        raise ProcessorError(f"image processor {shorten(repr(kind))} is not supported; supported: {kinds[0]}")
    for name, value in config.items():
        if value and name not in known and name.startswith(("do_", "use_")):
            raise ProcessorError(f"the image processor's {name} = {shorten(value)} is not supported")


def _spec(options: Mapping[str, Any], resize: Any, crop: Any) -> ImageSpec:
    normalize = options["do_normalize"]
    found = {
        "resize": resize,
        "crop": crop,
        "resample": options["resample"],
        "rescale_factor": options["rescale_factor"] if options["do_rescale"] else 1.0,
        "image_mean": _triple("image_mean", options["image_mean"]) if normalize else [0.0, 0.0, 0.0],
        "image_std": _triple("image_std", options["image_std"]) if normalize else [1.0, 1.0, 1.0],
    }
    return read(ImageSpec, found, "the image processor", ProcessorError)


def _edges(name: str, size: Any, square: bool) -> Any:
    """A processor's size: an int or {shortest_edge} gives the shorter edge, anything else [height, width]."""
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if isinstance(size, int) and not square:
        return size
    return pair(name, size)


def pair(name: str, size: Any) -> list[Any]:
    """Return a processor's size as [height, width], whichever way it is written; raises ProcessorError."""
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return [size["height"], size["width"]]
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return list(size)
    raise ProcessorError(f"the image processor's {name} = {shorten(size)} is not supported")


def check_tile(name: str, size: Any, shape: CropShape) -> None:
    """Check that a size of the image processor is the tower's.

    Raises:
        ProcessorError: It is another.
    """
    if tile_size(name, size) != shape.pixels:
        taken = " x ".join(map(str, shape.pixels))
        raise ProcessorError(f"the image processor's {name} = {shorten(size)} is not the {taken} that the tower takes")


def tile_size(name: str, size: Any) -> tuple[int, int]:
    """Return a processor's size as (height, width), which may be written as its edge too; raises ProcessorError."""
    height, width = pair(name, size["shortest_edge"] if isinstance(size, Mapping) and set(size) == {"shortest_edge"} else size)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ProcessorError(f"the image processor's {name} = {shorten(size)} is not supported")
    return height, width


def _triple(name: str, values: Any) -> list[Any]:
    if isinstance(values, (int, float)):
        return [values, values, values]
    if isinstance(values, (list, tuple)) and len(values) == 3:
        return list(values)
    raise ProcessorError(f"the image processor's {name} = {shorten(values)} is not supported; it needs three numbers")
