"""Every shape of every family against transformers' own `generate`, through the checkpoint's own processor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from original import NEW_TOKENS, Original
from original_lines import LinedOriginal
from original_sizes import SizedOriginal
from PIL import Image
from reference import REFERENCE, Crop

from leanvlm.exporter import ExportConfig, export, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.exporter.decoders import planes_of
from leanvlm.exporter.families import Parts
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.plan import pruner_for
from leanvlm.exporter.pruners import PRUNERS, VisionTokens
from leanvlm.exporter.pruners.base import ScoredBlock, widened
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.runtime import load
from leanvlm.runtime.crops import arrange
from leanvlm.runtime.errors import InputError, LeanVLMWarning, UnsupportedModelError, UnsupportedPrunerError
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.prompt import assemble, compose
from leanvlm.runtime.session import user_message

PROMPTS = ("What is on the table?", "Año 2026: count the red cups, please.")
BUDGET = 16


# `test_generate` asks the usual shape more.
SHAPES = [pytest.param(shape, marks=[pytest.mark.slow] * (shape == "llava")) for shape in tiny.TINY]


@pytest.fixture(scope="module", params=SHAPES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original.open(request.param, tiny.TINY[request.param](tmp_path_factory.mktemp("shape") / "checkpoint"))


def pictures(family: str) -> list[Image.Image]:
    """Return two pictures; for a family that cuts tiles a wide one and a tall one."""
    from skimage import data

    cuts = (np.s_[:], np.s_[:, 40:330]) if family == "llava" else (np.s_[100:290], np.s_[:, 200:370])
    found = zip((data.astronaut(), data.coffee()), cuts, strict=True)
    return [Image.fromarray(np.ascontiguousarray(levels[cut])) for levels, cut in found]


def test_greedy_tokens_equal_generate(original: Original, tmp_path: Path) -> None:
    """At the full budget, and pruned to what the slow pruner keeps of transformers' own features."""
    family = original.shape.partition("/")[0]
    count = open_checkpoint(ExportConfig(str(original.folder))).spec.tokens_per_crop
    budget, images = min(BUDGET, max(count // 6, 2)), pictures(family)
    with warnings.catch_warnings():
        # Of a context that ends before the checkpoint's: `test_frame` reads it.
        warnings.simplefilter("ignore", LeanVLMWarning)
        export(ExportConfig(str(original.folder), (budget,), tmp_path / "bundle"))
    seen: set[tuple[int, ...]] = set()
    questions = [(prompt, (image,)) for prompt in PROMPTS for image in images] + [(PROMPTS[0], tuple(images))]
    with load(tmp_path / "bundle") as session:
        full = max(session.manifest.budgets)

        def ours(budget: int) -> list[int]:
            return list(session.generate(prompt, asked, budget=budget, max_new_tokens=NEW_TOKENS, ignore_end=True).token_ids)

        for prompt, asked in questions:
            inputs = original.inputs(prompt, *asked)
            encoded = session.encode_images(asked, budget)
            ids = session.prompt_ids([user_message(prompt, len(asked))], [image.arrangement for image in encoded])
            whole = session.prompt(ids, session.encode_images(asked, full))
            assert list(whole.ids) == inputs["input_ids"][0].tolist()
            wanted = original.greedy(**inputs)
            assert ours(full) == wanted
            seen.add(tuple(wanted))
            crops = [crop.pruning.indices.tolist() for image in encoded for crop in image.crops]
            kept = [
                [token for token in crop if token in shown] for crop, shown in zip(crops, original.shown(inputs), strict=True)
            ]
            assert kept == original.choices(inputs, budget)
            embeddings, positions = original.pruned(budget, prompt, *asked)
            pruned = original.greedy(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]))
            assert ours(budget) == pruned
            rule = PositionRule("original")
            table, end, image = session.table, session.line_end, session.manifest.image_token_id
            plan = assemble(compose(ids, image, encoded, session.manifest.layout), table, rule, image, end)
            assert plan.positions[0].tolist() == positions.tolist()
            seen.add(tuple(pruned))
    assert len(seen) == 2 * len(questions), "the model ignores its prompt, its image or the pruning"
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in seen), "the model repeats itself"


# --- The vision side, without an export ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A tiny checkpoint's vision side: our parts, and what transformers says of two images, or of an image's crops.

    Attributes:
        size: (height, width) of the image.
    """

    checkpoint: Checkpoint
    parts: Parts
    reference: Reference
    pixels: torch.Tensor
    features: torch.Tensor
    size: tuple[int, int]


# Those whose towers, layers or strategies differ; the decoder does not matter here.
SIDES = [
    "llava", "llava/siglip", "llava/full", "llava/layers", "llava_next", "llava_next/mistral", "llava_onevision", "internvl",
    "internvl/qwen3", "smolvlm", "idefics3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "paligemma",
    "mistral3/mistral",
]  # fmt: skip


@pytest.fixture(scope="module", params=SIDES)
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Side:
    folder = tiny.EVERY[request.param](tmp_path_factory.mktemp("side") / "checkpoint")
    checkpoint = open_checkpoint(ExportConfig(str(folder)))
    reference = Reference(checkpoint, load_model(checkpoint))
    height, width = checkpoint.spec.image_size
    size = (height, 2 * width)
    count = max(arrange(size, checkpoint.frame.crops).crops, 2)
    pixels = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))
    if checkpoint.frame.crops.kind == "nearest":
        kind = LinedOriginal if request.param.startswith("mistral3") else SizedOriginal
        features = kind.open(folder).projected(pixels)
    else:
        features = Original.open(request.param, folder).projected(pixels, size)
    return Side(checkpoint, reference.parts, reference, pixels, features, size)


@pytest.mark.parametrize("scored", ["feature", "last"])
def test_a_tower_sees_what_the_model_sees(side: Side, scored: ScoredBlock) -> None:
    """The features bit for bit, where a tower computes in the same order; keys and scores against its own attention."""
    spec = side.checkpoint.spec
    with torch.no_grad():
        seen = side.parts.tower(scored, None, spec.shape)(side.pixels)
        features = widened(side.parts.project(seen.hidden), seen.deep)
    assert same(features, side.features, side)
    wanted = side.reference.vision(side.pixels.numpy(), scored, side.size)
    assert relative_difference(wanted.wide.numpy(), side.features.numpy()) < tolerances.FEATURES["fp32"]
    assert seen.hidden.shape[:2] == (len(side.pixels), spec.tokens_per_crop)
    for name, found, other in zip(seen._fields, seen, wanted.seen, strict=True):
        told = name == "hidden" or name in spec.signals or (name == "deep" and planes_of(side.parts.decoder) > 0)
        assert (found is not None) == (other is not None) == told
        if found is not None:
            assert found.shape == other.shape
            assert relative_difference(found.numpy(), other.numpy()) < tolerances.ATTENTION


def test_scores_of_a_tower_without_a_class_token_are_attention_received(side: Side) -> None:
    """They sum to one over the tokens of a whole sequence, whoever gives the attention."""
    seen = side.parts.tower("feature", None, side.checkpoint.spec.shape)(side.pixels)
    total = seen.saliency.sum(dim=1)
    whole = side.parts.skipped == 0
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5) if whole else (total < 1).all()


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_every_pruner_runs_on_every_shape_or_is_refused(side: Side, name: str) -> None:
    """Against the slow version on what transformers computes; a class token among the tokens is always kept."""
    spec, parts = side.checkpoint.spec, side.parts
    keep = min(20, spec.tokens_per_crop // 2)
    if not PRUNERS[name].needs <= spec.signals:
        with pytest.raises(UnsupportedPrunerError, match=rf"'{name}' needs a class token.*: agile, attention, cenprune"):
            pruner_for(name, spec, keep)
        return
    pruner = pruner_for(f"{name}:gate=none" if name == "agile" else name, spec, keep)
    graph = VisionGraph(parts.tower(pruner.scored_block, None, spec.shape), parts.project, pruner, spec.grid, spec.leading)
    with torch.no_grad():
        features, indices, *_ = graph(side.pixels)
    tokens = side.reference.vision(side.pixels.numpy(), pruner.scored_block, side.size)
    for row in range(len(side.pixels)):
        chosen, merged = REFERENCE[name](_crop(tokens.patches, row), keep - spec.leading)
        kept = [*range(spec.leading), *(spec.leading + index for index in chosen)]
        assert indices[row].tolist() == kept
        wanted = side.features[row, kept]
        if merged is not None:
            projected = side.reference.project(torch.from_numpy(merged).float())
            wanted[spec.leading :, : projected.shape[1]] = projected
        assert relative_difference(features[row].numpy(), wanted.numpy()) < tolerances.MERGED["fp32"]


def same(found: torch.Tensor, wanted: torch.Tensor, side: Side) -> bool:
    """Whether features are equal: to the bit, or of a tower that packs crops into one sequence to fp32's rounding."""
    if side.parts.order is None:
        return torch.equal(found, wanted)
    return relative_difference(found.numpy(), wanted.numpy()) < tolerances.FEATURES["fp32"]


def _crop(tokens: VisionTokens, row: int) -> Crop:
    absent = torch.zeros(len(tokens.features), tokens.count)
    parts = (tokens.features, *(absent if part is None else part for part in tokens.seen[:4]))
    return Crop(*(part[row].double().numpy() for part in parts))


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_the_full_budget_of_every_pruner_is_the_unpruned_model(side: Side, name: str) -> None:
    spec, parts = side.checkpoint.spec, side.parts
    if not PRUNERS[name].needs <= spec.signals:
        return
    pruner = pruner_for(name, spec, spec.tokens_per_crop)
    graph = VisionGraph(parts.tower(pruner.scored_block, None, spec.shape), parts.project, pruner, spec.grid, spec.leading)
    with torch.no_grad():
        features, indices, *_ = graph(side.pixels)
    assert same(features, side.features, side)
    assert indices.tolist() == [list(range(spec.tokens_per_crop))] * len(side.pixels)


def test_a_budget_that_only_the_class_token_fills_is_refused(side: Side) -> None:
    spec = side.checkpoint.spec
    if spec.leading:
        with pytest.raises(InputError, match="budget 1 leaves no room beside the class token"):
            pruner_for("agile", spec, 1)
    else:
        assert pruner_for("agile", spec, 1).keep == 1


def test_a_strategy_that_would_drop_a_patch_is_refused(side: Side) -> None:
    config = side.checkpoint.config
    if config.vision_config.model_type != "siglip_vision_model" or not hasattr(config, "vision_feature_select_strategy"):
        return
    changed = type(config)(**config.to_dict() | {"vision_feature_select_strategy": "default"})
    with pytest.raises(UnsupportedModelError, match="would drop a patch: a 'siglip_vision_model' tower has no class token"):
        side.checkpoint.family.describe(changed)


@pytest.mark.parametrize("shape", ["llava/siglip", "llava/full", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_levels_in_place_of_pixels(shape: str, tmp_path: Path) -> None:
    """As the GPU targets take images, also those that are no whole number of patches."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.EVERY[shape](tmp_path / "checkpoint"))))
    parts, image, size = checkpoint.family.parts(load_model(checkpoint)), checkpoint.image_spec, checkpoint.spec.shape
    picture = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    levels = torch.from_numpy(preprocess([picture], replace(image, layout="uint8")))
    with torch.no_grad():
        found = parts.tower("feature", image, size)(levels)
        wanted = parts.tower("feature", None, size)(torch.from_numpy(preprocess([picture], image)))
    assert relative_difference(found.hidden.numpy(), wanted.hidden.numpy()) < tolerances.FEATURES["fp32"]
