"""Several sequences' caches in one buffer on an NVIDIA GPU; see `rows`.

Steps of each block of rows are captured once and replayed, and while their tokens' texts are made the next ones go on: the
thread that replays fetches the tokens and sends their embeddings, as for one sequence (`ahead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.cuda_cache import BEST, CudaCache, CudaDecoder, decoder_tensors, empty_caches
from leanvlm.runtime.backends.device import Slot
from leanvlm.runtime.backends.ort import check_room
from leanvlm.runtime.backends.packed import PackedTensors
from leanvlm.runtime.backends.rows import Next, Step, block, seen_by
from leanvlm.runtime.backends.thread import Job
from leanvlm.runtime.generation import Scores
from leanvlm.runtime.sampling import check_peak

Array = npt.NDArray[Any]
MIXED = ("inputs_embeds", "attention_mask", "position_ids")


@dataclass(frozen=True)
class BlockSlot(Slot):
    """A block's tensors; what crosses the bus in every step is packed.

    Attributes:
        inputs: Embeddings, mask and positions.
        results: The best tokens and their logits.
        seen: Of each row how many positions the mask shows.
    """

    inputs: PackedTensors
    results: PackedTensors
    seen: npt.NDArray[np.int64]


class Run:
    """One run of a block and what came of it, fetched once.

    Args:
        slot: Of the block.
        first: Its first row.
        steps: What each row reads; filled before the run.
    """

    def __init__(self, slot: BlockSlot, first: int, steps: dict[int, Step]) -> None:
        self.slot = slot
        self.first = first
        self.steps = steps
        self.job: Job | None = None
        self._best: tuple[Array, Array] | None = None
        self._logits: Array | None = None

    def wait(self) -> None:
        """Return when it has ended; raises BackendError if it failed."""
        if self.job is not None:
            self.job.wait()

    def best(self, row: int) -> tuple[int, float]:
        """Return a row's best token and its logit."""
        if self._best is None:
            self.slot.results.fetch()
            values = self.slot.results.values
            self._best = values[BEST[0]].reshape(-1).copy(), values[BEST[1]].reshape(-1).copy()
        tokens, logits = self._best
        return int(tokens[row - self.first]), float(logits[row - self.first])

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Return a row's logits (V,)."""
        if self._logits is None:
            self._logits = self.slot.buffers["logits"].numpy()
        found: npt.NDArray[np.float32] = self._logits[row - self.first, 0].astype(np.float32)
        return found


@dataclass(frozen=True)
class RunScores:
    """The scores of one row of a run."""

    run: Run
    row: int

    def greedy(self) -> int:
        """Return the token that the graph found best; raises BackendError if its logit is not finite."""
        self.wait()
        token, logit = self.run.best(self.row)
        check_peak(logit)
        return token

    def logits(self) -> npt.NDArray[np.float32]:
        """Fetch the logits (V,)."""
        self.wait()
        return self.run.logits(self.row)

    def wait(self) -> None:
        """Return when the run has ended; raises BackendError if it failed."""
        self.run.wait()


class CudaRows:
    """The buffer, with a cache for each row.

    Args:
        decoder: What it is of.
        count: Rows.
        capacity: Positions of each.
    """

    def __init__(self, decoder: CudaDecoder, count: int, capacity: int) -> None:
        self.capacity = capacity
        self._decoder = decoder
        self._memory, self._spec = decoder.memory, decoder.spec
        self._buffers = empty_caches(self._memory, self._spec, count, capacity)
        self.caches: Sequence[CudaCache] = [
            CudaCache(decoder, capacity, True, {name: buffer.place.rows(row, 1) for name, buffer in self._buffers.items()})
            for row in range(count)
        ]
        self._slots: dict[tuple[int, int], BlockSlot] = {}
        self._flight: Run | None = None
        # The run that made the last scores of each row.
        self._last: dict[int, Run] = {}

    def warm(self) -> None:
        """Capture the steps of all blocks, which would otherwise hold the first answers up."""
        size = 1
        while True:
            for first in range(0, len(self.caches), size):
                run = self._new_run([first, min(first + size, len(self.caches)) - 1], {})
                self._fill(run, lambda _: np.empty(0))
                run.slot.run()
            if size >= len(self.caches):
                return
            size *= 2

    def step(self, steps: Sequence[Step], embed: Callable[[int], Array]) -> dict[int, Scores]:
        """Append a token to each of some rows: take what was begun, and run the others."""
        for step in steps:
            check_room(self.caches[step.row].length + 1, self.capacity)
        flight, self._flight = self._flight, None
        taken = {step.row: flight for step in steps if flight is not None and flight.steps.get(step.row) == step}
        others = [step for step in steps if step.row not in taken]
        if others:
            if flight is not None and flight.job is not None:
                flight.job.join()
            if taken:
                # The next run may be of the same block, which would overwrite what this one found.
                for row, run in taken.items():
                    run.wait()
                    run.best(row)
                    run.logits(row)
            run = self._new_run([step.row for step in others], {step.row: step for step in others})
            self._fill(run, embed)
            run.slot.run()
            taken |= {step.row: run for step in others}
        for step in steps:
            self.caches[step.row].length += 1
        self._last = taken
        return {step.row: RunScores(taken[step.row], step.row) for step in steps}

    def ahead(self, steps: Sequence[Next], embed: Callable[[int], Array]) -> None:
        """Begin the steps of the best tokens, if all come of one run whose block was run before."""
        runs = {self._last.get(one.row) for one in steps}
        last = next(iter(runs), None)
        wanted = block([one.row for one in steps], len(self.caches)) if steps else None
        # A run that was not made yet is captured, while nobody may go on.
        if last is None or len(runs) > 1 or wanted not in self._slots:
            return
        if any(self.caches[one.row].length >= self.capacity for one in steps):
            return
        flight = self._new_run([one.row for one in steps], {})
        known: SimpleQueue[None] = SimpleQueue()

        def work() -> None:
            try:
                if last.job is not None and last.job.failed:
                    return
                for one in steps:
                    token, _ = last.best(one.row)
                    if token not in one.ends:
                        flight.steps[one.row] = Step(one.row, token, one.position)
                if flight.steps:
                    self._fill(flight, embed)
                    known.put(None)
                    flight.slot.run()
            finally:
                known.put(None)

        flight.job = self._memory.start(work)
        self._flight = flight
        known.get()

    def settle(self) -> None:
        """Return when no step is going on any more; it may be taken later."""
        if self._flight is not None and self._flight.job is not None:
            self._flight.job.join()

    def _new_run(self, rows: Sequence[int], steps: dict[int, Step]) -> Run:
        first, size = block(rows, len(self.caches))
        if (first, size) not in self._slots:
            self._slots[first, size] = self._new_slot(first, size)
        return Run(self._slots[first, size], first, steps)

    def _fill(self, run: Run, embed: Callable[[int], Array]) -> None:
        """Send what a run reads. Rows that are run along read whatever was there, behind what they hold."""
        values, first = run.slot.inputs.values, run.first
        shown, mask = run.slot.seen, values["attention_mask"]
        # Most rows see one more than before; all of it would be 2,048 numbers a row, while the GPU waits.
        for row, seen in enumerate(seen_by(self.caches[first : first + len(mask)])):
            mask[row, min(seen, shown[row]) : max(seen, shown[row])] = seen > shown[row]
            shown[row] = seen
        for row, step in run.steps.items():
            values["inputs_embeds"][row - first, 0] = embed(step.token)
            if "position_ids" in values:
                values["position_ids"][..., row - first, :] = step.position
        run.slot.inputs.send()

    def _new_slot(self, first: int, size: int) -> BlockSlot:
        session, memory = self._decoder.session, self._memory
        tensors = {
            name: (name, shape, dtype)
            for name, shape, dtype in decoder_tensors(self._spec, sequence=1, capacity=self.capacity, rows=size)
        }
        wanted = {tensor.name for tensor in self._spec.graph.inputs} & set(tensors)
        inputs = PackedTensors([tensors[name] for name in MIXED if name in wanted], memory.empty)
        results = PackedTensors([tensors[name] for name in BEST], memory.empty)
        buffers = {name: memory.empty(*tensors[name][1:]) for name in ("last_position", "logits")}
        buffers["last_position"].fill(np.zeros(1, np.int64))
        binding = session.io_binding()
        for name in wanted:
            if name in inputs.values:
                binding.bind_input(name, memory.device, 0, *inputs.place(name))
            else:
                binding.bind_ortvalue_input(name, buffers[name].value)
        for name, buffer in self._buffers.items():
            rows = buffer.place.rows(first, size)
            rows.bind_input(binding, name, memory.device)
            rows.bind_output(binding, self._spec.caches[name], memory.device)
        binding.bind_ortvalue_output("logits", buffers["logits"].value)
        for name in BEST:
            binding.bind_output(name, memory.device, 0, *results.place(name))
        run = memory.slot(session, binding, buffers, next(self._decoder.ids), "the decoder").run
        return BlockSlot(buffers, run, inputs, results, np.zeros(size, np.int64))
