"""Decoders in which some layers keep a state of one size in place of keys and values: gated delta nets (arXiv 2412.06464).

Such a layer has two states. One holds the last columns that a short causal convolution reads, the other what the recurrence
remembers, (value heads, key width, value width). Both are replaced at every run, so nothing may be read behind a prompt's end.
The builder writes them with operators of ONNX Runtime's own; what it leaves out of the arithmetic is added here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch

LINEAR, FULL = "linear_attention", "full_attention"
# Layers of the checkpoint whose weights stay as they are whatever the precision: what they make is exponentiated.
DENSE = ("in_proj_a", "in_proj_b")
# What transformers adds to a squared length before it divides by the root, in every version.
EPSILON = 1e-6


def linear_layers(config: Any) -> list[int]:
    """Return the layers of a text configuration that keep a state in place of keys and values."""
    return [at for at, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind == LINEAR]


def with_states(base: Any) -> type:
    """Return a class over one of the builder's for gated delta nets, with the arithmetic of transformers."""

    class WithStates(base):  # type: ignore[misc]
        def get_attn_module(self, layer_id: int, layer: Any) -> Any:
            module = super().get_attn_module(layer_id, layer)
            if self.layer_types[layer_id] != LINEAR:
                return module
            # The builder would exponentiate in the weights' dtype, where transformers widens first.
            wide = {name: getattr(module, name).detach().float() for name in ("A_log", "dt_bias")}
            return SimpleNamespace(**{name: child for name, child in module.named_children()}, **wide)

        def make_l2_normalize(self, basename: str, root_input: str) -> str:
            heads, width = self.linear_num_key_heads, self.linear_key_head_dim
            flat, split = (["batch_size", "sequence_length", *sizes] for sizes in ([heads * width], [heads, width]))
            real, narrow = ir.DataType.FLOAT, self.io_dtype
            self.make_initializer(torch.tensor(EPSILON), "/model/l2norm/epsilon", to=real)

            def make(kind: str, inputs: list[str], shape: list[Any], dtype: Any = real, **attributes: Any) -> str:
                made = f"{basename}/{kind}/{dtype}"
                self.make_node(kind, inputs, [made], name=f"{made}/node", **attributes)
                self.make_value(made, dtype, shape=shape)
                return made

            single = [*split[:3], 1]
            rows = f"{basename}/heads"
            self.make_reshape(rows, [root_input, f"/model/constants/INT64/[0, 0, {heads}, {width}]"], narrow, split)
            # In half precision the square of a length over 256 would be infinite.
            wide = make("Cast", [f"{rows}/output_0"], split, to=real)
            squared = make("ReduceSumSquare", [wide, "/model/constants/INT64/[-1]"], single, keepdims=1)
            length = make("Sqrt", [make("Add", [squared, "/model/l2norm/epsilon"], single)], single)
            unit = make("Div", [wide, length], split)
            unit = unit if narrow == real else make("Cast", [unit], split, narrow, to=narrow)
            joined = f"{basename}/joined"
            self.make_reshape(joined, [unit, f"/model/constants/INT64/[0, 0, {heads * width}]"], narrow, flat)
            return f"{joined}/output_0"

    return WithStates
