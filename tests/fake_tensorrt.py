"""A stand-in for TensorRT's runtime and for a CUDA device, in the processor's memory, that keeps TensorRT's rules.

What it calls an engine is a file that names a graph and its profiles; it runs the graph with ONNX Runtime on whatever lies at
the addresses that it was given. What TensorRT refuses, it refuses: a shape outside the profile, an address that was not set, a
buffer too small, a context without its profile. Captured graphs are replayed with the addresses and shapes of their capture.
"""
# ruff: noqa: D101, D102

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from leanvlm.runtime.backends import trt
from leanvlm.runtime.bundle import file_sha256
from leanvlm.runtime.engines.profiles import Limits, decoder_profiles, usual_limits, vision_profile, whole_profile
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.specs import EngineSpec, GraphSpec

VERSION = "10.9.0"
NUMPY = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}


class FakeDevice:
    """Memory by address, checked: every access must lie inside one allocation."""

    def __init__(self) -> None:
        self.stream = 7
        self.blocks: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = 0

    def allocate(self, size: int) -> int:
        block = np.full(max(size, 1), 0xFF, np.uint8)  # As fp16 and fp32 that is NaN.
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        del self.blocks[address]

    def view(self, address: int, size: int) -> np.ndarray:
        for start, block in list(self.blocks.items()):  # Another thread may free its own meanwhile.
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are outside of every allocation")

    def upload(self, address: int, values: np.ndarray) -> None:
        assert self.recording is None, "a copy from the processor's memory would be captured with its values"
        self.view(address, values.nbytes)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def download(self, values: np.ndarray, address: int) -> None:
        ctypes.memmove(values.ctypes.data, self.view(address, values.nbytes).ctypes.data, values.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        self.view(target, size)[:] = self.view(source, size)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        assert width <= min(target_pitch, source_pitch), "rows overlap"
        for row in range(rows):
            self.copy(target + row * target_pitch, source + row * source_pitch, width)

    def zero(self, address: int, size: int) -> None:
        self.view(address, size)[:] = 0

    def capture(self, work: Callable[[], None]) -> Any:
        self.recording = []
        work()
        graph, self.recording = self.recording, None
        return graph

    def launch(self, graph: Any) -> None:
        self.launches += 1
        for call in graph:
            call()

    def synchronize(self) -> None:
        assert self.recording is None, "waiting ends a capture"


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        inside = len(shape) == len(least) and all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))
        if inside:
            self.shapes[name] = tuple(shape)
        return inside

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = name in self.engine.inputs or name in self.engine.outputs
        self.addresses[name] = address
        return known and address != 0

    def execute_async_v3(self, stream: int) -> bool:
        engine, device = self.engine, self.engine.device
        free = {name for name, value in engine.inputs.items() if any(isinstance(size, str) for size in value.shape)}
        ready = set(self.addresses) == {*engine.inputs, *engine.outputs} and free <= set(self.shapes)
        if not ready or stream != device.stream:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if device.recording is not None:
            device.recording.append(lambda: self._execute(shapes, addresses))
        else:
            self._execute(shapes, addresses)
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        device, feeds = self.engine.device, {}
        for name, value in self.engine.inputs.items():
            shape = shapes.get(name) or tuple(value.shape)
            dtype = np.dtype(NUMPY[value.type])
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = device.view(addresses[name], size).view(dtype).reshape(shape).copy()
        for name, found in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            device.view(addresses[name], found.nbytes)[:] = np.ascontiguousarray(found).reshape(-1).view(np.uint8)


class FakeEngine:
    def __init__(self, description: dict[str, Any], device: FakeDevice) -> None:
        self.device, self.profiles = device, description["profiles"]
        self.session = onnxruntime.InferenceSession(description["onnx"], providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


def pretend(monkeypatch: pytest.MonkeyPatch, device: FakeDevice, sm: int) -> None:
    """Give this machine a GPU of an SM with TensorRT."""
    monkeypatch.setattr(trt, "this_sm", lambda: sm)
    monkeypatch.setattr(trt, "load_runtime", lambda library, compatible: module(device))
    monkeypatch.setattr(trt, "CudaDevice", lambda: device)


def module(device: FakeDevice) -> Any:
    """Return what `import tensorrt` would."""

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger, self.engine_host_code_allowed = logger, False

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            try:
                return FakeEngine(json.loads(data), device)
            except ValueError:
                self.logger.log(ILogger.ERROR, "the engine's magic tag does not match")
                return None

    return SimpleNamespace(__version__=VERSION, __name__="tensorrt", ILogger=ILogger, Runtime=Runtime)


def add_engines(
    bundle: Path, manifest: Manifest, sm: int, limits: Limits | None = None, **changes: Any
) -> tuple[EngineSpec, ...]:
    """Write engine files of this kind for every graph of a bundle, and return their entries for the manifest."""
    sizes = usual_limits(manifest, limits or Limits())
    entries = []
    single = changes.pop("single", False)
    shapes = (manifest.decoder, sizes, manifest.default_budget)
    profiles = (whole_profile(*shapes),) if single else decoder_profiles(*shapes)
    jobs = [(graph, graph.budget, (vision_profile(graph, sizes),)) for graph in manifest.vision]
    for graph, budget, found in [*jobs, (manifest.decoder.graph, None, profiles)]:
        entries.append(_engine(bundle, graph, budget, found, sm, changes))
    return tuple(entries)


def _engine(bundle: Path, graph: GraphSpec, budget: int | None, profiles: Any, sm: int, changes: dict[str, Any]) -> EngineSpec:
    file = f"engines/{sm}/{Path(graph.file).stem}.engine"
    path = bundle / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"onnx": str(bundle / graph.file), "profiles": profiles}), encoding="utf-8")
    entry = {
        "file": file, "engine": "tensorrt", "version": VERSION, "sm": sm, "precision": "fp16", "graph": graph.file,
        "budget": budget, "inputs": graph.inputs, "outputs": graph.outputs, "profiles": profiles, "hardware": "none",
        "version_compatible": False, "bytes": path.stat().st_size, "sha256": file_sha256(path), "seconds": 1.0,
    }  # fmt: skip
    return EngineSpec(**{**entry, **changes})
