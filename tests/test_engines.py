"""`leanvlm build`: engines of real bundles with TensorRT-RTX, which needs no GPU; what is planned, recorded and refused."""

from __future__ import annotations

import copy
import errno
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from watched import watched

from leanvlm.exporter.decoders.portable import save_decoder, trace_decoder
from leanvlm.exporter.dialect import check_dialect
from leanvlm.exporter.families.llava import LlavaFamily
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.pruners import parse
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.trace import trace
from leanvlm.runtime.bundle import file_sha256, read_manifest, write_manifest
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.engines import jobs as planning
from leanvlm.runtime.engines import library
from leanvlm.runtime.engines.build import Builder, build_engines, check_ends, write_whole
from leanvlm.runtime.engines.jobs import BuildConfig, EngineJob, command_line, parse_sms, plan_build
from leanvlm.runtime.engines.profiles import Limits, decoder_profiles, shapes_text, vision_profile
from leanvlm.runtime.errors import BackendError, GraphError, InputError, LeanVLMError, MissingExtraError
from leanvlm.runtime.manifest import VISION_OUTPUTS, Manifest
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.signals import Terminated, raised_when_terminated
from leanvlm.runtime.specs import DecoderSpec, EngineSpec, FileSpec, GraphSpec, TensorSpec

SMS = (80, 86, 89, 120)
SECONDS = 60.0
LIMITS = Limits(images=2, prompt=700, positions=1000)

rtx = pytest.mark.skipif(not library.find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "bundle"
    shutil.copytree(tensorrt_bundle, copied)
    return copied


def config_of(bundle: Path, **options: Any) -> BuildConfig:
    return BuildConfig(bundle, options.pop("engine", "tensorrt-rtx"), **{"sms": (86,), "limits": LIMITS, **options})


def built(config: BuildConfig) -> Manifest:
    builder = Builder.of(config)
    return build_engines(plan_build(config, read_manifest(config.bundle), builder.module), builder)


@rtx
def test_every_graph_for_every_gpu_of_the_built_in_model(bundle: Path) -> None:
    seen: list[tuple[str, str, float]] = []
    config = config_of(bundle, sms=SMS)
    builder = Builder.of(config)
    plan = plan_build(config, read_manifest(bundle), builder.module)
    manifest = build_engines(plan, builder, lambda job, phase, share: seen.append((str(job.file), phase, share)))
    assert manifest == read_manifest(bundle)
    assert [(e.sm, e.budget) for e in manifest.engines] == [(sm, budget) for sm in SMS for budget in (64, 576, None)]
    for engine in manifest.engines:
        path = bundle / engine.file
        assert engine.file == f"engines/{engine.sm}/{Path(engine.graph).stem}.engine"
        assert engine.bytes == path.stat().st_size > 1_000_000
        assert engine.sha256 == file_sha256(path)
        assert 0 < engine.seconds < SECONDS
        assert (engine.engine, engine.version, engine.precision) == ("tensorrt-rtx", builder.module.__version__, "fp16")
        graph = manifest.decoder.graph if engine.budget is None else manifest.vision_graph(engine.budget)
        assert set(engine.inputs) == set(graph.inputs)
        assert set(engine.outputs) == set(graph.outputs)
        assert len(engine.profiles) == (2 if engine.budget is None else 1)
    decoder = manifest.engines[2]
    prefill, decode = decoder.profiles
    assert prefill["inputs_embeds"] == ((1, 1, 256), (1, 104, 256), (1, 700, 256))
    assert prefill["past_key_values.5.value"] == ((1, 4, 0, 64), (1, 4, 0, 64), (1, 4, 1000, 64))
    assert decode["inputs_embeds"] == ((1, 1, 256),) * 3
    assert decode["past_key_values.0.key"] == ((1, 4, 1, 64), (1, 4, 256, 64), (1, 4, 1000, 64))
    assert manifest.engines[0].profiles == ({"pixel_values": ((1, 3, 336, 336), (1, 3, 336, 336), (2, 3, 336, 336))},)
    assert {file for file, _, _ in seen} == {engine.file for engine in manifest.engines}
    assert max(share for _, _, share in seen) == 1.0
    # Nothing unfinished stays, and a second build replaces its engines alone.
    assert not list(bundle.rglob(".*.new"))
    again = built(config_of(bundle, sms=(89,), budgets=(64,), single_profile=True))
    (single,) = (engine for engine in again.engines if engine.file == "engines/89/decoder.engine")
    assert single.bytes < 0.7 * decoder.bytes
    assert single.profiles[0]["inputs_embeds"] == prefill["inputs_embeds"]
    assert single.profiles[0]["past_key_values.0.key"] == ((1, 4, 0, 64), (1, 4, 256, 64), (1, 4, 1000, 64))
    assert len(again.engines) == len(manifest.engines)
    assert {e.file for e in again.engines} == {e.file for e in manifest.engines}


# --- A full-width LLaVA -------------------------------------------------------------------------------------------------


def full_width() -> Any:
    """A random LLaVA-1.5 of its real widths: CLIP-L/336 whole, 4 of Llama's 32 layers; in half precision."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=32,
            intermediate_size=11008, max_position_embeddings=4096,
        ),
        image_token_index=32000,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def image_spec() -> ImageSpec:
    from leanvlm.demo import MODEL_DIR
    from leanvlm.exporter.checkpoint import open_checkpoint
    from leanvlm.exporter.config import ExportConfig

    return replace(open_checkpoint(ExportConfig(str(MODEL_DIR))).image_spec, layout="uint8")


@rtx
@pytest.mark.slow
def test_a_full_width_llava(tmp_path: Path, tensorrt_bundle: Path) -> None:
    """Vision engines for every GPU, and a decoder engine with two profiles, each in under a minute."""
    model, image = full_width(), image_spec()
    parts = LlavaFamily().parts(model)
    opset, config = TARGETS["tensorrt"].opset, model.config
    tower = parts.tower("feature", image, CropShape((336, 336), (24, 24)))
    graph = VisionGraph(tower, parts.project, parse("agile", keep=64), (24, 24)).eval()
    pixels = torch.zeros(2, 3, 336, 336, dtype=torch.uint8)
    vision = trace(graph, {"pixel_values": pixels}, output_names=VISION_OUTPUTS, opset=opset)
    for rewrite in TARGETS["tensorrt"].passes.values():
        rewrite(vision)
    check_dialect(vision, "vision_64.onnx")
    ir.save(vision, tmp_path / "vision_64.onnx", external_data="vision.data", size_threshold_bytes=1024)
    decoder = trace_decoder(parts.decoder, opset=opset, dtype=torch.float16)
    for rewrite in TARGETS["tensorrt"].decoder_passes.values():
        rewrite(decoder)
    save_decoder(decoder, tmp_path / "decoder.onnx")
    del model, graph, parts, tower

    manifest = _manifest_of(read_manifest(tensorrt_bundle), vision, decoder, config, tmp_path)
    write_manifest(tmp_path, manifest)
    done = built(config_of(tmp_path, sms=SMS, budgets=(64,), limits=Limits()))
    assert [(e.sm, e.budget) for e in done.engines] == [(sm, budget) for sm in SMS for budget in (64, None)]
    for engine in done.engines:
        assert engine.seconds < SECONDS
        assert engine.bytes > 5e8


def _manifest_of(like: Manifest, vision: ir.Model, decoder: ir.Model, config: Any, folder: Path) -> Manifest:
    def graph(name: str, model: ir.Model) -> GraphSpec:
        tensors = [
            tuple(
                TensorSpec(str(v.name), v.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in v.shape))  # type: ignore[union-attr]
                for v in values
            )
            for values in (model.graph.inputs, model.graph.outputs)
        ]
        return GraphSpec(name, *tensors)

    text = config.text_config
    spec = DecoderSpec(
        graph("decoder.onnx", decoder), text.num_hidden_layers, text.num_key_value_heads, 128, text.hidden_size,
        text.vocab_size, text.max_position_embeddings, "float16", "appended",
    )  # fmt: skip
    both = {64: graph("vision_64.onnx", vision), 576: graph("vision_64.onnx", vision)}
    (folder / "embed_tokens.safetensors").write_bytes(b"")
    files = {file.name: FileSpec(file.stat().st_size, "0" * 64) for file in folder.iterdir()}
    return replace(like, vision=both, decoder=spec, files=files, engines=())


# --- Plans --------------------------------------------------------------------------------------------------------------


def stand_in(version: str = "10.3.0") -> Any:
    return SimpleNamespace(__version__=version, ComputeCapability=SimpleNamespace(SM75=1, SM80=2, SM86=3, CURRENT=4))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    return lambda sm: monkeypatch.setattr(planning, "this_sm", lambda: sm)


@pytest.mark.parametrize(
    ("sm", "options", "message"),
    [
        (None, {"sms": (75,)}, "sm 75 .Turing. has no fp32 products"),
        (None, {"sms": (33,)}, "sm 33 is not one that TensorRT-RTX 10.3.0 builds for; known: 80, 86"),
        (None, {"sms": ()}, "this machine shows no GPU; name those to build for with --sm, of 80, 86"),
        (90, {"sms": ()}, "sm 90 is not one"),
        (None, {"budgets": (63,)}, "budget 63 is not in this bundle; it holds 64, 576"),
        (None, {"engine": "tensorrt", "sms": ()}, "TensorRT builds engines on the GPU that they will run on"),
        (87, {"engine": "tensorrt", "sms": (86,)}, "TensorRT builds for the GPU that it runs on, which is sm 87"),
    ],
)
def test_requests_that_no_build_can_meet(
    tensorrt_bundle: Path, gpu: Any, sm: int | None, options: dict[str, Any], message: str
) -> None:
    gpu(sm)
    with pytest.raises(InputError, match=message):
        plan_build(config_of(tensorrt_bundle, **options), read_manifest(tensorrt_bundle), stand_in())


def test_a_request_without_gpus_takes_this_machines(tensorrt_bundle: Path, gpu: Any) -> None:
    gpu(86)
    for engine in ("tensorrt-rtx", "tensorrt"):
        plan = plan_build(config_of(tensorrt_bundle, sms=(), engine=engine), read_manifest(tensorrt_bundle), stand_in())
        assert {job.sm for job in plan.jobs} == {86}
        assert [job.budget for job in plan.jobs] == [64, 576, None]


def test_bundles_of_other_targets(tensorrt_bundle: Path, gpu: Any) -> None:
    gpu(87)
    manifest = read_manifest(tensorrt_bundle)
    with pytest.raises(InputError, match=r"a bundle for cuda holds operators .* export it with --target tensorrt"):
        plan_build(config_of(tensorrt_bundle), replace(manifest, target="cuda"), stand_in())
    newer = replace(manifest, target="tensorrt-rtx")
    with pytest.raises(InputError, match=r"needs TensorRT 10.14 or newer and 10.3.0 is installed"):
        plan_build(config_of(tensorrt_bundle, engine="tensorrt", sms=()), newer, stand_in())
    assert plan_build(config_of(tensorrt_bundle, engine="tensorrt", sms=()), newer, stand_in("10.16.1")).jobs


def test_too_little_memory_or_disk_is_said_before_the_build(
    tensorrt_bundle: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(None)
    manifest = read_manifest(tensorrt_bundle)
    monkeypatch.setattr(planning, "available_memory", lambda: 4 * 10**8)
    with pytest.raises(InputError, match=r"the build needs about 0.5 GB of memory and 0.4 GB are free: .*--force"):
        plan_build(config_of(tensorrt_bundle), manifest, stand_in())
    assert plan_build(config_of(tensorrt_bundle, force=True), manifest, stand_in()).memory > 4 * 10**8
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"the engines need about 0.1 GB and .* has 0.0 GB free"):
        plan_build(config_of(tensorrt_bundle, force=True), manifest, stand_in())


def test_available_memory_is_a_number_here() -> None:
    found = planning.available_memory()
    assert found is None or 10**7 < found < 10**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensort"}, "--engine 'tensort' is not known"),
        ({"hardware": "hopper"}, "--hardware-compatibility 'hopper' is not known"),
        ({"hardware": "same"}, "--hardware-compatibility is for --engine tensorrt"),
        ({"workspace": 0}, "--workspace 0 is not possible"),
    ],
)
def test_options_that_do_not_go(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, **options)
    for wrong in ({"images": 0}, {"prompt": 9, "positions": 8}):
        with pytest.raises(InputError, match="--max-"):
            Limits(**wrong)


def test_compute_capabilities_are_read_as_people_write_them() -> None:
    assert parse_sms("86, sm_89,12.0,SM120") == (86, 89, 120, 120)
    assert parse_sms(None) == ()
    with pytest.raises(InputError, match="--sm 'ada' does not name compute capabilities"):
        parse_sms("ada")


def test_profiles_and_their_text(tensorrt_bundle: Path) -> None:
    manifest = read_manifest(tensorrt_bundle)
    profile = vision_profile(manifest.vision_graph(64), Limits(images=3))
    assert shapes_text(profile, 2) == "pixel_values:3x3x336x336"
    prefill, decode = decoder_profiles(manifest.decoder, Limits(prompt=50, positions=60), 64)
    assert prefill["inputs_embeds"] == ((1, 1, 256), (1, 50, 256), (1, 50, 256))
    assert decode["past_key_values.0.key"][1] == (1, 4, 60, 64)
    assert "past_length" not in prefill
    assert Limits().within(512) == Limits(4, 512, 512)


def test_the_same_by_hand(tensorrt_bundle: Path, gpu: Any) -> None:
    gpu(87)
    manifest = read_manifest(tensorrt_bundle)
    options = {"engine": "tensorrt", "sms": (), "workspace": 512, "hardware": "ampere+", "version_compatible": True}
    config = config_of(tensorrt_bundle, **options)
    plan = plan_build(config, manifest, stand_in())
    vision = command_line(plan.jobs[0], config)
    assert vision == (
        "trtexec --onnx=vision_64.onnx --saveEngine=engines/87/vision_64.engine --stronglyTyped --versionCompatible "
        "--hardwareCompatibilityLevel=ampere+ --memPoolSize=workspace:512 --minShapes=pixel_values:1x3x336x336 "
        "--optShapes=pixel_values:1x3x336x336 --maxShapes=pixel_values:2x3x336x336"
    )
    decoder = command_line(plan.jobs[-1], config)
    assert decoder.count("--profile=") == 2
    assert "past_key_values.0.key:1x4x0x64" in decoder
    config = config_of(tensorrt_bundle)
    assert command_line(replace(plan.jobs[0], sm=86), config).startswith("tensorrt_rtx --onnx=vision_64.onnx")
    assert "--computeCapabilities=86" in command_line(replace(plan.jobs[0], sm=86), config)


# --- Builds that fail ---------------------------------------------------------------------------------------------------


@rtx
def test_a_refused_node_is_named_with_its_stage(bundle: Path) -> None:
    model = ir.load(bundle / "vision_64.onnx")
    node = next(n for n in model.graph if str(n.name).startswith("/prune/") and n.op_type == "Relu")
    node.op_type = "Bernoulli"
    name = node.name
    ir.save(model, bundle / "vision_64.onnx")
    manifest = read_manifest_unchecked(bundle)
    config = config_of(bundle)
    builder = Builder.of(config)
    with pytest.raises(GraphError, match=rf"vision_64.onnx: the parser refuses Bernoulli {name} \(stage prune\)") as error:
        build_engines(plan_build(config, manifest, builder.module), builder)
    assert "\n" not in str(error.value)
    assert not (bundle / "engines").exists()


@rtx
def test_weights_behind_a_link_that_is_not_listed_are_not_read(bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 refuses other names that lead out of the folder, and follows links."""
    (tmp_path / "secret").write_bytes((bundle / "vision.data").read_bytes())
    (bundle / "secret.data").symlink_to(tmp_path / "secret")
    graph = (bundle / "vision_64.onnx").read_bytes()
    (bundle / "vision_64.onnx").write_bytes(graph.replace(b"vision.data", b"secret.data"))
    config = config_of(bundle, budgets=(64,))
    builder = Builder.of(config)
    with watched(tmp_path / "secret") as watch:
        with pytest.raises(GraphError, match=r"vision_64\.onnx reads 'secret\.data', which is no file of the bundle"):
            build_engines(plan_build(config, read_manifest_unchecked(bundle), builder.module), builder)
        assert not watch.touched


def read_manifest_unchecked(bundle: Path) -> Manifest:
    import json

    return Manifest.from_dict(json.loads((bundle / "leanvlm.json").read_text(encoding="utf-8")))


@rtx
@pytest.mark.alone
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_a_build_and_leaves_nothing(bundle: Path, number: int, error: type[BaseException]) -> None:
    config = config_of(bundle, budgets=(64,))
    builder = Builder.of(config)
    plan = plan_build(config, read_manifest(bundle), builder.module)

    def interrupt(job: EngineJob, phase: str, share: float) -> None:
        if job.budget is None:
            signal.raise_signal(number)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(error), raised_when_terminated():
        build_engines(plan, builder, interrupt)
    # The first engine was finished before.
    assert [path.name for path in sorted((bundle / "engines/86").iterdir())] == ["vision_64.engine"]
    assert [engine.graph for engine in read_manifest(bundle).engines] == ["vision_64.onnx"]


@rtx
def test_a_full_disk_leaves_nothing_half_written(bundle: Path, monkeypatch: pytest.MonkeyPatch, leanvlm: Any) -> None:
    def full(path: Path, data: Any) -> int:
        with path.open("wb") as file:
            file.write(bytes(data)[:1000])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = leanvlm("build", bundle, "--engine", "tensorrt-rtx", "--sm", "86", "--budget", "64")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("leanvlm: no space left on the disk: ")
    assert "Traceback" not in result.stderr
    assert not [path for path in bundle.rglob("*") if path.is_file() and "engine" in path.name]
    assert read_manifest(bundle).engines == ()


@rtx
def test_the_command_says_what_it_needs_and_what_it_built(bundle: Path, leanvlm: Any) -> None:
    dry = leanvlm("build", bundle, "--engine", "tensorrt-rtx", "--sm", "86", "--dry-run")
    assert dry.returncode == 0
    assert "3 TensorRT-RTX engines for sm 86: about 0.5 GB of memory at once" in dry.stdout
    assert dry.stdout.count("--onnx=") == 3
    assert not (bundle / "engines").exists()
    done = leanvlm("build", bundle, "--engine", "tensorrt-rtx", "--sm", "86", "--budget", "64")
    assert done.returncode == 0
    assert "engines/86/decoder.engine" in done.stdout
    inspected = leanvlm("inspect", bundle)
    assert "TensorRT-RTX" in inspected.stdout
    assert "sm 86" in inspected.stdout
    assert "checksums 14 files are as they were written" in leanvlm("inspect", bundle, "--verify").stdout
    (bundle / "engines/86/decoder.engine").unlink()
    verified = leanvlm("inspect", bundle, "--verify").stdout
    assert "checksums 13 files are as they were written" in verified
    assert "missing   engines/86/decoder.engine: copy or build again what this machine needs" in verified
    refused = leanvlm("build", bundle, "--engine", "tensorrt")
    assert refused.returncode == 2
    assert "TensorRT is not installed: on Jetson it comes with JetPack" in refused.stderr


def test_ends_that_differ_are_refused() -> None:
    graph = GraphSpec("g.onnx", (TensorSpec("x", "float16", ("B", 3)),), (TensorSpec("y", "float32", (1,)),))
    check_ends(graph, graph.inputs, graph.outputs)
    for inputs, outputs in (
        ((TensorSpec("x", "float32", ("B", 3)),), graph.outputs),
        ((TensorSpec("x", "float16", ("B", 4)),), graph.outputs),
        (graph.inputs, ()),
        (graph.inputs, (*graph.outputs, TensorSpec("z", "bool", (1,)))),
    ):
        with pytest.raises(GraphError, match=r"g.onnx: .*export the bundle again"):
            check_ends(graph, inputs, outputs)


def test_libraries_that_are_absent_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match="TensorRT is not installed"):
        library.load_library(library.library("tensorrt"))
    monkeypatch.setattr(library, "require", lambda module, extra: SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(BackendError, match=r"TensorRT 8.6.1 is too old; 10.3 \(JetPack 6.2\) or newer is needed"):
        library.load_library(library.library("tensorrt"))
    with pytest.raises(InputError, match="--engine 'trt' is not known; known: tensorrt-rtx, tensorrt"):
        library.library("trt")
    # The lean runtime stands in for engines that allow it.
    asked: list[str] = []
    monkeypatch.setattr(library, "find_spec", lambda name: None if name == "tensorrt" else name)
    monkeypatch.setattr(library, "require", lambda module, extra: asked.append(module) or SimpleNamespace(__version__="10.9"))
    library.load_runtime(library.library("tensorrt"), version_compatible=True)
    library.load_runtime(library.library("tensorrt"), version_compatible=False)
    assert asked == ["tensorrt_lean", "tensorrt"]


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a/b.engine"
    write_whole(path, memoryview(b"whole"))
    assert path.read_bytes() == b"whole"
    assert [file.name for file in path.parent.iterdir()] == ["b.engine"]


def test_engines_outside_of_the_manifests_words_are_refused(tensorrt_bundle: Path) -> None:
    manifest = read_manifest(tensorrt_bundle)
    graph = manifest.vision_graph(64)
    engine = EngineSpec(
        "engines/86/vision_64.engine", "tensorrt-rtx", "1.7", 86, "fp16", graph.file, 64, graph.inputs, graph.outputs,
        (vision_profile(graph, LIMITS),), "none", False, 5, "0" * 64, 1.0,
    )  # fmt: skip
    data = replace(manifest, engines=(engine,)).to_dict()
    assert Manifest.from_dict(copy.deepcopy(data)).engines == (engine,)
    for key in data["engines"][0]:
        broken = copy.deepcopy(data)
        del broken["engines"][0][key]
        with pytest.raises(LeanVLMError, match=rf"leanvlm\.json: engines\[0\] has no {key}"):
            Manifest.from_dict(broken)
