"""Graph passes: one rewrite per file, in lists in the order in which they run; `targets.py` says which list is whose."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from leanvlm.exporter.passes.attention import fuse_attention
from leanvlm.exporter.passes.bias_column import fold_bias_columns
from leanvlm.exporter.passes.greedy_token import add_greedy_token
from leanvlm.exporter.passes.last_position import add_last_position
from leanvlm.exporter.passes.levels_shape import shape_behind_cast
from leanvlm.exporter.passes.norm_types import widen_norm_inputs
from leanvlm.exporter.passes.quick_gelu import fuse_quick_gelu
from leanvlm.exporter.passes.rounded_products import round_products
from leanvlm.exporter.passes.simplified_norm import simplify_norms
from leanvlm.exporter.passes.skip_layer_norm import fuse_skip_layer_norm
from leanvlm.exporter.passes.stage_names import name_by_layer, name_by_stage
from leanvlm.exporter.passes.strip_metadata import strip_metadata
from leanvlm.exporter.passes.topk_count import fix_topk_counts

__all__ = ["CUDA", "CUDA_DECODER", "PLAIN", "ROUNDED", "TENSORRT", "TENSORRT_DECODER", "Pass"]

Pass = Callable[[ir.Model], int]
PLAIN: dict[str, Pass] = {"stage_names": name_by_stage, "strip_metadata": strip_metadata}
# Behind the others, where the vision graphs compute in 8 bits.
ROUNDED: dict[str, Pass] = {"rounded_products": round_products}
TENSORRT: dict[str, Pass] = {
    **PLAIN,
    "levels_shape": shape_behind_cast,
    "topk_count": fix_topk_counts,
    "norm_types": widen_norm_inputs,
}
# The fused operators are ONNX Runtime's own; on the processor its optimiser does as well by itself.
CUDA: dict[str, Pass] = {
    **PLAIN,
    "quick_gelu": fuse_quick_gelu,
    "attention": fuse_attention,
    "skip_layer_norm": fuse_skip_layer_norm,
    "simplified_norm": simplify_norms,
    "bias_column": fold_bias_columns,
}
CUDA_DECODER: dict[str, Pass] = {"last_position": add_last_position, "greedy_token": add_greedy_token}
TENSORRT_DECODER: dict[str, Pass] = {
    "layer_names": name_by_layer,
    "strip_metadata": strip_metadata,
    "norm_types": widen_norm_inputs,
}
