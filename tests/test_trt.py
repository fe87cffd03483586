"""The TensorRT backend on the processor, against a fake runtime that keeps TensorRT's rules and runs the graphs themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import VERSION, FakeDevice, add_engines, pretend
from PIL import Image

from leanvlm.exporter import tolerances
from leanvlm.exporter.reference import relative_difference
from leanvlm.runtime import load
from leanvlm.runtime.backends import trt
from leanvlm.runtime.bundle import read_manifest, verify_files, write_manifest
from leanvlm.runtime.engines.profiles import Limits
from leanvlm.runtime.errors import BackendError, BundleError, InputError, MissingExtraError
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import Session, user_message
from leanvlm.runtime.specs import EngineSpec

SM = 87
PROMPT = "What is below the green ring?"

Open = Callable[..., Session]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(tensorrt_bundle, copy)
    return copy


@pytest.fixture
def opened(bundle: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the bundle with engines for a GPU of SM 87, which this machine is made to have."""
    pretend(monkeypatch, device, SM)
    sessions = []

    def open_bundle(limits: Limits | None = None, **changes: Any) -> Session:
        manifest = read_manifest(bundle)
        engines = add_engines(bundle, manifest, changes.pop("sm", SM), limits, **changes)
        write_manifest(bundle, replace(manifest, engines=engines))
        sessions.append(load(bundle))
        return sessions[-1]

    yield open_bundle
    for session in sessions:
        session.close()


@pytest.fixture
def images(sample_image: Path) -> list[Image.Image]:
    first = Image.open(sample_image).convert("RGB")
    return [first, first.rotate(90)]


def test_answers_are_those_of_the_graphs(opened: Open, bundle: Path, images: list[Image.Image], device: FakeDevice) -> None:
    session = opened()
    with pytest.warns(UserWarning, match="runs on cpu"):
        graphs = load(bundle, device="cpu")
    with graphs:
        for budget in (64, 576):
            for image in images:
                ours = session.generate(PROMPT, [image], budget=budget, max_new_tokens=12, ignore_end=True)
                theirs = graphs.generate(PROMPT, [image], budget=budget, max_new_tokens=12, ignore_end=True)
                assert ours.token_ids == theirs.token_ids
                assert (ours.pruning[0].indices == theirs.pruning[0].indices).all()
    assert session.generate(PROMPT, [images[0]]).text == "a yellow hexagon"
    assert device.launches > 20, "decode steps are replayed"


def test_several_images_batches_and_prompts_without_images(opened: Open, images: list[Image.Image]) -> None:
    session = opened()
    both = session.encode_images(images, 64)
    apart = [session.encode_images([image], 64)[0] for image in images]
    for one, other in zip(both, apart, strict=True):
        assert (one.crops[0].pruning.indices == other.crops[0].pruning.indices).all()
        assert (
            relative_difference(np.asarray(one.crops[0].embeddings), np.asarray(other.crops[0].embeddings))
            <= tolerances.BATCHED["fp16"]
        )
    together = session.generate("Which is brighter?", images, max_new_tokens=6, ignore_end=True)
    assert len(together.pruning) == 2
    ids = session.prompt_ids([user_message("Which is brighter?", 2)], 2)
    plan = session.prompt(ids, session.encode_images(images, 64))
    expected = plan.embeddings(np.float16)
    sequence = session.decoder().sequence(len(plan) + 4)
    cache: Any = sequence.cache
    cache.load(plan)
    assert (cache._buffers(len(plan))["inputs_embeds"].numpy()[0] == expected).all()
    # Features that the graph has overwritten since come from the processor's memory.
    older, _ = session.encode_images([images[0]], 64), session.encode_images([images[1]], 64)
    plan = session.prompt(session.prompt_ids([user_message(PROMPT, 1)], 1), older)
    cache.load(plan)
    assert (cache._buffers(len(plan))["inputs_embeds"].numpy()[0] == plan.embeddings(np.float16)).all()
    assert session.generate("What is it?", max_new_tokens=3, ignore_end=True).token_ids


def test_a_longer_answer_gets_a_larger_cache_and_the_logits_are_there(opened: Open, images: list[Image.Image]) -> None:
    session = opened()
    short = session.generate(PROMPT, images[:1], max_new_tokens=4, ignore_end=True)
    long = session.generate(PROMPT, images[:1], max_new_tokens=150, ignore_end=True)
    assert long.token_ids[:4] == short.token_ids
    sampled = session.generate(PROMPT, images[:1], max_new_tokens=4, temperature=0.7, seed=3, ignore_end=True)
    assert len(sampled.token_ids) == 4


def test_steps_run_one_by_one_where_nothing_can_be_captured(
    opened: Open, images: list[Image.Image], device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    monkeypatch.setattr(device, "capture", tried.append)
    assert opened().generate(PROMPT, images[:1]).text == "a yellow hexagon"
    assert len(tried) == 1
    assert device.launches == 0


def test_sizes_outside_the_profiles_are_refused_with_what_to_build(opened: Open, images: list[Image.Image]) -> None:
    session = opened(Limits(images=1, prompt=600, positions=640))
    pixels = preprocess(images, session.manifest.image)
    with pytest.raises(BackendError, match=r"vision_64.engine takes pixel_values from .* to \[1, 3.*--max-images"):
        session.vision(64).run({"pixel_values": pixels})
    with pytest.raises(BackendError, match=r"decoder.engine takes past_key_values.*--max-positions"):
        session.generate(PROMPT, images[:1], max_new_tokens=700, ignore_end=True)


def test_more_crops_than_an_engine_takes_go_through_it_in_parts(opened: Open, images: list[Image.Image]) -> None:
    session = opened(Limits(images=1, prompt=1400, positions=1500))
    assert session.backend.crops_at_once == 1
    together, alone = session.encode_images(images, 64), [session.encode_images([image], 64)[0] for image in images]
    for ours, other in zip(together, alone, strict=True):
        assert (np.asarray(ours.crops[0].embeddings) == np.asarray(other.crops[0].embeddings)).all()
        assert ours.crops[0].pruning.indices.tolist() == other.crops[0].pruning.indices.tolist()
    assert together[0].crops[0].pruning.indices.tolist() != together[1].crops[0].pruning.indices.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sm": 89}, "this bundle's engines are for sm 89 and this GPU is sm 87: run leanvlm build"),
        ({"version": "10.13.3"}, "built with TensorRT 10.13.3 and 10.9.0 is installed: build it again"),
        ({"version": "10.13.3", "version_compatible": True}, "10.13.3 and 10.9.0"),
        ({"bytes": 5}, "bytes where the manifest says 5: copy it again, or build it again"),
        ({"file": "engines/87/gone.engine"}, "gone.engine is missing from the bundle: build it again"),
        ({"file": "../outside.engine"}, "outside the bundle"),
    ],
)
def test_engines_that_do_not_match_are_refused_in_one_line(
    opened: Open, images: list[Image.Image], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as error:
        opened(**changes).encode_images(images[:1], 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"hardware": "ampere+", "sm": 86}, {"version": "10.8.0", "version_compatible": True}, {"single": True}]
)
def test_compatible_engines_run(opened: Open, images: list[Image.Image], changes: dict[str, Any]) -> None:
    assert opened(**changes).generate(PROMPT, images[:1]).text == "a yellow hexagon"


def test_a_truncated_engine_is_the_librarys_to_refuse(opened: Open, bundle: Path, images: list[Image.Image]) -> None:
    session = opened()
    path = bundle / "engines/87/vision_64.engine"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BackendError, match=r"vision_64.engine has 40 bytes where the manifest says"):
        session.encode_images(images[:1], 64)

    def cut(engine: EngineSpec) -> EngineSpec:
        return replace(engine, bytes=40) if engine.budget == 64 else engine

    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, engines=tuple(map(cut, manifest.engines))))
    with (
        load(bundle) as again,
        pytest.raises(BackendError, match=r"TensorRT refuses engines/87/vision_64\.engine: the engine's magic"),
    ):
        again.encode_images(images[:1], 64)


def test_verifying_a_bundle_verifies_its_engines(opened: Open, bundle: Path) -> None:
    opened()
    manifest = read_manifest(bundle)
    assert verify_files(bundle, manifest) == ()
    path = bundle / "engines/87/decoder.engine"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"engines/87/decoder\.engine does not match its sha256"):
        verify_files(bundle, manifest)
    path.unlink()
    assert verify_files(bundle, manifest) == ("engines/87/decoder.engine",)


def test_no_engines_no_gpu_no_library(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"has no engines yet: run leanvlm build .* --engine tensorrt on the device"):
        load(bundle)
    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, engines=add_engines(bundle, manifest, SM)))
    monkeypatch.setattr(trt, "this_sm", lambda: None)
    with pytest.raises(BackendError, match="no NVIDIA GPU is seen"):
        load(bundle)
    monkeypatch.setattr(trt, "this_sm", lambda: SM)
    with pytest.raises(MissingExtraError, match="on Jetson it comes with JetPack"):
        load(bundle)
    with pytest.raises(BackendError, match="device 'cdua' is not known"):
        load(bundle, device="cdua")
    with pytest.raises(InputError, match="exclude each other"):
        load(bundle, device="cpu", provider="tensorrt")


def test_the_fake_refuses_what_tensorrt_refuses(opened: Open, device: FakeDevice) -> None:
    session = opened()
    backend: Any = session.backend
    context = backend._open("vision_64.onnx").engine.create_execution_context()
    assert not context.set_input_shape("pixel_values", (9, 3, 336, 336))
    assert not context.set_tensor_address("pixels", 1)
    assert not context.execute_async_v3(device.stream)
    with pytest.raises(AssertionError, match="outside of every allocation"):
        device.copy(1, 2, 3)
    assert backend.versions()["tensorrt"] == VERSION
