"""Images to the embeddings of their kept tokens: cut into crops, then through the vision graph of a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from leanvlm.runtime.answer import Pruning, Timings
from leanvlm.runtime.backends import Backend, Graph
from leanvlm.runtime.crops import PIXELS, Arrangement, CroppedImage, arrange, crop
from leanvlm.runtime.cuts import Uncut, size_of
from leanvlm.runtime.errors import BackendError, SessionClosedError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.preprocess import ImageSource, load_image, load_raster

Inputs = Mapping[str, Any]


def in_parts(inputs: Inputs, at_once: int) -> list[dict[str, Any]]:
    """Split a vision graph's inputs into those of so many crops at most; pieces that are not cut yet stay whole."""
    pixels = inputs[PIXELS]
    if isinstance(pixels, Uncut):
        parts = pixels.parts(at_once)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        spans = list(zip([0, *ends], ends, strict=False))
        rest = {name: values for name, values in inputs.items() if name != PIXELS}
        return [
            {PIXELS: part, **{name: values[start:end] for name, values in rest.items()}}
            for part, (start, end) in zip(parts, spans, strict=True)
        ]
    starts = range(0, len(pixels), at_once)
    return [{name: values[start : start + at_once] for name, values in inputs.items()} for start in starts]


class Encoder:
    """Runs a bundle's vision graphs; each opens when its budget is first used, with its own copy of the weights in memory."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self._manifest = manifest
        self._backend = backend
        self._graphs: dict[str, Graph] = {}
        self._closed = False

    def close(self) -> None:
        """Let go of the graphs."""
        self._closed = True
        self._graphs.clear()

    def arrange(
        self, images: Sequence[ImageSource], among: int | None = None
    ) -> tuple[Sequence[ImageSource], list[Arrangement]]:
        """Say how images will be cut, for which those that become tiles are opened.

        Args:
            images: Each as `load_image` takes it.
            among: How many images the prompt has; None: these.

        Returns:
            The images, those that were opened as Pillow images or levels; and one arrangement each.

        Raises:
            InputError: An image that cannot be used.
        """
        rule = self._manifest.crops
        if rule.kind == "whole":
            return images, [Arrangement()] * len(images)
        load = load_image if self._backend.resizer is None else load_raster
        opened = [load(image) for image in images]
        return opened, [arrange(size_of(image), rule, among or len(images)) for image in opened]

    def encode(
        self, images: Sequence[ImageSource], budget: int, timings: Timings, among: int | None = None
    ) -> list[ImageFeatures]:
        """Turn images into the embeddings that the decoder reads, keeping `budget` tokens of each crop.

        Args:
            images: B images; none gives an empty list.
            budget: One of the bundle's budgets.
            timings: Receives the times of preprocess and vision.
            among: How many images their prompt has; None: these.

        Raises:
            InputError: An image that cannot be used.
            BackendError: A graph failed, or returned values that are not finite.
        """
        if not images:
            return []
        start = perf_counter()
        cropped = crop(images, self._manifest.image, self._manifest.crops, among, self._backend.resizer)
        timings.preprocess += 1e3 * (perf_counter() - start)
        encoded = {shape: self._encode(inputs, budget, shape, timings) for shape, inputs in cropped.inputs.items()}

        def features(image: CroppedImage) -> ImageFeatures:
            return ImageFeatures(tuple(encoded[shape][row] for shape, row in image.crops), image.arrangement)

        return [features(image) for image in cropped.images]

    def graph(self, budget: int, shape: int = 0) -> Graph:
        """Return the vision graph of a budget, opened on first use. Beside other threads, run it under `backend.lock`.

        Args:
            budget: Image tokens kept per crop.
            shape: Index of the crop shape.
        """
        spec = self._manifest.vision_graph(budget, shape)
        with self._backend.lock:
            self._check_open()
            if spec.file not in self._graphs:
                self._graphs[spec.file] = self._backend.graph(spec)
            return self._graphs[spec.file]

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("this session is closed; load the bundle again")

    def _encode(self, inputs: Inputs, budget: int, shape: int, timings: Timings) -> list[CropFeatures]:
        """Run the vision graph on crops of one shape, as many at once as the backend takes."""
        parts = in_parts(inputs, self._backend.crops_at_once)
        return [features for part in parts for features in self._run(part, budget, shape, timings)]

    def _run(self, inputs: Inputs, budget: int, shape: int, timings: Timings) -> list[CropFeatures]:
        spec = self._manifest.vision_graph(budget, shape)
        with self._backend.lock:
            self._check_open()
            graph, start = self.graph(budget, shape), perf_counter()
            crops = inputs[PIXELS]
            if isinstance(crops, Uncut):
                inputs = {**inputs, PIXELS: self._cut(graph, crops)}
            cut = perf_counter()
            outputs = graph.run(inputs)
            timings.preprocess += 1e3 * (cut - start)
            timings.vision += 1e3 * (perf_counter() - cut)
        kept = {outputs["keep_indices"].shape[1], outputs["image_features"][0].shape[0]}
        if kept != {spec.kept}:
            found = " and ".join(map(str, sorted(kept)))
            raise BackendError(f"{spec.file} returned {found} tokens where it keeps {spec.kept}: export the bundle again")
        return [self._features(outputs, row, shape) for row in range(len(crops))]

    def _cut(self, graph: Any, crops: Uncut) -> Any:
        """Cut crops where a graph of the backend's device reads them, and return the buffer."""
        resizer: Any = self._backend.resizer
        buffer = graph.pixels(len(crops))
        resizer.fill(buffer, crops)
        return buffer

    def _features(self, outputs: Mapping[str, Any], row: int, shape: int) -> CropFeatures:
        # One value that is not finite spoils the sum, so features that stay on the device need not be fetched to be checked.
        if not np.isfinite(outputs["feature_sum"][row]):
            raise BackendError("the vision graph returned features or attention that are not finite (NaN or infinity)")
        embeddings, rank = outputs["image_features"][row], float(outputs["effective_rank"][row])
        pruning = Pruning(
            kept=embeddings.shape[0],
            effective_rank=rank if rank > 0 else None,
            num_selected=int(outputs["num_selected"][row]),
            converged=bool(outputs["converged"][row]),
            indices=outputs["keep_indices"][row],
            attention=outputs["attention"][row],
            shape=self._manifest.crops.shapes[shape],
        )
        return CropFeatures(embeddings, pruning)
