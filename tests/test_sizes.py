"""Families whose images have a size and a place, against `generate` through the checkpoint's own processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_sizes
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


@pytest.fixture(scope="module", params=tiny_sizes.TINY)
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
