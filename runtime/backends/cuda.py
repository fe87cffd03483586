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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ahead import Flight
from leanvlm.runtime.backends.attention import step_kernels
from leanvlm.runtime.backends.device import DeviceBuffer, DeviceGraph, DeviceRows, DeviceScores, Slot, batch_shape
from leanvlm.runtime.backends.ort import GRAPH_STAGES, PROVIDERS, OrtBackend, check_room, first_line
from leanvlm.runtime.backends.ort_memory import UNCAPTURED, DeviceMemory, OrtBuffer, preload_libraries
from leanvlm.runtime.backends.packed import PackedTensors
from leanvlm.runtime.backends.placement import misplaced_nodes
from leanvlm.runtime.backends.resizer import DeviceResizer, probe
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.backends.thread import Job
from leanvlm.runtime.crops import PIXELS
from leanvlm.runtime.errors import BackendError, GraphError
from leanvlm.runtime.machine.gpu import free_memory, gpus, misfit
from leanvlm.runtime.machine.kernels import without_kernels
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.specs import DecoderSpec, GraphSpec, VisionSpec

Array = npt.NDArray[Any]
# Prompts up to FINE positions are padded to a multiple of 8, which tensor cores like; longer ones to a multiple of COARSE.
FINE, COARSE = 256, 64
# What a token is chosen by, of a decoder's outputs.
BEST = ("next_token", "top_logit")
# Lengths of prompts whose tensors are kept.
PROMPT_SLOTS = 8
# ONNX Runtime keeps every graph that it captures, also of a length whose tensors went, so prompts behind these go without.
MAX_CAPTURES = 64
# Each number of crops keeps tensors and a captured graph; 4 x 4 tiles and a thumbnail are 17 crops, 4 x 5 are 21.
CROPS_AT_ONCE = 24
# A cache for a short question and answer, to judge whether a model fits before it is loaded.
USUAL_POSITIONS = 512
# While ONNX Runtime captures, no other thread of the process may allocate on the GPU, so sessions share one lock.
GPU_LOCK = threading.RLock()


def bucket(length: int) -> int:
    """Return the padded length at which a prompt of `length` positions is read."""
    step = 8 if length <= FINE else COARSE
    return -(-length // step) * step


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
        spec, splice = self.manifest.decoder, self.manifest.splice
        if splice is None:
            raise GraphError("this bundle has no splice graph: export it again")
        found = gpus() if self.device == "cuda" else []
        with step_kernels(spec, found[0] if found else None):
            session = self.session(spec.graph)
        opened = CudaDecoder(self._memory, session, self.session(splice, replayed=False), spec, count(1))
        return Decoder(lambda capacity, kept: CudaCache(opened, capacity, kept), "end" if spec.states else "any")

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


@dataclass(frozen=True)
class CudaDecoder:
    """The decoder and the graph that puts prompts together, opened; what its caches share.

    Attributes:
        memory: Where tensors live.
        session: The decoder.
        splice: The graph that puts prompts together.
        spec: The decoder's.
        ids: Of captured graphs, each given once: ONNX Runtime keeps what it captured for one.
    """

    memory: DeviceMemory
    session: Any
    splice: Any
    spec: DecoderSpec
    ids: Iterator[int]


@dataclass(frozen=True)
class DecoderSlot(Slot):
    """The decoder's tensors for inputs of one length; what crosses the bus in every run is packed.

    Attributes:
        inputs: Mask, positions, and of a step the embedding.
        results: The best token and its logit.
    """

    inputs: PackedTensors
    results: PackedTensors

    def best(self) -> tuple[int, float]:
        """Fetch the token that the last run found best, and its logit."""
        self.results.fetch()
        token, logit = (self.results.values[name].item() for name in BEST)
        return int(token), float(logit)


class CudaCache:
    """A cache with its tensors; prompts of one padded length share a captured graph, and so do all steps.

    States are replaced at every run, so there are two buffers of each, which take turns at being read and written, and two
    graphs of a step. What is read behind a prompt's end would change them: prompts of such decoders are not padded.
    """

    def __init__(self, decoder: CudaDecoder, capacity: int, kept: bool) -> None:
        self.capacity = capacity
        self._decoder = decoder
        self._memory = decoder.memory
        self._spec = spec = decoder.spec
        self._captured = kept
        self._dtype = np.dtype(spec.kv_dtype)
        self._positioned = bool(spec.named("positions"))
        self._caches: dict[str, OrtBuffer] = {}
        self._slots: dict[tuple[int, int], DecoderSlot] = {}
        self._states = [
            {name: self._memory.empty(spec.state_shape(name), self._dtype) for name in spec.states} for _ in range(2)
        ]
        # Which of the two is read next.
        self._turn = 0
        self._last: DecoderSlot | None = None
        self._flight: Flight | None = None
        self._prompt: Prompt | None = None
        self.length = self._past = 0
        shape = (1, spec.kv_heads, capacity, spec.head_dim)
        for name in spec.caches:
            # Whatever lies in fresh memory may be NaN, which even a weight of zero lets through.
            self._caches[name] = cache = self._memory.empty(shape, self._dtype)
            cache.fill(np.zeros(shape, self._dtype))

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Put a prompt together on the device, for a new sequence or behind the rows that stay.

        The text's rows go up, the images' are there.
        """
        check_room(past + len(prompt), self.capacity)
        self.settle()
        self._prompt, self.length, self._past = prompt, past, past
        if past == 0:
            self._turn = 0
            for name, state in self._states[0].items():
                state.fill(np.zeros(self._spec.state_shape(name), self._dtype))
        slot = self._slot(self._padded(len(prompt)))
        if "inputs_embeds" in slot.inputs.values:
            # All but one row is there already, and is sent as a step's.
            slot.inputs.values["inputs_embeds"][0] = prompt.embeddings(self._dtype)
            return
        target, text = slot.buffers["inputs_embeds"], prompt.text.astype(self._dtype, copy=False)
        shared = _shared_features(prompt)
        if shared is None:
            # No image, or images of several runs, as in a chat: the processor puts them together.
            whole = np.zeros((1, self._padded(len(prompt)), self._spec.row_width), self._dtype)
            whole[0, : len(prompt)] = prompt.embeddings(self._dtype)
            target.fill(whole)
            return
        binding = self._decoder.splice.io_binding()
        binding.bind_cpu_input("text", text)
        count, width = shared.shape[0] * shared.shape[1], shared.shape[2]
        binding.bind_input("images", self._memory.device, 0, self._dtype, (count, width), shared.address)
        index = np.zeros(self._padded(len(prompt)), np.int64)
        index[: len(prompt)] = prompt.index
        binding.bind_cpu_input("index", index)
        binding.bind_output("inputs_embeds", self._memory.device, 0, self._dtype, target.shape, target.address)
        try:
            self._decoder.splice.run_with_iobinding(binding)
        except Exception as error:  # As above.
            raise BackendError(f"the splice graph failed: {first_line(error)}") from error

    def prefill(self) -> DeviceScores:
        """Read the loaded prompt, padded to its bucket."""
        assert self._prompt is not None, "load comes before prefill"
        length, padded = len(self._prompt), self._padded(len(self._prompt))
        slot = self._slot(padded)
        positions = np.zeros((self._spec.axes, padded), np.int64)
        positions[:, :length] = self._prompt.positions
        slot.buffers["last_position"].fill(np.array([length - 1], np.int64))
        self._send(slot, self._past + padded, positions)
        slot.run()
        self.length = self._past + length
        return self._scores(slot)

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> DeviceScores:
        """Append one embedding (D,) at a position."""
        check_room(self.length + 1, self.capacity)
        self.settle()
        slot = self._slot(1)
        self._step(slot, embedding, position, self.length)
        self.length += 1
        return self._scores(slot)

    def begin(self, scores: DeviceScores, row: Callable[[int], Array], position: int, ends: Collection[int]) -> Flight | None:
        """Begin the step of the best token of the last run, and return when that is known.

        Args:
            scores: Of the last run.
            row: Looks an embedding up.
            position: Of the step.
            ends: Tokens behind which no step is made.

        Returns:
            None where no step was made yet, which may be captured only while all wait for it, or where there is no room.
        """
        slot, length = self._slots.get((1, self._turn)), self.length
        if slot is None or length >= self.capacity:
            return None

        def step(token: int, begins: Callable[[], None]) -> None:
            self._step(slot, row(token), position, length, begins)

        self._flight = Flight(scores, position, ends, self._memory.start, step)
        return self._flight

    def take(self, flight: Flight) -> DeviceScores:
        """Count a step that was begun as made, and return its scores."""
        slot = self._slots[1, self._turn]
        self.length += 1
        return self._scores(slot, flight.job)

    def settle(self) -> None:
        """Return when no step is going on any more; what became of it is of no interest then."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.job.join()

    def replay(self) -> None:
        """Run the last run's graph again as it stands: for measuring."""
        assert self._last is not None, "a step comes before"
        self.settle()
        self._last.run()

    def _step(
        self, slot: DecoderSlot, embedding: Array, position: int, length: int, begins: Callable[[], None] = lambda: None
    ) -> None:
        """Run the step behind `length` rows."""
        slot.inputs.values["inputs_embeds"][0, 0] = embedding
        self._send(slot, length + 1, position)
        begins()
        slot.run()

    def _send(self, slot: DecoderSlot, seen: int, positions: npt.NDArray[np.int64] | int) -> None:
        values = slot.inputs.values
        values["attention_mask"][0, :seen], values["attention_mask"][0, seen:] = 1, 0
        if self._positioned:
            values["position_ids"][:] = as_input(positions) if isinstance(positions, np.ndarray) else positions
        slot.inputs.send()

    def _scores(self, slot: DecoderSlot, job: Job | None = None) -> DeviceScores:
        self._last = slot
        if self._spec.states:
            self._turn = 1 - self._turn
        return DeviceScores(slot.buffers, slot.best, job)

    def _padded(self, length: int) -> int:
        room = self.capacity - self._past
        return min(bucket(length), room) if self._memory.captures and not self._spec.states else length

    def _slot(self, length: int) -> DecoderSlot:
        """Return the tensors for inputs of one length in this turn: 1 is the decode step, every other a prompt's."""
        key = length, self._turn
        if key in self._slots:
            self._slots[key] = self._slots.pop(key)  # The last used comes last.
            return self._slots[key]
        # A prompt's tensors are as large as it is long, so those unused for longest go; the step's stay.
        prompts = [held for held in self._slots if held[0] != 1]
        if len(prompts) >= PROMPT_SLOTS:
            del self._slots[prompts[0]]
        self._slots[key] = self._new_slot(length)
        return self._slots[key]

    def _new_slot(self, length: int) -> DecoderSlot:
        sizes = {"sequence": length, "capacity": self.capacity}
        session, memory = self._decoder.session, self._memory
        tensors = {name: (name, shape, dtype) for name, shape, dtype in _decoder_tensors(self._spec, **sizes)}
        wanted = [tensor.name for tensor in self._spec.graph.inputs if tensor.name in tensors]
        # A prompt's embeddings are put together on the device.
        small = [
            name for name in wanted if name in ("attention_mask", "position_ids") or (name, length) == ("inputs_embeds", 1)
        ]
        inputs = PackedTensors([tensors[name] for name in small], memory.empty)
        results = PackedTensors([tensors[name] for name in BEST], memory.empty)
        buffers = {name: memory.empty(*tensor[1:]) for name, tensor in tensors.items() if name not in {*small, *BEST}}
        buffers["last_position"].fill(np.array([length - 1], np.int64))
        binding = session.io_binding()
        for name in wanted:
            if name in small:
                binding.bind_input(name, memory.device, 0, *inputs.place(name))
            else:
                binding.bind_ortvalue_input(name, buffers[name].value)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache.value)
            binding.bind_ortvalue_output(self._spec.caches[name], cache.value)
        before, after = self._states[self._turn], self._states[1 - self._turn]
        for name, replaced in self._spec.states.items():
            binding.bind_ortvalue_input(name, before[name].value)
            binding.bind_ortvalue_output(replaced, after[name].value)
        binding.bind_ortvalue_output("logits", buffers["logits"].value)
        for name in BEST:
            binding.bind_output(name, memory.device, 0, *results.place(name))
        # Prompts of any length would be graphs without end.
        graph_id = next(self._decoder.ids) if self._captured and (length == 1 or not self._spec.states) else UNCAPTURED
        if length > 1 and graph_id > MAX_CAPTURES:
            graph_id = UNCAPTURED
        run = memory.slot(session, binding, buffers, graph_id, "the decoder").run
        return DecoderSlot(buffers, run, inputs, results)


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


def _shared_features(prompt: Prompt) -> DeviceBuffer | None:
    """Return where the run that made all crops of a prompt, in order and nothing else, left them, if it is still there."""
    rows = [crop.embeddings for crop in prompt.crops if isinstance(crop.embeddings, DeviceRows)]
    if not rows or len(rows) < len(prompt.crops):
        return None
    features = rows[0].features
    one_run = all(row.features is features for row in rows)
    in_order = [row.index for row in rows] == list(range(features.shape[0]))
    return features.buffer if one_run and in_order else None


def _decoder_tensors(spec: DecoderSpec, *, sequence: int, capacity: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of the decoder's tensors, the caches aside, for inputs of one length."""
    return [
        ("inputs_embeds", (1, sequence, spec.row_width), spec.kv_dtype),
        ("attention_mask", (1, capacity), "int64"),
        ("position_ids", (1, sequence) if spec.axes == 1 else (spec.axes, 1, sequence), "int64"),
        ("last_position", (1,), "int64"),
        ("logits", (1, 1, spec.vocab_size), spec.kv_dtype),
        ("next_token", (1, 1, 1), "int64"),
        ("top_logit", (1, 1, 1), spec.kv_dtype),
    ]


def _decoder_probe(spec: DecoderSpec, length: int = 8) -> dict[str, Array]:
    """Return inputs with which every node of a decoder runs once."""
    caches = (1, spec.kv_heads, length, spec.head_dim)
    known = {name: np.zeros(shape, dtype) for name, shape, dtype in _decoder_tensors(spec, sequence=length, capacity=length)}
    known["attention_mask"] = np.ones((1, length), np.int64)
    known |= {name: np.zeros(spec.state_shape(name), spec.kv_dtype) for name in spec.states}
    return {
        tensor.name: known[tensor.name] if tensor.name in known else np.zeros(caches, spec.kv_dtype)
        for tensor in spec.graph.inputs
    }
