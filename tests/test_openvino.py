"""Bundles for cpu with OpenVINO: everything equals ONNX Runtime in fp32, and in bfloat16 the gate still measures right."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Command
from PIL import Image

from leanvlm import ExportConfig, export
from leanvlm.demo import SAMPLES_DIR
from leanvlm.exporter.tolerances import FEATURES_MOST, OPENVINO_BF16_KEPT, OPENVINO_LOGITS, RANK
from leanvlm.runtime import Session, load
from leanvlm.runtime.bundle import read_manifest, write_manifest
from leanvlm.runtime.errors import BackendError, InputError, MissingExtraError
from leanvlm.runtime.specs import FileSpec

openvino = pytest.importorskip("openvino")
from leanvlm.runtime.backends import openvino as backend  # noqa: E402
from leanvlm.runtime.backends.openvino_graphs import split  # noqa: E402

IMAGE = SAMPLES_DIR / "complex-9003.png"
EXACT = "openvino:f32"
PRECISIONS = ("fp32", "int8", "int4")
# A shape of every way in which a decoder or a tower asks for something of its own.
SHAPES = ("llava/full", "llava/gemma3", "llava_next", "smolvlm", "gemma3", "paligemma", "mistral3")


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint in every precision, and with its image tokens at their original positions."""
    folder = tmp_path_factory.mktemp("openvino")
    for precision in PRECISIONS[1:]:
        export(ExportConfig(str(tiny_llava), (16,), folder / precision, precision=precision))
    export(ExportConfig(str(tiny_llava), (16,), folder / "original", positions="original"))
    return {"fp32": tiny_bundle, **{name: folder / name for name in (*PRECISIONS[1:], "original")}}


@pytest.fixture
def exact(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, provider=EXACT, threads=1) as session:
        yield session


def logits_of(session: Session, prompts: list[str], steps: int, tokens: list[list[int]] | None = None) -> list[list[Any]]:
    """Return copies of the logits of each prompt's first position and of `steps` after it, the sequences in turn.

    Args:
        session: The bundle.
        prompts: One question about the sample image each.
        steps: Tokens after the prompt.
        tokens: Those tokens; None takes the most likely ones.
    """
    features = session.encode_images([IMAGE], session.manifest.default_budget)
    opened = []
    for text in prompts:
        ids = session.prompt_ids([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], 1)
        prompt = session.prompt(ids, features)
        sequence = session.decoder().sequence(len(prompt) + steps)
        sequence.load(prompt)
        opened.append((sequence, prompt))
    found = [[np.array(sequence.prefill().logits())] for sequence, _ in opened]
    for step in range(steps):
        for at, (sequence, prompt) in enumerate(opened):
            token = int(found[at][-1].argmax()) if tokens is None else tokens[at][step]
            row = session.table.rows([token])[0]
            found[at].append(np.array(sequence.step(row, prompt.next_position + step).logits()))
    for sequence, _ in opened:
        sequence.close()
    return found


@pytest.mark.parametrize("name", [*PRECISIONS, "original"])
def test_logits_in_prefill_and_steps_of_two_sequences_in_turn(bundles: dict[str, Path], name: str) -> None:
    prompts = ["What is below the ring?", "Describe it, please, in a few words"]
    with load(bundles[name], threads=1) as plain, load(bundles[name], provider=EXACT, threads=1) as session:
        wanted = logits_of(plain, prompts, 20)
        tokens = [[int(logits.argmax()) for logits in one] for one in wanted]
        found = logits_of(session, prompts, 20, tokens)
    limit = OPENVINO_LOGITS["fp32" if name == "original" else name]
    for ours, theirs in zip(found, wanted, strict=True):
        differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
        assert max(differences) < limit
    assert np.abs(wanted[0][5] - wanted[1][5]).max() > 0.1 * np.abs(wanted[0][5]).max()


def test_a_full_cache_is_refused(exact: Session) -> None:
    features = exact.encode_images([IMAGE], 16)
    prompt = exact.prompt(exact.prompt_ids([{"role": "user", "content": [{"type": "image"}]}], 1), features)
    sequence = exact.decoder().sequence(len(prompt) + 1)
    sequence.load(prompt)
    sequence.prefill()
    row = exact.table.rows([5])[0]
    sequence.step(row, prompt.next_position)
    with pytest.raises(BackendError, match="do not fit a cache of"):
        sequence.step(row, prompt.next_position + 1)


def test_a_cache_that_is_used_again_has_forgotten(exact: Session) -> None:
    """The kept cache goes from answer to answer: a longer one leaves nothing behind."""
    alone = exact.generate("What?", [IMAGE], max_new_tokens=8, ignore_end=True).token_ids
    exact.generate("Describe the image at length", [IMAGE, IMAGE], max_new_tokens=30, ignore_end=True)
    assert exact.generate("What?", [IMAGE], max_new_tokens=8, ignore_end=True).token_ids == alone


@pytest.mark.parametrize("budget", [16, tiny.TOKENS])
def test_vision_graphs_for_a_batch(tiny_bundle: Path, exact: Session, budget: int) -> None:
    """Budget N among them, where nothing is pruned; the second image of a batch is what it is alone."""
    pictures = [Image.open(IMAGE), Image.open(IMAGE).rotate(90)]
    with load(tiny_bundle, threads=1) as plain:
        for wanted, found in zip(plain.encode_images(pictures, budget), exact.encode_images(pictures, budget), strict=True):
            theirs, ours = wanted.crops[0], found.crops[0]
            np.testing.assert_array_equal(ours.pruning.indices, theirs.pruning.indices)
            limit = FEATURES_MOST * np.abs(theirs.embeddings).max()
            np.testing.assert_allclose(ours.embeddings, theirs.embeddings, rtol=0, atol=limit)
            assert ours.pruning.num_selected == theirs.pruning.num_selected


@pytest.mark.filterwarnings("ignore:the bundle's context is")
# Each is exported first: one of tiles and one with a mask of its own, the others on demand.
@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[pytest.mark.slow] * (shape not in ("llava_next", "gemma3"))) for shape in SHAPES]
)
def test_tiny_shapes_answer_alike(shape: str, tmp_path: Path) -> None:
    """Windows, partly turned heads, masks of the graph's own, padding that the graph is told, several crops."""
    export(ExportConfig(str(tiny.EVERY[shape](tmp_path / "checkpoint")), (4,), tmp_path / "bundle"))
    answers = []
    for provider in (None, EXACT):
        with load(tmp_path / "bundle", provider=provider, threads=1) as session:
            answer = session.generate("What is it?", [IMAGE], max_new_tokens=8, ignore_end=True)
            answers.append((answer.token_ids, [crop.indices.tolist() for crop in answer.pruning]))
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore:the bundle's context is")
@pytest.mark.parametrize("shape", ["llava/gemma2", "qwen2_5_vl"])
def test_what_openvino_computes_otherwise_is_refused_before_the_work(shape: str, tmp_path: Path) -> None:
    """Capped scores, and positions of three coordinates."""
    export(ExportConfig(str(tiny.EVERY[shape](tmp_path / "checkpoint")), (4,), tmp_path / "bundle"))
    with pytest.raises(BackendError, match="without --provider") as error:
        load(tmp_path / "bundle", provider="openvino")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bf16() -> None:
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")


def test_in_bfloat16_the_gate_measures_right(demo_bundle: Path, bf16: None) -> None:
    """In a graph that is bfloat16 as a whole the rank comes out as 1 on these pictures."""
    pictures = [Image.open(IMAGE), Image.open(SAMPLES_DIR / "simple-9001.png")]
    with load(demo_bundle, threads=2) as plain, load(demo_bundle, provider="openvino", threads=2) as session:
        assert session.backend.versions()["openvino"].endswith("(bf16)")
        shares = []
        for wanted, found in zip(plain.encode_images(pictures, 64), session.encode_images(pictures, 64), strict=True):
            theirs, ours = wanted.crops[0].pruning, found.crops[0].pruning
            assert ours.effective_rank == pytest.approx(theirs.effective_rank, rel=RANK)
            shares.append(len({*ours.indices} & {*theirs.indices}) / 64)
        assert np.mean(shares) >= OPENVINO_BF16_KEPT
        question = "What is below the green ring?"
        assert session.generate(question, [IMAGE]).text == "a yellow hexagon"


def test_shares_are_of_all_stages(exact: Session) -> None:
    inputs = {"pixel_values": np.zeros((1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), np.float32)}
    shares = exact.backend.vision_shares(exact.manifest.vision_graph(16), inputs, 2)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0


def test_sums_beside_transpositions_are_kept_apart() -> None:
    """What OpenVINO 2026.4 makes one node of, with the shape of the sum: here as AgilePruner has it."""
    ops = pytest.importorskip("openvino.opset13")
    rows = ops.parameter([-1, 2, 7, 1], np.float32, name="/prune/x")
    total = ops.reduce_sum(rows, [1], False, name="/prune/sum")
    turned = ops.transpose(total, [0, 2, 1], name="/prune/turned")
    result = ops.result(turned)
    rows.output(0).set_names({"x"})
    turned.output(0).set_names({"/prune/y"})
    _, model = split(openvino.Model([result], [rows], "sums"))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = np.arange(14, dtype=np.float32).reshape(1, 2, 7, 1)
    feeds = {name: values if name == "x" else np.float32(1) for port in compiled.inputs for name in port.get_names()}
    assert compiled(feeds)[0].tolist() == values.sum(1).transpose(0, 2, 1).tolist()


def test_threads_are_openvino_s(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", lambda self, m, d, p: asked.append(p) or compile_model(self, m, d, p))
    with load(tiny_bundle, provider="openvino", threads=1) as session:
        session.generate("What?", [IMAGE], max_new_tokens=1)
    assert [properties["INFERENCE_NUM_THREADS"] for properties in asked] == [1, 1, 1]


def linked(bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of a bundle whose files are links, as in the Hub's cache."""
    blobs, copy = tmp_path / "blobs", tmp_path / "bundle"
    shutil.copytree(bundle, blobs)
    copy.mkdir()
    for name, spec in read_manifest(blobs).files.items():
        (blobs / name).rename(blobs / spec.sha256)
        (copy / name).symlink_to(blobs / spec.sha256)
    for path in blobs.iterdir():
        if not (copy / path.name).exists() and len(path.name) != 64:
            (copy / path.name).symlink_to(path)
    return copy


def test_files_that_are_links_out_of_the_bundle_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = linked(tiny_bundle, tmp_path)
    (copy / "leanvlm.json").unlink(missing_ok=True)
    shutil.copy(tiny_bundle / "leanvlm.json", copy)
    with pytest.raises(BackendError, match="is a link out of the bundle, which OpenVINO does not follow: copy it with cp -rL"):
        load(copy, provider=EXACT)


def test_a_provider_or_device_that_there_is_not(tiny_bundle: Path) -> None:
    for provider, device, kind, match in (
        ("openvino:int3", None, InputError, "for OpenVINO: openvino, openvino:f32"),
        ("tensorrt", None, InputError, "whose target is cpu"),
        ("openvino", "GPU.7", BackendError, "finds no device 'GPU.7'; it has CPU"),
    ):
        with pytest.raises(kind, match=match) as error:
            load(tiny_bundle, provider=provider, device=device)
        assert "\n" not in str(error.value)


def test_a_bundle_for_another_target(cuda_bundle: Path, leanvlm: Command) -> None:
    result = leanvlm("run", cuda_bundle, "--prompt", "What?", "--provider", "openvino")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "whose target is cuda" in result.stderr


def test_it_is_not_installed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str, activity: str | None = None) -> Any:
        raise MissingExtraError(f"pip install 'leanvlm[{extra}]'")

    monkeypatch.setattr(backend, "require", missing)
    with pytest.raises(MissingExtraError, match=r"leanvlm\[openvino\]"):
        load(tiny_bundle, provider="openvino")


def test_an_older_version_is_refused() -> None:
    backend.check_version("2026.4.0-1-abc")
    backend.check_version("2027.0.0")
    with pytest.raises(BackendError, match=r"need OpenVINO 2026\.4 or newer; 2025\.4\.1 is installed"):
        backend.check_version("2025.4.1-20426-82bbf0292c5")


def test_an_operator_that_it_does_not_take_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = read_manifest(copy)
    model = onnx.load(copy / "decoder.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Nonesuch"
    content = model.SerializeToString()
    (copy / "decoder.onnx").write_bytes(content)
    changed = {**manifest.files, "decoder.onnx": FileSpec(len(content), hashlib.sha256(content).hexdigest())}
    write_manifest(copy, replace(manifest, files=changed))
    with pytest.raises(BackendError, match=r"OpenVINO does not take Nonesuch\S* of decoder\.onnx; run it without") as error:
        load(copy, provider="openvino")
    assert "\n" not in str(error.value)


def test_one_profile_times_both(leanvlm: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    few = ("--runs", 2, "--warmup", 1, "--max-new-tokens", 3, "--threads", 1)
    files = ("--json", tmp_path / "figures.json", "--html", tmp_path / "page.html")
    result = leanvlm("profile", tiny_bundle, "--provider", "onnxruntime,openvino", *few, *files)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert list(figures["providers"]) == ["onnxruntime", "openvino"]
    for one, version in zip(figures["providers"].values(), ("onnxruntime", "openvino"), strict=True):
        assert version in one["versions"]
        assert set(one["budgets"]) == {"16", "121"}
        assert set(one["budgets"]["16"]["stages_ms"]) == set(figures["budgets"]["16"]["stages_ms"])
    assert "time to first token with openvino" in result.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('class="bar"') == 4
    assert leanvlm("profile", tiny_bundle, "--provider", "openvino,openvino").returncode == 2
