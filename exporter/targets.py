"""What graphs are written for: everything that the exporter does differently for one target stands in its record here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from leanvlm.exporter import passes
from leanvlm.exporter.passes import Pass

__all__ = ["MIN_ONNXRUNTIME", "TARGETS", "Target"]

# What a bundle asks for, if it needs nothing newer.
MIN_ONNXRUNTIME = "1.23"


@dataclass(frozen=True)
class Target:
    """One target. Its precisions are in `runtime/manifest.py`, where a device looks them up too.

    Attributes:
        opset: ONNX opset of its graphs.
        decoder: `genai`: made by onnxruntime-genai's model builder. `portable`: traced, in standard operators.
        passes: Graph passes for vision graphs, in order.
        decoder_passes: The same for the decoder.
        extra: What of this package must be installed to verify a bundle.
        layout: What the vision graph takes; levels are a quarter of the bytes to move, and the GPU normalises them.
        rounded_passes: Vision graphs in int8 go through these too; empty where there are none.
        vision_dtype: What vision graphs compute in, the gate and the selection aside; None: as the decoder.
        head_multiple: The decoder's attention takes heads whose width is a multiple of this.
        gate_up_in_one: Precisions at which a block's two products of one input are made one.
        is_gpu: The checkpoint may run on this machine's GPU during the verification.
        cut_stages: Vision graphs that end with each stage are written too, where the host's clock cannot time a stage.
        splice: A graph that puts prompts together is written too.
        resize: Graphs that resize pictures are written too.
        dialect: Graphs must keep to what TensorRT's parser takes.
        masked: The least ONNX Runtime whose attention takes another mask than the causal one; None where it takes none.
        newer_opset: The opset instead, where the TensorRT of this machine is new enough for attention in one operator.
    """

    opset: int
    decoder: Literal["genai", "portable"]
    passes: Mapping[str, Pass]
    decoder_passes: Mapping[str, Pass]
    extra: Literal["export", "gpu-export"] = "export"
    layout: Literal["float32", "uint8"] = "uint8"
    rounded_passes: Mapping[str, Pass] = field(default_factory=dict)
    vision_dtype: torch.dtype | None = None
    head_multiple: int = 2
    gate_up_in_one: tuple[str, ...] = ()
    is_gpu: bool = False
    cut_stages: bool = False
    splice: bool = False
    resize: bool = False
    dialect: bool = False
    masked: str | None = None
    newer_opset: int | None = None


TARGETS: dict[str, Target] = {
    "cpu": Target(
        opset=18,
        decoder="genai",
        passes=passes.PLAIN,
        decoder_passes={},
        layout="float32",
        rounded_passes=passes.ROUNDED,
        vision_dtype=torch.float32,
        # ONNX Runtime's kernels of GroupQueryAttention take no other head sizes.
        head_multiple=16,
        # Its GroupQueryAttention can be told not to be causal since.
        masked="1.30",
    ),
    "cuda": Target(
        opset=23,
        decoder="genai",
        passes=passes.CUDA,
        decoder_passes=passes.CUDA_DECODER,
        extra="gpu-export",
        vision_dtype=torch.float16,
        head_multiple=16,
        # A GPU reads the wider matrix at 4.1 TB/s, the two at 3.7 (H200). Quantised weights gain nothing.
        gate_up_in_one=("fp16",),
        is_gpu=True,
        cut_stages=True,
        splice=True,
        resize=True,
    ),
    "tensorrt-rtx": Target(
        opset=23,
        decoder="portable",
        passes=passes.TENSORRT,
        decoder_passes=passes.TENSORRT_DECODER,
        dialect=True,
        # The mask is made of ordinary operators.
        masked=MIN_ONNXRUNTIME,
    ),
    "tensorrt": Target(
        opset=20,
        decoder="portable",
        passes=passes.TENSORRT,
        decoder_passes=passes.TENSORRT_DECODER,
        dialect=True,
        # The mask is made of ordinary operators.
        masked=MIN_ONNXRUNTIME,
        newer_opset=23,
    ),
}
