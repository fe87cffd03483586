"""Towers of families whose images have a size and a place, and every pruner on them, against transformers' own model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny_sizes
import torch
from reference import REFERENCE, Crop

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.plan import pruner_for
from leanvlm.exporter.pruners import PRUNERS
from leanvlm.exporter.pruners.base import ScoredBlock, VisionTokens, widened
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import UnsupportedPrunerError
from leanvlm.runtime.preprocess import preprocess

KEEP = 6


@dataclass(frozen=True)
class Side:
    """A tiny checkpoint's vision side, and two images of one shape that is no square."""

    checkpoint: Checkpoint
    reference: Reference
    pixels: torch.Tensor

    @property
    def shape(self) -> CropShape:
        """The images'."""
        return self.checkpoint.frame.crops.shapes[1]

    def seen(self, scored: ScoredBlock = "feature") -> VisionTokens:
        """Return what the checkpoint itself sees."""
        return self.reference.vision(self.pixels.numpy(), scored)

    def graph(self, name: str, keep: int) -> VisionGraph:
        """Return the vision graph of a pruner."""
        pruner = pruner_for(f"{name}:gate=none" if name == "agile" else name, self.checkpoint.spec, keep)
        parts = self.reference.parts
        return VisionGraph(parts.tower(pruner.scored_block, None, self.shape), parts.project, pruner, self.shape.grid)


@pytest.fixture(scope="module", params=tiny_sizes.TINY)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Side:
    folder = tiny_sizes.TINY[request.param](tmp_path_factory.mktemp("side") / "checkpoint")
    checkpoint = open_checkpoint(ExportConfig(str(folder), image_sizes=tiny_sizes.sizes(folder)))
    shape = checkpoint.frame.crops.shapes[1]
    pixels = torch.randn(2, 3, *shape.pixels, generator=torch.Generator().manual_seed(3))
    return Side(checkpoint, Reference(checkpoint, load_model(checkpoint)), pixels)


@pytest.mark.parametrize("scored", ["feature", "last"])
@torch.no_grad()
def test_a_tower_sees_what_the_model_sees(side: Side, scored: ScoredBlock) -> None:
    """For two images, which the model packs into one sequence."""
    parts, wanted = side.reference.parts, side.seen(scored)
    seen = parts.tower(scored, None, side.shape)(side.pixels)
    for name, found, other in zip(seen._fields, seen, wanted.seen, strict=True):
        assert (found is None) == (other is None), name
        if found is not None:
            assert found.shape == other.shape
            assert relative_difference(found.numpy(), other.numpy()) < tolerances.ATTENTION, name
    features = parts.project(seen.hidden).numpy()
    assert relative_difference(features, wanted.features.numpy()) < tolerances.FEATURES["fp32"]
    assert torch.allclose(seen.saliency.sum(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("name", sorted(PRUNERS))
@torch.no_grad()
def test_every_pruner_runs_on_every_shape_or_is_refused(side: Side, name: str) -> None:
    """Against the slow version on what transformers computes."""
    if not PRUNERS[name].needs <= side.checkpoint.spec.signals:
        with pytest.raises(UnsupportedPrunerError, match=rf"'{name}' needs a class token.*: agile, attention, cenprune"):
            pruner_for(name, side.checkpoint.spec, KEEP)
        return
    graph, parts = side.graph(name, KEEP), side.reference.parts
    features, indices, *_ = graph(side.pixels)
    tokens = side.seen(graph.prune.pruner.scored_block)
    width = tokens.features.shape[2]
    for row in range(len(side.pixels)):
        kept, merged = REFERENCE[name](_crop(tokens, row), KEEP)
        assert indices[row].tolist() == list(kept)
        wanted = tokens.features[row, list(kept)]
        if merged is not None:
            wanted = parts.project(torch.from_numpy(merged).float()[None])[0]
        assert relative_difference(features[row, :, :width].numpy(), wanted.numpy()) < tolerances.MERGED["fp32"]


def _crop(tokens: VisionTokens, row: int) -> Crop:
    absent = torch.zeros(len(tokens.features), tokens.count)
    parts = (tokens.features, *(absent if part is None else part for part in tokens.seen[:4]))
    return Crop(*(part[row].double().numpy() for part in parts))


@pytest.mark.parametrize("name", sorted(PRUNERS))
@torch.no_grad()
def test_the_full_budget_of_every_pruner_is_the_unpruned_model(side: Side, name: str) -> None:
    if not PRUNERS[name].needs <= side.checkpoint.spec.signals:
        return
    features, indices, *_ = side.graph(name, side.shape.tokens)(side.pixels)
    assert relative_difference(features.numpy(), side.seen().wide.numpy()) < tolerances.FEATURES["fp32"]
    assert indices.tolist() == [list(range(side.shape.tokens))] * len(side.pixels)


@torch.no_grad()
def test_levels_in_place_of_pixels(side: Side) -> None:
    """As the GPU targets take images."""
    parts, image = side.reference.parts, replace(side.checkpoint.image_spec, resize=side.shape.pixels)
    picture = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    levels = torch.from_numpy(preprocess([picture], replace(image, layout="uint8")))
    pixels = preprocess([picture], image)
    towers = parts.tower("feature", image, side.shape), parts.tower("feature", None, side.shape)
    seen = [tower(given) for tower, given in zip(towers, (levels, torch.from_numpy(pixels)), strict=True)]
    found, wanted = (widened(parts.project(one.hidden), one.deep).numpy() for one in seen)
    rounding = side.reference.rounding(pixels, wanted)
    assert relative_difference(found, wanted) < tolerances.features_limit("fp32", rounding)
