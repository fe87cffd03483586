"""Backends: what runs a bundle's graphs. A target names its backend; a backend opens vision graphs and the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.manifest import Manifest

__all__ = ["BACKENDS", "Backend", "Decoder", "Graph", "open_backend"]

BACKENDS: dict[str, str] = {
    "cpu": "leanvlm.runtime.backends.ort:OrtBackend",
    "cuda": "leanvlm.runtime.backends.ort:OrtBackend",
}

Array = npt.NDArray[Any]


class Graph(Protocol):
    """One vision graph, ready to run."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; inputs and outputs go by the names in the manifest."""
        ...


class Decoder(Protocol):
    """The decoder with the key-value cache of one sequence."""

    def start(self, capacity: int) -> None:
        """Begin a new sequence of at most `capacity` positions."""
        ...

    def step(self, embeddings: npt.NDArray[np.float32], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append embeddings (S, D) at positions (S,) to the sequence and return the logits (V,) of the last one."""
        ...


class Backend(Protocol):
    """Opens the graphs of one bundle on one device."""

    device: str

    def graph(self, budget: int) -> Graph:
        """Open the vision graph of a budget."""
        ...

    def decoder(self) -> Decoder:
        """Open the decoder."""
        ...

    def vision_shares(self, budget: int, pixel_values: Array, runs: int) -> dict[str, float]:
        """Return the share of vision, project and prune in a vision graph's time, measured node by node."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that run the graphs."""
        ...


def open_backend(folder: Path, manifest: Manifest, *, device: str | None, threads: int | None, prepack: bool = True) -> Backend:
    """Open the backend of a bundle's target.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        device: `cpu`, `cuda`, or None for the bundle's own.
        threads: Processor threads; None leaves the choice to the backend.
        prepack: Let the backend copy weights into the layout that its kernels like best; without, they stay mapped from the
            files, which is slower and takes half the memory.

    Raises:
        BackendError: The target has no backend here, or the device is not there.
    """
    if manifest.target not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise BackendError(f"bundles for {manifest.target} cannot be run by this version; it runs those for {known}")
    module, name = BACKENDS[manifest.target].split(":")
    backend: Backend = getattr(import_module(module), name)(folder, manifest, device=device, threads=threads, prepack=prepack)
    return backend
