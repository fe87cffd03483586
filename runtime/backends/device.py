"""Tensors on a device, and runs that are captured once and replayed: what the graphs and the decoder on a GPU are made of."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ort import first_line
from leanvlm.runtime.backends.thread import OneThread
from leanvlm.runtime.errors import BackendError

Array = npt.NDArray[Any]


def preload_libraries(ort: Any) -> None:
    """Let ONNX Runtime find CUDA and cuDNN in Python packages; it prints what it does not find, which its sessions will say."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


# ONNX Runtime's "neither capture nor replay this run".
UNCAPTURED = -1


class DeviceMemory:
    """Allocates tensors on one device, and runs what is bound to them.

    Captured runs are all done by one thread: ONNX Runtime keeps what it captures a thread, so another one would capture
    everything again, into memory that is never given back; and it promises nothing for captures of several threads.
    """

    def __init__(self, ort: Any, device: str) -> None:
        self._ort = ort
        self._thread = OneThread()
        self.device = device

    @property
    def captures(self) -> bool:
        """Whether runs are captured as graphs and replayed."""
        return self.device == "cuda"

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        """Return an uninitialised tensor."""
        try:
            return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise BackendError(f"no memory on the GPU for {size / 1e6:.0f} MB: {first_line(error)}") from error

    def run_options(self, graph_id: int) -> Any:
        """Return options that capture a run under an id and replay it from then on; `UNCAPTURED` does neither."""
        options = self._ort.RunOptions()
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def run(self, session: Any, slot: Slot, what: str) -> None:
        """Run a session on a slot's tensors and wait for it; `what` names it in the BackendError if ONNX Runtime fails."""
        work = partial(session.run_with_iobinding, slot.binding, slot.options)
        try:
            if self.captures:
                self._thread.run(work)
            else:
                work()
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise BackendError(f"{what} failed: {first_line(error)}") from error


class DeviceFeatures:
    """The embeddings of B images of one run, (B, K, D); an index gives one image's rows.

    They lie where the graph wrote them, until its next run would overwrite them: then they are kept in the processor's memory.
    That may be another thread's run at any time, so they are read under the device's lock.
    """

    def __init__(self, tensor: Any, shape: tuple[int, int, int], lock: AbstractContextManager[Any]) -> None:
        self.tensor: Any = tensor
        self.shape = shape
        self._lock = lock
        self._kept: Array | None = None

    def __getitem__(self, row: int) -> DeviceRows:
        return DeviceRows(self, row)

    def numpy(self) -> Array:
        """Fetch them."""
        with self._lock:
            if self._kept is not None:
                return self._kept
            # A copy: on the processor numpy() shows the tensor itself, which the next run overwrites.
            return np.array(self.tensor.numpy())

    def keep(self) -> None:
        """Move them out of the graph's way."""
        with self._lock:
            self._kept, self.tensor = self.numpy(), None


@dataclass(frozen=True)
class DeviceRows:
    """One image's embeddings, (K, D): row `index` of its run's."""

    features: DeviceFeatures
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self.features.shape[1:]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows: Array = self.features.numpy()[self.index].astype(dtype or np.float32)
        return rows


@dataclass(frozen=True)
class Slot:
    """Tensors bound to one captured graph: names to device tensors, the binding and the run's options."""

    tensors: Mapping[str, Any]
    binding: Any
    options: Any
