"""Bundles for cuda: on a GPU where there is one, else the same code on the processor, without captured graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from prompts import text_prompt

from leanvlm.demo import MODEL_DIR, SAMPLES_DIR
from leanvlm.runtime import Session, load
from leanvlm.runtime.backends import cuda, cuda_cache
from leanvlm.runtime.backends.ort_memory import DeviceMemory
from leanvlm.runtime.backends.placement import misplaced_nodes
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.errors import BackendError, LeanVLMWarning, VerificationError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import user_message
from leanvlm.runtime.specs import FileSpec

BUDGET, NEW_TOKENS = 64, 32
PROMPT = "Describe the image."
HAS_GPU = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:a bundle for cuda runs on cpu")


@pytest.fixture(scope="module")
def bundle(cuda_bundle: Path) -> Path:
    return cuda_bundle


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with load(bundle, device=DEVICE) as session:
        yield session


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.open(SAMPLES_DIR / name).convert("RGB") for name in ("complex-9003.png", "simple-9001.png")]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def _answer(session: Session, images: Any, prompt: str = PROMPT, **options: Any) -> list[int]:
    answer = session.generate(prompt, images, max_new_tokens=NEW_TOKENS, ignore_end=True, **options)
    return list(answer.token_ids)


@torch.no_grad()
def _greedy(model: Any, embeddings: Any, tokens: int) -> list[int]:
    """Decode with transformers, without a cache: one pass over the whole sequence for every token."""
    sequence, found = torch.from_numpy(embeddings)[None], []
    for _ in range(tokens):
        hidden = model.model.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state[:, -1]
        found.append(int(model.lm_head(hidden).argmax()))
        sequence = torch.cat([sequence, model.get_input_embeddings()(torch.tensor([[found[-1]]]))], dim=1)
    return found


@torch.no_grad()
def _features(session: Session, model: Any, image: Image.Image) -> Any:
    """Return transformers' own features of an image, all of them."""
    spec = session.manifest.image
    levels = preprocess([image], spec).astype(np.float32)
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (spec.image_mean, spec.image_std))
    pixels = torch.from_numpy((levels * np.float32(spec.rescale_factor) - mean) / std)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return model.model.multi_modal_projector(hidden)[0].numpy()


@pytest.mark.parametrize("budget", [BUDGET, 576])
def test_greedy_tokens_equal_transformers_with_the_same_pruned_features(
    session: Session, model: Any, images: list[Image.Image], budget: int
) -> None:
    longest = 0
    for prompt in (PROMPT, "How many shapes are there?"):
        for image in images:
            encoded = session.encode_images([image], budget)[0]
            ids = session.prompt_ids([user_message(prompt, 1)], 1)
            plan = session.prompt(ids, [encoded])
            rows = np.concatenate([plan.text, _features(session, model, image)[encoded.crops[0].pruning.indices]])
            wanted = _greedy(model, rows[plan.index], NEW_TOKENS)
            found = _answer(session, [image], prompt, budget=budget)
            # Behind the end of an answer a model is asked for nothing that it learned, and nearly equal logits are common.
            ends = [count for count, token in enumerate(wanted) if token in session.end_ids]
            compared = ends[0] + 1 if ends else NEW_TOKENS
            assert found[:compared] == wanted[:compared]
            longest = max(longest, compared)
    assert longest == NEW_TOKENS


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
def test_captured_graphs_give_the_same_again_and_for_other_lengths(session: Session, images: list[Image.Image]) -> None:
    """Prompts of many lengths share the cache and a few graphs; each is replayed, with others between."""
    prompts = [PROMPT + " Now." * extra for extra in (0, 1, 2, 9, 30)]
    first = [_answer(session, images[:1], prompt) for prompt in prompts]
    assert [_answer(session, images[:1], prompt) for prompt in prompts] == first
    with pytest.warns(LeanVLMWarning), load(session.folder, device="cpu") as slow:
        assert [_answer(slow, images[:1], prompt) for prompt in prompts] == first


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.gpu
def test_eight_threads_get_the_answers_that_each_gets_alone(session: Session, images: list[Image.Image]) -> None:
    """With captured graphs; an answer beside another is run without, and is the same."""
    asked = [(image, PROMPT + " Now." * extra) for image in images for extra in (0, 9, 30)]

    def all_answers(_: int = 0) -> list[list[int]]:
        return [_answer(session, [image], prompt) for image, prompt in asked]

    alone = all_answers()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(all_answers, range(8))) == [alone] * 8
    assert all_answers() == alone


def test_two_images_at_once_equal_one_by_one(session: Session, images: list[Image.Image]) -> None:
    together = session.encode_images(images, BUDGET)
    rows = [np.asarray(features.crops[0].embeddings) for features in together]
    indices = [features.crops[0].pruning.indices for features in together]
    for image, row, kept in zip(images, rows, indices, strict=True):
        alone = session.encode_images([image], BUDGET)[0]
        np.testing.assert_array_equal(alone.crops[0].pruning.indices, kept)
        np.testing.assert_allclose(np.asarray(alone.crops[0].embeddings), row, atol=2e-2 * np.abs(row).max())


def test_images_of_one_run_and_of_several_give_the_same_answer(session: Session, images: list[Image.Image]) -> None:
    """The second run moves the first one's features away from where it writes its own."""
    messages = [user_message("What differs?", 2)]
    once = session.encode_images(images, BUDGET)
    twice = [session.encode_images([image], BUDGET)[0] for image in images]
    for one, other in zip(once, twice, strict=True):
        np.testing.assert_array_equal(one.crops[0].pruning.indices, other.crops[0].pruning.indices)
    options = GenerateOptions(max_new_tokens=8, ignore_end=True)
    assert (
        session.respond(messages, once, options).answer.token_ids == session.respond(messages, twice, options).answer.token_ids
    )


@pytest.mark.parametrize("stage", ["vision", "project"])
def test_graphs_that_end_before_there_are_features_run(session: Session, images: list[Image.Image], stage: str) -> None:
    """`profile` times stages by them; again and for another batch size their outputs are those of plain ONNX Runtime."""
    spec = session.manifest.stage_graphs(0)[stage]
    assert "image_features" not in {tensor.name for tensor in spec.outputs}
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[DEVICE]
    graph, plain = session.backend.graph(spec), onnxruntime.InferenceSession(session.folder / spec.file, providers=[provider])
    for pictures in (images[:1], images, images[1:]):
        pixels = preprocess(pictures, session.manifest.image)
        with session.backend.lock:
            outputs = graph.run({"pixel_values": pixels})
        wanted = dict(zip(outputs, plain.run(list(outputs), {"pixel_values": pixels}), strict=True))
        assert outputs.keys() == {tensor.name for tensor in spec.outputs}
        for name, values in wanted.items():
            np.testing.assert_array_equal(outputs[name], values)


def test_padding_a_prompt_changes_nothing(session: Session, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [_answer(session, images[:count], budget=BUDGET) for count in (0, 1, 2)]
    monkeypatch.setattr(cuda_cache, "bucket", lambda length: length + 13)
    monkeypatch.setattr(DeviceMemory, "captures", True)
    with load(session.folder, device=DEVICE) as padded:
        assert [_answer(padded, images[:count], budget=BUDGET) for count in (0, 1, 2)] == plain


def test_tensors_of_few_lengths_are_kept_and_the_step_s_always(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_cache, "PROMPT_SLOTS", 2)
    prompts = [PROMPT + " Now." * extra for extra in range(4)]
    wanted = [_answer(session, [], prompt) for prompt in prompts]
    with load(session.folder, device=DEVICE) as small:
        assert [_answer(small, [], prompt) for prompt in [*prompts, prompts[0]]] == [*wanted, wanted[0]]
        slots = small.decoder().sequence(1).cache._slots  # type: ignore[attr-defined]
        assert (1, 0) in slots
        assert len(slots) <= 3


def test_buckets_cover_every_length() -> None:
    lengths = range(1, 2000)
    padded = [cuda_cache.bucket(length) for length in lengths]
    assert all(length <= found < length + 64 for length, found in zip(lengths, padded, strict=True))
    assert all(found < length + 8 for length, found in zip(range(1, 257), padded, strict=False))
    assert padded == sorted(padded)
    assert len(set(padded)) <= 32 + 28


def test_a_longer_sequence_starts_a_new_cache(session: Session, images: list[Image.Image]) -> None:
    alone = _answer(session, images[:1])
    session.generate(PROMPT, images[:1], max_new_tokens=1500)
    assert _answer(session, images[:1]) == alone


def test_sampling_reads_the_logits(session: Session, images: list[Image.Image]) -> None:
    drawn = {tuple(_answer(session, images[:1], temperature=3.0, seed=seed)) for seed in (1, 1, 2, 3)}
    assert 1 < len(drawn) <= 3
    assert list(_answer(session, images[:1], temperature=1e-4, seed=5)) == _answer(session, images[:1])


def test_decoder_refuses_more_than_its_cache(session: Session) -> None:
    sequence = session.backend.decoder().sequence(4)
    with pytest.raises(BackendError, match="5 positions do not fit a cache of 4"):
        sequence.load(text_prompt(session.table.rows([1, 2, 3, 4, 5])))


def test_logits_that_are_not_finite_are_an_error(session: Session) -> None:
    sequence = session.backend.decoder().sequence(8)
    sequence.load(text_prompt(np.full((3, session.manifest.decoder.hidden_size), np.nan, np.float16)))
    with pytest.raises(BackendError, match="cannot be sampled"):
        sequence.prefill().greedy()


def test_a_model_that_does_not_fit_says_what_would(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), files={"decoder.onnx.data": FileSpec(14_100_000_000, "")})
    backend = object.__new__(cuda.CudaBackend)
    backend.manifest = manifest
    monkeypatch.setattr(cuda, "free_memory", lambda: (8_000_000_000, 8_500_000_000))
    with pytest.raises(BackendError, match=r"needs 14\.5 GB of GPU memory.*8\.0 GB are free.*int4") as refusal:
        backend._check_memory()
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(cuda, "free_memory", lambda: (20_000_000_000, 24_000_000_000))
    backend._check_memory()
    monkeypatch.setattr(cuda, "free_memory", lambda: None)
    backend._check_memory()


def test_nodes_off_the_device_are_named(bundle: Path) -> None:
    """A profile taken on the processor, judged as one of a GPU's: the work is misplaced, the arithmetic of shapes is not."""
    with load(bundle, device="cpu") as session:
        backend: Any = session.backend
        pixels = np.zeros((1, 3, *session.manifest.image.size), np.uint8)
        events = backend.node_events(session.manifest.vision_graph(BUDGET), {"pixel_values": pixels})
    found = misplaced_nodes(events, "CUDAExecutionProvider")
    assert any(entry.endswith("(MatMul on CPU)") for entry in found)
    assert any("/vision/blocks/0/self_attn" in entry for entry in found)
    assert not any("(Shape on" in entry for entry in found)
    assert misplaced_nodes(events, "CPUExecutionProvider") == []


def test_a_misplaced_node_fails_the_verification() -> None:
    from leanvlm.exporter import verify

    with pytest.raises(VerificationError, match=r"vision_64.onnx: 6 nodes .*a \(Add on CPU\).* and 1 more"):
        verify._check_placement("vision_64.onnx", [f"{name} (Add on CPU)" for name in "abcdef"])
    verify._check_placement("vision_64.onnx", [])


@pytest.mark.skipif(HAS_GPU, reason="this machine has a CUDA device")
def test_without_a_gpu_a_bundle_runs_only_where_it_is_asked_to(bundle: Path, demo_bundle: Path) -> None:
    with pytest.raises(BackendError, match="does not offer cuda"):
        load(bundle)
    with pytest.raises(BackendError, match="does not offer cuda"):
        load(demo_bundle, device="cuda")
    with pytest.warns(LeanVLMWarning, match="a bundle for cuda runs on cpu"):
        load(bundle, device="cpu").close()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_decoders_export_for_cuda(tiny_llava: Path, tmp_path: Path, precision: str) -> None:
    from leanvlm.exporter import ExportConfig, export

    manifest = export(ExportConfig(str(tiny_llava), (16,), tmp_path / "out", target="cuda", precision=precision))
    assert manifest.vision_graph(16).inputs[0].dtype == "uint8"
    assert manifest.vision_graph(16).outputs[0].dtype == manifest.decoder.kv_dtype == "float16"
    assert {tensor.name for tensor in manifest.decoder.graph.outputs} >= {"logits", "next_token", "top_logit"}
    with load(tmp_path / "out", device=DEVICE) as session:
        assert len(_answer(session, [np.zeros((50, 70, 3), np.uint8)])) == NEW_TOKENS


def test_original_positions_equal_the_other_backend(tiny_llava: Path, tmp_path: Path) -> None:
    """The graph for cuda in half precision against the processor's in fp32, with gaps between the kept tokens' positions."""
    from leanvlm.exporter import ExportConfig, export

    answers = []
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    for target in ("cpu", "cuda"):
        export(ExportConfig(str(tiny_llava), (16,), tmp_path / target, target=target, positions="original"))
        with load(tmp_path / target, device="cpu") as session:
            answers.append(session.generate("Why?", [image], max_new_tokens=6, ignore_end=True).token_ids)
    assert answers[0] == answers[1]
