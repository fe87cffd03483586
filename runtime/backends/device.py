"""Tensors on a device, and runs that are captured once and replayed: what the graphs and the decoder on a GPU are made of."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ort import first_line
from leanvlm.runtime.errors import BackendError

Array = npt.NDArray[Any]


def preload_libraries(ort: Any) -> None:
    """Let ONNX Runtime find CUDA and cuDNN in Python packages; it prints what it does not find, which its sessions will say."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


class DeviceMemory:
    """Allocates tensors on one device."""

    def __init__(self, ort: Any, device: str) -> None:
        self._ort = ort
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
        """Return options that capture a run under an id and replay it from then on."""
        options = self._ort.RunOptions()
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options


class DeviceFeatures:
    """The embeddings of B images of one run, (B, K, D); an index gives one image's rows.

    They lie where the graph wrote them, until its next run would overwrite them: then they are kept in the processor's memory.
    """

    def __init__(self, tensor: Any, shape: tuple[int, int, int]) -> None:
        self.tensor: Any = tensor
        self.shape = shape
        self._kept: Array | None = None

    def __getitem__(self, row: int) -> DeviceRows:
        return DeviceRows(self, row)

    def numpy(self) -> Array:
        """Fetch them."""
        if self._kept is not None:
            return self._kept
        fetched: Array = self.tensor.numpy()
        return fetched

    def keep(self) -> None:
        """Move them out of the graph's way."""
        self._kept, self.tensor = self.numpy().copy(), None


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


def run_slot(session: Any, slot: Slot, what: str) -> None:
    """Run a session on a slot's tensors and wait for it; `what` names it in the BackendError if ONNX Runtime fails."""
    try:
        session.run_with_iobinding(slot.binding, slot.options)
    except Exception as error:  # ONNX Runtime's errors share no base of their own.
        raise BackendError(f"{what} failed: {first_line(error)}") from error
