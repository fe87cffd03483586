"""Weights that are no numbers: an error that names the vision graph, or the answer of the undamaged bundle; nothing between."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leanvlm.runtime import Session, load
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.prompt import ImageFeatures

BLOCK = 4096


@pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")
@pytest.mark.parametrize("kind", ["tiny_bundle", "cuda_bundle", "tensorrt_bundle"])
def test_damaged_vision_weights_are_an_error_or_do_not_matter(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, sample_image: Path
) -> None:
    whole, damaged = request.getfixturevalue(kind), tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    images = [Image.open(sample_image).convert("RGB"), Image.new("RGB", (50, 40), "red")]
    size = (damaged / "vision.data").stat().st_size
    named = 0
    with load(whole, device="cpu", threads=1) as session:
        budgets = session.manifest.budgets
        wanted = {budget: session.encode_images(images, budget) for budget in budgets}
    # Embeddings, blocks, projector; the masks of truth values at the file's end have no NaN.
    for start in np.linspace(0, 0.9 * size, 5, dtype=int) // 4 * 4:
        weights = np.memmap(damaged / "vision.data", np.uint8, mode="r+")
        before = weights[start : start + BLOCK].copy()
        # A NaN in half precision, and two of them are one in single.
        weights[start : start + BLOCK] = np.frombuffer(b"\xff\x7f" * (BLOCK // 2), np.uint8)
        weights.flush()
        with load(damaged, device="cpu", threads=1) as session:
            for budget in budgets:
                found = _encoded(session, images, budget)
                if isinstance(found, str):
                    assert found.startswith("the vision graph")
                    named += 1
                    continue
                for ours, theirs in zip(found, wanted[budget], strict=True):
                    np.testing.assert_array_equal(np.asarray(ours.crops[0].embeddings), np.asarray(theirs.crops[0].embeddings))
        weights[start : start + BLOCK] = before
        weights.flush()
    assert named >= 4


def _encoded(session: Session, images: list[Image.Image], budget: int) -> list[ImageFeatures] | str:
    """Return the encoded images, or what the error says."""
    try:
        return session.encode_images(images, budget)
    except BackendError as error:
        return str(error)
