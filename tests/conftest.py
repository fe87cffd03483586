"""Fixtures that several test files share; what is slow to make is made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA checkpoint."""
    import tiny

    return tiny.llava(tmp_path_factory.mktemp("checkpoint") / "tiny-llava")
