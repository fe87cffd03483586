"""The rows of the comparison: which program, in which environment, on which files, with which options.

A peer is a module with a class `Peer` (`worker.py`) and a line in `PEERS`; a machine with a GPU has rows of its own.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.beside import ort_genai_files
from bench.beside.environments import OWN, python_of
from bench.beside.prepare import checkpoint, once
from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime.errors import LeanVLMError

ROOT = Path(__file__).parents[2]
KEPT = 64
REFERENCE = "transformers fp32"
"""The row whose tokens the others' are compared with."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        module: Of `bench.beside`.
        environment: Of `ENVIRONMENTS`.
        files: Makes what the peer reads, once, from (work, threads); the path goes to it as `files_as`.
        files_as: The name of that option.
        options: The others.
        budget: Image tokens that the decoder reads; None is all.
        exact: Whether all arithmetic is fp32, so that its tokens must be those of the reference.
        note: What a reader must know of it.
    """

    module: str
    environment: str
    files: Callable[[Path, int], Path]
    files_as: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    exact: bool = False
    note: str = ""


def _ours(precision: str, work: Path, threads: int) -> Path:
    """Export a bundle with budgets of 64 and all tokens."""
    source = checkpoint(work)
    path = work / f"ours-{precision}"
    if not path.exists():
        export(ExportConfig(str(source), (KEPT,), path, precision=precision))
    return path


def _ort_genai(work: Path, threads: int) -> Path:
    bundle = _ours("fp32", work, threads)
    return once(work / f"ort-genai-{threads}", lambda folder: ort_genai_files.write(bundle, folder, threads))


def _openvino_genai(work: Path, threads: int) -> Path:
    """Export with optimum-intel, in the checkpoint's own fp16; OpenVINO computes in what it is told."""
    source = checkpoint(work)

    def make(folder: Path) -> None:
        command = python_of("optimum-intel", work).parent / "optimum-cli"
        options = ["--task", "image-text-to-text", "--weight-format", "fp16"]
        _run([str(command), "export", "openvino", "--model", str(source), *options, str(folder)])

    return once(work / "openvino-genai", make)


def _gguf(kind: str, work: Path, threads: int) -> Path:
    source = checkpoint(work)
    command = [str(python_of("llama-cpp", work)), "-m", "bench.beside.gguf_files", str(source)]
    return once(work / f"llama-cpp-{kind}", lambda folder: _run([*command, str(folder), kind]))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise LeanVLMError(f"{' '.join(command[:4])} … failed: {done.stderr.strip().splitlines()[-1:]}")


def _bundle(provider: str, precision: str, budget: int | None) -> Row:
    exact = precision == "fp32" and provider != "openvino"
    options = {"provider": provider, "budget": budget}
    return Row("ours", OWN, partial(_ours, precision), "bundle", options, budget, exact)


def _plain_checkpoint(work: Path, threads: int) -> Path:
    return checkpoint(work)


_NO_PICTURES = "keeps keys and values, and encodes the picture again"
_OWN_RESIZE = "prepares pictures in its own way, so its tokens are others; its wheel is built without AVX-512"

PEERS: dict[str, Row] = {
    REFERENCE: Row("hf_transformers", OWN, _plain_checkpoint, "checkpoint", {"dtype": "float32"}, exact=True),
    "transformers bf16": Row("hf_transformers", OWN, _plain_checkpoint, "checkpoint", {"dtype": "bfloat16"}),
    "OpenVINO GenAI fp32": Row(
        "openvino_genai", "openvino-genai", _openvino_genai, "folder", {"keep_prefixes": False, "precision": "f32"}
    ),
    "OpenVINO GenAI bf16": Row("openvino_genai", "openvino-genai", _openvino_genai, "folder", {"keep_prefixes": False}),
    "OpenVINO GenAI bf16, prefix cache": Row(
        "openvino_genai", "openvino-genai", _openvino_genai, "folder", {"keep_prefixes": True}, note=_NO_PICTURES
    ),
    "onnxruntime-genai fp32": Row(
        "ort_genai", OWN, _ort_genai, "folder", exact=True, note="our graphs, its loop, inputs set by hand"
    ),
    "llama.cpp f16": Row("llama_cpp", "llama-cpp", partial(_gguf, "f16"), "folder", note=_OWN_RESIZE),
    "llama.cpp q8_0": Row("llama_cpp", "llama-cpp", partial(_gguf, "q8_0"), "folder", note=_OWN_RESIZE),
    "llama.cpp q4_0": Row("llama_cpp", "llama-cpp", partial(_gguf, "q4_0"), "folder", note=_OWN_RESIZE),
}
"""Other programs on the processor. Those that keep prefixes do so by default."""

OURS: dict[str, Row] = {
    f"ours {provider} {precision}, {budget or 'all'}": _bundle(provider, precision, budget)
    for budget in (None, KEPT)
    for provider, precision in (
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("onnxruntime", "int4"),
        ("openvino:f32", "fp32"),
        ("openvino", "fp32"),
        ("openvino", "int8"),
        ("openvino", "int4"),
    )
}
"""Bundles with either provider; `openvino` computes in bfloat16 where there is any, and the precision is of the decoder."""
