"""Families: one file per Hugging Face `model_type`."""

from __future__ import annotations

from importlib import import_module

from leanvlm.exporter.families.base import Description, Family, Frame, Parts
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.records import shorten

__all__ = ["ARCHITECTURES", "FAMILIES", "Description", "Family", "Frame", "Parts", "family_for"]

FAMILIES: dict[str, str] = {
    "gemma3": "leanvlm.exporter.families.gemma3:Gemma3Family",
    "idefics3": "leanvlm.exporter.families.smolvlm:Idefics3Family",
    "internvl": "leanvlm.exporter.families.internvl:InternVlFamily",
    "llava": "leanvlm.exporter.families.llava:LlavaFamily",
    "llava_next": "leanvlm.exporter.families.llava_next:LlavaNextFamily",
    "llava_onevision": "leanvlm.exporter.families.llava_onevision:LlavaOnevisionFamily",
    "mistral3": "leanvlm.exporter.families.mistral3:Mistral3Family",
    "paligemma": "leanvlm.exporter.families.paligemma:PaliGemmaFamily",
    "qwen2_5_vl": "leanvlm.exporter.families.qwen2_5_vl:Qwen25VlFamily",
    "qwen3_5": "leanvlm.exporter.families.qwen3_5:Qwen35Family",
    "qwen3_vl": "leanvlm.exporter.families.qwen3_vl:Qwen3VlFamily",
    "smolvlm": "leanvlm.exporter.families.smolvlm:SmolVlmFamily",
}
# For configurations that name their architecture only.
ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": "gemma3",
    "Idefics3ForConditionalGeneration": "idefics3",
    "InternVLForConditionalGeneration": "internvl",
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Mistral3ForConditionalGeneration": "mistral3",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "SmolVLMForConditionalGeneration": "smolvlm",
}


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
