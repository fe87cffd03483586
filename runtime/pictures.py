"""A prompt's pictures: those that a session has encoded before, and the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from leanvlm.runtime.answer import Timings
from leanvlm.runtime.crops import Arrangement
from leanvlm.runtime.encoder import Encoder
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.preprocess import ImageSource
from leanvlm.runtime.reuse import ImageCache, content_key


@dataclass(frozen=True)
class Asked:
    """The images of a prompt before it is known whether they fit.

    Attributes:
        keys: Of each what it is known by; the first part is None for one that cannot be.
        known: Of each its features, if it was encoded before.
        opened: The others.
        arrangements: How each is cut.
    """

    keys: Sequence[tuple[Hashable, ...]]
    known: Sequence[ImageFeatures | None]
    opened: Sequence[ImageSource]
    arrangements: Sequence[Arrangement]


@dataclass(frozen=True)
class Pictures:
    """Encodes pictures once.

    Attributes:
        encoder: Turns them into embeddings.
        cache: Those that were.
        by_number: Whether one is cut otherwise when there are several.
    """

    encoder: Encoder
    cache: ImageCache
    by_number: bool

    def look_up(self, images: Sequence[ImageSource], budget: int) -> Asked:
        """Find the images that were encoded before, and say how the others will be cut."""
        several = len(images) > 1 and self.by_number
        keys = [(content_key(image), budget, several) if self.cache.limit else (None,) for image in images]
        known = [None if key[0] is None else self.cache.get(key) for key in keys]
        new = [image for image, found in zip(images, known, strict=True) if found is None]
        opened, cut = self.encoder.arrange(new, len(images))
        arrangements = iter(cut)
        return Asked(keys, known, opened, [next(arrangements) if one is None else one.arrangement for one in known])

    def encode(self, asked: Asked, budget: int, timings: Timings) -> list[ImageFeatures]:
        """Encode those of a prompt's images that are new."""
        made = iter(self.encoder.encode(asked.opened, budget, timings, len(asked.known)))
        features = [next(made) if one is None else one for one in asked.known]
        for key, one, found in zip(asked.keys, features, asked.known, strict=True):
            if found is None and key[0] is not None:
                self.cache.put(key, one)
        timings.reused_images = len(features) - len(asked.opened)
        return features
