"""What the estimated effective rank changes in the kept tokens, against the exact rank in float64: the measure that counts."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from test_gates import Draw, clustered, exponential, gaussian, power

from leanvlm.calibration.rank_fit import fit_rank, spectrum
from leanvlm.demo import ERANK_REF
from leanvlm.demo.render import render
from leanvlm.demo.scenes import make_scene
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.pruners.gates import effective_rank, exact_effective_rank
from leanvlm.exporter.pruners.rank_coefficients import RankCoefficients
from leanvlm.exporter.reference import Reference
from leanvlm.runtime.preprocess import preprocess

SHAPES = ((144, 256), (144, 1024), (576, 256), (576, 1024), (576, 4096), (729, 1152))
BUDGETS = (1, 32, 64, 128, 192)
SETS = 50

pytestmark = pytest.mark.slow


def _overlaps(features: NDArray[np.float64], attention: NDArray[np.float64], exact: float, estimated: float) -> list[float]:
    """Return, for every budget and N, the share of tokens kept under both ratios."""
    crop = reference.Crop(features, features, features[:, None], attention, attention)
    shares = []
    for keep in (*BUDGETS, len(features)):
        keep = min(keep, len(features))
        chosen = [set(reference.agile(crop, keep, ratio)[0]) for ratio in (exact, estimated)]
        shares.append(len(chosen[0] & chosen[1]) / keep)
    return shares


def _ranks(features: NDArray[np.float64], coefficients: RankCoefficients | None = None) -> tuple[float, float]:
    tokens = torch.from_numpy(features)[None]
    return float(exact_effective_rank(tokens)), float(effective_rank(tokens.float(), coefficients))


@pytest.mark.parametrize("draw", [gaussian, power, exponential, clustered])
def test_random_sets_keep_the_tokens_of_the_exact_rank(draw: Draw) -> None:
    """Half of the sets give each rank its own reference; the other half are compared."""
    rng = np.random.default_rng(2026)
    sets = [draw(rng, *SHAPES[i % len(SHAPES)]) for i in range(SETS)]
    ranks = np.array([_ranks(features) for features in sets])
    references = ranks[::2].mean(axis=0)
    shares: list[float] = []
    for features, (exact, estimated) in zip(sets[1::2], ranks[1::2], strict=True):
        attention = rng.standard_exponential(len(features))
        shares += _overlaps(features, attention / attention.sum(), exact / references[0], estimated / references[1])
    assert np.mean(shares) >= 0.99
    assert min(shares) >= 0.95


def test_held_out_scenes_keep_the_tokens_of_the_exact_rank() -> None:
    """The built-in model, its estimator refitted on half of the scenes."""
    checkpoint = open_checkpoint(ExportConfig("demo"))
    model = Reference(checkpoint, load_model(checkpoint).float())
    scenes = [make_scene(seed, kind) for seed in range(50) for kind in ("simple", "complex")]
    batches = [model.vision(preprocess(render(scenes[i : i + 20]), checkpoint.image_spec)) for i in range(0, 100, 20)]
    features = np.concatenate([tokens.features.double().numpy() for tokens in batches])
    attention = np.concatenate([tokens.attention.double().numpy() for tokens in batches])
    fitted = fit_rank([spectrum(f) for f in features[:50]])
    shares: list[float] = []
    for f, a in zip(features[50:], attention[50:], strict=True):
        exact, estimated = _ranks(f, fitted)
        shares += _overlaps(f, a, exact / ERANK_REF, estimated / ERANK_REF)
    assert np.mean(shares) >= 0.99
    assert min(shares) >= 0.95
