"""What families have alike whose configuration is a `vision_config` and a `text_config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from leanvlm.exporter import decoders
from leanvlm.exporter.ranges import check_depth
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.records import shorten


class ModelFamily:
    """The part that is the same in all of them.

    Attributes:
        model_type: Theirs.
        model: The model's class in transformers.
        towers: What a `vision_config` may call its type.
        texts: The same of a `text_config`.
    """

    model_type: ClassVar[str]
    model: ClassVar[Callable[[Any], nn.Module]]
    towers: ClassVar[tuple[str, ...]]
    texts: ClassVar[tuple[str, ...]] = decoders.ORDINARY

    def check_parts(self, raw: Mapping[str, Any]) -> None:
        """Refuse other towers and decoders, and deeper ones: of some, transformers makes lists as long as the file says.

        Raises:
            UnsupportedModelError: A tower or decoder that this family does not handle.
            CheckpointError: More layers than any has.
        """
        known = {"vision_config": ("tower", self.towers), "text_config": ("decoder", self.texts)}
        for name, (called, kinds) in known.items():
            part = raw.get(name)
            kind = part.get("model_type") if isinstance(part, Mapping) else None
            if isinstance(part, Mapping):
                check_depth(part, f"{name} in config.json")
            if kind and kind not in list(kinds):
                raise UnsupportedModelError(
                    f"{self.model_type} with a {shorten(repr(kind))} {called} is not supported; supported: {', '.join(kinds)}"
                )

    def check_config(self, config: Any) -> None:
        """Do the same with a transformers configuration, whose classes fill in what a file leaves out."""
        parts = ("vision_config", "text_config")
        self.check_parts({name: {"model_type": getattr(config, name).model_type} for name in parts})

    def empty(self, config: Any) -> nn.Module:
        """Build the model on the meta device: structure, no memory."""
        with torch.device("meta"):
            model = type(self).model(config)
        return model.eval()


def language_model_key(key: str) -> str:
    """Map `language_model.model.x`, `model.language_model.x` and so on, of several transformers versions, to one spelling."""
    key = key.removeprefix("model.")
    for old, new in (("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head.")):
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def feature_layers(named: Any, depth: int) -> tuple[int, ...]:
    """Return the hidden states that a `vision_feature_layer` names, one or several, counted from the embeddings.

    Raises:
        UnsupportedModelError: One is outside a tower of so many blocks; or the embeddings are named 0, not in a list, which
            transformers takes for no layer and fails.
    """
    if named == 0 and isinstance(named, int):
        raise UnsupportedModelError(
            f"vision_feature_layer 0, the embeddings, is not read by transformers; for {depth} blocks write {-depth - 1}"
        )
    layers = [named] if isinstance(named, int) else list(named)
    outside = next((layer for layer in layers if not -depth - 1 <= layer <= depth), None)
    if outside is not None or not layers:
        raise UnsupportedModelError(f"vision_feature_layer {shorten(named)} is outside a tower of {depth} blocks")
    return tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def cells_of(patches: int, cell: int, named: str) -> tuple[int, int]:
    """Return the grid of cells of cell x cell patches, of so many patches a side; `named` is the field that sets `cell`.

    Raises:
        UnsupportedModelError: They are no whole number.
    """
    if patches % cell:
        raise UnsupportedModelError(f"{patches} patches a row are no whole number of cells of {cell}; see {named}")
    return patches // cell, patches // cell
