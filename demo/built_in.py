"""The built-in models, offered under the names that `pyproject.toml` gives them as entry points."""

from __future__ import annotations

from leanvlm.demo import ERANK_REF, MODEL_DIR, SMALL_DIR, SMALL_ERANK_REF
from leanvlm.exporter.config import KnownCheckpoint

__all__ = ["BUILT_IN", "DEMO", "DEMO_SMALL"]

DEMO = KnownCheckpoint("leanvlm-demo", MODEL_DIR, ERANK_REF)
DEMO_SMALL = KnownCheckpoint("leanvlm-demo-small", SMALL_DIR, SMALL_ERANK_REF)
BUILT_IN = {"demo": DEMO, "demo-small": DEMO_SMALL}
