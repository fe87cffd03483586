"""Weights that are NaN or infinite: an error that names their file's graph or table, or the answer of the undamaged bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from safetensors.numpy import save_file

from leanvlm.runtime import Session, load
from leanvlm.runtime.embeddings import TokenTable
from leanvlm.runtime.errors import BackendError, BundleError
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.session import user_message

Array = npt.NDArray[Any]
BLOCK = 4096


@contextmanager
def spoilt(data: Array, start: int, size: int) -> Iterator[None]:
    """Fill a part of a file with NaN for a while."""
    before = data[start : start + size].copy()
    # A NaN in half precision, and two of them are one in single.
    data[start : start + size] = np.frombuffer(b"\xff\x7f" * (size // 2), np.uint8)
    data.flush()
    yield
    data[start : start + size] = before
    data.flush()


def answer(bundle: Path, image: Path, prompt: str = "What is it?") -> tuple[int, ...] | str:
    """Return the answer's tokens, or what the error says."""
    with load(bundle, device="cpu", threads=1) as session:
        try:
            return session.generate(prompt, image, max_new_tokens=4, ignore_end=True).token_ids
        except (BackendError, BundleError) as error:
            return str(error)


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
        with spoilt(weights, start, BLOCK), load(damaged, device="cpu", threads=1) as session:
            for budget in budgets:
                found = _encoded(session, images, budget)
                if isinstance(found, str):
                    assert found.startswith("the vision graph")
                    named += 1
                    continue
                for ours, theirs in zip(found, wanted[budget], strict=True):
                    np.testing.assert_array_equal(np.asarray(ours.crops[0].embeddings), np.asarray(theirs.crops[0].embeddings))
    assert named >= 4


def _encoded(session: Session, images: list[Image.Image], budget: int) -> list[ImageFeatures] | str:
    """Return the encoded images, or what the error says."""
    try:
        return session.encode_images(images, budget)
    except BackendError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")
@pytest.mark.parametrize("kind", ["tiny_bundle", "cuda_bundle", "tensorrt_bundle"])
def test_damaged_decoder_weights_are_an_error_or_do_not_matter(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, sample_image: Path
) -> None:
    whole, damaged = request.getfixturevalue(kind), tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    wanted, named = answer(whole, sample_image), 0
    weights = np.memmap(damaged / "decoder.onnx.data", np.uint8, mode="r+")
    starts = np.linspace(0, weights.size - BLOCK, 8, dtype=int) // 4 * 4
    for start in starts:
        with spoilt(weights, start, BLOCK):
            found = answer(damaged, sample_image)
        assert found == wanted or str(found).startswith("the decoder returned logits that cannot"), f"at {start}: {found}"
        named += found != wanted
    assert named >= 6


@pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")
@pytest.mark.parametrize("kind", ["tiny_bundle", "cuda_bundle", "tensorrt_bundle"])
def test_a_damaged_token_table_is_named_where_it_is_used(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, sample_image: Path
) -> None:
    whole, damaged = request.getfixturevalue(kind), tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    wanted = answer(whole, sample_image)
    with load(whole, device="cpu", threads=1) as session:
        prompt = set(session.prompt_ids([user_message("What is it?", 1)], 1)) - {session.manifest.image_token_id}
        rows, width = session.manifest.decoder.vocab_size, session.manifest.decoder.hidden_size
    file = np.memmap(damaged / "embed_tokens.safetensors", np.uint8, mode="r+")
    size = 2 * width if kind != "tiny_bundle" else 4 * width
    begin = file.size - rows * size
    # The answer's last token is never read.
    read = [*sorted(prompt)[:2], *(token for token in wanted[:-1] if token not in prompt)]
    for token in read:
        with spoilt(file, begin + token * size, size):
            found = answer(damaged, sample_image)
        assert str(found).startswith(f"the token table embed_tokens.safetensors has a value for token {token} that"), found
    unread = next(token for token in range(rows - 1, 0, -1) if token not in prompt and token not in wanted)
    with spoilt(file, begin + unread * size, size):
        assert answer(damaged, sample_image) == wanted


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, "most", "least", 0.0, -0.0, 6e-8])
def test_rows_are_finite_as_numpy_has_it(tmp_path: Path, dtype: Any, value: float | str) -> None:
    limits = {"most": np.finfo(dtype).max, "least": np.finfo(dtype).min}
    table = np.random.default_rng(0).normal(size=(5, 8)).astype(dtype)
    table[3, 2] = limits.get(value, value) if isinstance(value, str) else value
    save_file({"embed_tokens.weight": table}, tmp_path / "table")
    rows = TokenTable(tmp_path / "table", 5, 8)
    np.testing.assert_array_equal(rows.rows([0, 4, 2]), table[[0, 4, 2]])
    assert rows.rows([]).shape == (0, 8)
    if np.isfinite(table).all():
        np.testing.assert_array_equal(rows.rows([1, 3]), table[[1, 3]])
    else:
        with pytest.raises(BundleError, match="token 3 that is not finite"):
            rows.rows([1, 3])
