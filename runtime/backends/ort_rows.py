"""Several sequences' caches in one buffer in the processor's memory; see `rows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ort import OrtCache, OrtScores, check_room, first_line
from leanvlm.runtime.backends.rows import Next, Step, block, seen_by
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.generation import Scores
from leanvlm.runtime.specs import DecoderSpec

Array = npt.NDArray[Any]


class OrtRows:
    """The buffer, with a cache for each row.

    Args:
        ort: ONNX Runtime.
        session: Of the decoder.
        spec: Of the decoder.
        count: Rows.
        capacity: Positions of each.
    """

    def __init__(self, ort: Any, session: Any, spec: DecoderSpec, count: int, capacity: int) -> None:
        self.capacity = capacity
        self._session = session
        self._spec = spec
        self._dtype = np.dtype(spec.kv_dtype)
        shape = (count, spec.kv_heads, capacity, spec.head_dim)
        self._buffers = {name: np.zeros(shape, self._dtype) for name in spec.caches}
        self.caches: Sequence[OrtCache] = [
            OrtCache(ort, session, spec, capacity, {name: buffer[row : row + 1] for name, buffer in self._buffers.items()})
            for row in range(count)
        ]
        self._bindings: dict[tuple[int, int], Any] = {}

    def warm(self) -> None:
        """Do nothing: nothing is captured."""

    def step(self, steps: Sequence[Step], embed: Callable[[int], Array]) -> dict[int, Scores]:
        """Append a token to each of some rows."""
        for step in steps:
            check_room(self.caches[step.row].length + 1, self.capacity)
        first, size = block([step.row for step in steps], len(self.caches))
        embeddings = np.zeros((size, 1, self._spec.row_width), self._dtype)
        positions = np.zeros((self._spec.axes, size, 1), np.int64)
        for step in steps:
            embeddings[step.row - first, 0] = embed(step.token)
            positions[:, step.row - first] = step.position
        seen = np.array(seen_by(self.caches[first : first + size]))
        mask = (np.arange(seen.max()) < seen[:, None]).astype(np.int64)
        logits = self._run(first, size, embeddings, positions, mask)
        for step in steps:
            self.caches[step.row].length += 1
        return {step.row: OrtScores(logits[step.row - first]) for step in steps}

    def ahead(self, steps: Sequence[Next], embed: Callable[[int], Array]) -> None:
        """Do nothing: the processor has no time to spare."""

    def settle(self) -> None:
        """Return: nothing goes on by itself."""

    def _run(self, first: int, size: int, embeddings: Array, positions: Array, mask: Array) -> npt.NDArray[np.float32]:
        """Run the decoder on a block and return the logits (B, V)."""
        binding = self._binding(first, size)
        binding.bind_cpu_input("inputs_embeds", embeddings)
        if self._spec.named("positions"):
            binding.bind_cpu_input("position_ids", positions if self._spec.axes > 1 else positions[0])
        binding.bind_cpu_input("attention_mask", mask)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise BackendError(f"the decoder failed: {first_line(error)}") from error
        logits: npt.NDArray[np.float32] = binding.get_outputs()[-1].numpy()[:, -1].astype(np.float32, copy=False)
        return logits

    def _binding(self, first: int, size: int) -> Any:
        """Return a block's binding: its rows of each cache are read and appended to where they lie."""
        if (first, size) not in self._bindings:
            binding = self._session.io_binding()
            for past, present in self._spec.caches.items():
                rows = self._buffers[past][first : first + size]
                where = ("cpu", 0, self._dtype.type, rows.shape, rows.ctypes.data)
                binding.bind_input(past, *where)
                binding.bind_output(present, *where)
            binding.bind_output("logits", "cpu")
            self._bindings[first, size] = binding
        return self._bindings[first, size]
