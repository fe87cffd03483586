"""ONNX Runtime on an NVIDIA GPU, close to the hardware: tensors stay on the device, and graphs are replayed.

Every input, output and cache is allocated once and bound to one address, so that ONNX Runtime can capture a run as a CUDA graph
and replay it: one capture for each batch size of a vision graph, one for each length of prompt, one for the decode step.
A cache that goes with its sequence is run without: what was captured for it would stay in ONNX Runtime.
Only token ids, their embeddings and a mask cross the bus while an answer is made.

A prompt is read at the next length of a ladder (`bucket`), so that few graphs serve all prompts. The padding is at its
end, behind everything: attention is causal, so it changes nothing before it; the logits are those of the last real position,
and the first generated token overwrites the first position of padding in the cache.

The same code runs a bundle for cuda on the processor when that is asked for, without graphs and without padding.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.attention import step_kernels
from leanvlm.runtime.backends.cuda_cache import CudaCache, CudaDecoder, decoder_tensors
from leanvlm.runtime.backends.cuda_rows import CudaRows
from leanvlm.runtime.backends.device import DeviceGraph, Slot, batch_shape
from leanvlm.runtime.backends.ort import GRAPH_STAGES, PROVIDERS, OrtBackend
from leanvlm.runtime.backends.ort_memory import DeviceMemory, preload_libraries
from leanvlm.runtime.backends.placement import misplaced_nodes
from leanvlm.runtime.backends.resizer import DeviceResizer, probe
from leanvlm.runtime.backends.rows import Rows
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.crops import PIXELS
from leanvlm.runtime.errors import BackendError, GraphError
from leanvlm.runtime.machine.gpu import free_memory, gpus, misfit
from leanvlm.runtime.machine.kernels import without_kernels
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.specs import DecoderSpec, GraphSpec, VisionSpec

Array = npt.NDArray[Any]
# Each number of crops keeps tensors and a captured graph; 4 x 4 tiles and a thumbnail are 17 crops, 4 x 5 are 21.
CROPS_AT_ONCE = 24
# A cache for a short question and answer, to judge whether a model fits before it is loaded.
USUAL_POSITIONS = 512
# While ONNX Runtime captures, no other thread of the process may allocate on the GPU, so sessions share one lock.
GPU_LOCK = threading.RLock()


class CudaBackend(OrtBackend):
    """Opens a bundle for cuda.

    Raises:
        BackendError: As `OrtBackend`; or the installed library has no kernels for the GPU, or its memory is too small.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: str | None, threads: int | None, prepack: bool = True
    ) -> None:
        super().__init__(folder, manifest, device=device, threads=threads, prepack=prepack)
        self._memory = DeviceMemory(self.ort, self.device)
        if self.device == "cuda":
            self.lock = GPU_LOCK
            self._check_kernels()
            self._check_memory()
            preload_libraries(self.ort)
            # On the processor Pillow is faster.
            self.resizer = self.new_resizer()

    @property
    def crops_at_once(self) -> int:
        """The most crops that go through a vision graph in one run."""
        return super().crops_at_once if self.device == "cpu" else CROPS_AT_ONCE

    def graph(self, spec: GraphSpec) -> DeviceGraph:
        """Open a vision graph."""
        return self._graph(spec)

    def decoder(self) -> Decoder:
        """Open the decoder and the graph that puts prompts together."""
        spec, found = self.manifest.decoder, gpus() if self.device == "cuda" else []
        with step_kernels(spec, found[0] if found else None):
            opened = self._open_decoder()
        return Decoder(lambda capacity, kept: CudaCache(opened, capacity, kept), "end" if spec.states else "any")

    def rows(self, count: int, capacity: int) -> Rows:
        """Open the decoder for several sequences, with ONNX Runtime's choice of kernels.

        On an H100 cuDNN's attention, which `step_kernels` prefers for one, gives rows of a run tokens that differ from run to
        run: of 8 answers of 64 tokens (7B, random weights) 5 or 6 were as each alone. With XQA all 8 are, and of 16 six; a step
        takes 1 % longer at one row, 5 % at 8.
        """
        return CudaRows(self._open_decoder(), count, capacity)

    def _open_decoder(self) -> CudaDecoder:
        spec, splice = self.manifest.decoder, self.manifest.splice
        if splice is None:
            raise GraphError("this bundle has no splice graph: export it again")
        return CudaDecoder(self._memory, self.session(spec.graph), self.session(splice, replayed=False), spec, count(1))

    def new_resizer(self) -> DeviceResizer | None:
        """Return what cuts pictures where the graphs run; None for a bundle that has no graphs for it."""
        specs = {spec.first: spec for spec in self.manifest.resize}
        if len(specs) < 2:
            return None
        # Opened when first used: most pictures need but one of the two.
        sessions = {first: lru_cache(partial(self.session, spec, replayed=False)) for first, spec in specs.items()}
        return DeviceResizer(self._memory, sessions, self.crops_at_once)

    def session(self, spec: GraphSpec, *, profile_prefix: str | None = None, replayed: bool = True) -> Any:
        """Open a graph file; raises BackendError where ONNX Runtime would quietly go on without the GPU."""
        session = super().session(spec, profile_prefix=profile_prefix, replayed=replayed)
        if PROVIDERS[self.device] not in session.get_providers():
            raise BackendError("ONNX Runtime cannot use the GPU; `leanvlm doctor` says what is missing (or pass --device cpu)")
        return session

    def providers(self, spec: GraphSpec, replayed: bool, options: Any) -> list[Any] | None:
        """Return the execution providers, with CUDA graphs or without."""
        if self.device == "cpu":
            return super().providers(spec, replayed, options)
        settings = {
            # The arena would otherwise double at every extension.
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": "1" if replayed else "0",
        }
        return [(PROVIDERS["cuda"], settings), PROVIDERS["cpu"]]

    def vision_shares(self, spec: VisionSpec, inputs: Mapping[str, Array], runs: int) -> dict[str, float]:
        """Return the share of each stage in a vision graph's time: what it takes longer than the graph that ends before it."""
        if self.device == "cpu":
            return super().vision_shares(spec, inputs, runs)
        cuts = [self.manifest.stage_graphs(spec.shape)[stage] for stage in GRAPH_STAGES[:-1]]
        ends = [self._median_ms(graph, inputs, runs) for graph in (*cuts, spec)]
        spent = [max(end - start, 0.0) for start, end in zip([0.0, *ends], ends, strict=False)]
        return {stage: time / sum(spent) for stage, time in zip(GRAPH_STAGES, spent, strict=True)}

    def _median_ms(self, spec: GraphSpec, inputs: Mapping[str, Array], runs: int) -> float:
        graph, times = self._graph(spec), []
        graph.run(inputs)
        for _ in range(4 * runs):
            begin = perf_counter()
            graph.replay(len(inputs[PIXELS]))
            times.append(1e3 * (perf_counter() - begin))
        return median(times)

    def misplaced(self, spec: GraphSpec, inputs: Mapping[str, Array]) -> list[str]:
        """Return the nodes of a vision graph, the decoder and resizing that run on the processor, shape arithmetic aside."""
        if self.device == "cpu":
            return []
        decoder = self.manifest.decoder
        events = self.node_events(spec, inputs)
        events += self.node_events(decoder.graph, _decoder_probe(decoder))
        for resize in self.manifest.resize:
            events += self.node_events(resize, probe())
        return misplaced_nodes(events, PROVIDERS[self.device])

    def _graph(self, spec: GraphSpec) -> DeviceGraph:
        return DeviceGraph(spec, self.lock, partial(_vision_slot, self._memory, self.session(spec), spec))

    def _check_kernels(self) -> None:
        """Refuse a GPU on which ONNX Runtime would open the bundle and fail at the first node."""
        found = gpus()
        problem = without_kernels(self.ort, found[0]) if found else None
        if problem:
            raise BackendError(f"{problem}, or pass --device cpu")

    def _check_memory(self) -> None:
        found = free_memory()
        if found is None:
            return
        spec, files = self.manifest.decoder, self.manifest.files
        weights = sum(size.bytes for name, size in files.items() if name.endswith(".data"))
        cache = USUAL_POSITIONS * 2 * spec.layers * spec.kv_heads * spec.head_dim * np.dtype(spec.kv_dtype).itemsize
        message = misfit(weights, cache, found[0], self.manifest.precision)
        if message:
            raise BackendError(message)


def _vision_slot(memory: DeviceMemory, session: Any, spec: GraphSpec, batch: int) -> Slot:
    """Return the slot of a vision graph for a batch size."""
    tensors = (*spec.inputs, *spec.outputs)
    buffers = {tensor.name: memory.empty(batch_shape(tensor, batch), tensor.dtype) for tensor in tensors}
    binding = session.io_binding()
    for tensor in spec.inputs:
        binding.bind_ortvalue_input(tensor.name, buffers[tensor.name].value)
    for tensor in spec.outputs:
        binding.bind_ortvalue_output(tensor.name, buffers[tensor.name].value)
    return memory.slot(session, binding, buffers, batch, "the vision graph")


def _decoder_probe(spec: DecoderSpec, length: int = 8) -> dict[str, Array]:
    """Return inputs with which every node of a decoder runs once."""
    caches = (1, spec.kv_heads, length, spec.head_dim)
    known = {name: np.zeros(shape, dtype) for name, shape, dtype in decoder_tensors(spec, sequence=length, capacity=length)}
    known["attention_mask"] = np.ones((1, length), np.int64)
    known |= {name: np.zeros(spec.state_shape(name), spec.kv_dtype) for name in spec.states}
    return {
        tensor.name: known[tensor.name] if tensor.name in known else np.zeros(caches, spec.kv_dtype)
        for tensor in spec.graph.inputs
    }
