"""What the prune stage costs: its share of a CLIP-L/336 vision graph on the processor, and its milliseconds in a CUDA graph.

Both use random weights of LLaVA-1.5-7B's vision widths (24 blocks of 1024, projector to 4096), since time does not depend on
values. On the processor the share comes from ONNX Runtime's node profiler, inside one run. On a GPU whole vision graphs are
replayed turn by turn, with `agile` and with a plain top-k of the attention, and the difference of the medians is the cost.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.pruners import parse
from leanvlm.exporter.pruners.base import gather_tokens, top_indices
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.towers.base import Seen
from leanvlm.exporter.towers.clip import ClipTower
from leanvlm.exporter.trace import trace
from leanvlm.runtime.manifest import VISION_OUTPUTS
from leanvlm.runtime.optional import require

RESULTS = Path(__file__).parent / "results"
GRID, SIDE, WIDTH = (24, 24), 336, 4096


@dataclass(frozen=True)
class PruneOptions:
    """What is measured.

    Attributes:
        device: `cpu` or `cuda`.
        budget: K.
        runs: Counted runs.
        replays: On a GPU, replays that one sample averages over, so that the host's share of the time is hidden.
        threads: Processor threads.
    """

    device: str = "cpu"
    budget: int = 64
    runs: int = 20
    replays: int = 20
    threads: int = 2


class TopK(nn.Module):
    """The plainest prune stage: the K most attended tokens, and nothing said about them."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, features: Tensor, seen: Seen) -> tuple[Tensor | None, ...]:
        """Return the kept features, their indices, and no merged tokens."""
        assert seen.saliency is not None
        indices = top_indices(seen.saliency, self.keep)
        return gather_tokens(features, indices), indices, None


def vision_graphs(options: PruneOptions) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Return the vision graphs to compare, over the same random weights: name to module and output names."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=SIDE, patch_size=14
    )
    clip = CLIPVisionModel(config).eval()
    projector = nn.Sequential(nn.Linear(1024, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()
    graphs: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    for name in ("agile", "attention"):
        tower = ClipTower(getattr(clip, "vision_model", clip), (23,), 22)
        graph = VisionGraph(tower, projector, parse(name, keep=options.budget), GRID).eval()
        graphs[name] = (graph, VISION_OUTPUTS)
        if name == "attention":
            graph.prune = TopK(options.budget)  # type: ignore[assignment]
            graphs[name] = (graph, VISION_OUTPUTS[:2])
    return graphs


def measure_prune(options: PruneOptions) -> Path:
    """Measure, write `results/prune-<device>.json` and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        dtype = torch.float16 if options.device == "cuda" else torch.float32
        for name, (graph, outputs) in vision_graphs(options).items():
            example = torch.zeros(2, 3, SIDE, SIDE, dtype=dtype)
            opset = TARGETS[options.device].opset
            model = trace(graph.to(dtype), {"pixel_values": example}, output_names=outputs, opset=opset)
            for rewrite in TARGETS[options.device].passes.values():
                rewrite(model)
            paths[name] = Path(folder) / f"{name}.onnx"
            ir.save(model, paths[name], external_data=f"{name}.data")
        figures = _on_gpu(paths, options) if options.device == "cuda" else _on_processor(paths["agile"], options)
    result = RESULTS / f"prune-{options.device}.json"
    result.write_text(json.dumps(_conditions(options) | figures, indent=1) + "\n", encoding="utf-8")
    return result


def _on_processor(path: Path, options: PruneOptions) -> dict[str, Any]:
    """Return each stage's node time in ms, one entry a run."""
    ort = require("onnxruntime", "export")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.enable_profiling = True
    settings.profile_file_prefix = str(path.with_suffix(""))
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    for _ in range(options.runs + 1):
        session.run(None, {"pixel_values": pixels})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [e for e in events if e["name"] == "model_run"][1:]
    nodes = sorted((e for e in events if e.get("cat") == "Node" and "kernel_time" in e["name"]), key=lambda e: e["ts"])
    samples: dict[str, list[float]] = {"vision": [], "project": [], "prune": []}
    for run in runs:
        spent, stage = dict.fromkeys(samples, 0.0), "vision"
        for node in (n for n in nodes if run["ts"] <= n["ts"] < run["ts"] + run["dur"]):
            first = node["name"].lstrip("/").split("/")[0]
            stage = first if first in spent else stage
            spent[stage] += node["dur"] / 1e3
        for name, time in spent.items():
            samples[name].append(time)
    return {"samples_ms": samples}


def _on_gpu(paths: dict[str, Path], options: PruneOptions) -> dict[str, Any]:
    """Return the time of one replay of each vision graph in ms, one entry a sample, taken turn by turn."""
    bindings = {name: _captured(path) for name, path in paths.items()}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(options.runs):
        for name, (session, binding, run) in bindings.items():
            begin = perf_counter()
            for _ in range(options.replays):
                session.run_with_iobinding(binding, run)
            binding.synchronize_outputs()
            torch.cuda.synchronize()
            samples[name].append(1e3 * (perf_counter() - begin) / options.replays)
    return {"samples_ms": samples}


def _captured(path: Path) -> tuple[Any, Any, Any]:
    """Open a graph on the GPU and run it until ONNX Runtime replays it as a CUDA graph."""
    ort = require("onnxruntime", "gpu-export")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN come with PyTorch there.
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    settings = ort.SessionOptions()
    settings.add_free_dimension_override_by_name("B", 1)
    session = ort.InferenceSession(path, settings, providers=[provider])
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float16)
    binding = session.io_binding()
    binding.bind_ortvalue_input("pixel_values", ort.OrtValue.ortvalue_from_numpy(pixels, "cuda", 0))
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    for output in session.get_outputs():
        shape = [d if isinstance(d, int) else 1 for d in output.shape]
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, types[output.type], "cuda", 0)
        binding.bind_ortvalue_output(output.name, value)
    run = ort.RunOptions()
    run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    for _ in range(5):
        session.run_with_iobinding(binding, run)
    torch.cuda.synchronize()
    return session, binding, run


def _conditions(options: PruneOptions) -> dict[str, Any]:
    ort = require("onnxruntime", "export")
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name(0) if options.device == "cuda" else None
    return {
        "kind": "prune",
        "commit": done.stdout.strip() or None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": gpu or f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "onnxruntime": ort.__version__, "python": platform.python_version()},
        "command": f"python -m bench prune --device {options.device} --budget {options.budget} --runs {options.runs}",
        "threads": options.threads,
        "replays": options.replays,
        "budget": options.budget,
    }
