"""What the estimated effective rank changes in the kept tokens, against the exact rank in float64: the measure that counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
from llava_like import FLATTEST, MEAN_COSINE, STEEPEST, TOKENS, llava_like, pair_cosines
from numpy.typing import NDArray
from test_gates import Draw, clustered, exponential, gaussian, power

from leanvlm.demo import ERANK_REF
from leanvlm.demo.render import render
from leanvlm.demo.scenes import make_scene
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.pruners.agile import AgilePruner
from leanvlm.exporter.pruners.base import VisionTokens
from leanvlm.exporter.pruners.gates import effective_rank, exact_effective_rank
from leanvlm.exporter.reference import Reference
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.preprocess import preprocess

SHAPES = ((144, 256), (144, 1024), (576, 256), (576, 1024), (576, 4096), (729, 1152))
BUDGETS = (32, 64, 128, 192)
SEEDS = 16

Image = tuple[NDArray[np.float32], NDArray[np.float32]]


def _tokens(features: NDArray[np.float32], attention: NDArray[np.float32]) -> VisionTokens:
    """Tokens of one crop, as a pruner takes them."""
    points, scores = torch.from_numpy(features)[None], torch.from_numpy(attention)[None]
    return VisionTokens(points, Seen(points, points[:, :, None], scores, scores), (1, len(features)))


def _overlaps(features: NDArray[np.float32], attention: NDArray[np.float32], erank_ref: float) -> dict[int, float]:
    """Return, for every budget and N, the share of tokens that our rule and the exact one, in plain NumPy, both keep."""
    points, scores = features.astype(np.float64), attention.astype(np.float64)
    crop = reference.Crop(points, points, points[:, None], scores, scores)
    ratio = float(exact_effective_rank(torch.from_numpy(features)[None])) / erank_ref
    shares = {}
    for keep in (*BUDGETS, len(features)):
        ours = AgilePruner(keep=keep, erank_ref=erank_ref)(_tokens(features, attention)).indices[0].tolist()
        shares[keep] = len(set(ours) & set(reference.agile(crop, keep, ratio)[0])) / keep
    return shares


@pytest.fixture(scope="module")
def images() -> list[Image]:
    exponents = np.linspace(FLATTEST, STEEPEST, SEEDS)
    return [llava_like(seed, exponent) for seed, exponent in enumerate(exponents)]


def test_llava_like_features_have_the_published_statistics(
    images: list[Image],
) -> None:
    cosines = [pair_cosines(features.astype(np.float64) @ features.T) for features, _ in images]
    assert np.mean([values.mean() for values in cosines]) == pytest.approx(MEAN_COSINE, abs=0.01)
    assert np.mean([(values > 0.99).mean() for values in cosines]) == pytest.approx(0.05, abs=0.01)
    ranks = [float(exact_effective_rank(torch.from_numpy(features)[None])) for features, _ in images]
    assert 50 < min(ranks) < 65
    assert 110 < max(ranks) < 130


def test_llava_like_features_keep_the_tokens_of_the_exact_rank(
    images: list[Image],
) -> None:
    """With LLaVA's reference of 90, and no gate file."""
    found = [_overlaps(features, attention, 90.0) for features, attention in images]
    for keep, mean, worst in ((32, 0.985, 0.9), (64, 0.99, 0.95), (128, 0.99, 0.95), (TOKENS, 1.0, 1.0)):
        shares = [overlaps[keep] for overlaps in found]
        assert np.mean(shares) >= mean, keep
        assert min(shares) >= worst, keep


def test_llava_like_features_have_the_estimated_rank(images: list[Image]) -> None:
    features = [torch.from_numpy(points)[None] for points, _ in images]
    errors = [abs(float(effective_rank(points)) / float(exact_effective_rank(points)) - 1) for points in features]
    assert np.mean(errors) < 0.003
    assert max(errors) <= 0.005


def _overlapping(images: Iterator[Image], erank_ref: float) -> None:
    shares = [share for image in images for share in _overlaps(*image, erank_ref).values()]
    assert np.mean(shares) >= 0.99
    assert min(shares) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("draw", [gaussian, power, exponential, clustered])
def test_random_sets_keep_the_tokens_of_the_exact_rank(draw: Draw) -> None:
    rng = np.random.default_rng(2026)
    sets = [draw(rng, *SHAPES[i % len(SHAPES)]).astype(np.float32) for i in range(24)]
    scores = [rng.standard_exponential(len(features)).astype(np.float32) for features in sets]
    ranks = [float(exact_effective_rank(torch.from_numpy(features)[None])) for features in sets]
    _overlapping(zip(sets, scores, strict=True), float(np.mean(ranks)))


@pytest.mark.slow
def test_scenes_keep_the_tokens_of_the_exact_rank() -> None:
    checkpoint = open_checkpoint(ExportConfig("demo"))
    model = Reference(checkpoint, load_model(checkpoint).float())
    scenes = [make_scene(seed, kind) for seed in range(25) for kind in ("simple", "complex")]
    batches = [model.vision(preprocess(render(scenes[i : i + 10]), checkpoint.image_spec)) for i in range(0, 50, 10)]
    rows = ((batch.features[i].numpy(), batch.saliency[i].numpy()) for batch in batches for i in range(10))
    _overlapping(rows, ERANK_REF)
