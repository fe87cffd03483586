"""OpenVINO under a bundle for the processor: its vision graphs in two parts, its decoder with the cache as state.

`--provider openvino` computes tower and decoder in what the device is best at, bfloat16 on a processor that has it, and the
tower's last blocks, the projector and the stage prune in fp32; `--provider openvino:f32` computes all in fp32. Nothing is
written: compiled graphs are not kept. On other devices than the processor (`--device GPU`, `NPU`) this was not run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.openvino_graphs import BEAM, COLUMNS, GONE, ONE, STAGES, keep_state, split, stages_of
from leanvlm.runtime.backends.ort import CROPS_AT_ONCE, DATA, OrtScores, check_room
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.bundle import leads_out
from leanvlm.runtime.errors import BackendError, GraphError, InputError
from leanvlm.runtime.graph_files import graph_path
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import SavedRows
from leanvlm.runtime.specs import DecoderSpec, GraphSpec, VisionSpec

Array = npt.NDArray[Any]
Properties = dict[str, Any]
# What `--provider` takes, and the arithmetic that is asked for; None is the device's own choice.
OPENVINO: dict[str, str | None] = {"openvino": None, "openvino:f32": "f32"}
# Versions before it leave the window of an attention out of what they read, without a word.
LEAST = (2026, 4)
# Rows behind filled ones take twice the time: 606 behind 4 took 1,200 ms where 610 behind none took 600 (12 layers of 1,024).
LEAST_SHARE = 0.5
PRECISION = "INFERENCE_PRECISION_HINT"
NUMPY_NAMES = {"i64": "int64", "i32": "int32", "u8": "uint8", "f32": "float32", "f16": "float16", "boolean": "bool"}


class OpenVinoBackend:
    """Opens a bundle's graphs with OpenVINO.

    Raises:
        BackendError: OpenVINO is too old, the device is not there, or the decoder is none that it computes.
        InputError: A provider that is not known.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        device: str | None,
        threads: int | None,
        prepack: bool = True,
        provider: str = "openvino",
    ) -> None:
        if provider not in OPENVINO:
            raise InputError(f"--provider {provider!r} is not known; for OpenVINO: {', '.join(OPENVINO)}")
        self.folder = folder
        self.manifest = manifest
        self.lock = threading.RLock()
        self.resizer: Any = None
        self.ov: Any = require("openvino", "openvino")
        check_version(str(self.ov.__version__))
        self._core = self.ov.Core()
        self._where = check_device(self._core, device)
        self.device = "cpu" if self._where == "CPU" else self._where
        self._fastest = self._properties(threads, OPENVINO[provider])
        self._exact = self._properties(threads, "f32")
        if manifest.decoder.axes > 1:
            raise BackendError(
                "OpenVINO turns positions of three coordinates (M-RoPE) by wrong angles: run this bundle without --provider"
            )
        for name in manifest.files:
            if name.endswith(DATA) and leads_out(folder, folder / name):
                raise BackendError(f"{name} is a link out of the bundle, which OpenVINO does not follow: copy it with cp -rL")
        # Before any image is encoded: what OpenVINO does not take is said at once. Weights stay in the file until then.
        self._decoder = self._read(manifest.decoder.graph)
        keep_state(self._decoder, manifest.decoder)

    @property
    def crops_at_once(self) -> int:
        """The most crops that go through a vision graph in one run."""
        return CROPS_AT_ONCE

    @property
    def arithmetic(self) -> str:
        """What tower and decoder compute in: `f32`, or what the device is best at, such as `bf16`."""
        asked = self._fastest.get(PRECISION) or self._core.get_property(self._where, PRECISION).to_string()
        return str(asked)

    def graph(self, spec: GraphSpec) -> OpenVinoGraph:
        """Open a vision graph."""
        return OpenVinoGraph(self._parts(spec), spec)

    def decoder(self) -> Decoder:
        """Open the decoder."""
        spec = self.manifest.decoder
        # By default OpenVINO rounds the cache to 8 bits.
        kind = "f32" if self.arithmetic == "f32" else self.arithmetic
        properties = {**self._fastest, "KV_CACHE_PRECISION": kind} if self._where == "CPU" else self._fastest
        compiled = self._compile(self._decoder.clone(), properties, spec.graph.file)
        return Decoder(lambda capacity, kept: OpenVinoCache(self.ov, compiled, spec, capacity), "any", LEAST_SHARE)

    def vision_shares(self, spec: VisionSpec, inputs: Mapping[str, Array], runs: int) -> dict[str, float]:
        """Return the share of each stage in a vision graph's time: each part's by the clock, in it by the nodes' times."""
        graph = OpenVinoGraph(self._parts(spec, {"PERF_COUNT": True}), spec)
        spent = dict.fromkeys(STAGES, 0.0)
        for _ in range(runs):
            graph.run(inputs)
            for name, seconds in graph.seconds().items():
                spent[name] += seconds
        return {name: time / max(sum(spent.values()), 1e-9) for name, time in spent.items()}

    def misplaced(self, spec: GraphSpec, inputs: Mapping[str, Array]) -> list[str]:
        """Return nothing: a graph is compiled for one device as a whole."""
        return []

    def versions(self) -> dict[str, str]:
        """Return the version of OpenVINO, with the arithmetic."""
        return {"openvino": f"{number(str(self.ov.__version__))} ({self.arithmetic})"}

    def _properties(self, threads: int | None, precision: str | None) -> Properties:
        properties: Properties = {"PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            properties[PRECISION] = precision
        if threads is not None and self._where == "CPU":
            properties["INFERENCE_NUM_THREADS"] = threads
        return properties

    def _parts(self, spec: GraphSpec, more: Properties | None = None) -> list[_Part]:
        model = self._read(spec)
        stages = {node.get_friendly_name(): STAGES[stage] for node, stage in _with_stages(model)}
        coarse, exact = split(model)
        parts = [_Part(self._compile(coarse, {**self._fastest, **(more or {})}, spec.file), stages)]
        if exact is not None:
            parts.append(_Part(self._compile(exact, {**self._exact, **(more or {})}, spec.file), stages))
        return parts

    def _read(self, spec: GraphSpec) -> Any:
        """Read a graph file, checked against its spec.

        Raises:
            BackendError: It has operators that OpenVINO does not take.
            GraphError: It cannot be read, or its inputs and outputs differ from the manifest's.
        """
        path = graph_path(self.folder, spec.file, self.manifest.files)
        try:
            model = self._core.read_model(path)
        except Exception as error:  # OpenVINO's errors share no base of their own.
            if (refused := _refused(str(error))) is not None:
                raise BackendError(f"OpenVINO does not take {refused} of {spec.file}; run it without --provider") from error
            raise GraphError(f"{spec.file} cannot be opened: {last_line(error)}") from error
        _check_graph(spec, model)
        return model

    def _compile(self, model: Any, properties: Properties, file: str) -> Any:
        try:
            return self._core.compile_model(model, self._where, properties)
        except Exception as error:  # As above.
            raise BackendError(f"OpenVINO cannot compile {file} for {self._where}: {last_line(error)}") from error


class _Part:
    """One compiled part of a vision graph and what it is run with."""

    def __init__(self, compiled: Any, stages: Mapping[str, str]) -> None:
        self.stages = stages
        self.request = compiled.create_infer_request()
        self.inputs = [_name(port) for port in compiled.inputs]
        self.outputs = [name for port in compiled.outputs for name in port.get_names()]


class OpenVinoGraph:
    """One vision graph, in one or two parts."""

    def __init__(self, parts: Sequence[_Part], spec: GraphSpec) -> None:
        self._parts = parts
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._walls: list[float] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; raises BackendError if OpenVINO does."""
        values: dict[str, Any] = {**inputs, ONE: np.ones((), np.float32)}
        self._walls = []
        for part in self._parts:
            begin = perf_counter()
            try:
                part.request.infer({name: values[name] for name in part.inputs}, share_inputs=True)
            except Exception as error:  # As above.
                raise BackendError(f"the vision graph failed: {last_line(error)}") from error
            self._walls.append(perf_counter() - begin)
            values |= {name: part.request.get_tensor(name).data for name in part.outputs}
        # The next run writes over what the requests hold.
        return {name: np.array(values[name]) for name in self._outputs}

    def seconds(self) -> dict[str, float]:
        """Return what each stage took of the run before, of graphs that were compiled to count: nodes' shares of each part."""
        total = dict.fromkeys(STAGES, 0.0)
        for part, wall in zip(self._parts, self._walls, strict=True):
            spent, nodes = dict.fromkeys(STAGES, 0.0), part.request.get_profiling_info()
            stage = next((part.stages[node.node_name] for node in nodes if node.node_name in part.stages), STAGES[0])
            for node in nodes:
                # A node that optimisations made has a name of its own; it counts for the stage of the node before it.
                stage = part.stages.get(node.node_name, stage)
                spent[stage] += node.real_time.total_seconds()
            for name, time in spent.items():
                total[name] += wall * time / max(sum(spent.values()), 1e-9)
        return total


class OpenVinoCache:
    """A sequence's keys and values: the state of an infer request of its own."""

    def __init__(self, ov: Any, compiled: Any, spec: DecoderSpec, capacity: int) -> None:
        self.capacity = capacity
        self._ov = ov
        self._request = compiled.create_infer_request()
        self._inputs = {_name(port) for port in compiled.inputs}
        self._spec, self._dtype = spec, np.dtype(spec.kv_dtype)
        self._beam = np.zeros(1, np.int32)
        self._prompt: Prompt | None = None
        self._embeddings: Array = np.empty((0, spec.row_width), self._dtype)
        self.length = 0
        self._columns: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Put a prompt together, for a new sequence or behind the rows that stay."""
        if past == 0:
            self._request.reset_state()
            self._columns = np.empty(0, np.int64)
        elif past < self.length:
            self._cut(past)
        self._prompt, self._embeddings, self.length = prompt, prompt.embeddings(self._dtype), past

    def _cut(self, past: int) -> None:
        """Go back to the first rows: the others stay where they are, seen by nothing, until they are too many."""
        left = np.where(self._columns < past, self._columns, GONE)
        # Masks that the graph makes itself count the cache's rows.
        if self._spec.named("last_seen") or np.count_nonzero(left == GONE) > past // 2:
            self.restore(self.saved(past))
        else:
            self._columns = left

    def saved(self, count: int) -> SavedRows:
        """Return copies of the first rows."""
        rows = np.flatnonzero(self._columns < count)
        return SavedRows([state.state.data[:, :, rows] for state in self._request.query_state()])

    def restore(self, saved: SavedRows) -> None:
        """Make these rows all that there are."""
        for state, rows in zip(self._request.query_state(), saved.rows, strict=True):
            state.state = self._ov.Tensor(rows)
        self.length = saved.rows[0].shape[2]
        self._columns = np.arange(self.length)

    def prefill(self) -> OrtScores:
        """Read the loaded prompt behind the rows that are filled."""
        assert self._prompt is not None, "load comes before prefill"
        return self._append(self._embeddings, self._prompt.positions, self._prompt.last_seen)

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> OrtScores:
        """Append one embedding (D,) at a position."""
        place = np.full((self._spec.axes, 1), position, np.int64)
        return self._append(embedding[None], place, np.array([self.length]))

    def _append(self, embeddings: Array, positions: npt.NDArray[np.int64], last_seen: npt.NDArray[np.int64]) -> OrtScores:
        """Append embeddings (S, D) at positions (axes, S), which see rows up to `last_seen` (S,); return the last one's scores.

        Raises:
            BackendError: The cache is full, or OpenVINO failed.
        """
        total = self.length + len(embeddings)
        check_room(total, self.capacity)
        given = {
            "embeddings": np.ascontiguousarray(embeddings[None], self._dtype),
            "positions": as_input(positions),
            "last_seen": last_seen[None],
            "mask": np.ones((1, total), np.int64),
        }
        roles = self._spec.roles.items()
        columns = np.concatenate([self._columns, np.arange(self.length, total)])
        feeds = {name: given[role] for name, role in roles if role in given and name in self._inputs}
        feeds |= {BEAM: self._beam, COLUMNS: columns}
        try:
            self._request.infer(feeds, share_inputs=True)
        except Exception as error:  # As above.
            raise BackendError(f"the decoder failed: {last_line(error)}") from error
        self.length, self._columns = total, columns
        return OrtScores(np.array(self._request.get_tensor("logits").data[0, -1], np.float32))


def check_device(core: Any, asked: str | None) -> str:
    """Return OpenVINO's name of a device; raise BackendError with what there is where it is not there."""
    name = (asked or "CPU").upper()
    found = [str(device) for device in core.available_devices]
    if not any(name in (device, device.partition(".")[0]) for device in found):
        raise BackendError(f"OpenVINO finds no device {asked!r}; it has {', '.join(found) or 'none'}")
    return name


def check_version(version: str) -> None:
    """Raise BackendError if an OpenVINO is older than what was tested."""
    digits = [int(part) for part in number(version).split(".")[:2]]
    if tuple(digits) < LEAST:
        least = ".".join(map(str, LEAST))
        raise BackendError(f"bundles need OpenVINO {least} or newer; {number(version)} is installed")


def number(version: str) -> str:
    """Return the number of a version such as `2026.4.1-22982-e213a147257-releases/2026/4`."""
    return version.partition("-")[0]


def last_line(error: Exception) -> str:
    """Return the last line of what OpenVINO says, which comes behind the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _refused(message: str) -> str | None:
    """Return the operators that an error says the front end does not take, or None where it says something else."""
    known = "No conversion rule found for operations: "
    for line in message.splitlines():
        if known in line:
            return line.partition(known)[2].strip()
        if line.startswith("-- ") and " with a message:" in line:
            return line[3:].partition(" with a message:")[0] + " as it is"
    return None


def _check_graph(spec: GraphSpec, model: Any) -> None:
    """Compare a graph's inputs and outputs with the manifest's: names, types, and sizes that both know.

    Raises:
        GraphError: They differ.
    """
    found = {name: port for port in (*model.inputs, *model.outputs) for name in port.get_names()}
    for tensor in (*spec.inputs, *spec.outputs):
        port = found.get(tensor.name)
        if port is None:
            raise GraphError(f"{spec.file} has no {tensor.name}, which the manifest declares: export the bundle again")
        kind = NUMPY_NAMES.get(port.get_element_type().to_string(), port.get_element_type().to_string())
        sizes = [size.get_length() if size.is_static else None for size in port.partial_shape]
        pairs = zip(sizes, tensor.shape, strict=False)
        differ = any(a is not None and isinstance(b, int) and a != b for a, b in pairs)
        if differ or len(sizes) != len(tensor.shape) or kind != tensor.dtype:
            raise GraphError(
                f"{tensor.name} of {spec.file} is {kind} {sizes}, where the manifest declares {tensor.dtype} "
                f"{list(tensor.shape)}: export the bundle again"
            )


def _with_stages(model: Any) -> list[tuple[Any, int]]:
    stages = stages_of(model)
    return [(node, stages[node.get_name()]) for node in model.get_ordered_ops()]


def _name(port: Any) -> str:
    return str(next(iter(sorted(port.get_names()))))
