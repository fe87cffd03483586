"""Families whose images have a size and a place, against `generate` through the checkpoint's own processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_sizes
from conftest import Command
from original import NEW_TOKENS
from original_lines import LinedOriginal
from original_sizes import SizedOriginal, pictures
from PIL import Image

from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import load
from leanvlm.runtime.crops import arrange
from leanvlm.runtime.errors import BundleError
from leanvlm.runtime.manifest import MANIFEST
from leanvlm.runtime.session import Session, user_message

PROMPTS = ("What is on the table?", "Año 2026: count the red cups, please.")
BUDGET = 6


# One of each family; what else their files may hold takes as long again.
SHAPES = [pytest.param(shape, marks=[pytest.mark.slow] * ("/" in shape)) for shape in tiny_sizes.TINY]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(shape: str, tmp_path_factory: pytest.TempPathFactory) -> SizedOriginal:
    kind = LinedOriginal if shape.startswith("mistral3") else SizedOriginal
    return kind.open(tiny_sizes.TINY[shape](tmp_path_factory.mktemp("sized") / "checkpoint"))


@pytest.fixture(scope="module")
def bundle(original: SizedOriginal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export(ExportConfig(str(original.folder), (BUDGET,), folder, image_sizes=tiny_sizes.sizes(original.folder)))
    return folder


def brought(image: Image.Image, session: Session) -> Image.Image:
    """Return a picture as the user would bring it to the nearest shape; transformers then leaves its size alone."""
    at = arrange((image.height, image.width), session.manifest.crops).shape
    height, width = session.manifest.crops.shapes[at].pixels
    return image.resize((width, height), Image.Resampling.BICUBIC)


def test_greedy_tokens_equal_generate(original: SizedOriginal, bundle: Path) -> None:
    """At the full budget, and pruned to what the slow pruner keeps of transformers' own features; positions too."""
    images = pictures()
    questions = [(prompt, (image,)) for prompt in PROMPTS for image in images] + [(PROMPTS[0], tuple(images))]
    seen: set[tuple[int, ...]] = set()
    with load(bundle) as session:
        full, shapes = max(session.manifest.budgets), set()
        for prompt, asked in questions:
            inputs = original.inputs(prompt, *(brought(image, session) for image in asked))
            encoded = session.encode_images(asked, BUDGET)
            shapes |= {image.arrangement.shape for image in encoded}
            ids = session.prompt_ids([user_message(prompt, len(asked))], [image.arrangement for image in encoded])
            whole = session.prompt(ids, session.encode_images(asked, full))
            assert list(whole.ids) == inputs["input_ids"][0].tolist()
            assert whole.positions.tolist() == original.positions(inputs).tolist()
            wanted = original.generate(inputs)
            options = {"max_new_tokens": NEW_TOKENS, "ignore_end": True}
            assert list(session.generate(prompt, asked, budget=full, **options).token_ids) == wanted
            choices = original.choices(inputs, BUDGET)
            assert [crop.pruning.indices.tolist() for image in encoded for crop in image.crops] == choices
            pruned, positions = original.pruned(inputs, choices)
            assert session.prompt(ids, encoded).positions.tolist() == positions.tolist()
            assert list(session.generate(prompt, asked, budget=BUDGET, **options).token_ids) == pruned
            seen |= {tuple(wanted), tuple(pruned)}
        assert len(shapes) == 2, "both pictures go to one shape"
    assert len(seen) == 2 * len(questions), "the model ignores its prompt, its image or the pruning"
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in seen), "the model repeats itself"


def test_a_break_that_the_tokenizer_does_not_know_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    raw["layout"]["line_break"] = "[BREAK]"
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=r"the tokenizer does not know '\[BREAK\]', so it or the layout in leanvlm"):
        load(folder)


def test_inspect_says_which_shape_an_image_is_brought_to(
    leanvlm: Command, original: SizedOriginal, bundle: Path, tmp_path: Path
) -> None:
    """And a picture of what is kept has that shape."""
    wide = pictures()[0]
    wide.save(tmp_path / "wide.png")
    result = leanvlm("inspect", bundle, "--image", tmp_path / "wide.png", "--overlay", tmp_path / "kept.png")
    assert result.returncode == 0, result.stderr
    with load(bundle) as session:
        shapes = session.manifest.crops.shapes
        shape = shapes[arrange((wide.height, wide.width), session.manifest.crops).shape]
    listed = ", ".join(one.text for one in shapes)
    assert f"brought to the nearest of {listed} pixels (height x width)" in result.stdout
    assert f"brought to        {shape.text} pixels (height x width)" in result.stdout
    assert f"kept              {BUDGET} of {shape.tokens} image tokens" in result.stdout
    height, width = shape.pixels
    with Image.open(tmp_path / "kept.png") as kept:
        assert kept.height == 2 * height
        assert kept.width > 4 * width


def test_profile_times_the_shape_that_an_image_goes_to(leanvlm: Command, bundle: Path, tmp_path: Path) -> None:
    """The nodes of that shape's graph, whatever the first shape is."""
    pictures()[1].save(tmp_path / "tall.png")
    arguments = ("--image", tmp_path / "tall.png", "--runs", 1, "--warmup", 0, "--json", tmp_path / "a.json")
    result = leanvlm("profile", bundle, *arguments)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())["budgets"]
    with load(bundle) as session:
        rule = session.manifest.crops
        tall = pictures()[1]
        count = rule.shapes[arrange((tall.height, tall.width), rule).shape].tokens
    assert {budget["image_tokens"]["total"] for budget in figures.values()} == {count}
    assert count < max(shape.tokens for shape in rule.shapes)
