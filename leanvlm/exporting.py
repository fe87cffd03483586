"""Exporting as `leanvlm.export` offers it: the exporter, and the built-in models by their names."""

from __future__ import annotations

from collections.abc import Callable

from leanvlm.demo.built_in import resolved
from leanvlm.exporter import export as write_bundle
from leanvlm.exporter.config import ExportConfig
from leanvlm.runtime.manifest import Manifest


def export(config: ExportConfig, on_step: Callable[[str], None] = lambda step: None) -> Manifest:
    """Write a bundle and return its manifest.

    Args:
        config: What to export; the model may also be `demo` or `demo-small`.
        on_step: Told each step as it begins.

    Raises:
        LeanVLMError: A wrong request, checkpoint or graph, in one line; nothing is left behind.
    """
    return write_bundle(resolved(config), on_step)
