"""TensorRT and TensorRT-RTX: a bundle's engines, one code path for both.

Images go up as levels; their features stay where the vision engine wrote them and are copied from there between the prompt's
text. All layers' caches of a sequence are one buffer at one address: the engine reads them as they are and returns the new
rows, and one strided copy puts those of all layers in place. So a decode step has the same shapes and addresses every time, and
is replayed as a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.cuda_memory import Buffer, CudaDevice, Device
from leanvlm.runtime.backends.device import DeviceGraph, DeviceScores, Slot, batch_shape
from leanvlm.runtime.backends.ort import check_room
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.backends.trt_engine import TrtContext, TrtEngine, bind_all
from leanvlm.runtime.crops import PIXELS
from leanvlm.runtime.engines.library import LIBRARIES, load_runtime, quiet_logger, this_sm
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.specs import DecoderSpec, EngineSpec, GraphSpec, Role, VisionSpec

Array = npt.NDArray[Any]
PREFILL, DECODE = 0, 1
# What a decoder is given anew with every position.
GIVEN: tuple[Role, ...] = ("embeddings", "positions", "last_seen")


class TrtBackend:
    """Opens the engines of a bundle that are for this machine's GPU.

    Raises:
        BackendError: The bundle has no engines for this GPU, or those are damaged or of another version.
        MissingExtraError: The library or `cuda-python` is not installed.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, device: str | None, threads: int | None = None, prepack: bool = True
    ) -> None:
        if device not in (None, "cuda"):
            raise BackendError(f"device {device!r} is not known for engines; they run on the GPU, the bundle's graphs on cpu")
        self.folder = folder
        self.manifest = manifest
        self.device = manifest.target
        self.resizer = None
        self.lock = threading.RLock()
        self._engines = self._chosen()
        spec = next(iter(self._engines.values()))
        self._module: Any = load_runtime(LIBRARIES[spec.engine], spec.version_compatible)
        self._complaints: list[str] = []
        self._logger = quiet_logger(self._module, self._complaints)
        self._memory: Device | None = None

    @property
    def crops_at_once(self) -> int:
        """The most crops that go through a vision engine in one run: as many as all were built for."""
        vision = [engine for engine in self._engines.values() if engine.budget is not None]
        return min((max(engine.profiles[0][PIXELS][2][0], 1) for engine in vision if PIXELS in engine.profiles[0]), default=1)

    def graph(self, spec: GraphSpec) -> DeviceGraph:
        """Open the engine of a vision graph."""
        return DeviceGraph(spec, self.lock, partial(_vision_slot, self._open(spec.file), self._device()))

    def decoder(self) -> Decoder:
        """Open the decoder's engine."""
        opened = TrtDecoder(self._open(self.manifest.decoder.graph.file), self.manifest.decoder, self._device())
        return Decoder(lambda capacity, kept: TrtCache(opened, capacity, kept))

    def vision_shares(self, spec: VisionSpec, inputs: Mapping[str, Array], runs: int) -> dict[str, float]:
        """Return the whole for `vision`: TensorRT compiles the graph as one, with project and prune in it."""
        return {"vision": 1.0}

    def misplaced(self, spec: GraphSpec, inputs: Mapping[str, Array]) -> list[str]:
        """Return nothing: an engine runs on the GPU as a whole."""
        return []

    def versions(self) -> dict[str, str]:
        """Return the library's version."""
        return {self._module.__name__: str(self._module.__version__)}

    def _device(self) -> Device:
        if self._memory is None:
            self._memory = CudaDevice()
        return self._memory

    def _open(self, graph: str) -> TrtEngine:
        spec = self._engines.get(graph)
        if spec is None:
            held = ", ".join(sorted(self._engines))
            raise BackendError(f"no engine of {graph} was built for this GPU, only of {held}: run leanvlm build again")
        return TrtEngine(self.folder, spec, self._module, self._logger, self._complaints)

    def _chosen(self) -> dict[str, EngineSpec]:
        """Return the engines for this GPU by their graphs, of the first library that has any."""
        sm, engines = this_sm(), self.manifest.engines
        build = f"leanvlm build {self.folder} --engine {self.manifest.target}"
        if not engines:
            where = " on the device" if self.manifest.target == "tensorrt" else ""
            raise BackendError(f"this bundle has no engines yet: run {build}{where} (or run it with --device cpu)")
        if sm is None:
            raise BackendError("no NVIDIA GPU is seen, which engines need; `leanvlm doctor` says more (or pass --device cpu)")
        for kind in dict.fromkeys(engine.engine for engine in engines):
            chosen = {engine.graph: engine for engine in engines if engine.engine == kind and _runs_on(engine, sm)}
            if chosen:
                return chosen
        held = ", ".join(str(found) for found in dict.fromkeys(engine.sm for engine in engines))
        which = f" --sm {sm}" if self.manifest.target == "tensorrt-rtx" else ""
        raise BackendError(f"this bundle's engines are for sm {held} and this GPU is sm {sm}: run {build}{which}")


def _runs_on(engine: EngineSpec, sm: int) -> bool:
    return engine.sm == sm or (engine.hardware == "ampere+" and min(engine.sm, sm) >= 80)


class TrtDecoder:
    """The decoder's engine, opened: what the caches share.

    Contexts hold the engine's workspace, so they are shared too. The kept cache has a pair for itself, whose step stays
    captured; those that go with their sequences share another, which is bound anew whenever it is another's turn.
    """

    def __init__(self, engine: TrtEngine, spec: DecoderSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self._engine = engine
        self._contexts: dict[bool, dict[int, TrtContext]] = {}

    def contexts(self, kept: bool) -> dict[int, TrtContext]:
        """Return the contexts for prompts and for steps, made when first used."""
        if kept not in self._contexts:
            # An engine may have one profile for both; each still has its context, so that the step's graph stays captured.
            last = len(self._engine.spec.profiles) - 1
            self._contexts[kept] = {
                profile: self._engine.context(min(profile, last), self.device) for profile in (PREFILL, DECODE)
            }
        return self._contexts[kept]


class TrtCache:
    """The caches of all layers in one buffer, with the buffers of the engine's other tensors."""

    def __init__(self, decoder: TrtDecoder, capacity: int, kept: bool) -> None:
        self.capacity = capacity
        self._spec = spec = decoder.spec
        self._device = decoder.device
        self._captured = kept
        self._contexts = decoder.contexts(kept)
        self._dtype = np.dtype(spec.kv_dtype)
        self._names = list(spec.caches)
        self._given = [name for role in GIVEN for name in spec.named(role)]
        # Before the memory is there: one that no step could use is not to be kept.
        self._contexts[DECODE].check(self._names[0], (1, spec.kv_heads, capacity, spec.head_dim))
        specs = {tensor.name: tensor for tensor in spec.graph.outputs}
        outputs = ("logits", "next_token", "top_logit")
        self._scores = {name: Buffer(self._device, _sizes(specs[name].shape), specs[name].dtype) for name in outputs}
        self._counts = {name: Buffer(self._device, (1,), np.int64) for name in ("past_length", "last_position")}
        self._caches = Buffer(self._device, (len(self._names), spec.kv_heads, capacity, spec.head_dim), self._dtype)
        self._device.zero(self._caches.address, self._caches.bytes)
        self._inputs: dict[int, dict[str, Buffer]] = {}
        self._prompt: Prompt | None = None
        self.length = 0

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Put a prompt together, for a new sequence: the text's rows go up, the images' are copied from where they are."""
        assert past == 0, "an engine reads prompts with an empty cache"
        check_room(len(prompt), self.capacity)
        self._prompt, self.length = prompt, 0
        target = self._buffers(len(prompt))["inputs_embeds"]
        addresses = [getattr(crop.embeddings, "address", None) for crop in prompt.crops]
        if any(address is None for address in addresses):
            target.fill(prompt.embeddings(self._dtype))
            return
        width = self._spec.row_width * self._dtype.itemsize
        # Rows as `index` numbers them: the text's first, then each image's.
        rows, text = np.asarray(prompt.index), prompt.text.astype(self._dtype, copy=False)
        starts = np.cumsum([len(text), *(crop.embeddings.shape[0] for crop in prompt.crops)])
        for begin, end in _runs(rows):
            row, address = int(rows[begin]), target.address + begin * width
            if row < len(text):
                self._device.upload(address, text[row : row + end - begin])
                continue
            image = int(np.searchsorted(starts, row, side="right")) - 1
            source = int(addresses[image] or 0) + (row - int(starts[image])) * width
            self._device.copy(address, source, (end - begin) * width)

    def prefill(self) -> DeviceScores:
        """Read the loaded prompt, with an empty cache."""
        assert self._prompt is not None, "load comes before prefill"
        return self._append(PREFILL, self._prompt.positions, self._prompt.last_seen)

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> DeviceScores:
        """Append one embedding (D,) at a position."""
        self._buffers(1)["inputs_embeds"].fill(embedding)
        return self._append(DECODE, np.full((self._spec.axes, 1), position, np.int64), np.array([self.length]))

    def _append(self, profile: int, positions: npt.NDArray[np.int64], last_seen: npt.NDArray[np.int64]) -> DeviceScores:
        count, context = positions.shape[1], self._contexts[profile]
        check_room(self.length + count, self.capacity)
        buffers, past = self._buffers(count), 0 if profile == PREFILL else self.capacity
        buffers["position_ids"].fill(as_input(positions))
        if "last_seen" in buffers:
            buffers["last_seen"].fill(last_seen[None])
        self._counts["past_length"].fill(np.array([self.length]))
        self._counts["last_position"].fill(np.array([count - 1]))
        bound = (self._caches, *buffers.values(), *self._counts.values(), *self._scores.values())
        binding = (count, past, self.capacity, *(buffer.address for buffer in bound))
        if context.binding != binding:
            context.binding = ()  # Until all of it is set.
            self._bind(context, buffers, count, past)
            context.binding = binding
        context.run(replayed=profile == DECODE and self._captured)
        size, rows = self._spec.head_dim * self._dtype.itemsize, len(self._names) * self._spec.kv_heads
        address = self._caches.address + self.length * size
        self._device.copy_rows(address, self.capacity * size, buffers["new"].address, count * size, count * size, rows)
        self.length += count
        return DeviceScores(self._scores)

    def _bind(self, context: TrtContext, buffers: Mapping[str, Buffer], count: int, past: int) -> None:
        spec, caches, new = self._spec, self._caches, buffers["new"]
        for name in self._given:
            context.shape(name, buffers[name].shape)
            context.bind(name, buffers[name].address)
        bind_all(context, {**self._counts, **self._scores})
        for index, name in enumerate(self._names):
            context.shape(name, (1, spec.kv_heads, past, spec.head_dim))
            context.bind(name, caches.address + index * caches.bytes // len(self._names))
            context.bind(self._spec.caches[name], new.address + index * new.bytes // len(self._names))

    def _buffers(self, count: int) -> dict[str, Buffer]:
        """Return the buffers of `count` positions: of one they are kept, of a prompt until the next of another length."""
        if count not in self._inputs:
            self._inputs = {length: kept for length, kept in self._inputs.items() if length == 1}
            spec = self._spec
            self._inputs[count] = {
                "inputs_embeds": Buffer(self._device, (1, count, spec.row_width), self._dtype),
                "position_ids": Buffer(self._device, (1, count) if spec.axes == 1 else (spec.axes, 1, count), np.int64),
                **{name: Buffer(self._device, (1, count), np.int64) for name in spec.named("last_seen")},
                "new": Buffer(self._device, (len(self._names), spec.kv_heads, count, spec.head_dim), self._dtype),
            }
        return self._inputs[count]


def _vision_slot(engine: TrtEngine, device: Device, batch: int) -> Slot:
    """Return the slot of a vision engine for a batch size."""
    spec, context = engine.spec, engine.context(0, device)
    for tensor in spec.inputs:
        context.shape(tensor.name, batch_shape(tensor, batch))
    tensors = (*spec.inputs, *spec.outputs)
    buffers = {tensor.name: Buffer(device, batch_shape(tensor, batch), tensor.dtype) for tensor in tensors}
    bind_all(context, buffers)
    return Slot(buffers, partial(context.run, replayed=True))


def _sizes(shape: Sequence[int | str]) -> list[int]:
    return [int(size) for size in shape]


def _runs(rows: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the stretches (begin, end) of positions whose rows follow one another."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return [(begin, end) for begin, end in pairwise(edges) if end > begin]
