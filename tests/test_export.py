"""The export itself: shared weights, node names, dtypes, licence, verification that fails when it should."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from conftest import Command
from safetensors.torch import load_file

from leanvlm.exporter import ExportConfig, export, tolerances, verify
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.config import Share, parse_budgets
from leanvlm.exporter.graphs import VisionPlan
from leanvlm.exporter.passes import stage_names
from leanvlm.exporter.pruners import PRUNERS, NoPruner, parse
from leanvlm.exporter.reference import Reference
from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.embeddings import TokenTable
from leanvlm.runtime.errors import UnsupportedPrunerError, VerificationError

FORBIDDEN = {"Loop", "If", "Scan", "NonZero", "Compress", "Unique"}


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "two-budgets"
    (tiny_llava / "LICENSE").write_text("Do as you like.\n")
    (tiny_llava / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    export(ExportConfig(str(tiny_llava), (16, 40), output))
    return output


def _pixels(batch: int) -> np.ndarray[Any, Any]:
    shape = (batch, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)


def test_bundle_holds_what_the_design_says(bundle: Path) -> None:
    names = {file.name for file in bundle.iterdir()}
    manifest = read_manifest(bundle)
    assert manifest.budgets == (16, 40, tiny.TOKENS)
    assert {"leanvlm.json", "vision_16.onnx", "vision_40.onnx", "vision_121.onnx", "vision.data"} <= names
    assert {"decoder.onnx", "decoder.onnx.data", "embed_tokens.safetensors", "tokenizer.json"} <= names
    assert set(manifest.files) == names - {"leanvlm.json"}
    assert not any(name.startswith("genai") for name in names)


def test_manifest_records_source_and_licence(bundle: Path) -> None:
    source = read_manifest(bundle).source
    assert source.licence == "apache-2.0"
    assert (bundle / str(source.licence_file)).read_text() == "Do as you like.\n"
    assert len(source.sha256) == 64


def test_weights_of_all_budgets_are_stored_once(bundle: Path, tiny_llava: Path) -> None:
    """The data file holds the cut tower and the projector in fp32, once, with at most a page of padding a tensor."""
    weights = load_file(tiny_llava / "model.safetensors")
    used = [v for k, v in weights.items() if re.search("multi_modal_projector|vision_tower", k) and not re.search(
        r"layers\.4\.|post_layernorm", k)]  # fmt: skip
    least = sum(v.numel() * 4 for v in used if v.numel() * 4 >= 1024)
    size = (bundle / "vision.data").stat().st_size
    assert least <= size <= least + 4096 * (len(used) + 8)


@pytest.mark.parametrize("budget", [16, 40, tiny.TOKENS])
def test_vision_graph_obeys_the_rules(bundle: Path, budget: int) -> None:
    path = bundle / f"vision_{budget}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert not FORBIDDEN & {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert all(node.name.split("/")[1] in stage_names.STAGES for node in model.graph.node)
    assert {node.name.split("/")[1] for node in model.graph.node} == set(stage_names.STAGES)
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def test_vision_graph_takes_batches_that_were_not_traced(bundle: Path) -> None:
    session = onnxruntime.InferenceSession(bundle / "vision_16.onnx", providers=["CPUExecutionProvider"])
    pixels = _pixels(5)
    together = session.run(None, {"pixel_values": pixels})
    for row in range(5):
        alone = session.run(None, {"pixel_values": pixels[row : row + 1]})
        np.testing.assert_array_equal(together[1][row], alone[1][0])
        np.testing.assert_allclose(together[0][row], alone[0][0], rtol=1e-4, atol=1e-5)


def test_full_budget_of_any_pruner_is_the_unpruned_model(tiny_llava: Path, bundle: Path, tmp_path: Path) -> None:
    export(ExportConfig(str(tiny_llava), (tiny.TOKENS,), tmp_path / "full", pruner="attention"))
    pixels = _pixels(2)
    outputs = []
    for folder in (bundle, tmp_path / "full"):
        session = onnxruntime.InferenceSession(folder / "vision_121.onnx", providers=["CPUExecutionProvider"])
        outputs.append(session.run(["image_features", "keep_indices"], {"pixel_values": pixels}))
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    np.testing.assert_array_equal(outputs[0][1], np.tile(np.arange(tiny.TOKENS), (2, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_export(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = tiny.llava(tmp_path / "half", dtype=dtype)
    manifest = export(ExportConfig(str(checkpoint), (16,), tmp_path / "out"))
    table = load_file(checkpoint / "model.safetensors")
    wanted = next(v for k, v in table.items() if k.endswith("embed_tokens.weight")).float().numpy()
    found = TokenTable(tmp_path / "out" / "embed_tokens.safetensors", *wanted.shape).rows([5, 0, 9])
    np.testing.assert_array_equal(found, wanted[[5, 0, 9]])
    for found in manifest.verification["vision"].values():
        assert found["features"] <= tolerances.features_limit("fp32", found.get("rounding", 0.0))
    assert all(t["equal"] == t["compared"] for t in manifest.verification["tokens"].values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_decoders_stay_near(tiny_llava: Path, tmp_path: Path, precision: str) -> None:
    """To the checkpoint with weights quantised alike nearly exactly, to the checkpoint itself less; and not to another one."""
    manifest = export(ExportConfig(str(tiny_llava), (16,), tmp_path / "out", precision=precision))
    for tokens in manifest.verification["tokens"].values():
        assert tokens["cosine"] >= tolerances.LOGITS_COSINE["fp32"]
        assert tokens["equal"] == tokens["compared"]
        assert 0.5 < tokens["unrounded"]["cosine"] < tokens["cosine"]
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    reference = Reference(checkpoint, load_model(checkpoint).float())
    attention = reference.model.model.language_model.layers[1].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.flip(0)
    with load(tmp_path / "out") as session:
        answer = session.generate("What?", [np.zeros((50, 70, 3), np.uint8)], max_new_tokens=5, ignore_end=True)
        with pytest.raises(VerificationError, match="decoder at budget 16"):
            verify.verify(session, reference, [VisionPlan(0, 16, parse("agile", keep=16), 16, "vision_16.onnx")])
    assert len(answer.token_ids) == 5


def test_tied_embeddings_export(tmp_path: Path) -> None:
    """A checkpoint that stores one table for the token table and the output head."""
    import json

    from safetensors.torch import save_file

    checkpoint = tiny.llava(tmp_path / "tied")
    config = json.loads((checkpoint / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = load_file(checkpoint / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, checkpoint / "model.safetensors")
    manifest = export(ExportConfig(str(checkpoint), (16,), tmp_path / "out"))
    assert all(t["wrong"] == 0 for t in manifest.verification["tokens"].values())


@pytest.mark.parametrize("stage", ["features", "kept_overlap", "converged", "ascending", "finite", "logits", "wrong"])
def test_each_figure_is_enough_to_refuse_a_bundle(
    tiny_llava: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The comparison itself is real; one of its figures is spoiled."""
    bad = {"features": 1.0, "kept_overlap": 0.1, "logits": 1.0, "wrong": 2}
    for name in ("_compare_vision", "_compare_chain"):
        original = getattr(verify, name)

        def spoiled(*args: Any, _original: Any = original) -> Mapping[str, Any]:
            measured = _original(*args)
            return {**measured, stage: bad.get(stage, False)} if stage in measured else measured

        monkeypatch.setattr(verify, name, spoiled)
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    reference = Reference(checkpoint, load_model(checkpoint).float())
    pruners = {16: parse("agile", keep=16), tiny.TOKENS: NoPruner(tiny.TOKENS)}
    planned = [VisionPlan(0, keep, pruner, keep, f"vision_{keep}.onnx") for keep, pruner in pruners.items()]
    with load(bundle) as session, pytest.raises(VerificationError):
        verify.verify(session, reference, planned)


def test_verification_sees_a_wrong_weight(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph made from other weights than the checkpoint's does not pass."""
    from leanvlm.exporter import pipeline

    original = pipeline.save_sharing

    def spoiled(models: Any, folder: Path, data_name: str) -> None:
        original(models, folder, data_name)
        data = bytearray((folder / data_name).read_bytes())
        data[4096 : 4096 + 400] = np.ones(100, np.float32).tobytes()
        (folder / data_name).write_bytes(data)

    monkeypatch.setattr(pipeline, "save_sharing", spoiled)
    with pytest.raises(VerificationError, match="vision graph"):
        export(ExportConfig(str(tiny_llava), (16,), tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("share", "count"), [("640/2880", 128), ("320/2880", 64), ("160/2880", 32), ("2880/2880", 576)])
def test_a_share_of_all_crops_is_as_many_tokens_of_each(share: str, count: int) -> None:
    """LLaVA-NeXT's five crops have 576 tokens each."""
    asked = ExportConfig("llava-next", parse_budgets(f"{share},7"))
    assert asked.resolved(576).counts == (count, 7)
    # What the folder is called is what was asked for.
    name = f"llava-next-{share.replace('/', 'of')}-7"
    assert asked.named_output == asked.resolved(576).named_output == Path(name)


def test_shares_are_rounded_to_the_nearest_and_keep_something() -> None:
    for kept in range(1, 51):
        nearest = min(range(1, 8), key=lambda count: (abs(Fraction(count, 7) - Fraction(kept, 50)), -count))
        assert Share(kept, 50).of(7) == nearest
    assert Share(1, 10**9).of(576) == 1


def test_a_dry_run_says_what_a_share_becomes(
    leanvlm: Command, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = leanvlm("export", "--model", tiny_llava, "--budget", "32/242", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "to tiny-llava-32of242:" in result.stdout
    assert "--budget 32/242 keeps 16 of the 121 image tokens of each crop" in " ".join(result.stderr.split())
    assert re.findall(r"vision_\d+", result.stdout) == ["vision_16", "vision_121"]
    assert not list(tmp_path.iterdir())


def test_pruner_specs_are_parsed() -> None:
    pruner = parse("agile:gate=entropy,step=0.02", keep=7, erank_ref=55.0)
    assert dataclasses.asdict(pruner) | {"gate": "entropy", "step": 0.02, "keep": 7, "erank_ref": 55.0} == dataclasses.asdict(
        pruner
    )
    assert parse("attention", keep=3, erank_ref=1.0) == PRUNERS["attention"](keep=3)  # type: ignore[call-arg]
    for wrong in ("agil", "agile:gat=erank", "agile:gate=rank", "agile:step=much", "agile:step"):
        with pytest.raises(UnsupportedPrunerError):
            parse(wrong)
