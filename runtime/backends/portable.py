"""ONNX Runtime under a bundle for TensorRT: on the processor, or over a TensorRT provider of its own.

The graphs are in standard operators, so any provider runs them. The decoder's cache is open: the graph reads it and returns the
new rows, which are written behind the old ones here. TensorRT providers build engines when a graph is first run and keep them
in the bundle, under `engines/onnxruntime`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.ort import OrtBackend, OrtGraph, OrtScores, check_room, first_line
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.bundle import inside
from leanvlm.runtime.engines.profiles import (
    Limits,
    Profile,
    shapes_text,
    usual_image,
    usual_limits,
    vision_profile,
    whole_profile,
)
from leanvlm.runtime.errors import BackendError, MissingExtraError
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import as_input
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import SavedRows
from leanvlm.runtime.specs import DecoderSpec, GraphSpec

Array = npt.NDArray[Any]
CACHE = Path("engines") / "onnxruntime"
# What `--provider` takes, and ONNX Runtime's name for it.
TENSORRT = {"tensorrt": "TensorrtExecutionProvider", "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


class PortableBackend(OrtBackend):
    """Opens a bundle for TensorRT with ONNX Runtime.

    Raises:
        BackendError: ONNX Runtime is too old, or the provider is not there.
        MissingExtraError: ONNX Runtime or the provider's plugin is not installed.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        device: str | None,
        threads: int | None,
        prepack: bool = True,
        provider: str | None = None,
    ) -> None:
        if provider is not None and provider not in TENSORRT:
            raise BackendError(f"--provider {provider!r} is not known; known: {', '.join(TENSORRT)}")
        self.provider = provider
        self._plugin_devices: list[Any] = []
        super().__init__(folder, manifest, device=device or "cpu", threads=threads, prepack=prepack)

    def graph(self, spec: GraphSpec) -> OrtGraph:
        """Open a vision graph."""
        return OrtGraph(self.session(spec), spec)

    def decoder(self) -> Decoder:
        """Open the decoder."""
        spec = self.manifest.decoder
        session = self.session(spec.graph)
        # Engines that a provider built for prompts take empty caches only.
        return Decoder(lambda capacity, kept: PortableCache(session, spec, capacity), "nothing" if self.provider else "any")

    def session(self, spec: GraphSpec, *, profile_prefix: str | None = None, replayed: bool = True) -> Any:
        """Open a graph file; raises BackendError where ONNX Runtime would quietly go on without the provider."""
        session = super().session(spec, profile_prefix=profile_prefix, replayed=replayed)
        if self.provider is not None and TENSORRT[self.provider] not in session.get_providers():
            raise BackendError(f"ONNX Runtime cannot use {TENSORRT[self.provider]}; `leanvlm doctor` says what is missing")
        return session

    def provider_options(self, spec: GraphSpec) -> dict[str, str]:
        """Return a TensorRT provider's options for a graph: which shapes to build for, and where engines are kept."""
        profile, cache = self._profile(spec), str(self.folder / CACHE)
        if self.provider == "nv-tensorrt-rtx":
            names = ("nv_profile_min_shapes", "nv_profile_opt_shapes", "nv_profile_max_shapes")
            return {"nv_runtime_cache_path": cache, **{name: shapes_text(profile, at) for at, name in enumerate(names)}}
        names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
        half = self.manifest.precision == "fp16"
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": cache,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": cache,
            # The graphs say which values are in half precision; without this TensorRT would widen them.
            "trt_fp16_enable": "1" if half else "0",
            **{name: shapes_text(profile, at) for at, name in enumerate(names)},
        }

    def providers(self, spec: GraphSpec, replayed: bool, options: Any) -> list[Any] | None:
        """Return the execution providers of a session; None where its options name them."""
        if self.provider is None:
            return super().providers(spec, replayed, options)
        inside(self.folder, str(CACHE / "any")).parent.mkdir(parents=True, exist_ok=True)
        settings = self.provider_options(spec)
        if self._plugin_devices:
            options.add_provider_for_devices(self._plugin_devices, settings)
            return None
        return [(TENSORRT[self.provider], settings), "CUDAExecutionProvider", "CPUExecutionProvider"]

    def _profile(self, spec: GraphSpec) -> Profile:
        limits = usual_limits(self.manifest, Limits())
        if spec is self.manifest.decoder.graph:
            return whole_profile(self.manifest.decoder, limits, usual_image(self.manifest))
        return vision_profile(spec, limits)

    def _check_device(self) -> None:
        if self.provider is None:
            self._warn_of_device()
        elif self.provider == "nv-tensorrt-rtx":
            self._plugin_devices = _plugin_devices(self.ort)
            self.device = self.provider
        elif TENSORRT[self.provider] not in self.ort.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime does not offer {TENSORRT[self.provider]}: install 'leanvlm[gpu]' on a machine with "
                f"TensorRT, or run the bundle's engines without --provider"
            )
        else:
            self.device = self.provider


def _plugin_devices(ort: Any) -> list[Any]:
    """Load NVIDIA's plugin into ONNX Runtime and return the devices that it offers; none is an error.

    Raises:
        BackendError: No GPU that it can use, or an ONNX Runtime without plugins.
        MissingExtraError: It is not installed.
    """
    try:
        plugin = require(PLUGIN, "rtx")
    except MissingExtraError as error:
        raise MissingExtraError(
            f"--provider nv-tensorrt-rtx needs {PLUGIN}: pip install onnxruntime-ep-nv-tensorrt-rtx"
        ) from error
    name = plugin.get_ep_name()
    try:
        if all(device.ep_name != name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as error:  # ONNX Runtime's errors share no base of their own.
        raise BackendError(f"ONNX Runtime cannot load {PLUGIN}: {first_line(error)}") from error
    if not devices:
        raise BackendError(f"{PLUGIN} finds no GPU that it can use: it needs an RTX GPU of the Ampere generation or later")
    return devices


class PortableCache:
    """An open cache, beside the decoder's session in ONNX Runtime."""

    def __init__(self, session: Any, spec: DecoderSpec, capacity: int) -> None:
        self.capacity = capacity
        self._run: Callable[..., list[Array]] = session.run
        self._dtype, self._axes, self._masked = np.dtype(spec.kv_dtype), spec.axes, bool(spec.named("last_seen"))
        self._names, self._news = list(spec.caches), list(spec.caches.values())
        self._caches = np.zeros((len(self._names), 1, spec.kv_heads, capacity, spec.head_dim), self._dtype)
        self._prompt: Prompt | None = None
        self.length = 0

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Take a prompt, for a new sequence or behind the rows that stay."""
        self._prompt, self.length = prompt, past

    def saved(self, count: int) -> SavedRows:
        """Return copies of the first rows."""
        return SavedRows([self._caches[:, :, :, :count].copy()])

    def restore(self, saved: SavedRows) -> None:
        """Fill the first rows."""
        (rows,) = saved.rows
        self._caches[:, :, :, : rows.shape[3]], self.length = rows, rows.shape[3]

    def prefill(self) -> OrtScores:
        """Read the loaded prompt behind the rows that are filled."""
        assert self._prompt is not None, "load comes before prefill"
        filled, prompt = self._caches[:, :, :, : self.length], self._prompt
        return self._append(prompt.embeddings(self._dtype), prompt.positions, prompt.last_seen, filled)

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> OrtScores:
        """Append one embedding (D,) at a position; the whole cache goes in, filled or not, as a captured graph has it."""
        place = np.full((self._axes, 1), position, np.int64)
        return self._append(embedding[None], place, np.array([self.length]), self._caches)

    def _append(
        self, embeddings: Array, positions: npt.NDArray[np.int64], last_seen: npt.NDArray[np.int64], caches: Array
    ) -> OrtScores:
        count = len(embeddings)
        check_room(self.length + count, self.capacity)
        inputs: dict[str, Array] = {
            "inputs_embeds": np.ascontiguousarray(embeddings[None], self._dtype),
            "position_ids": as_input(positions),
            "past_length": np.array([self.length], np.int64),
            "last_position": np.array([count - 1], np.int64),
            **{name: np.ascontiguousarray(cache) for name, cache in zip(self._names, caches, strict=True)},
        }
        if self._masked:
            inputs["last_seen"] = last_seen[None]
        names = ["logits", *self._news]
        try:
            logits, *rows = self._run(names, inputs)
        except Exception as error:  # ONNX Runtime's errors share no base of their own.
            raise BackendError(f"the decoder failed: {first_line(error)}") from error
        for cache, row in zip(self._caches, rows, strict=True):
            cache[:, :, self.length : self.length + count] = row
        self.length += count
        return OrtScores(logits[0, -1].astype(np.float32, copy=False))
