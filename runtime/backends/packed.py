"""Small tensors side by side in one buffer of a device: one copy over the bus takes them all, where each would cost 10 us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.device import DeviceBuffer

Array = npt.NDArray[Any]
# What ONNX Runtime aligns its own tensors to.
ALIGNMENT = 256


class PackedTensors:
    """Tensors of a graph in one buffer, with their values in the processor's memory beside it.

    Args:
        tensors: Name, shape and dtype of each.
        allocate: Returns a buffer of a shape and dtype on the device.

    Attributes:
        values: Of each tensor, by its name: what `send` copies to the device and `fetch` copies back.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, tuple[int, ...], str]],
        allocate: Callable[[tuple[int, ...], str], DeviceBuffer],
    ) -> None:
        sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for _, shape, dtype in tensors]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._offsets = dict(zip((name for name, *_ in tensors), np.cumsum([0, *padded]).tolist(), strict=False))
        self._host = np.zeros(sum(padded), np.uint8)
        self._buffer = allocate(self._host.shape, "uint8")
        self.values: dict[str, Array] = {
            name: self._host[self._offsets[name] : self._offsets[name] + size].view(dtype).reshape(shape)
            for (name, shape, dtype), size in zip(tensors, sizes, strict=True)
        }

    def place(self, name: str) -> tuple[type[Any], tuple[int, ...], int]:
        """Return a tensor's type, shape and address on the device, as ONNX Runtime's bindings take them."""
        values = self.values[name]
        return values.dtype.type, values.shape, self._buffer.address + self._offsets[name]

    def send(self) -> None:
        """Copy all values to the device."""
        self._buffer.fill(self._host)

    def fetch(self) -> None:
        """Copy all values from the device."""
        self._host[:] = self._buffer.numpy()
