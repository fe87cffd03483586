"""Families whose image tokens see each other in the decoder, against `generate` through the checkpoint's own processor."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_blocks
import torch
from fake_tensorrt import FakeDevice, add_engines, pretend
from original import NEW_TOKENS, Original
from PIL import Image

from leanvlm.exporter import ExportConfig, export, tolerances
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.decoders.portable import PortableDecoder
from leanvlm.exporter.plan import plan
from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.targets import TARGETS
from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest, write_manifest
from leanvlm.runtime.errors import (
    BackendError,
    CheckpointError,
    InputError,
    LeanVLMError,
    LeanVLMWarning,
    ManifestError,
    UnsupportedModelError,
)
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.session import Session, user_message

PROMPTS = ("What is on the table?", "Año 2026: count the red cups, please.")
BUDGET, SM = 9, 87
# One decoder for ONNX Runtime that counts positions itself, one that is given them, and the one in standard operators.
WAYS = {"cpu": ("cpu", "compact"), "cpu-original": ("cpu", "original"), "tensorrt-rtx": ("tensorrt-rtx", "compact")}


@pytest.fixture(scope="module", params=tiny_blocks.TINY)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original.open(request.param, tiny_blocks.TINY[request.param](tmp_path_factory.mktemp("blocks") / "checkpoint"))


def bundle_of(original: Original, folder: Path, **options: Any) -> Path:
    """Export a checkpoint whose context ends before its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVLMWarning)
        export(ExportConfig(str(original.folder), (BUDGET,), folder, **options))
    return folder


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=[pytest.mark.slow] * (way == "cpu-original")) for way in WAYS]
)  # fmt: skip
def session(request: pytest.FixtureRequest, original: Original, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    target, positions = WAYS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    bundle_of(original, folder, target=target, positions=positions, precision="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVLMWarning)
        session = load(folder, device="cpu")
    with session:
        yield session


def pictures() -> list[Image.Image]:
    """Return a wide and a tall picture."""
    from skimage import data

    found = zip((data.astronaut(), data.coffee()), (np.s_[100:290], np.s_[:, 200:370]), strict=True)
    return [Image.fromarray(np.ascontiguousarray(levels[cut])) for levels, cut in found]


def questions() -> list[tuple[str, tuple[Image.Image, ...]]]:
    """Return two prompts with each picture, and one with both."""
    images = pictures()
    return [(prompt, (image,)) for prompt in PROMPTS for image in images] + [(PROMPTS[0], tuple(images))]


def pruned(original: Original, inputs: Any, choices: list[list[int]]) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what the model takes of a prompt with the chosen image tokens alone, and their places in the whole (S,)."""
    ids = inputs["input_ids"][0]
    placeholder = ids == original.model.config.image_token_id
    with torch.no_grad():
        features = original.model.get_image_features(inputs["pixel_values"]).pooler_output
    chosen = torch.zeros(features.shape[:2], dtype=torch.bool)
    for image, kept in enumerate(choices):
        chosen[image, kept] = True
    stays = ~placeholder
    stays[placeholder] = chosen.flatten()
    given = {
        "input_ids": ids[stays][None],
        "attention_mask": torch.ones(1, int(stays.sum()), dtype=torch.long),
        "token_type_ids": inputs["token_type_ids"][:, stays],
        "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features[chosen].reshape(len(choices), BUDGET, -1))},
    }
    return given, stays.nonzero()[:, 0]


@torch.no_grad()
def greedy(original: Original, given: dict[str, Any], places: torch.Tensor, following: int) -> list[int]:
    """Return the answer to a pruned prompt at positions (S,), read anew for each token, none of them a matter of rounding."""
    given, tokens = dict(given), []
    for step in range(NEW_TOKENS):
        logits = original.model(**given, position_ids=places[None], use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] > tolerances.TOKEN_MARGIN["fp32"] * logits.abs().max(), "a near tie"
        tokens.append(int(logits.argmax()))
        answered = int(original.shape == "paligemma")
        for name, value in (("input_ids", tokens[-1]), ("attention_mask", 1), ("token_type_ids", answered)):
            given[name] = torch.nn.functional.pad(given[name], (0, 1), value=value)
        places = torch.nn.functional.pad(places, (0, 1), value=following + step)
    return tokens


def test_greedy_tokens_equal_generate(original: Original, session: Session) -> None:
    """At the full budget, and pruned to what the slow pruner keeps of transformers' own features."""
    full, kept = max(session.manifest.budgets), session.manifest.positions.kept
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_end": True}
    seen: set[tuple[int, ...]] = set()
    for prompt, asked in questions():
        inputs = original.inputs(prompt, *asked)
        encoded = session.encode_images(asked, BUDGET)
        ids = session.prompt_ids([user_message(prompt, len(asked))], [image.arrangement for image in encoded])
        whole = session.prompt(ids, session.encode_images(asked, full))
        assert list(whole.ids) == inputs["input_ids"][0].tolist()
        assert whole.positions[0].tolist() == list(range(len(whole)))
        wanted = original.greedy(**inputs)
        assert list(session.generate(prompt, asked, budget=full, **options).token_ids) == wanted
        choices = original.choices(inputs, BUDGET)
        assert [crop.pruning.indices.tolist() for image in encoded for crop in image.crops] == choices
        given, places = pruned(original, inputs, choices)
        some = session.prompt(ids, encoded)
        if kept == "compact":
            places = torch.arange(len(places))
        assert some.positions[0].tolist() == places.tolist()
        expected = greedy(original, given, places, some.next_position)
        assert list(session.generate(prompt, asked, budget=BUDGET, **options).token_ids) == expected
        seen |= {tuple(wanted), tuple(expected)}
    assert len(seen) == 2 * len(questions()), "the model ignores its prompt, its image or the pruning"
    assert all(len(set(tokens)) > NEW_TOKENS // 3 for tokens in seen), "the model repeats itself"


def test_another_mask_gives_other_tokens(original: Original) -> None:
    """So that the tests above can fail: positions that see the past alone, and two images that see each other."""
    inputs = original.inputs(PROMPTS[0], *pictures())
    given, _ = pruned(original, inputs, original.choices(inputs, BUDGET))
    kinds = given["token_type_ids"]
    images = (given["input_ids"][0] == original.model.config.image_token_id).nonzero()[:, 0]
    seen, unseen = (1, 0) if original.shape == "gemma3" else (0, 1)
    joined = torch.full_like(kinds, unseen)
    joined[0, images[0] : images[-1] + 1] = seen
    places = torch.arange(kinds.shape[1])
    masks = (kinds, torch.full_like(kinds, unseen), joined)
    answers = [tuple(greedy(original, given | {"token_type_ids": mask}, places, len(places))) for mask in masks]
    assert len(set(answers)) == 3


def test_a_causal_mask_gives_other_tokens(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bundle too: what it is told of who sees whom counts."""
    prompt, asked = questions()[0]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_end": True, "budget": BUDGET}
    before = session.generate(prompt, asked, **options).token_ids
    rule = replace(session.manifest.positions, visibility="causal")
    monkeypatch.setattr(session, "manifest", replace(session.manifest, positions=rule))
    assert session.generate(prompt, asked, **options).token_ids != before


def test_who_sees_whom(original: Original, session: Session) -> None:
    """Kept tokens of one image see each other, of two images not; text sees what is before it. As transformers masks it."""
    from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

    if original.shape != "gemma3":
        return
    prompt, asked = questions()[-1]
    encoded = session.encode_images(asked, BUDGET)
    ids = session.prompt_ids([user_message(prompt, len(asked))], [image.arrangement for image in encoded])
    plan = session.prompt(ids, encoded)
    given, _ = pruned(original, original.inputs(prompt, *asked), [crop.pruning.indices.tolist() for crop in plan.crops])
    text = original.model.config.text_config
    text._attn_implementation = "eager"
    masks = create_masks_for_vision_model(
        text, torch.zeros(1, len(plan), 1), given["attention_mask"], None, None,
        get_block_sequence_ids_for_mask(given["token_type_ids"]),
    )  # fmt: skip
    text._attn_implementation = "sdpa"
    seen = np.arange(len(plan))[None] <= plan.last_seen[:, None]
    assert len(plan) == len(seen) < text.sliding_window
    for mask in masks.values():
        assert ((mask[0, 0] == 0).numpy() == seen).all()


def test_what_each_rule_lets_see() -> None:
    runs = [(2, False), (3, True), (2, True), (1, False)]
    wanted = {"causal": [0, 1, 2, 3, 4, 5, 6, 7], "blocks": [0, 1, 4, 4, 4, 6, 6, 7], "prefix": [7] * 8}
    for visibility, seen in wanted.items():
        rule = PositionRule("compact", visibility=visibility)  # type: ignore[arg-type]
        assert rule.last_seen(runs).tolist() == seen
        assert rule.last_seen([]).tolist() == []


def test_the_manifest_says_it(session: Session) -> None:
    manifest = session.manifest
    assert manifest.positions.visibility == {"gemma3": "blocks", "paligemma": "prefix"}[manifest.family]
    assert manifest.decoder.named("last_seen") == ("last_seen",)
    assert manifest.min_onnxruntime == TARGETS[manifest.target].masked
    changed = manifest.to_dict()
    changed["positions"]["visibility"] = "causal"
    with pytest.raises(ManifestError, match="visibility causal is not what the decoder takes"):
        type(manifest).from_dict(changed)
    changed["positions"]["visibility"] = "all"
    with pytest.raises(ManifestError, match=r'positions\.visibility is "all"; it must be one of'):
        type(manifest).from_dict(changed)


def test_attention_is_told_in_every_layer(session: Session) -> None:
    """None of the operators that would be causal by themselves is left to it."""
    graph = ir.load(session.folder / session.manifest.decoder.graph.file).graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == (session.manifest.decoder.layers if session.manifest.target == "cpu" else 0)
    for node in nodes:
        assert node.attributes.get_int("causal") == 0
        assert node.inputs[10] is not None


def test_an_engine_is_told_too(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TensorRT backend, on a stand-in that keeps TensorRT's rules: the answers of the graphs themselves."""
    if session.manifest.target == "cpu":
        return
    bundle, device = tmp_path / "bundle", FakeDevice()
    shutil.copytree(session.folder, bundle)
    write_manifest(bundle, replace(session.manifest, engines=add_engines(bundle, session.manifest, SM)))
    pretend(monkeypatch, device, SM)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_end": True, "budget": BUDGET}
    with load(bundle) as engines:
        for prompt, asked in questions()[1:5:3]:
            wanted = session.generate(prompt, asked, **options).token_ids
            assert engines.generate(prompt, asked, **options).token_ids == wanted


def test_an_older_onnxruntime_is_refused(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if session.manifest.target != "cpu":
        return
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    with pytest.raises(BackendError, match=r"this bundle needs ONNX Runtime 1.30 or newer; 1.29.0 is installed"):
        load(session.folder)


@pytest.mark.parametrize("images", [0, 2])
def test_the_prompt_says_an_image_by_what_the_template_writes(session: Session, images: int) -> None:
    """A raw prompt too; the token whose places the image's take is not to be written."""
    if session.manifest.family != "gemma3":
        return
    asked = pictures()[:images]
    text = "user\n" + session.image_token * images + "What?"
    assert session.image_token == "<start_of_image>"
    answer = session.generate(text, asked, raw=True, budget=BUDGET, max_new_tokens=2, ignore_end=True)
    said = session.generate("What?", asked, budget=BUDGET, max_new_tokens=2, ignore_end=True)
    assert answer.prompt_tokens < said.prompt_tokens
    with pytest.raises(InputError, match="the prompt has <image> in it, which stands for an image's tokens"):
        session.generate("What is <image>?", asked, budget=BUDGET)
    with pytest.raises(InputError, match=rf"{images + 1} image tokens for {images} images"):
        session.generate("What is <start_of_image>?", asked, budget=BUDGET)


@pytest.mark.parametrize("target", ["tensorrt-rtx"])
def test_half_precision_is_verified(original: Original, target: str, tmp_path: Path) -> None:
    """Norms that are computed in fp32 among them, which opset 23 writes with two types."""
    manifest = read_manifest(bundle_of(original, tmp_path / "bundle", target=target))
    assert manifest.precision == "fp16"
    assert [measured["wrong"] for measured in manifest.verification["tokens"].values()] == [0, 0]


def test_sums_beyond_half_precision_stay_numbers(tmp_path: Path) -> None:
    """What a Gemma 3's layers add up may be beyond 65,504."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny_blocks.gemma3_checkpoint(tmp_path / "checkpoint"))))
    decoder: Any = checkpoint.family.parts(load_model(checkpoint)).decoder
    embeddings = torch.randn(1, 12, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in decoder.model.layers:
            layer.post_feedforward_layernorm.weight.fill_(3e4)
        positions, seen = torch.arange(12)[None], torch.full((1, 12), 11)
        numbers = [positions, torch.tensor([0]), torch.tensor([11]), seen]
        found = []
        for dtype in (torch.float32, torch.float16):
            portable = PortableDecoder(copy.deepcopy(decoder).to(dtype), fused=False, visibility="blocks")
            found.append(
                portable(embeddings.to(dtype), *numbers, *[torch.zeros(1, 4, 0, 16, dtype=dtype)] * 6)[0][0, 0].numpy()
            )
    assert relative_difference(found[1], found[0]) < tolerances.LOGITS["fp16"]


# --- Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda"])
def test_a_target_whose_attention_is_causal_is_refused(original: Original, target: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=f"image tokens of this model see those behind them, which the attention of {target} does not let them; "
        "--target takes it: cpu, tensorrt-rtx, tensorrt$",
    ):
        plan(ExportConfig(str(original.folder), (BUDGET,), tmp_path / "bundle", target=target))
    assert not any(tmp_path.iterdir())


def test_an_onnxruntime_that_could_not_verify_is_refused_before_the_work(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    with pytest.raises(BackendError, match=r"needs ONNX Runtime 1.30 or newer"):
        plan(ExportConfig(str(original.folder), (BUDGET,), tmp_path / "bundle"))


IMAGES = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        (IMAGES, {"do_pan_and_scan": True}, UnsupportedModelError, "do_pan_and_scan = [Tt]rue is not supported"),
        (IMAGES, {"size": {"height": 160, "width": 160}}, UnsupportedModelError, "size = .* is not the 168 x 168"),
        ("config.json", {"mm_tokens_per_image": 35}, UnsupportedModelError, "mm_tokens_per_image 35 is not supported"),
        ("config.json", {"mm_tokens_per_image": 25}, UnsupportedModelError, "a square whose side divides the 12 patches"),
        ("config.json", {"mm_tokens_per_image": 0}, CheckpointError, "mm_tokens_per_image"),
        ("text", {"final_logit_softcapping": 30.0}, UnsupportedModelError, "final_logit_softcapping 30.0 is not supported"),
        ("text", {"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention is not supported"),
        ("text", {"query_pre_attn_scalar": 0}, CheckpointError, "query_pre_attn_scalar"),
        ("text", {"layer_types": ["chunked_attention"] * 3}, LeanVLMError, "chunked_attention"),
        ("text", {"rope_parameters": {"full_attention": {"rope_theta": 0.0}}}, CheckpointError, "rope_theta"),
        ("text", {"model_type": "gemma2"}, UnsupportedModelError, "gemma3 with a 'gemma2' decoder is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_handled_is_refused(
    file: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tiny_blocks.gemma3_checkpoint(tmp_path / "checkpoint")
    path = folder / ("config.json" if file == "text" else file)
    raw = json.loads(path.read_text())
    (raw["text_config"] if file == "text" else raw).update(changes)
    path.write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVLMWarning)
        with pytest.raises(error, match=message):
            plan(ExportConfig(str(folder), (BUDGET,), tmp_path / "bundle"))


def test_the_context_ends_at_the_window(original: Original, tmp_path: Path) -> None:
    if original.shape != "gemma3":
        return
    with pytest.warns(LeanVLMWarning, match="the bundle's context is 400 tokens, the checkpoint's 2048"):
        plan(ExportConfig(str(original.folder), (BUDGET,), tmp_path / "bundle"))


def test_a_manifest_of_another_runtime_is_not_run_causally(session: Session, tmp_path: Path) -> None:
    """One that tells the decoder nothing does not pass for it."""
    if session.manifest.target != "cpu":
        return
    folder = tmp_path / "bundle"
    folder.mkdir()
    rule = replace(session.manifest.positions, visibility="causal")
    write_manifest(folder, replace(session.manifest, positions=rule))
    with pytest.raises(ManifestError, match="is told the last row that each position sees"):
        read_manifest(folder)


def test_a_template_of_ours_takes_one_question(session: Session) -> None:
    """Without an image too, where the first token is not put in front twice."""
    if session.manifest.family != "paligemma":
        return
    begin, *_, end = session.prompt_ids([user_message("What?", 0)], 0)
    assert (begin, session.tokenizer.decode([end])) == (1, "\n")
    assert session.prompt_ids([user_message("What?", 1)], 1)[:2] == [session.manifest.image_token_id, begin]
    answer = {"role": "assistant", "content": "A cup."}
    with pytest.raises(InputError, match="this model answers one question, without turns before it"):
        session.prompt_ids([user_message("What?", 1), answer, user_message("And?", 0)], 1)
