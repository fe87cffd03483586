"""ONNX Runtime's tensors on a device, and runs that are captured once and replayed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.device import Slot
from leanvlm.runtime.backends.ort import first_line
from leanvlm.runtime.backends.thread import Job, OneThread
from leanvlm.runtime.errors import BackendError

Array = npt.NDArray[Any]


def preload_libraries(ort: Any) -> None:
    """Let ONNX Runtime find CUDA and cuDNN in Python packages; it prints what it does not find, which its sessions will say."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


# ONNX Runtime's "neither capture nor replay this run".
UNCAPTURED = -1
# All sessions' runs: while one is captured, no other thread may copy to the device or from it.
DEVICE_THREAD = OneThread()


@dataclass(frozen=True)
class OrtBuffer:
    """A tensor of ONNX Runtime on a device."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        """Where it lies."""
        return int(self.value.data_ptr())

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def fill(self, values: Array) -> None:
        """Overwrite it with an array's values."""
        self.value.update_inplace(np.ascontiguousarray(values, self.dtype))

    @property
    def place(self) -> Place:
        """Where it lies, with its shape and type."""
        return Place(self.shape, self.dtype, self.address)

    def numpy(self) -> Array:
        """Fetch it. A copy: on the processor ONNX Runtime shows the tensor itself, which the next run overwrites."""
        return np.array(self.value.numpy())


@dataclass(frozen=True)
class Place:
    """Where a tensor lies that is part of another: its shape, type and address."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int

    def rows(self, start: int, count: int) -> Place:
        """Return some rows of the first axis."""
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        return Place((count, *self.shape[1:]), self.dtype, self.address + start * row)

    def bind_input(self, binding: Any, name: str, device: str) -> None:
        """Make it an input of a run."""
        binding.bind_input(name, device, 0, self.dtype.type, self.shape, self.address)

    def bind_output(self, binding: Any, name: str, device: str) -> None:
        """Make it an output of a run."""
        binding.bind_output(name, device, 0, self.dtype.type, self.shape, self.address)


class DeviceMemory:
    """Allocates tensors on one device, and runs what is bound to them.

    Captured runs are all done by one thread: ONNX Runtime keeps what it captures a thread, so another one would capture
    everything again, into memory that is never given back; and it promises nothing for captures of several threads. So is
    work that goes on while nobody waits for it.
    """

    def __init__(self, ort: Any, device: str) -> None:
        self._ort = ort
        self.device = device

    @property
    def captures(self) -> bool:
        """Whether runs are captured as graphs and replayed."""
        return self.device == "cuda"

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> OrtBuffer:
        """Return an uninitialised tensor."""
        try:
            value = self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise BackendError(f"no memory on the GPU for {size / 1e6:.0f} MB: {first_line(error)}") from error
        return OrtBuffer(value, tuple(shape), np.dtype(dtype))

    def run_options(self, graph_id: int) -> Any:
        """Return options that capture a run under an id and replay it from then on; `UNCAPTURED` does neither."""
        options = self._ort.RunOptions()
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def once_options(self, shrink: bool) -> Any:
        """Return options of a run of a session without graphs; `shrink` gives back memory that only this run needed."""
        options = self._ort.RunOptions()
        if shrink and self.captures:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        return options

    def slot(self, session: Any, binding: Any, buffers: Mapping[str, OrtBuffer], graph_id: int, what: str) -> Slot:
        """Return a slot of a session: its buffers, bound, and the run that is captured under an id.

        Args:
            session: In ONNX Runtime.
            binding: Of the session, to the buffers.
            buffers: By names.
            graph_id: Of the captured run; `UNCAPTURED` captures none.
            what: Names it in the BackendError if ONNX Runtime fails.
        """
        work = partial(session.run_with_iobinding, binding, self.run_options(graph_id))
        return Slot(buffers, partial(self._run, work, what))

    def start(self, work: Callable[[], object]) -> Job:
        """Begin work on the thread that does the captured runs, behind what it was given before."""
        return DEVICE_THREAD.start(work)

    def _run(self, work: Callable[[], None], what: str) -> None:
        try:
            if self.captures:
                DEVICE_THREAD.run(work)
            else:
                work()
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise BackendError(f"{what} failed: {first_line(error)}") from error
