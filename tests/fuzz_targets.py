"""What `python -m bench fuzz` tries, for the tests: the package `bench` is not installed, and lies in the checkout's root."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the checkout: bench is not installed", allow_module_level=True)

sys.path.append(str(ROOT))
try:
    from bench.fuzz import POLICY, REQUEST, TARGETS, seeds
finally:
    sys.path.remove(str(ROOT))

__all__ = ["POLICY", "REQUEST", "TARGETS", "seeds"]
