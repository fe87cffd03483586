"""Families: one file per Hugging Face `model_type`."""

from __future__ import annotations

from importlib import import_module

from leanvlm.exporter.families.base import Description, Family, Parts
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.records import shorten

__all__ = ["ARCHITECTURES", "FAMILIES", "Description", "Family", "Parts", "family_for"]

FAMILIES: dict[str, str] = {
    "llava": "leanvlm.exporter.families.llava:LlavaFamily",
}
# For configurations that name their architecture only.
ARCHITECTURES = {"LlavaForConditionalGeneration": "llava"}


def family_for(model_type: str) -> Family:
    """Return the family of a checkpoint's `model_type`.

    Raises:
        UnsupportedModelError: No family of that name.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {shorten(repr(model_type))} is not supported; supported: {', '.join(FAMILIES)}"
        )
    module, name = FAMILIES[model_type].split(":")
    family: Family = getattr(import_module(module), name)()
    return family
