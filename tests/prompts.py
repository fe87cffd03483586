"""Prompts of embeddings that no token has."""

from __future__ import annotations

from typing import Any

import numpy as np

from leanvlm.runtime.prompt import Prompt


def text_prompt(embeddings: Any) -> Prompt:
    """Return a prompt of text rows (S, D) alone."""
    index = np.arange(len(embeddings))
    return Prompt(embeddings, (), index, index[None], len(index), index)
