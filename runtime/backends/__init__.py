"""Backends: what runs a bundle's graphs. A target names its backend; a backend opens vision graphs and the decoder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.engines.library import LIBRARIES
from leanvlm.runtime.errors import InputError, LeanVLMWarning
from leanvlm.runtime.generation import Scores
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.specs import GraphSpec, VisionSpec

__all__ = ["BACKENDS", "Backend", "Decoder", "Graph", "Scores", "open_backend", "processors"]

BACKENDS: dict[str, str] = {
    "cpu": "leanvlm.runtime.backends.ort:OrtBackend",
    "cuda": "leanvlm.runtime.backends.cuda:CudaBackend",
    "tensorrt-rtx": "leanvlm.runtime.backends.trt:TrtBackend",
    "tensorrt": "leanvlm.runtime.backends.trt:TrtBackend",
}
PORTABLE = "leanvlm.runtime.backends.portable:PortableBackend"
OPENVINO = "leanvlm.runtime.backends.openvino:OpenVinoBackend"

Array = npt.NDArray[Any]
DEFAULT = "onnxruntime"
"""The provider that runs a bundle for cpu or cuda where none is named."""


class Graph(Protocol):
    """One vision graph, ready to run."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Run the graph; inputs and outputs go by the names in the manifest.

        All outputs are arrays but `image_features`, which may stay on the device: an array, or `Rows` by index.
        """
        ...


class Backend(Protocol):
    """Opens the graphs of one bundle on one device.

    Attributes:
        device: Its name.
        resizer: Cuts pictures on the device, into what its vision graphs call `pixels`; None where the processor does.
        lock: Held by whoever uses the device: opens or runs a graph, loads a prompt, reads scores or features.
    """

    device: str
    resizer: Any
    lock: AbstractContextManager[Any]

    @property
    def crops_at_once(self) -> int:
        """The most crops that go through a vision graph in one run."""
        ...

    def graph(self, spec: GraphSpec) -> Graph:
        """Open a vision graph."""
        ...

    def decoder(self) -> Decoder:
        """Open the decoder."""
        ...

    def vision_shares(self, spec: VisionSpec, inputs: Mapping[str, Array], runs: int) -> dict[str, float]:
        """Return the share of vision, project and prune in a vision graph's time."""
        ...

    def misplaced(self, spec: GraphSpec, inputs: Mapping[str, Array]) -> list[str]:
        """Return the nodes, shape arithmetic aside, that do not run on the device: of a vision graph and the others."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that run the graphs."""
        ...


def open_backend(
    folder: Path,
    manifest: Manifest,
    *,
    device: str | None,
    threads: int | None,
    prepack: bool = True,
    provider: str | None = None,
) -> Backend:
    """Open the backend of a bundle's target.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        device: `cpu`, `cuda`, or None for the bundle's own; with OpenVINO one of its devices, None for its CPU.
        threads: Processor threads, no more than there are processors; None leaves the choice to the backend.
        provider: For a bundle for cpu, `onnxruntime` (as None), `openvino` or `openvino:f32`. For one for TensorRT, `tensorrt`
            or `nv-tensorrt-rtx`: let ONNX Runtime run it; None runs its engines.
        prepack: Let the backend copy weights into the layout that its kernels like best; without, they stay mapped from the
            files, which is slower and takes half the memory.

    Raises:
        BackendError: The device, the provider or the engines are not there.
        InputError: A provider for another target, or together with a device; a number of threads below 1.
    """
    path = BACKENDS[manifest.target]
    options: dict[str, Any] = {"device": device, "threads": _capped(threads), "prepack": prepack}
    if provider == DEFAULT and manifest.target not in LIBRARIES:
        provider = None
    if provider is not None:
        _check_provider(provider, manifest.target)
    if provider is not None and manifest.target == "cpu":
        path, options = OPENVINO, {**options, "provider": provider}
    elif manifest.target in LIBRARIES and (device == "cpu" or provider is not None):
        if device is not None and provider is not None:
            raise InputError(f"--device {device} and --provider {provider} exclude each other; give one")
        path, options = PORTABLE, {**options, "provider": provider}
    module, name = path.split(":")
    backend: Backend = getattr(import_module(module), name)(folder, manifest, **options)
    return backend


def _check_provider(provider: str, target: str) -> None:
    """Raise InputError if a provider is not for bundles of a target."""
    if target == "cpu" and provider.partition(":")[0] == "openvino":
        return
    if target in LIBRARIES and provider.partition(":")[0] != "openvino":
        return
    named = " and ".join((" or ".join(LIBRARIES), "cpu (openvino)"))
    raise InputError(f"--provider {provider} is not for this bundle, whose target is {target}; providers are for {named}")


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _capped(threads: int | None) -> int | None:
    """Return `threads`, or the number of processors where that is less."""
    if threads is None or 1 <= threads <= processors():
        return threads
    if threads < 1:
        raise InputError(f"threads {threads} is not possible; give at least 1")
    most = processors()
    warnings.warn(
        f"{threads} threads for {most} processors only wait for each other; {most} are used", LeanVLMWarning, stacklevel=2
    )
    return most
