"""The whole chain against transformers' own `generate`, through the checkpoint's own processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from leanvlm.exporter import ExportConfig, export
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.runtime import Session, load
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.session import user_message

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
                assert np.array_equal(alone.crops[0].pruning.indices, both.crops[0].pruning.indices)
                np.testing.assert_allclose(alone.crops[0].embeddings, both.crops[0].embeddings, rtol=1e-4, atol=1e-5)


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
    """Embeddings of the prompt with the reference's choice of image features at the images' positions."""
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
        positions = (ids == model.config.image_token_id).nonzero()[:, 0]
        dropped = positions[[i for i in range(len(positions)) if i not in set(kept)]]
        embeddings[positions] = features[0]
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[dropped] = False
    return embeddings[keep][None]


def test_generation_settings_equal_generate(bundle: Path, images: Any, model: Any, processor: Any) -> None:
    """As the file's and as the request's, with an end token that the model gives early."""
    inputs = _inputs(processor, PROMPTS[1], images[:1])
    plain, prompt = _greedy(model, **inputs), inputs["input_ids"].shape[1]
    settings: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"repetition_penalty": 0.5, "no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": plain[:3]},
        {"begin_suppress_tokens": plain[:3]},
        {"bad_words_ids": [[plain[3]]]},
        {"bad_words_ids": [plain[1:4], [prompt % 7, 9]]},
        {"min_new_tokens": 12},
        {"min_length": prompt + 15},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": plain[6:8], "min_new_tokens": 12},
    ]
    ends, answers = [plain[9], 3], []
    with load(bundle) as session:
        for extra in settings:
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=ends, pad_token_id=0, **extra
            )
            wanted = out[0, prompt:].tolist()
            options: dict[str, Any] = {"budget": tiny.TOKENS, "max_new_tokens": NEW_TOKENS}
            session.settings = GenerationSettings.from_dict({"eos_token_id": ends, **extra})
            session.end_ids = session.settings.end_ids
            assert list(session.generate(PROMPTS[1], images[0], **options).token_ids) == wanted, extra
            session.settings = GenerationSettings.from_dict({"eos_token_id": ends})
            assert list(session.generate(PROMPTS[1], images[0], **options, **extra).token_ids) == wanted, extra
            answers.append(wanted)
    assert answers.count(answers[0]) == 1, "a setting changes nothing"


def test_settings_see_the_prompt_of_the_processor(bundle: Path, images: Any, processor: Any) -> None:
    wanted = _inputs(processor, PROMPTS[0], images)["input_ids"][0].tolist()
    with load(bundle) as session:
        features = session.encode_images(images, BUDGET)
        ids = session.prompt_ids([user_message(PROMPTS[0], len(images))], len(images))
        assert list(session.prompt(ids, features).ids) == wanted


def test_a_raw_prompt_is_the_text_as_it_is(bundle: Path, images: Any, processor: Any) -> None:
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with load(bundle) as session:
        assert session.image_token == "<image>"
        raw = session.generate(text, images[0], raw=True, max_new_tokens=8)
        assert raw.token_ids == session.generate(PROMPTS[0], images[0], max_new_tokens=8).token_ids
        other = session.generate(f"<image>{PROMPTS[0]}", images[0], raw=True, max_new_tokens=8)
        assert other.prompt_tokens == raw.prompt_tokens - len("USER: \n ASSISTANT:")


def test_an_export_without_a_template(tiny_llava: Path, images: Any, tmp_path: Path) -> None:
    """A checkpoint whose template is for text only, with generation settings and a tokenizer class of its own."""
    checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] | trim }}")
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    settings = {"eos_token_id": 2, "repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    export(ExportConfig(str(checkpoint), (BUDGET,), tmp_path / "bundle", template="none"))
    with load(tmp_path / "bundle") as session:
        assert session.settings == GenerationSettings.from_dict(settings)
        answer = session.generate(f"USER: <image>\n{PROMPTS[0]} ASSISTANT:", images[0], raw=True, max_new_tokens=4)
        assert answer.token_ids
        with pytest.raises(InputError, match="was exported without one; write the whole prompt and pass --raw-prompt"):
            session.generate(PROMPTS[0], images[0])
