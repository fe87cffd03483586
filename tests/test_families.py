"""Every shape of every family against transformers' own `generate`, through the checkpoint's own processor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from PIL import Image
from reference import REFERENCE, Crop
from transformers import AutoModelForImageTextToText, AutoProcessor

from leanvlm.exporter import ExportConfig, export, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.exporter.families import Parts
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.plan import pruner_for
from leanvlm.exporter.pruners import PRUNERS, VisionTokens
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.runtime import load
from leanvlm.runtime.errors import InputError, LeanVLMWarning, UnsupportedModelError, UnsupportedPrunerError
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import user_message

PROMPTS = ("What is on the table?", "Año 2026: count the red cups, please.")
NEW_TOKENS = 24
BUDGET = 16


@dataclass(frozen=True)
class Original:
    """A tiny checkpoint as transformers runs it, in fp32.

    Attributes:
        shape: Its name in `TINY`.
        folder: Its files.
    """

    shape: str
    folder: Path
    model: Any
    processor: Any

    def inputs(self, prompt: str, image: Image.Image) -> Any:
        """Return what the processor makes of a question about an image."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=text, images=[image], return_tensors="pt")

    def greedy(self, **inputs: Any) -> list[int]:
        """Return the answer of `generate`, of which no token may be a matter of rounding."""
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
        logits = torch.stack(out.scores)[:, 0]
        best = logits.topk(2, dim=1).values
        assert ((best[:, 0] - best[:, 1]) > tolerances.TOKEN_MARGIN["fp32"] * logits.abs().amax(dim=1)).all()
        return [int(token) for token in out.sequences[0, -NEW_TOKENS:]]

    @torch.no_grad()
    def choice(self, pixels: torch.Tensor, keep: int) -> list[int]:
        """Return which image tokens the slow AgilePruner keeps; a class token among them is always kept."""
        config, tower = self.model.config, self.model.model.vision_tower
        layers = config.vision_feature_layer
        depth = config.vision_config.num_hidden_layers
        deepest = max(layer % (depth + 1) for layer in ([layers] if isinstance(layers, int) else layers))
        tower.set_attn_implementation("eager")
        attention = tower(pixels, output_attentions=True).attentions[deepest - 1][0].mean(dim=0).double()
        tower.set_attn_implementation("sdpa")
        tokens = self.model.get_image_features(pixels, return_dict=True).pooler_output[0]
        has_class = config.vision_config.model_type == "clip_vision_model"
        scores = (attention[0, 1:] if has_class else attention.mean(dim=0)).numpy()
        first = len(tokens) - len(scores)
        points = tokens[first:].double().numpy()
        ratio = float(exact_effective_rank(tokens[None, first:])) / 90.0
        kept, _ = reference.agile(reference.Crop(points, points, points[:, None], scores, scores), keep - first, ratio)
        return [*range(first), *(first + index for index in kept)]

    @torch.no_grad()
    def pruned(self, inputs: Any, keep: int) -> torch.Tensor:
        """Return the prompt's embeddings (1, S, D) with the kept image features at the image's positions."""
        ids, features = inputs["input_ids"][0], self.model.get_image_features(inputs["pixel_values"], return_dict=True)
        embeddings = self.model.get_input_embeddings()(ids)
        positions = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embeddings[positions] = features.pooler_output[0]
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[positions] = False
        stays[positions[self.choice(inputs["pixel_values"], keep)]] = True
        return embeddings[stays][None]


# `test_generate` asks the usual shape more.
SHAPES = [pytest.param(shape, marks=[pytest.mark.slow] * (shape == "llava")) for shape in tiny.TINY]


@pytest.fixture(scope="module", params=SHAPES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder = tiny.TINY[request.param](tmp_path_factory.mktemp("shape") / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return Original(request.param, folder, model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    from skimage import data

    return [Image.fromarray(data.astronaut()), Image.fromarray(data.coffee()[:, 40:330])]


def test_greedy_tokens_equal_generate(original: Original, images: list[Image.Image], tmp_path: Path) -> None:
    """At the full budget, and pruned to what the slow pruner keeps of transformers' own features."""
    with warnings.catch_warnings():
        # Of a context that ends before the checkpoint's: `test_frame` reads it.
        warnings.simplefilter("ignore", LeanVLMWarning)
        export(ExportConfig(str(original.folder), (BUDGET,), tmp_path / "bundle"))
    seen: set[tuple[int, ...]] = set()
    with load(tmp_path / "bundle") as session:
        full = max(session.manifest.budgets)

        def ours(budget: int) -> list[int]:
            return list(session.generate(prompt, image, budget=budget, max_new_tokens=NEW_TOKENS, ignore_end=True).token_ids)

        for prompt in PROMPTS:
            for image in images:
                inputs = original.inputs(prompt, image)
                assert int((inputs["input_ids"] == session.manifest.image_token_id).sum()) == full
                encoded = session.encode_images([image], BUDGET)
                ids = session.prompt(session.prompt_ids([user_message(prompt, 1)], 1), encoded).ids
                assert list(ids) == inputs["input_ids"][0].tolist()
                wanted = original.greedy(**inputs)
                assert ours(full) == wanted
                seen.add(tuple(wanted))
                assert encoded[0].crops[0].pruning.indices.tolist() == original.choice(inputs["pixel_values"], BUDGET)
                embeddings = original.pruned(inputs, BUDGET)
                pruned = original.greedy(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]))
                assert ours(BUDGET) == pruned
                seen.add(tuple(pruned))
    assert len(seen) == 2 * len(PROMPTS) * len(images), "the model ignores its prompt, its image or the pruning"
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in seen), "the model repeats itself"


# --- The vision side, without an export ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A tiny checkpoint's vision side: our parts, and what transformers says of two images."""

    checkpoint: Checkpoint
    parts: Parts
    reference: Reference
    pixels: torch.Tensor
    features: torch.Tensor


# Those whose towers, layers or strategies differ; the decoder does not matter here.
@pytest.fixture(scope="module", params=["llava", "llava/siglip", "llava/full", "llava/layers"])
def side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Side:
    folder = tiny.TINY[request.param](tmp_path_factory.mktemp("side") / "checkpoint")
    checkpoint = open_checkpoint(ExportConfig(str(folder)))
    reference = Reference(checkpoint, load_model(checkpoint))
    pixels = torch.randn(2, 3, *checkpoint.spec.image_size, generator=torch.Generator().manual_seed(3))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        features = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
    return Side(checkpoint, reference.parts, reference, pixels, features)


@pytest.mark.parametrize("scored", ["feature", "last"])
def test_a_tower_sees_what_the_model_sees(side: Side, scored: ScoredBlock) -> None:
    """The features bit for bit; keys and scores against eager attention of the model's own block."""
    spec = side.checkpoint.spec
    with torch.no_grad():
        seen = side.parts.tower(scored, None)(side.pixels)
        assert torch.equal(side.parts.project(seen.hidden), side.features)
    wanted = side.reference.vision(side.pixels.numpy(), scored)
    assert relative_difference(wanted.features.numpy(), side.features.numpy()) < tolerances.FEATURES["fp32"]
    assert seen.hidden.shape[:2] == (2, spec.tokens_per_crop)
    for name, found, other in zip(seen._fields, seen, wanted.seen, strict=True):
        told = name == "hidden" or name in spec.signals
        assert (found is not None) == (other is not None) == told
        if found is not None:
            assert found.shape == other.shape
            assert relative_difference(found.numpy(), other.numpy()) < tolerances.ATTENTION


def test_scores_of_a_tower_without_a_class_token_are_attention_received(side: Side) -> None:
    """They sum to one over the tokens of a whole sequence, whoever gives the attention."""
    seen = side.parts.tower("feature", None)(side.pixels)
    total = seen.saliency.sum(dim=1)
    whole = side.parts.skipped == 0
    assert torch.allclose(total, torch.ones(2), atol=1e-5) if whole else (total < 1).all()


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_every_pruner_runs_on_every_shape_or_is_refused(side: Side, name: str) -> None:
    """Against the slow version on what transformers computes; a class token among the tokens is always kept."""
    spec, parts, keep = side.checkpoint.spec, side.parts, 20
    if not PRUNERS[name].needs <= spec.signals:
        with pytest.raises(UnsupportedPrunerError, match=rf"'{name}' needs a class token.*: agile, attention, cenprune"):
            pruner_for(name, spec, keep)
        return
    pruner = pruner_for(f"{name}:gate=none" if name == "agile" else name, spec, keep)
    graph = VisionGraph(parts.tower(pruner.scored_block, None), parts.project, pruner, spec.grid, spec.leading)
    with torch.no_grad():
        features, indices, *_ = graph(side.pixels)
    tokens = side.reference.vision(side.pixels.numpy(), pruner.scored_block)
    for row in range(2):
        chosen, merged = REFERENCE[name](_crop(tokens.patches, row), keep - spec.leading)
        kept = [*range(spec.leading), *(spec.leading + index for index in chosen)]
        assert indices[row].tolist() == kept
        wanted = side.features[row, kept]
        if merged is not None:
            wanted[spec.leading :] = side.reference.project(torch.from_numpy(merged).float())
        assert relative_difference(features[row].numpy(), wanted.numpy()) < tolerances.MERGED["fp32"]


def _crop(tokens: VisionTokens, row: int) -> Crop:
    absent = torch.zeros(len(tokens.features), tokens.count)
    parts = (tokens.features, *(absent if part is None else part for part in tokens.seen))
    return Crop(*(part[row].double().numpy() for part in parts))


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_the_full_budget_of_every_pruner_is_the_unpruned_model(side: Side, name: str) -> None:
    spec, parts = side.checkpoint.spec, side.parts
    if not PRUNERS[name].needs <= spec.signals:
        return
    pruner = pruner_for(name, spec, spec.tokens_per_crop)
    graph = VisionGraph(parts.tower(pruner.scored_block, None), parts.project, pruner, spec.grid, spec.leading)
    with torch.no_grad():
        features, indices, *_ = graph(side.pixels)
    assert torch.equal(features, side.features)
    assert indices.tolist() == [list(range(spec.tokens_per_crop))] * 2


def test_a_budget_that_only_the_class_token_fills_is_refused(side: Side) -> None:
    spec = side.checkpoint.spec
    if spec.leading:
        with pytest.raises(InputError, match="budget 1 leaves no room beside the class token"):
            pruner_for("agile", spec, 1)
    else:
        assert pruner_for("agile", spec, 1).keep == 1


def test_a_strategy_that_would_drop_a_patch_is_refused(side: Side) -> None:
    config = side.checkpoint.config
    if side.checkpoint.spec.saliency == "class":
        return
    changed = type(config)(**config.to_dict() | {"vision_feature_select_strategy": "default"})
    with pytest.raises(UnsupportedModelError, match="would drop a patch: a 'siglip_vision_model' tower has no class token"):
        side.checkpoint.family.describe(changed)


@pytest.mark.parametrize("shape", ["llava/siglip", "llava/full"])
def test_levels_in_place_of_pixels(shape: str, tmp_path: Path) -> None:
    """As the GPU targets take images, also those that are no whole number of patches."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.TINY[shape](tmp_path / "checkpoint"))))
    parts, image = checkpoint.family.parts(load_model(checkpoint)), checkpoint.image_spec
    picture = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    levels = torch.from_numpy(preprocess([picture], replace(image, layout="uint8")))
    with torch.no_grad():
        found = parts.tower("feature", image)(levels)
        wanted = parts.tower("feature", None)(torch.from_numpy(preprocess([picture], image)))
    assert relative_difference(found.hidden.numpy(), wanted.hidden.numpy()) < tolerances.FEATURES["fp32"]
