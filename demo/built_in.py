"""The names that `--model` has for the built-in models."""

from __future__ import annotations

from dataclasses import replace

from leanvlm.demo import ERANK_REF, MODEL_DIR, SMALL_DIR, SMALL_ERANK_REF
from leanvlm.exporter.config import ExportConfig, KnownCheckpoint

__all__ = ["BUILT_IN", "resolved"]

BUILT_IN = {
    "demo": KnownCheckpoint("leanvlm-demo", MODEL_DIR, ERANK_REF),
    "demo-small": KnownCheckpoint("leanvlm-demo-small", SMALL_DIR, SMALL_ERANK_REF),
}


def resolved(config: ExportConfig) -> ExportConfig:
    """Return a request that knows its checkpoint, where its model is a built-in one; any other as it is."""
    return replace(config, known=BUILT_IN.get(config.model, config.known))
