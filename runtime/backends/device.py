"""What every backend with a device has in common: buffers, features that stay there, scores, and slots for batch sizes.

A backend says what a buffer is and how a slot runs; what stays on the device, and until when, is decided here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.thread import Job
from leanvlm.runtime.crops import PIXELS
from leanvlm.runtime.sampling import check_peak
from leanvlm.runtime.specs import GraphSpec, TensorSpec

Array = npt.NDArray[Any]
FEATURES = "image_features"


class DeviceBuffer(Protocol):
    """An array on a device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        ...

    @property
    def address(self) -> int:
        """Where it lies."""
        ...

    @property
    def bytes(self) -> int:
        """Its size."""
        ...

    def fill(self, values: Array) -> None:
        """Overwrite it with an array's values."""
        ...

    def numpy(self) -> Array:
        """Return a copy in the processor's memory."""
        ...


@dataclass(frozen=True)
class Slot:
    """Buffers by the names of a graph's inputs and outputs, and what runs the graph on them; raises BackendError."""

    buffers: Mapping[str, DeviceBuffer]
    run: Callable[[], None]


class DeviceFeatures:
    """The embeddings of B crops of one run, (B, K, D); an index gives one crop's rows.

    They lie where the graph wrote them, until its next run would overwrite them: then they are kept in the processor's memory.
    That may be another thread's run at any time, so they are read under the device's lock.
    """

    def __init__(self, buffer: DeviceBuffer, lock: AbstractContextManager[Any]) -> None:
        self.buffer: DeviceBuffer | None = buffer
        self.shape = buffer.shape
        self._lock = lock
        self._kept: Array | None = None

    def __getitem__(self, row: int) -> DeviceRows:
        return DeviceRows(self, row)

    def numpy(self) -> Array:
        """Fetch them, all at once and once only: each crop may ask."""
        with self._lock:
            if self._kept is None:
                assert self.buffer is not None
                self._kept = self.buffer.numpy()
            return self._kept

    def keep(self) -> None:
        """Move them out of the graph's way."""
        with self._lock:
            self.numpy()
            self.buffer = None


@dataclass(frozen=True)
class DeviceRows:
    """One crop's embeddings, (K, D): row `index` of its run's."""

    features: DeviceFeatures
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, D)."""
        return self.features.shape[1:]

    @property
    def address(self) -> int | None:
        """Where they lie on the device, if they still do."""
        buffer = self.features.buffer
        return None if buffer is None else buffer.address + self.index * buffer.bytes // buffer.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows: Array = self.features.numpy()[self.index].astype(dtype or np.float32)
        return rows


class DeviceScores:
    """The scores of one run of the decoder, on the device until they are asked for.

    Args:
        buffers: `logits`, and unless `best` is given `next_token` and `top_logit`.
        best: Fetches the token that the graph found best, and its logit.
        job: The run, if it may not have ended.
    """

    def __init__(
        self,
        buffers: Mapping[str, DeviceBuffer],
        best: Callable[[], tuple[int, float]] | None = None,
        job: Job | None = None,
    ) -> None:
        self._buffers = buffers
        self._best = best or self._fetch_best
        self._job = job
        self._token: int | None = None

    def greedy(self) -> int:
        """Return the token that the graph itself found best; the logits stay where they are."""
        if self._token is None:
            self.wait()
            token, logit = self._best()
            check_peak(logit)
            self._token = token
        return self._token

    def logits(self) -> npt.NDArray[np.float32]:
        """Fetch the logits (V,)."""
        self.wait()
        fetched: npt.NDArray[np.float32] = self._buffers["logits"].numpy().reshape(-1).astype(np.float32)
        return fetched

    @property
    def failed(self) -> bool:
        """Whether the run has ended with an error."""
        return self._job is not None and self._job.failed

    def wait(self) -> None:
        """Return when the run has ended; raises BackendError if it failed."""
        if self._job is not None:
            self._job.wait()

    def _fetch_best(self) -> tuple[int, float]:
        token, logit = self._buffers["next_token"].numpy(), self._buffers["top_logit"].numpy()
        return int(token.reshape(())), float(logit.reshape(()))


class DeviceGraph:
    """One vision graph; each batch size has its own buffers and its own captured run.

    Args:
        spec: Of the graph.
        lock: The device's.
        make: Returns the slot of a batch size.
    """

    def __init__(self, spec: GraphSpec, lock: AbstractContextManager[Any], make: Callable[[int], Slot]) -> None:
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._lock = lock
        self._make = make
        self._slots: dict[int, Slot] = {}
        self._given: dict[int, weakref.ref[DeviceFeatures]] = {}

    def pixels(self, batch: int) -> DeviceBuffer:
        """Return where the graph reads the pixel values of a batch size; what is written there goes to `run` as its input."""
        return self._slot(batch).buffers[PIXELS]

    def run(self, inputs: Mapping[str, Array | DeviceBuffer]) -> dict[str, Any]:
        """Run the graph; the features stay on the device. A graph that ends before they are made returns its outputs."""
        batch = inputs[PIXELS].shape[0]
        slot = self._slot(batch)
        before = self._given.get(batch)
        if before is not None and (held := before()) is not None:
            held.keep()
        for name, values in inputs.items():
            # A graph that ends early may not take all.
            if name in slot.buffers and values is not slot.buffers[name]:
                slot.buffers[name].fill(np.asarray(values))
        slot.run()
        fetched: dict[str, Any] = {name: slot.buffers[name].numpy() for name in self._outputs if name != FEATURES}
        if FEATURES in slot.buffers:
            fetched[FEATURES] = features = DeviceFeatures(slot.buffers[FEATURES], self._lock)
            self._given[batch] = weakref.ref(features)
        return fetched

    def replay(self, batch: int) -> None:
        """Run once more on the pixels of the last run of this batch size: for measuring."""
        self._slot(batch).run()

    def _slot(self, batch: int) -> Slot:
        if batch not in self._slots:
            self._slots[batch] = self._make(batch)
        return self._slots[batch]


def batch_shape(tensor: TensorSpec, batch: int) -> tuple[int, ...]:
    """Return the shape of a tensor for a batch size, its only free size."""
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)
