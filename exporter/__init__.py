"""Exporting: checkpoint to bundle. `export(ExportConfig(model="llava", budgets=(64,)))`."""

from __future__ import annotations

from collections.abc import Callable

from leanvlm.exporter.config import ExportConfig
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.optional import require

__all__ = ["ExportConfig", "export"]


def export(config: ExportConfig, on_step: Callable[[str], None] = lambda step: None) -> Manifest:
    """Write a bundle and return its manifest.

    Args:
        config: What to export.
        on_step: Told each step as it begins.

    Raises:
        LeanVLMError: A wrong request, checkpoint or graph, in one line; nothing is left behind.
    """
    require("torch", "export")
    require("transformers", "export")
    # Imported here so that a machine without torch can still import this package and be told what is missing.
    from leanvlm.exporter.pipeline import export_plan
    from leanvlm.exporter.plan import fetch, plan

    return export_plan(fetch(plan(config)), on_step)
