"""Graph passes: one rewrite per file, applied in this order to each traced vision graph."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from leanvlm.exporter.passes.stage_names import name_by_stage
from leanvlm.exporter.passes.strip_metadata import strip_metadata

__all__ = ["PASSES"]

PASSES: dict[str, Callable[[ir.Model], int]] = {
    "stage_names": name_by_stage,
    "strip_metadata": strip_metadata,
}
