"""ONNX Runtime on the processor: vision graphs and the decoder; and what its backend for GPUs shares with it.

A cache of the decoder is bound as input (past) and output (present) at the same address, so a step appends to it in place.
"""

from __future__ import annotations

import json
import tempfile
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.rows import Rows
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.bundle import leads_out
from leanvlm.runtime.errors import BackendError, GraphError, LeanVLMWarning
from leanvlm.runtime.graph_files import graph_path
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import SavedRows
from leanvlm.runtime.sampling import highest
from leanvlm.runtime.specs import DecoderSpec, GraphSpec, VisionSpec

if TYPE_CHECKING:
    from leanvlm.runtime.backends import Graph

Array = npt.NDArray[Any]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
GRAPH_STAGES = ("vision", "project", "prune")
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
# A processor gains nothing from more, and the attention of 17 crops of 1,024 tokens and 16 heads would take 1.1 GB at once.
CROPS_AT_ONCE = 4
# Files of weights end so.
DATA = ".data"


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
        self.lock = threading.RLock()
        self.ort: Any = require("onnxruntime", EXTRAS[self.device])
        self.threads = threads
        self.prepack = prepack
        self.resizer: Any = None
        check_version(self.ort, manifest.min_onnxruntime)
        self._check_device()

    @property
    def crops_at_once(self) -> int:
        """The most crops that go through a vision graph in one run."""
        return CROPS_AT_ONCE

    def graph(self, spec: GraphSpec) -> Graph:
        """Open a vision graph."""
        return OrtGraph(self.session(spec), spec)

    def decoder(self) -> Decoder:
        """Open the decoder."""
        spec = self.manifest.decoder
        session = self.session(spec.graph)
        return Decoder(lambda capacity, kept: OrtCache(self.ort, session, spec, capacity), "end" if spec.states else "any")

    def rows(self, count: int, capacity: int) -> Rows:
        """Open the decoder for several sequences; see `Backend`."""
        from leanvlm.runtime.backends.ort_rows import OrtRows

        spec = self.manifest.decoder
        return OrtRows(self.ort, self.session(spec.graph), spec, count, capacity)

    def vision_shares(self, spec: VisionSpec, inputs: Mapping[str, Array], runs: int) -> dict[str, float]:
        """Return the share of each stage in a vision graph's node times, from a profiled session of its own.

        A fused node may have lost its name; it counts for the stage of the node before it.
        """
        spent, stage = dict.fromkeys(GRAPH_STAGES, 0.0), GRAPH_STAGES[0]
        for event in self.node_events(spec, inputs, runs):
            first = event["name"].lstrip("/").split("/")[0]
            stage = first if first in spent else stage
            spent[stage] += event["dur"]
        return {name: time / max(sum(spent.values()), 1e-9) for name, time in spent.items()}

    def misplaced(self, spec: GraphSpec, inputs: Mapping[str, Array]) -> list[str]:
        """Return nothing: on the processor every node is where it belongs."""
        return []

    def node_events(self, spec: GraphSpec, inputs: Mapping[str, Array], runs: int = 1) -> list[dict[str, Any]]:
        """Run a graph in a profiled session of its own and return the profiler's entry of each node, in the order of time."""
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(spec, profile_prefix=str(Path(folder) / "nodes"))
            for _ in range(runs):
                session.run(None, dict(inputs))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        return sorted(nodes, key=lambda event: float(event["ts"]))

    def versions(self) -> dict[str, str]:
        """Return the version of ONNX Runtime."""
        return {"onnxruntime": str(self.ort.__version__)}

    def session(self, spec: GraphSpec, *, profile_prefix: str | None = None, replayed: bool = True) -> Any:
        """Open a graph file as an InferenceSession, checked against its spec.

        Args:
            spec: The graph.
            profile_prefix: Path prefix of a node profile to write, or None.
            replayed: Capture the graph's runs and replay them, on a device that can; a profiled one is not captured.

        Raises:
            GraphError: ONNX Runtime refuses the file, or its inputs and outputs differ from the manifest's.
        """
        path = graph_path(self.folder, spec.file, self.manifest.files)
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
        providers = self.providers(spec, replayed and profile_prefix is None, options)
        linked = self._add_linked_data(spec, options)
        try:
            session = self.ort.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise GraphError(f"{spec.file} cannot be opened: {first_line(error)}") from error
        del linked
        check_graph(spec, session)
        return session

    def providers(self, spec: GraphSpec, replayed: bool, options: Any) -> list[Any] | None:
        """Return the execution providers of a graph's session, the preferred one first; None where `options` names them."""
        return [PROVIDERS["cpu"]]

    def _add_linked_data(self, spec: GraphSpec, options: Any) -> list[Array]:
        """Hand over weights that links lead elsewhere to, and return what must stay alive until the session is made.

        From 1.24 on ONNX Runtime itself reads data only from the graph's folder, as it stands or with links followed.
        """
        beside = (self.folder / spec.file).resolve().parent
        paths = {name: self.folder / name for name in self.manifest.files if name.endswith(DATA)}
        mapped = {
            name: np.memmap(path, np.uint8, "r")
            for name, path in paths.items()
            if leads_out(self.folder, path) and path.resolve().parent != beside
        }
        if mapped and hasattr(options, "add_external_initializers_from_files_in_memory"):
            sizes = [data.nbytes for data in mapped.values()]
            options.add_external_initializers_from_files_in_memory(list(mapped), list(mapped.values()), sizes)
        return list(mapped.values())

    def _check_device(self) -> None:
        if PROVIDERS[self.device] not in self.ort.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime does not offer {self.device}: install 'leanvlm[{EXTRAS[self.device]}]' "
                f"on a machine that has it, or pass --device cpu"
            )
        if self.device != self.manifest.target:
            if self.manifest.target == "cpu":
                raise BackendError(f"a bundle for cpu does not run on {self.device}; export it with --target {self.device}")
            self._warn_of_device()

    def _warn_of_device(self) -> None:
        message = f"a bundle for {self.manifest.target} runs on {self.device}: expect it to be slow"
        warnings.warn(message, LeanVLMWarning, stacklevel=6)


ORT_TYPES = {"float32": "float", "float64": "double"}
"""NumPy's names of types that ONNX Runtime calls otherwise."""


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
            raise BackendError(f"the vision graph failed: {first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


@dataclass(frozen=True)
class OrtScores:
    """The logits (V,) of one position, in the processor's memory."""

    values: npt.NDArray[np.float32]

    def greedy(self) -> int:
        """Return the most probable token; raises BackendError if no score is finite."""
        return highest(self.values)

    def logits(self) -> npt.NDArray[np.float32]:
        """Return them."""
        return self.values

    def wait(self) -> None:
        """Return: they are there."""


class OrtCache:
    """A cache bound to the decoder's session in ONNX Runtime."""

    def __init__(
        self, ort: Any, session: Any, spec: DecoderSpec, capacity: int, places: Mapping[str, Array] | None = None
    ) -> None:
        """Allocate it.

        Args:
            ort: ONNX Runtime.
            session: Of the decoder.
            spec: Of the decoder.
            capacity: Positions.
            places: Keys and values (1, kv_heads, capacity, head_dim) that somebody else has allocated.
        """
        self.capacity = capacity
        self._session = session
        self._dtype = np.dtype(spec.kv_dtype)
        self._positioned, self._axes = bool(spec.named("positions")), spec.axes
        self._masked = bool(spec.named("last_seen"))
        self._prompt: Prompt | None = None
        self._embeddings: npt.NDArray[np.floating[Any]] = np.empty((0, spec.row_width), np.float32)
        self.length = 0
        shape = [1, spec.kv_heads, capacity, spec.head_dim]
        self._binding = session.io_binding()
        self._caches: list[Any] = []
        for past, present in spec.caches.items():
            if places is None:
                cache = ort.OrtValue.ortvalue_from_shape_and_type(shape, self._dtype, "cpu")
            else:
                # On the processor it is the array itself, not a copy.
                cache = ort.OrtValue.ortvalue_from_numpy(places[past], "cpu")
            self._caches.append(cache)
            self._binding.bind_ortvalue_input(past, cache)
            self._binding.bind_ortvalue_output(present, cache)
        # Of each state what a run reads, and what replaces it.
        shapes, make = {name: [*spec.state_shape(name)] for name in spec.states}, ort.OrtValue.ortvalue_from_shape_and_type
        self._states = [[make(size, self._dtype, "cpu") for size in shapes.values()] for _ in range(2)]
        self._state_names = spec.states
        self._bind_states()
        # The last of the outputs.
        self._binding.bind_output("logits", "cpu")

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Put a prompt together, for a new sequence or behind the rows that stay."""
        self._prompt, self._embeddings, self.length = prompt, prompt.embeddings(), past
        for state in self._states[0] if past == 0 else ():
            state.update_inplace(np.zeros(state.shape(), self._dtype))

    def saved(self, count: int) -> SavedRows:
        """Return copies of the first rows, and of the states."""
        rows = [cache.numpy()[:, :, :count].copy() for cache in self._caches]
        return SavedRows(rows, [state.numpy().copy() for state in self._states[0]])

    def restore(self, saved: SavedRows) -> None:
        """Fill the first rows."""
        for cache, rows in zip(self._caches, saved.rows, strict=True):
            whole = np.zeros(cache.shape(), self._dtype)
            whole[:, :, : rows.shape[2]] = rows
            cache.update_inplace(whole)
        for state, values in zip(self._states[0], saved.states, strict=True):
            state.update_inplace(values)
        self.length = saved.rows[0].shape[2]

    def prefill(self) -> OrtScores:
        """Read the loaded prompt."""
        assert self._prompt is not None, "load comes before prefill"
        return self._append(self._embeddings, self._prompt.positions, self._prompt.last_seen)

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> OrtScores:
        """Append one embedding (D,) at a position."""
        return self._append(embedding[None], np.full((self._axes, 1), position, np.int64), np.array([self.length]))

    def _append(
        self,
        embeddings: npt.NDArray[np.floating[Any]],
        positions: npt.NDArray[np.int64],
        last_seen: npt.NDArray[np.int64],
    ) -> OrtScores:
        """Append embeddings (S, D) at positions (axes, S), which see rows up to `last_seen` (S,); return the last one's scores.

        A decoder of a bundle with compact positions counts by itself and is not given them; a causal one is not told what
        they see.

        Raises:
            BackendError: The cache is full, or ONNX Runtime failed.
        """
        total = self.length + embeddings.shape[0]
        check_room(total, self.capacity)
        self._binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeddings[None], dtype=self._dtype))
        if self._positioned:
            self._binding.bind_cpu_input("position_ids", as_input(positions))
        if self._masked:
            self._binding.bind_cpu_input("last_seen", last_seen[None])
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        self._bind_states()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # As above.
            raise BackendError(f"the decoder failed: {first_line(error)}") from error
        self.length = total
        self._states.reverse()
        return OrtScores(self._binding.get_outputs()[-1].numpy()[0, -1].astype(np.float32, copy=False))

    def _bind_states(self) -> None:
        for (past, present), before, after in zip(self._state_names.items(), *self._states, strict=True):
            self._binding.bind_ortvalue_input(past, before)
            self._binding.bind_ortvalue_output(present, after)


def check_graph(spec: GraphSpec, session: Any) -> None:
    """Compare a session's inputs and outputs with the manifest's: names, types, and sizes that both know.

    Raises:
        GraphError: They differ.
    """
    found = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
    for tensor in (*spec.inputs, *spec.outputs):
        value = found.get(tensor.name)
        if value is None:
            raise GraphError(f"{spec.file} has no {tensor.name}, which the manifest declares: export the bundle again")
        pairs = zip(value.shape, tensor.shape, strict=False)
        differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if (
            differ
            or len(value.shape) != len(tensor.shape)
            or value.type != f"tensor({ORT_TYPES.get(tensor.dtype, tensor.dtype)})"
        ):
            raise GraphError(
                f"{tensor.name} of {spec.file} is {value.type} {value.shape}, where the manifest declares {tensor.dtype} "
                f"{list(tensor.shape)}: export the bundle again"
            )
    given = {tensor.name for tensor in spec.inputs}
    stranger = next((value.name for value in session.get_inputs() if value.name not in given), None)
    if stranger is not None:
        raise GraphError(f"{spec.file} takes {stranger}, which the manifest does not declare: export the bundle again")


def check_version(ort: Any, least: str) -> None:
    """Raise BackendError if an ONNX Runtime is older than a bundle asks for."""
    found = str(ort.__version__)
    if _version(found) < _version(least):
        raise BackendError(f"this bundle needs ONNX Runtime {least} or newer; {found} is installed")


def check_room(positions: int, capacity: int) -> None:
    """Raise BackendError if a sequence of so many positions does not fit a cache."""
    if positions > capacity:
        raise BackendError(f"{positions} positions do not fit a cache of {capacity}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:3])


def first_line(error: Exception) -> str:
    """Return the first line of what ONNX Runtime says."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
