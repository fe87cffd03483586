"""Levels to patch embeddings in one product, against normalising and convolving one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.towers.patches import MULTIPLE, LevelPatches
from leanvlm.runtime.preprocess import ImageSpec

WIDTH = 40
ROWS, COLUMNS = 3, 5
# Rounded to half precision once, a number is off by 2^-11 = 4.9e-4 of itself at most; this is two of them.
HALF = 1e-3
EXTREMES = ("random", "all 0", "all 255", "0 and 255")


def image_spec(patch: int) -> ImageSpec:
    """Return CLIP's own image processor as data, for a grid that is not square."""
    processor = CLIPImageProcessor()
    return ImageSpec(
        resize=None, crop=(ROWS * patch, COLUMNS * patch), resample=3, rescale_factor=processor.rescale_factor,
        image_mean=tuple(processor.image_mean), image_std=tuple(processor.image_std), layout="uint8",
    )  # fmt: skip


def convolution(patch: int, bias: bool, seed: int = 0) -> nn.Conv2d:
    """Return a patch convolution with random weights in fp64."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, WIDTH, patch, stride=patch, bias=bias, dtype=torch.float64)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, 0, 0.1 if parameter.dim() == 1 else (3 * patch * patch) ** -0.5)
    return conv.requires_grad_(False)


def levels_of(kind: str, patch: int, seed: int = 1) -> Tensor:
    """Return the levels (2, 3, H, W) of two images, of which the second is random in any case."""
    shape = (2, 3, ROWS * patch, COLUMNS * patch)
    levels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if kind == "0 and 255":
        levels[0] = (levels[0] > 127) * 255
    elif kind != "random":
        levels[0] = int(kind.removeprefix("all "))
    return levels


def normalised(levels: Tensor, image: ImageSpec, dtype: torch.dtype) -> Tensor:
    """Rescale and normalise in a dtype, step by step."""
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (image.image_mean, image.image_std))
    return (levels.to(dtype) * image.rescale_factor - mean) / std


def embedded(conv: nn.Module, pixels: Tensor) -> Tensor:
    """Convolve as a CLIP tower does: patches (B, N, Dv) in raster order."""
    patches: Tensor = conv(pixels).flatten(2).transpose(1, 2)
    return patches


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude, the worst of the images."""
    rows = zip(found.double().numpy(), wanted.double().numpy(), strict=True)
    return max(relative_difference(one, other) for one, other in rows)


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("patch", [4, 5, 14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_normalising_and_convolving(dtype: torch.dtype, patch: int, bias: bool, kind: str) -> None:
    conv, image, levels = convolution(patch, bias), image_spec(patch), levels_of(kind, patch)
    wanted = embedded(conv, normalised(levels, image, torch.float64))
    found = LevelPatches(conv.to(dtype), image)(levels)
    assert found.dtype == dtype
    assert found.shape == (2, ROWS * COLUMNS, WIDTH)
    # The weights of the checkpoint are rounded to fp32 before either sees them.
    assert difference(found, wanted) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_equals_the_processor_of_transformers() -> None:
    """Its own pixel values through the convolution, in fp32 from end to end."""
    conv, image, levels = convolution(14, bias=False).float(), image_spec(14), levels_of("random", 14)
    images = [np.ascontiguousarray(row.permute(1, 2, 0).numpy()) for row in levels]
    pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(images, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    assert difference(LevelPatches(conv, image)(levels), embedded(conv, pixels)) < 1e-6


def test_other_processors_than_clips() -> None:
    """Another mean, deviation and scale for each channel: what is folded is the processor's, not CLIP's."""
    image = ImageSpec(
        resize=None, crop=(ROWS * 4, COLUMNS * 4), resample=3, rescale_factor=1 / 127.5,
        image_mean=(1.0, 0.25, 0.0), image_std=(1.0, 0.5, 2.0), layout="uint8",
    )  # fmt: skip
    conv, levels = convolution(4, bias=True), levels_of("random", 4)
    wanted = embedded(conv, normalised(levels, image, torch.float64))
    assert difference(LevelPatches(conv, image)(levels), wanted) < 1e-12


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("patch", [4, 14])
def test_half_precision_is_as_good_as_normalising_in_fp32_first(patch: int, bias: bool, kind: str) -> None:
    """The worst of several draws of the weights, against the same weights in fp64."""
    ours, theirs = [], []
    for seed in range(5):
        image, levels = image_spec(patch), levels_of(kind, patch, seed)
        conv = convolution(patch, bias, seed).half()
        pixels = normalised(levels, image, torch.float32).half()
        found, usual = LevelPatches(conv, image)(levels), embedded(conv, pixels)
        wanted = embedded(conv.double(), normalised(levels, image, torch.float64))
        assert found.dtype == torch.float16
        ours.append(difference(found, wanted))
        theirs.append(difference(usual, wanted))
    assert max(ours) <= HALF
    assert max(ours) <= 1.5 * max(theirs)


@pytest.mark.parametrize("patch", [4, 5, 14])
def test_rows_of_the_weight_fill_whole_multiples(patch: int) -> None:
    """The columns that fill up are zeros: whatever stands in them of a patch has no influence."""
    embedding = LevelPatches(convolution(patch, bias=True), image_spec(patch))
    columns = embedding.weight.shape[1]
    used = 3 * patch * patch + 1
    assert columns % MULTIPLE == 0
    assert 0 < columns - used < MULTIPLE
    assert not embedding.weight[:, used:].any()


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    embedding, levels = LevelPatches(convolution(5, bias=True), image_spec(5)), levels_of("random", 5)
    assert difference(embedding(levels[1:]), embedding(levels)[1:]) < 1e-12
