"""The built-in model, exported: held-out questions through the bundle, beside transformers with the same kept tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from leanvlm.demo import MODEL_DIR
from leanvlm.demo.render import render
from leanvlm.demo.scenes import Question, Scene, held_out_questions, make_scene
from leanvlm.runtime import Session, load
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import user_message

SCENES = [(kind, seed) for kind in ("simple", "complex") for seed in range(8)]
PER_SCENE = 7


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Iterator[Session]:
    with load(demo_bundle) as session:
        yield session


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, kind) for kind, seed in SCENES]


def _encode(session: Session, scenes: list[Scene], budget: int) -> list[ImageFeatures]:
    return [session.encode_images([image], budget)[0] for image in render(scenes)]


def _asked(scenes: list[Scene]) -> Iterator[tuple[int, Question]]:
    for index, scene in enumerate(scenes):
        for question in held_out_questions(scene)[:PER_SCENE]:
            yield index, question


def _answer(session: Session, features: ImageFeatures, text: str) -> str:
    messages = [user_message(text, 1)]
    return session.respond(messages, [features], GenerateOptions(max_new_tokens=12)).answer.text


def test_full_budget_answers_held_out_questions(session: Session, scenes: list[Scene]) -> None:
    features = _encode(session, scenes, 576)
    asked = list(_asked(scenes))
    right = sum(_answer(session, features[i], q.text) == q.answer for i, q in asked)
    assert len(asked) >= 100
    assert right >= 0.99 * len(asked)


def test_pruned_answers_equal_transformers_with_the_same_tokens(session: Session, scenes: list[Scene]) -> None:
    features = _encode(session, scenes, 64)
    model: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    pixels = torch.from_numpy(preprocess(render(scenes), session.manifest.image))
    with torch.no_grad():
        whole = torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))
    asked = list(_asked(scenes))[:100]
    same = 0
    for index, question in asked:
        kept = whole[index][torch.from_numpy(features[index].crops[0].pruning.indices)]
        same += _answer(session, features[index], question.text) == _theirs(session, model, kept, question.text)
    assert len(asked) == 100
    assert same >= 99


def _theirs(session: Session, model: Any, kept: torch.Tensor, text: str) -> str:
    ids = session.prompt_ids([user_message(text, 1)], 1)
    at = ids.index(session.manifest.image_token_id)
    embed = model.get_input_embeddings()
    before, after = embed(torch.tensor(ids[:at])), embed(torch.tensor(ids[at + 1 :]))
    inputs = torch.cat([before, kept, after])[None]
    out = model.generate(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), max_new_tokens=12,
                         do_sample=False)  # fmt: skip
    return session.tokenizer.decode(out[0].tolist()).strip()
