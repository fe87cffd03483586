"""The whole chain against transformers' own `generate`, through the checkpoint's own processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.runtime import Session, load

PROMPTS = ("What is on the table?", "Count the red cups, please.", "Año 2026: describe 画像 in one line.")
NEW_TOKENS = 24
BUDGET = 16


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    from skimage import data

    return [Image.fromarray(data.astronaut()), Image.fromarray(data.coffee()[:, 40:330])]


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(tiny_llava: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_llava)


def _inputs(processor: Any, prompt: str, pictures: list[Image.Image]) -> Any:
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=pictures, return_tensors="pt")


def _greedy(model: Any, **inputs: Any) -> list[int]:
    out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in out[0, -NEW_TOKENS:]]


def _ours(session: Session, prompt: str, pictures: list[Image.Image], budget: int) -> list[int]:
    answer = session.generate(prompt, pictures, budget=budget, max_new_tokens=NEW_TOKENS, ignore_end=True)
    return list(answer.token_ids)


def test_greedy_tokens_equal_generate_at_full_budget(bundle: Path, images: Any, model: Any, processor: Any) -> None:
    seen: set[tuple[int, ...]] = set()
    with load(bundle) as session:
        for prompt in PROMPTS:
            for image in images:
                wanted = _greedy(model, **_inputs(processor, prompt, [image]))
                assert _ours(session, prompt, [image], tiny.TOKENS) == wanted
                seen.add(tuple(wanted))
    assert len(seen) == len(PROMPTS) * len(images), "the model ignores its prompt or its image"
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in seen), "the model repeats itself"


def test_greedy_tokens_equal_generate_with_the_references_choice(bundle: Path, images: Any, model: Any, processor: Any) -> None:
    """At budget 16 transformers runs on image features that the test replaced by the numpy reference's choice."""
    with load(bundle) as session:
        for prompt in PROMPTS:
            for image in images:
                inputs = _inputs(processor, prompt, [image])
                embeddings = _pruned_embeddings(model, inputs)
                wanted = _greedy(model, inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]))
                assert _ours(session, prompt, [image], BUDGET) == wanted


def test_several_images_equal_generate(bundle: Path, images: Any, model: Any, processor: Any) -> None:
    wanted = _greedy(model, **_inputs(processor, PROMPTS[0], images))
    with load(bundle) as session:
        assert _ours(session, PROMPTS[0], images, tiny.TOKENS) == wanted


def test_two_images_at_once_equal_one_by_one(bundle: Path, images: Any) -> None:
    with load(bundle) as session:
        for budget in (BUDGET, tiny.TOKENS):
            together = session.encode_images(images, budget)
            for image, both in zip(images, together, strict=True):
                alone = session.encode_images([image], budget)[0]
                assert np.array_equal(alone.pruning.indices, both.pruning.indices)
                np.testing.assert_allclose(alone.embeddings, both.embeddings, rtol=1e-4, atol=1e-5)


def test_several_turns_equal_generate(bundle: Path, images: Any, model: Any, processor: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    wanted = _greedy(model, **processor(text=text, images=images[:1], return_tensors="pt"))
    with load(bundle) as session:
        answer = session.generate(messages, images[:1], budget=tiny.TOKENS, max_new_tokens=NEW_TOKENS, ignore_end=True)
    assert list(answer.token_ids) == wanted


def test_a_prompt_without_an_image_equals_generate(bundle: Path, model: Any, processor: Any) -> None:
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}], add_generation_prompt=True
    )
    wanted = _greedy(model, **processor(text=text, return_tensors="pt"))
    with load(bundle) as session:
        assert _ours(session, PROMPTS[0], [], BUDGET) == wanted


def _pruned_embeddings(model: Any, inputs: Any) -> torch.Tensor:
    """Embeddings of the prompt with the reference's choice of image features in the images' places."""
    import reference

    core = model.model
    with torch.no_grad():
        core.vision_tower.set_attn_implementation("eager")
        out = core.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        features = core.multi_modal_projector(out.hidden_states[-2][:, 1:])
        attention = out.attentions[-2].mean(dim=1)[:, 0, 1:]
        points, scores = features[0].double().numpy(), attention[0].double().numpy()
        ratio = float(exact_effective_rank(features)) / 90.0
        kept, _ = reference.agile(reference.Crop(points, points, points[:, None], scores, scores), BUDGET, ratio)
        ids = inputs["input_ids"][0]
        embeddings = core.get_input_embeddings()(ids)
        places = (ids == model.config.image_token_id).nonzero()[:, 0]
        dropped = places[[i for i in range(len(places)) if i not in set(kept)]]
        embeddings[places] = features[0]
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[dropped] = False
    return embeddings[keep][None]
