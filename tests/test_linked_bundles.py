"""Bundles whose files are links: opened and asked, with ONNX Runtime's own rules on weights behind links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import load
from leanvlm.runtime.bundle import file_sha256
from leanvlm.runtime.errors import GraphError
from leanvlm.runtime.manifest import MANIFEST

Store = Callable[[int, Path], str | None]


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle; no test may change it."""
    output = tmp_path_factory.mktemp("linked") / "bundle"
    export(ExportConfig(str(tiny_llava), (16,), output))
    return output


def answer(folder: Path) -> tuple[int, ...]:
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    with load(folder, threads=1) as session:
        return session.generate("What is it?", image, max_new_tokens=6, ignore_end=True).token_ids


# Number and file to the path that its link leads to, beside the bundle's folder; None for no link.
STORES: dict[str, Store] = {
    "the Hub's cache": lambda number, file: f"blobs/{file_sha256(file)}",
    "a store of other names": lambda number, file: f"blobs/{number:04d}",
    "git-annex": lambda number, file: f"objects/{number:02d}/key/SHA256E-s1--{file_sha256(file)}",
    "weights on another disk": lambda number, file: f"disk/{file.name}" if file.suffix == ".data" else None,
    "graphs elsewhere": lambda number, file: f"disk/{file.name}" if file.suffix == ".onnx" else None,
}


@pytest.mark.parametrize("store", STORES)
def test_bundles_of_links_answer_alike(bundle: Path, tmp_path: Path, store: str) -> None:
    folder = tmp_path / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(bundle.iterdir())):
        target = STORES[store](number, file)
        real = folder / file.name if target is None else tmp_path / target
        real.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, real)
        if target is not None:
            (folder / file.name).symlink_to(os.path.relpath(real, folder))
    assert answer(folder) == answer(bundle)


def test_a_graph_cannot_read_weights_from_outside(bundle: Path, tmp_path: Path) -> None:
    """More of that in `test_attacks_bundle`."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "secret").write_bytes(bytes(64))
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    node = helper.make_node("Add", ["pixel_values", "w"], ["image_features"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in ("pixel_values", "image_features")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "decoder.onnx")
    relist(folder, "decoder.onnx")
    with pytest.raises(GraphError, match=r"decoder\.onnx reads '\.\./secret', which is no file of the bundle"):
        answer(folder)


def relist(folder: Path, name: str) -> None:
    """Make the manifest state a changed file's size and checksum."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def test_onnx_runtime_itself_would_refuse_some(bundle: Path, tmp_path: Path) -> None:
    """Or the backend needs no way round any more."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "decoder.onnx.data").rename(tmp_path / "weights")
    (folder / "decoder.onnx.data").symlink_to(tmp_path / "weights")
    with pytest.raises(Exception, match="escapes model directory"):
        onnxruntime.InferenceSession(str(folder / "decoder.onnx"), providers=["CPUExecutionProvider"])
