"""ONNX Runtime: vision graphs and the decoder, on the CPU or on CUDA.

The decoder's cache is allocated once a sequence, and bound as input (past) and output (present) at the same address, so a
step appends to it in place.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import BackendError, GraphError, LeanVLMWarning
from leanvlm.runtime.manifest import DecoderSpec, GraphSpec, Manifest
from leanvlm.runtime.optional import require

Array = npt.NDArray[Any]
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
GRAPH_STAGES = ("vision", "project", "prune")
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


class OrtBackend:
    """Opens a bundle's graphs with ONNX Runtime.

    Raises:
        BackendError: ONNX Runtime is too old, or the device is not there.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: str | None, threads: int | None, prepack: bool = True
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.device = device or manifest.target
        if self.device not in PROVIDERS:
            raise BackendError(f"device {self.device!r} is not known; known: {', '.join(PROVIDERS)}")
        self.ort: Any = require("onnxruntime", EXTRAS[self.device])
        self.threads = threads
        self.prepack = prepack
        self._check_version()
        self._check_device()

    def graph(self, budget: int) -> OrtGraph:
        """Open the vision graph of a budget (image tokens per crop)."""
        spec = self.manifest.vision[budget]
        return OrtGraph(self.session(spec), spec)

    def decoder(self) -> OrtDecoder:
        """Open the decoder."""
        spec = self.manifest.decoder
        return OrtDecoder(self.ort, self.session(spec.graph), spec)

    def vision_shares(self, budget: int, pixel_values: Array, runs: int) -> dict[str, float]:
        """Return the share of each stage in a vision graph's node times, from a profiled session of its own.

        A fused node may have lost its name; it counts for the stage of the node before it.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(self.manifest.vision[budget], profile_prefix=str(Path(folder) / "nodes"))
            for _ in range(runs):
                session.run(None, {"pixel_values": pixel_values})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        spent, stage = dict.fromkeys(GRAPH_STAGES, 0.0), GRAPH_STAGES[0]
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        for event in sorted(nodes, key=lambda e: e["ts"]):
            first = event["name"].lstrip("/").split("/")[0]
            stage = first if first in spent else stage
            spent[stage] += event["dur"]
        return {name: time / max(sum(spent.values()), 1e-9) for name, time in spent.items()}

    def versions(self) -> dict[str, str]:
        """Return the version of ONNX Runtime."""
        return {"onnxruntime": str(self.ort.__version__)}

    def session(self, spec: GraphSpec, profile_prefix: str | None = None) -> Any:
        """Open a graph file as an InferenceSession, checked against its spec.

        Args:
            spec: The graph.
            profile_prefix: Path prefix of a node profile to write, or None.

        Raises:
            GraphError: ONNX Runtime refuses the file, or its inputs and outputs differ from the manifest's.
        """
        options = self.ort.SessionOptions()
        # Its errors come as exceptions, which we report; level 3 would print them too.
        options.log_severity_level = 4
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if not self.prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        try:
            session = self.ort.InferenceSession(self.folder / spec.file, options, providers=PROVIDERS[self.device])
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise GraphError(f"{spec.file} cannot be opened: {_first_line(error)}") from error
        found = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
        absent = [tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.name not in found]
        if absent:
            raise GraphError(f"{spec.file} has no {absent[0]}, which the manifest declares: export the bundle again")
        return session

    def _check_version(self) -> None:
        found, least = str(self.ort.__version__), self.manifest.min_onnxruntime
        if _version(found) < _version(least):
            raise BackendError(f"this bundle needs ONNX Runtime {least} or newer; {found} is installed")

    def _check_device(self) -> None:
        if PROVIDERS[self.device][0] not in self.ort.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime does not offer {self.device}: install 'leanvlm[{EXTRAS[self.device]}]' "
                f"on a machine that has it, or pass --device cpu"
            )
        if self.device != self.manifest.target:
            message = f"a bundle for {self.manifest.target} runs on {self.device}: expect it to be slow"
            warnings.warn(message, LeanVLMWarning, stacklevel=4)


class OrtGraph:
    """One vision graph in an ONNX Runtime session."""

    def __init__(self, session: Any, spec: GraphSpec) -> None:
        self._session = session
        self._outputs = [tensor.name for tensor in spec.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; raises BackendError if ONNX Runtime does."""
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # As above.
            raise BackendError(f"the vision graph failed: {_first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


class OrtDecoder:
    """The decoder in an ONNX Runtime session, with one preallocated cache."""

    def __init__(self, ort: Any, session: Any, spec: DecoderSpec) -> None:
        self._ort = ort
        self._session = session
        self._spec = spec
        self._dtype = np.dtype(spec.kv_dtype)
        self._positioned = any(tensor.name == "position_ids" for tensor in spec.graph.inputs)
        self._binding: Any = None
        self._capacity = 0
        self.length = 0

    def start(self, capacity: int) -> None:
        """Begin a new sequence; the cache of the last one is reused where it is large enough."""
        self.length = 0
        if self._binding is not None and capacity <= self._capacity:
            return
        spec, shape = self._spec, [1, self._spec.kv_heads, capacity, self._spec.head_dim]
        binding = self._session.io_binding()
        for layer in range(spec.layers):
            for part in ("key", "value"):
                cache = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, self._dtype, "cpu")
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", cache)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)
        binding.bind_output("logits", "cpu")
        self._binding, self._capacity = binding, capacity

    def step(self, embeddings: npt.NDArray[np.float32], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append embeddings (S, D) at positions (S,) and return the last one's logits (V,).

        A decoder of a bundle with compact positions counts by itself and is not given them.

        Raises:
            BackendError: The cache is full, or ONNX Runtime failed.
        """
        total = self.length + embeddings.shape[0]
        if total > self._capacity:
            raise BackendError(f"{total} positions do not fit a cache of {self._capacity}")
        self._binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeddings[None], dtype=self._dtype))
        if self._positioned:
            self._binding.bind_cpu_input("position_ids", positions[None])
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # As above.
            raise BackendError(f"the decoder failed: {_first_line(error)}") from error
        self.length = total
        logits: npt.NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()[0, -1].astype(np.float32, copy=False)
        return logits


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:3])


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
