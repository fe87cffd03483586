"""The sizes that models give images by rules of their own, against transformers' processors, and sizes that a user names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_sizes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.ladder import usual_shapes
from leanvlm.runtime.crops import CropRule, CropShape, own_size
from leanvlm.runtime.errors import InputError, ManifestError

SIDES = st.integers(1, 300) | st.integers(1, 6000)


@given(SIDES, SIDES, st.sampled_from([14, 28, 32]), st.sampled_from([224, 300, 1540]))
def test_a_longest_edge_is_as_the_processor_rounds_it(height: int, width: int, factor: int, longest: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    found = own_size((height, width), factor, longest)
    theirs = get_resize_output_image_size(np.zeros((3, height, width), np.bool_), (longest, longest), (factor, factor))
    # It leaves nothing of a side that is too short.
    assert found == tuple(max(int(side), factor) for side in theirs)


@given(SIDES, SIDES, st.sampled_from([(3136, 200_704), (65_536, 16_777_216)]))
def test_pixels_are_as_the_processor_bounds_them(height: int, width: int, pixels: tuple[int, int]) -> None:
    if max(height, width) <= 200 * min(height, width):
        assert own_size((height, width), 28, pixels) == smart_resize(height, width, 28, *pixels)


@pytest.mark.parametrize(("factor", "longest"), [(28, 1540), (32, 1024), (28, 224)])
def test_the_processor_leaves_the_usual_shapes_alone(factor: int, longest: int) -> None:
    shapes = usual_shapes(factor, longest)
    processor = PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size={"height": factor, "width": factor})
    for shape in shapes:
        levels = Image.new("RGB", shape.pixels[::-1])
        assert processor(levels, return_tensors="np")["pixel_values"].shape[2:] == shape.pixels
    assert shapes[0].tokens == max(shape.tokens for shape in shapes)


def test_sizes_that_the_processor_would_change_are_refused(tmp_path: Path) -> None:
    folder = tiny_sizes.TINY["mistral3"](tmp_path / "checkpoint")
    for size, words in (
        ((224, 252), "224x252 is too long; the model's image processor makes images of at most 224 pixels a side"),
        ((100, 84), "sides are multiples of 28 for this model, such as 112x84"),
    ):
        with pytest.raises(InputError, match=words):
            open_checkpoint(ExportConfig(str(folder), image_sizes=(size,)))
    taken = open_checkpoint(ExportConfig(str(folder), image_sizes=((224, 224), (28, 56)))).frame.crops
    assert [shape.grid for shape in taken.shapes] == [(8, 8), (1, 2)]


def test_a_rule_of_nearest_shapes_has_one_limit() -> None:
    rule = CropRule("nearest", (CropShape((56, 28), (2, 1)),), longest_edge=224)
    assert rule.limit == 224
    assert replace(rule, longest_edge=None, pixels=(784, 7840)).limit == (784, 7840)
    for changes in ({"pixels": (784, 7840)}, {"longest_edge": None}):
        with pytest.raises(ManifestError, match="go with nearest shapes, or longest_edge does"):
            replace(rule, **changes)
