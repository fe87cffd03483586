"""TensorRT engines on the GPU of this machine, where it has one that TensorRT or TensorRT-RTX runs on: `make test-gpu`."""

from __future__ import annotations

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leanvlm.exporter import tolerances
from leanvlm.runtime import Session, load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.engines.build import Builder, build_engines
from leanvlm.runtime.engines.jobs import BuildConfig, plan_build
from leanvlm.runtime.engines.library import this_sm

PROMPT = "What is below the green ring?"
# TensorRT-RTX runs on Ampere, Ada and Blackwell, the data centre's Hopper aside.
RTX_SMS = (80, 86, 87, 89, 120, 121)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(this_sm() is None, reason="no NVIDIA GPU")]


def engine_of(name: str) -> str:
    """Return a library's name if it is installed and this machine's GPU is one of its; skips the test otherwise."""
    sm = this_sm()
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-python is not installed")
    if importlib.util.find_spec(name.replace("-", "_")) is None or (name == "tensorrt-rtx" and sm not in RTX_SMS):
        pytest.skip(f"{name} is not installed, or does not run on sm {sm}")
    return name


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def session(request: pytest.FixtureRequest, tensorrt_bundle: Path, tmp_path: Path) -> Session:
    engine = engine_of(request.param)
    bundle = tmp_path / "bundle"
    shutil.copytree(tensorrt_bundle, bundle)
    config = BuildConfig(bundle, engine)
    builder = Builder.of(config)
    build_engines(plan_build(config, read_manifest(bundle), builder.module), builder)
    return load(bundle)


def test_engines_answer_as_the_graphs_do(session: Session, sample_image: Path, tensorrt_bundle: Path) -> None:
    image = Image.open(sample_image).convert("RGB")
    with pytest.warns(UserWarning, match="runs on cpu"):
        graphs = load(tensorrt_bundle, device="cpu")
    with session, graphs:
        for budget in (64, 576):
            ours = session.generate(PROMPT, [image], budget=budget, max_new_tokens=32, ignore_end=True)
            theirs = graphs.generate(PROMPT, [image], budget=budget, max_new_tokens=32, ignore_end=True)
            end = next((n for n, token in enumerate(theirs.token_ids) if token in graphs.end_ids), 31)
            assert ours.token_ids[: end + 1] == theirs.token_ids[: end + 1]
            kept = np.intersect1d(ours.pruning[0].indices, theirs.pruning[0].indices)
            assert len(kept) >= tolerances.KEPT_OVERLAP["fp16"] * budget
        assert session.generate(PROMPT, [image]).text == "a yellow hexagon"


def test_several_images_and_later_sessions(session: Session, sample_image: Path) -> None:
    image = Image.open(sample_image).convert("RGB")
    turned = image.rotate(90)
    with session:
        both = session.encode_images([image, turned], 64)
        for one, other in zip(both, (image, turned), strict=True):
            alone = session.encode_images([other], 64)[0]
            kept = np.intersect1d(one.crops[0].pruning.indices, alone.crops[0].pruning.indices)
            assert len(kept) >= tolerances.KEPT_OVERLAP["fp16"] * 64
        first = session.generate(PROMPT, [image], max_new_tokens=60, ignore_end=True)
        # The second answer replays what the first captured.
        assert session.generate(PROMPT, [image], max_new_tokens=60, ignore_end=True).token_ids == first.token_ids
    with load(session.folder) as again:
        assert again.generate(PROMPT, [image]).text == "a yellow hexagon"


def test_threads_get_the_answers_that_each_gets_alone(session: Session, sample_image: Path) -> None:
    image = Image.open(sample_image).convert("RGB")

    def answers(_: int = 0) -> list[tuple[int, ...]]:
        pictures = (image, image.rotate(90), image.rotate(180))
        return [session.generate(PROMPT, [p], max_new_tokens=24, ignore_end=True).token_ids for p in pictures]

    with session:
        alone = answers()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(answers, range(8))) == [alone] * 8
