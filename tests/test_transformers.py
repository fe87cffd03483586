"""The built-in models are plain checkpoints: transformers loads every weight of theirs and answers with `generate`.

`make test-transformers` runs this file with the oldest transformers that is supported as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from leanvlm.demo import MODEL_DIR, SMALL_DIR
from leanvlm.demo.render import render
from leanvlm.demo.scenes import Kind, Question, held_out_questions, make_scene

ASKED = 50


def sample_questions(kinds: tuple[Kind, ...]) -> Iterator[tuple[Image.Image, Question]]:
    """Yield `ASKED` questions with their images: the short ones about held-out scenes, kind by kind from seed 0."""
    scenes = [make_scene(seed, kind) for seed in range(ASKED) for kind in kinds]
    asked = ((scene, question) for scene in scenes for question in held_out_questions(scene)[:-1])
    for (scene, question), _ in zip(asked, range(ASKED), strict=False):
        yield render([scene])[0], question


@pytest.mark.parametrize(
    ("folder", "kinds"),
    # What the smaller model is there for is simple scenes.
    [pytest.param(MODEL_DIR, ("simple", "complex"), id="demo"), pytest.param(SMALL_DIR, ("simple",), id="demo-small")],
)
def test_every_weight_is_loaded_and_questions_are_answered(folder: Path, kinds: tuple[Kind, ...]) -> None:
    model: Any
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    wrong = []
    for image, question in sample_questions(kinds):
        inputs = processor(images=image, text=f"USER: <image>\n{question.text} ASSISTANT:", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if answer != question.answer:
            wrong.append((question.text, answer, question.answer))
    assert not wrong
