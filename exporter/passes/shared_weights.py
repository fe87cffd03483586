"""Write several graphs over one weights file: equal tensors are stored once, whatever graph they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

# Smaller tensors (shape constants, scalars) stay inside the graph, where optimisers can fold them.
INLINE_BYTES = 1024
# Page-aligned tensors can be mapped by the runtime.
ALIGNMENT = 4096


def save_sharing(models: Mapping[str, ir.Model], folder: Path, data_name: str) -> None:
    """Save each model as `folder/<name>`, its large tensors in `folder/<data_name>`.

    Args:
        models: File name to model; their initialisers are replaced by references into the data file.
        folder: Existing folder to write into.
        data_name: Name of the shared data file.
    """
    offsets: dict[str, int] = {}
    # Copies of a graph hold the same objects, which need not be read again.
    known: dict[int, tuple[ir.TensorProtocol, int]] = {}
    with (folder / data_name).open("wb") as data:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = tensor, _place(tensor.tobytes(), offsets, data)
                value.const_value = ir.ExternalTensor(
                    data_name, known[id(tensor)][1], tensor.nbytes, tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=folder,
                )  # fmt: skip
    for name, model in models.items():
        ir.save(model, folder / name)


def _place(raw: bytes, offsets: dict[str, int], data: BinaryIO) -> int:
    """Return where bytes stand in the data file, to which they are added if they are not there yet."""
    digest = hashlib.sha256(raw).hexdigest()
    if digest not in offsets:
        data.seek(-data.tell() % ALIGNMENT, 1)
        offsets[digest] = data.tell()
        data.write(raw)
    return offsets[digest]
