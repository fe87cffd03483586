"""TensorRT targets of families whose images have a size: three axes of positions, wide rows, a vision graph for each shape."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny_sizes
from original import NEW_TOKENS
from original_sizes import SizedOriginal, pictures

from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.crops import arrange
from leanvlm.runtime.engines import library
from leanvlm.runtime.engines.build import Builder, build_engines
from leanvlm.runtime.engines.jobs import BuildConfig, plan_build
from leanvlm.runtime.engines.profiles import Limits
from leanvlm.runtime.errors import LeanVLMWarning

rtx = pytest.mark.skipif(not library.find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
SMS = (86, 89, 120)
BUDGET = 6


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sizes.TINY[request.param](tmp_path_factory.mktemp("sized") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    sizes = tiny_sizes.sizes(checkpoint)[1:]
    config = ExportConfig(
        str(checkpoint), (BUDGET,), folder / "bundle", target="tensorrt-rtx", precision="fp32", image_sizes=sizes
    )  # fmt: skip
    export(config)
    return folder / "bundle"


@pytest.mark.parametrize("checkpoint", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"], indirect=True)
def test_the_portable_decoder_answers_as_transformers(bundle: Path) -> None:
    """Unpruned and pruned, on the processor, which runs what TensorRT's parser is given."""
    original = SizedOriginal.open(bundle.parent / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVLMWarning)
        session = load(bundle, device="cpu")
    with session:
        for picture in pictures():
            rule = session.manifest.crops
            height, width = rule.shapes[arrange((picture.height, picture.width), rule).shape].pixels
            inputs = original.inputs("What is on the table?", picture.resize((width, height)))
            options = {"max_new_tokens": NEW_TOKENS, "ignore_end": True}
            whole = session.generate("What is on the table?", [picture], budget=max(session.manifest.budgets), **options)
            assert list(whole.token_ids) == original.generate(inputs)
            pruned, _ = original.pruned(inputs, original.choices(inputs, BUDGET))
            found = session.generate("What is on the table?", [picture], budget=BUDGET, **options)
            assert list(found.token_ids) == pruned


@rtx
def test_engines_are_built_for_every_gpu(checkpoint: Path, tmp_path: Path) -> None:
    """In half precision, with windows of which some are not whole: fp32 attention has no kernel there."""
    bundle, sizes = tmp_path / "bundle", tiny_sizes.sizes(checkpoint)[1:2]
    export(ExportConfig(str(checkpoint), (BUDGET,), bundle, target="tensorrt-rtx", image_sizes=sizes))
    config = BuildConfig(bundle, "tensorrt-rtx", sms=SMS, budgets=(BUDGET,), limits=Limits(2, 64, 128))
    manifest, builder = read_manifest(bundle), Builder.of(config)
    done = build_engines(plan_build(config, manifest, builder.module), builder)
    files = {Path(engine.file).stem for engine in done.engines}
    assert files == {"decoder", f"vision_{BUDGET}"}
    assert {engine.sm for engine in done.engines} == set(SMS)
    decoder = next(engine for engine in done.engines if engine.budget is None)
    shapes = {tensor.name: tensor.shape for tensor in decoder.inputs}
    assert shapes["position_ids"][0] == 3
    assert shapes["inputs_embeds"][2] == manifest.decoder.row_width
