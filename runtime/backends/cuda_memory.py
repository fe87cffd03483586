"""Memory, copies and captured graphs of one CUDA stream, through NVIDIA's `cuda-python`.

Addresses are plain numbers, which is what TensorRT takes. Everything happens in the stream's order; only `download` and
`synchronize` wait for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import BackendError, MissingExtraError

Array = npt.NDArray[Any]


class Device(Protocol):
    """What the TensorRT backend needs of a device: one stream, memory by address."""

    stream: int

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes, at least one."""
        ...

    def free(self, address: int) -> None:
        """Give an allocation back."""
        ...

    def upload(self, address: int, values: Array) -> None:
        """Copy an array to the device."""
        ...

    def download(self, values: Array, address: int) -> None:
        """Fill an array from the device, once all before it in the stream is done."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes within the device."""
        ...

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy rows of `width` bytes that lie a pitch apart, within the device."""
        ...

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        ...

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` puts into the stream, without running it, and return the graph; None where that fails."""
        ...

    def launch(self, graph: Any) -> None:
        """Run a captured graph."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...


def bindings() -> Any:
    """Import CUDA's runtime API from `cuda-python`; raises MissingExtraError without it."""
    # The first is of version 12.6 and later, the second was its name before.
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise MissingExtraError("running TensorRT engines needs cuda-python, which is not installed: pip install 'leanvlm[trt]'")


class CudaDevice:
    """The first CUDA device, with a stream of its own.

    Raises:
        BackendError: CUDA fails; the message is its own.
        MissingExtraError: `cuda-python` is not installed.
    """

    def __init__(self) -> None:
        self._api = bindings()
        self._kind = self._api.cudaMemcpyKind
        self._call("cudaSetDevice", 0)
        self.stream = int(self._call("cudaStreamCreate"))

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._api, name)(*arguments)
        if int(error) != 0:
            reason = self._api.cudaGetErrorString(error)[1]
            raise BackendError(f"CUDA: {name} failed: {reason.decode() if isinstance(reason, bytes) else reason}")
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        """Return the address of new bytes."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Give an allocation back."""
        self._call("cudaFree", address)

    def upload(self, address: int, values: Array) -> None:
        """Copy an array to the device."""
        values = np.ascontiguousarray(values)
        # From pageable memory the call returns when the array has been read.
        self._call(
            "cudaMemcpyAsync", address, values.ctypes.data, values.nbytes, self._kind.cudaMemcpyHostToDevice, self.stream
        )

    def download(self, values: Array, address: int) -> None:
        """Fill an array from the device and wait."""
        self._call(
            "cudaMemcpyAsync", values.ctypes.data, address, values.nbytes, self._kind.cudaMemcpyDeviceToHost, self.stream
        )
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes within the device."""
        self._call("cudaMemcpyAsync", target, source, size, self._kind.cudaMemcpyDeviceToDevice, self.stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy rows within the device, all with one call."""
        kind = self._kind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.stream)

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero."""
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record a graph; None where something in it cannot be recorded."""
        self._call("cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
            graph = self._call("cudaStreamEndCapture", self.stream)
            return self._call("cudaGraphInstantiate", graph, 0)
        except BackendError:
            # A failed call ends the capture, and leaves an error behind that the next call would report.
            self._api.cudaStreamEndCapture(self.stream)
            self._api.cudaGetLastError()
            return None

    def launch(self, graph: Any) -> None:
        """Run a captured graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)


class Buffer:
    """An array on a device: an address with a shape and a dtype; the memory goes back with the object."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.device = device
        self.shape = tuple(int(size) for size in shape)
        self.dtype = np.dtype(dtype)
        self.address = device.allocate(self.bytes)
        weakref.finalize(self, device.free, self.address)

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def fill(self, values: Array) -> None:
        """Overwrite it, or its beginning, with an array's values."""
        values = np.asarray(values, self.dtype)
        assert values.nbytes <= self.bytes, "an array larger than its buffer"
        self.device.upload(self.address, values)

    def numpy(self) -> Array:
        """Fetch it."""
        values = np.empty(self.shape, self.dtype)
        self.device.download(values, self.address)
        return values
