"""The decoder's cache on an NVIDIA GPU, with the tensors of its runs; see `cuda`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ahead import Flight
from leanvlm.runtime.backends.device import DeviceBuffer, DeviceRows, DeviceScores, Slot
from leanvlm.runtime.backends.ort import check_room, first_line
from leanvlm.runtime.backends.ort_memory import UNCAPTURED, DeviceMemory, OrtBuffer, Place
from leanvlm.runtime.backends.packed import PackedTensors
from leanvlm.runtime.backends.thread import Job
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.specs import DecoderSpec

Array = npt.NDArray[Any]
# Prompts up to FINE positions are padded to a multiple of 8, which tensor cores like; longer ones to a multiple of COARSE.
FINE, COARSE = 256, 64
# What a token is chosen by, of a decoder's outputs.
BEST = ("next_token", "top_logit")
# Lengths of prompts whose tensors are kept.
PROMPT_SLOTS = 8
# ONNX Runtime keeps every graph that it captures, also of a length whose tensors went, so prompts behind these go without.
MAX_CAPTURES = 64


def bucket(length: int) -> int:
    """Return the padded length at which a prompt of `length` positions is read."""
    step = 8 if length <= FINE else COARSE
    return -(-length // step) * step


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

    def __init__(self, decoder: CudaDecoder, capacity: int, kept: bool, places: Mapping[str, Place] | None = None) -> None:
        """Allocate it.

        Args:
            decoder: What it is of.
            capacity: Positions.
            kept: Whether its runs are captured.
            places: Where keys and values lie that somebody else has allocated, who has many caches: prompts are not captured.
        """
        self.capacity = capacity
        self._decoder = decoder
        self._memory = decoder.memory
        self._spec = spec = decoder.spec
        self._captured = kept
        self._prompts_captured = kept and places is None and not spec.states
        self._dtype = np.dtype(spec.kv_dtype)
        self._positioned = bool(spec.named("positions"))
        self._caches: dict[str, OrtBuffer] = {}
        self._places: Mapping[str, Place] = places or self._allocate()
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

    def _allocate(self) -> dict[str, Place]:
        self._caches = empty_caches(self._memory, self._spec, 1, self.capacity)
        return {name: cache.place for name, cache in self._caches.items()}

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
        tensors = {name: (name, shape, dtype) for name, shape, dtype in decoder_tensors(self._spec, **sizes)}
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
        for name, place in self._places.items():
            place.bind_input(binding, name, memory.device)
            place.bind_output(binding, self._spec.caches[name], memory.device)
        before, after = self._states[self._turn], self._states[1 - self._turn]
        for name, replaced in self._spec.states.items():
            binding.bind_ortvalue_input(name, before[name].value)
            binding.bind_ortvalue_output(replaced, after[name].value)
        binding.bind_ortvalue_output("logits", buffers["logits"].value)
        for name in BEST:
            binding.bind_output(name, memory.device, 0, *results.place(name))
        # Prompts of any length would be graphs without end.
        captured = self._captured if length == 1 else self._prompts_captured
        graph_id = next(self._decoder.ids) if captured else UNCAPTURED
        if length > 1 and graph_id > MAX_CAPTURES:
            graph_id = UNCAPTURED
        run = memory.slot(session, binding, buffers, graph_id, "the decoder").run
        return DecoderSlot(buffers, run, inputs, results)


def empty_caches(memory: DeviceMemory, spec: DecoderSpec, rows: int, capacity: int) -> dict[str, OrtBuffer]:
    """Return buffers (rows, kv_heads, capacity, head_dim) of zeros for the decoder's keys and values, by name."""
    shape = (rows, spec.kv_heads, capacity, spec.head_dim)
    zeros = np.zeros(shape, spec.kv_dtype)
    buffers = {name: memory.empty(shape, spec.kv_dtype) for name in spec.caches}
    for buffer in buffers.values():
        # Whatever lies in fresh memory may be NaN, which even a weight of zero lets through.
        buffer.fill(zeros)
    return buffers


def _shared_features(prompt: Prompt) -> DeviceBuffer | None:
    """Return where the run that made all crops of a prompt, in order and nothing else, left them, if it is still there."""
    rows = [crop.embeddings for crop in prompt.crops if isinstance(crop.embeddings, DeviceRows)]
    if not rows or len(rows) < len(prompt.crops):
        return None
    features = rows[0].features
    one_run = all(row.features is features for row in rows)
    in_order = [row.index for row in rows] == list(range(features.shape[0]))
    return features.buffer if one_run and in_order else None


def decoder_tensors(
    spec: DecoderSpec, *, sequence: int, capacity: int, rows: int = 1
) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of the decoder's tensors, the caches aside, for inputs of one length."""
    return [
        ("inputs_embeds", (rows, sequence, spec.row_width), spec.kv_dtype),
        ("attention_mask", (rows, capacity), "int64"),
        ("position_ids", (rows, sequence) if spec.axes == 1 else (spec.axes, rows, sequence), "int64"),
        ("last_position", (1,), "int64"),
        ("logits", (rows, 1, spec.vocab_size), spec.kv_dtype),
        ("next_token", (rows, 1, 1), "int64"),
        ("top_logit", (rows, 1, 1), spec.kv_dtype),
    ]
