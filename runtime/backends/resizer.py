"""Pictures resized and cut on the device.

Their levels go up as they were decoded, and the crops are written where the vision graph reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.backends.device import DeviceBuffer
from leanvlm.runtime.backends.ort import first_line
from leanvlm.runtime.backends.ort_memory import DeviceMemory
from leanvlm.runtime.cuts import Cut, Picture, Piece, Uncut, cut_pieces, is_height_first, known_order, whole
from leanvlm.runtime.errors import BackendError, LeanVLMWarning
from leanvlm.runtime.taps import PARTS, taps

MAX_BYTES = 1 << 30
"""Of device memory that one picture takes while it is resized: enough for 4096 x 4096 pixels to one crop, or 4000 x 3000 to
twelve of 448. It comes on top of the model's, so what is larger is left to the processor."""
KEPT_BYTES = 1 << 26
"""What stays allocated after a picture; of more all goes back, which takes longer than to keep it."""

First = Literal["width", "height"]


@dataclass(frozen=True)
class _Source:
    """Levels on the device: `shape` is (groups, pixels, channels of a group) and `size` (height, width)."""

    buffer: DeviceBuffer
    shape: tuple[int, int, int]
    size: tuple[int, int]


class DeviceResizer:
    """Runs the resize graphs.

    Args:
        memory: Where tensors live.
        sessions: Return the opened graph that resizes an axis first, the same with every call.
        most: Crops that are asked for at once.
    """

    def __init__(self, memory: DeviceMemory, sessions: Mapping[First, Callable[[], Any]], most: int) -> None:
        self.most = most
        self._memory = memory
        self._sessions = sessions

    def takes(self, piece: Piece) -> bool:
        """Whether a piece can be cut here exactly as Pillow would, within `MAX_BYTES`."""
        if not known_order():
            return False
        cuts = [*piece.picture.steps, piece.cut]
        if max(map(working_bytes, cuts)) > MAX_BYTES:
            return False
        windows = [window for cut in cuts for window in (cut.rows, cut.columns)]
        return all(taps(window, piece.picture.resample) is not None for window in windows)

    def fill(self, target: DeviceBuffer, crops: Uncut) -> None:
        """Cut pieces that are taken into a buffer of their levels (C, 3, H, W). Run it under the device's lock."""
        try:
            self._fill(target, crops)
        except Exception as error:  # ONNX Runtime's errors share no base of their own; most likely the memory is used up.
            warnings.warn(f"a picture was resized on the processor: {first_line(error)}", LeanVLMWarning, stacklevel=2)
            target.fill(np.stack(cut_pieces(crops.pieces)).transpose(0, 3, 1, 2))

    def _fill(self, target: DeviceBuffer, crops: Uncut) -> None:
        address, picture = target.address, None
        for piece in crops.pieces:
            if piece.picture is not picture:
                picture, source = piece.picture, self._prepared(piece.picture)
            self._run(source, piece.cut, picture.resample, address)
            address += piece.cut.crops * 3 * piece.cut.size[0] * piece.cut.size[1]

    def _prepared(self, picture: Picture) -> _Source:
        """Send a picture's levels up and resize the whole of it, where that comes first."""
        levels = np.asarray(picture.image)
        height, width, _ = levels.shape
        source = _Source(self._memory.empty(levels.shape, np.uint8), (1, height * width, 3), (height, width))
        source.buffer.fill(levels)
        for step in picture.steps:
            height, width = step.size
            planes = self._memory.empty((3, height, width), np.uint8)
            self._run(source, step, picture.resample, planes.address)
            source = _Source(planes, (3, height * width, 1), (height, width))
        return source

    def _run(self, source: _Source, cut: Cut, resample: int, address: int) -> None:
        session = self._sessions["height" if is_height_first(cut) else "width"]()
        binding, memory = session.io_binding(), self._memory
        binding.bind_input("levels", memory.device, 0, np.uint8, source.shape, source.buffer.address)
        for name, values in _small_inputs(source.size, cut, resample).items():
            binding.bind_cpu_input(name, values)
        (rows, columns), (height, width) = cut.tiles, cut.size
        binding.bind_output("crops", memory.device, 0, np.uint8, (rows, columns, 3, height, width), address)
        session.run_with_iobinding(binding, memory.once_options(shrink=working_bytes(cut) > KEPT_BYTES))


def probe() -> dict[str, npt.NDArray[Any]]:
    """Return inputs with which every node of a resize graph runs once."""
    return {"levels": np.zeros((1, 20 * 30, 3), np.uint8), **_small_inputs((20, 30), whole((20, 30), (8, 10)), 3)}


def _small_inputs(size: tuple[int, int], cut: Cut, resample: int) -> dict[str, npt.NDArray[Any]]:
    """Return what a resize graph takes beside the levels of a picture (height, width)."""
    inputs: dict[str, npt.NDArray[Any]] = {
        "size": np.array([3, *size], np.int64),
        "grid": np.array([3, cut.tiles[0], cut.size[0], cut.tiles[1], cut.size[1]], np.int64),
    }
    for name, window in (("rows", cut.rows), ("columns", cut.columns)):
        found = taps(window, resample)
        if found is None:
            raise BackendError("a picture that only the processor resizes exactly")
        inputs[f"{name}_shape"] = np.array([PARTS * window.size, window.length], np.int64)
        inputs[f"{name}_index"], inputs[f"{name}_weights"] = found.index, found.weights
    return inputs


def working_bytes(cut: Cut) -> int:
    """Return the most device memory that a cut takes, the levels of the picture among it."""
    (height, width), (rows, columns) = (cut.rows.length, cut.columns.length), (cut.rows.size, cut.columns.size)
    # The levels, the same in planes, and these in fp32.
    picture = (3 + 3 + 12) * height * width
    # Sums of parts in fp32, and what is made of them, two at a time.
    between = rows * width if is_height_first(cut) else height * columns
    sums = (PARTS + 2) * 12 * (between + rows * columns)
    matrices = 2 * 4 * PARTS * (rows * height + columns * width)
    return picture + sums + matrices
