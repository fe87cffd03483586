"""CLIP towers that are small enough to trace in tests, their inputs, and what the GPU's graph passes find in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from leanvlm.exporter.passes.pattern import CONTRIB
from leanvlm.exporter.targets import TARGETS

Array = npt.NDArray[Any]

IMAGE_SIZE, PATCH, GRID, HEADS, BLOCKS = 56, 14, (4, 4), 4, 3
# The exporter folds a transposed weight of at most 8192 elements whoever uses it, and a larger one if it has one user. So
# the scored block's keys are computed twice in a tower of 64, and shared, as in a real one, in a tower of 96.
FOLDED, SHARED = 64, 96
# Graphs are traced with two images.
BATCHES = (1, 3)
# Pass to how many changes it makes in such a tower. A sum stands before every norm but the first two: that of the embeddings
# and the first block's.
CHANGES = {"quick_gelu": 3, "attention": 3, "skip_layer_norm": 6, "bias_column": 3}
# ONNX Runtime's fused operators.
QUICK_GELU, ATTENTION, MULTI_HEAD, SKIP_NORM = (
    f"{CONTRIB}.{name}" for name in ("QuickGelu", "Attention", "MultiHeadAttention", "SkipLayerNormalization")
)


def clip(width: int) -> Any:
    """Return a random CLIP transformer, no bias of which is zero and no scale of a norm one."""
    config = CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, intermediate_size=width + 64,
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_act="quick_gelu",
    )  # fmt: skip
    torch.manual_seed(width)
    model: Any = CLIPVisionModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(0, 0.2).add_(float("norm" in name and name.endswith("weight")))
    return getattr(model, "vision_model", model)


def apply(model: ir.Model, names: Sequence[str] | None = None) -> dict[str, int]:
    """Run passes of the target cuda in the order of its list, all by default, and return what each says it changed."""
    return {name: rewrite(model) for name, rewrite in TARGETS["cuda"].passes.items() if names is None or name in names}


def levels(batch: int) -> dict[str, Array]:
    """Return random images."""
    shape = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"pixel_values": np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)}


def pixels(batch: int) -> dict[str, Array]:
    """Return random normalised images."""
    shape = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"pixel_values": np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)}
