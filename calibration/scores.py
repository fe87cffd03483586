"""How answers are scored: exact match for short questions, hallucinated objects for captions, and how sure that is.

Captions are scored as CHAIR does (Rohrbach et al., 2018, arXiv 1809.02156): the share of mentioned objects that are not in
the scene (CHAIR-i), and the share of captions that mention at least one such (CHAIR-s).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leanvlm.demo.scenes import Scene, mentioned, present

CAPTION = "caption"


class CaptionScore(NamedTuple):
    """One caption: how many objects it mentions, how many of those are absent, how many objects it finds, of how many."""

    mentions: int
    absent: int
    found: int
    present: int


def score_caption(text: str, scene: Scene) -> CaptionScore:
    """Compare a caption with what the scene holds; two objects of one name must be mentioned twice to be found twice."""
    names, there = mentioned(text), present(scene)
    found = Counter(names) & Counter(there)
    return CaptionScore(len(names), sum(name not in there for name in names), found.total(), len(there))


@dataclass
class Scores:
    """Answers of one method at one budget to the questions about some scenes of one kind.

    Attributes:
        right: Short questions answered exactly, in each scene.
        asked: Short questions asked, in each scene.
        kinds: Kind of question to (right, asked).
        captions: One for each caption that was generated.
    """

    right: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    captions: list[CaptionScore] = field(default_factory=list)

    def add_scene(self, outcomes: Sequence[tuple[str, bool]]) -> None:
        """Count the short questions of a scene, given as (kind, whether the answer was right)."""
        self.right.append(sum(right for _, right in outcomes))
        self.asked.append(len(outcomes))
        for kind, right in outcomes:
            before = self.kinds.get(kind, (0, 0))
            self.kinds[kind] = (before[0] + right, before[1] + 1)

    @property
    def accuracy(self) -> float:
        """Share of short questions answered exactly, 0..1; 0 where none was asked."""
        return sum(self.right) / max(sum(self.asked), 1)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(sum(self.right), sum(self.asked))

    @property
    def chair_i(self) -> float:
        """Share of mentioned objects that are not there, 0..1."""
        return sum(c.absent for c in self.captions) / max(sum(c.mentions for c in self.captions), 1)

    @property
    def chair_s(self) -> float:
        """Share of captions that mention an object that is not there, 0..1."""
        return sum(c.absent > 0 for c in self.captions) / max(len(self.captions), 1)

    @property
    def recall(self) -> float:
        """Share of the objects that captions mention, 0..1."""
        return sum(c.found for c in self.captions) / max(sum(c.present for c in self.captions), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON holds them; `from_dict` reads them back."""
        return {
            "right": self.right,
            "asked": self.asked,
            "kinds": {kind: list(counts) for kind, counts in sorted(self.kinds.items())},
            "captions": [list(caption) for caption in self.captions],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Read the JSON form."""
        kinds = {kind: (int(right), int(asked)) for kind, (right, asked) in data["kinds"].items()}
        return cls(list(data["right"]), list(data["asked"]), kinds, [CaptionScore(*c) for c in data["captions"]])


@dataclass(frozen=True)
class Result:
    """Scores and what they belong to.

    Attributes:
        method: The pruner, as its spec string.
        budget: Image tokens kept.
        kind: Kind of scenes.
        scores: The counts.
        source: The bundle, or the checkpoint that was run in torch.
    """

    method: str
    budget: int
    kind: str
    scores: Scores
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back."""
        return {
            "source": self.source,
            "method": self.method,
            "budget": self.budget,
            "kind": self.kind,
            **self.scores.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Read the JSON form."""
        return cls(data["method"], int(data["budget"]), data["kind"], Scores.from_dict(data), data["source"])


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson, 1927); (0, 1) where nothing was asked.

    Unlike the normal approximation it stays inside 0..1 and is not empty at either end.
    """
    if asked == 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    share, total = right / asked, asked + z2
    centre = (right + z2 / 2) / total
    half = (z2 * (share * (1 - share) * asked + z2 / 4)) ** 0.5 / total
    return max(0.0, centre - half), min(1.0, centre + half)
