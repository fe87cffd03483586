"""The graph that puts a prompt together on a GPU: rows of the text and of the images, taken in the prompt's order.

| direction | name | shape | meaning |
|---|---|---|---|
| in | `text` | (T, D) | embeddings of the text's tokens |
| in | `images` | (R, D) | embeddings of the kept image tokens, as the vision graph left them |
| in | `index` | (S,) int64 | for each position of the prompt, its row among the text's followed by the images' |
| out | `inputs_embeds` | (1, S, D) | what the decoder reads |

The decoder's own graph knows nothing of images, and an index is all that the host has to work out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

SPLICE = "splice.onnx"
OPSET = 18


def write_splice_graph(folder: Path, width: int, dtype: ir.DataType) -> ir.Graph:
    """Write `splice.onnx` for embeddings of a width D into a folder and return the graph."""

    def value(name: str, shape: tuple[int | str, ...], of: ir.DataType) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(of))

    text, images = value("text", ("T", width), dtype), value("images", ("R", width), dtype)
    index, output = value("index", ("S",), ir.DataType.INT64), value("inputs_embeds", (1, "S", width), dtype)
    axis = value("axis", (1,), ir.DataType.INT64)
    axis.const_value = ir.Tensor(np.array([0], np.int64), name="axis")
    rows = ir.node("Concat", [text, images], {"axis": 0}, name="/splice/Concat")
    taken = ir.node("Gather", [rows.outputs[0], index], {"axis": 0}, name="/splice/Gather")
    shaped = ir.node("Unsqueeze", [taken.outputs[0], axis], outputs=[output], name="/splice/Unsqueeze")
    graph = ir.Graph(
        [text, images, index],
        [output],
        nodes=[rows, taken, shaped],
        initializers=[axis],
        opset_imports={"": OPSET},
        name="splice",
    )
    ir.save(ir.Model(graph, ir_version=10, producer_name="leanvlm"), folder / SPLICE)
    return graph
