"""Which shapes an engine takes: TensorRT wants the least, the usual and the largest of every free size before it builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.specs import DecoderSpec, GraphSpec, TensorSpec

Shape = tuple[int, ...]
# Input to its least, usual and largest shape.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
# A question of a usual length, beside the image's tokens.
USUAL_TEXT = 40
# Tokens of the text around a crop, where there is any.
USUAL_MARKS = 4
USUAL_POSITIONS = 256


@dataclass(frozen=True)
class Limits:
    """The largest sizes that engines are built for.

    Attributes:
        images: Crops that go through a vision graph at once; an image that is taken whole is one.
        prompt: Positions of a prompt.
        positions: Positions of prompt and answer together.

    Raises:
        InputError: A size below 1, or a prompt longer than all positions.
    """

    images: int = 4
    prompt: int = 1024
    positions: int = 2048

    def __post_init__(self) -> None:
        for name, size in (("--max-images", self.images), ("--max-prompt", self.prompt), ("--max-positions", self.positions)):
            if size < 1:
                raise InputError(f"{name} {size} is not possible; give at least 1")
        if self.prompt > self.positions:
            raise InputError(f"--max-prompt {self.prompt} is more than --max-positions {self.positions}")

    def within(self, context: int) -> Limits:
        """Return these limits, cut to a model's context."""
        return Limits(self.images, min(self.prompt, context), min(self.positions, context))


def vision_profile(graph: GraphSpec, limits: Limits) -> Profile:
    """Return the profile of a vision graph: one crop is usual."""

    def shapes(tensor: TensorSpec) -> tuple[Shape, Shape, Shape]:
        sizes = tuple(int(size) for size in tensor.shape[1:])
        return (1, *sizes), (1, *sizes), (limits.images, *sizes)

    return {tensor.name: shapes(tensor) for tensor in graph.inputs}


def usual_image(manifest: Manifest) -> int:
    """Return the image tokens of a usual prompt: those of one image of half the most crops, at the default budget."""
    return manifest.default_budget * -(-manifest.crops.most // 2)


def decoder_profiles(decoder: DecoderSpec, limits: Limits, budget: int) -> tuple[Profile, Profile]:
    """Return the profiles of a decoder: for prompts, which usually begin with an empty cache, and for single tokens.

    Args:
        decoder: With an open cache.
        limits: The largest sizes.
        budget: Image tokens of a usual prompt.
    """
    prompt = min(budget + USUAL_TEXT, limits.prompt)
    prefill = _profile(decoder, (1, prompt, limits.prompt), (0, 0, limits.positions))
    decode = _profile(decoder, (1, 1, 1), (1, min(USUAL_POSITIONS, limits.positions), limits.positions))
    return prefill, decode


def whole_profile(decoder: DecoderSpec, limits: Limits, budget: int) -> Profile:
    """Return one profile that holds both of a decoder's, for a runtime that takes one."""
    prompt = min(budget + USUAL_TEXT, limits.prompt)
    return _profile(decoder, (1, prompt, limits.prompt), (0, min(USUAL_POSITIONS, limits.positions), limits.positions))


def _profile(decoder: DecoderSpec, count: tuple[int, int, int], past: tuple[int, int, int]) -> Profile:
    """Return least, usual and largest shapes for so many new (S) and past (P) positions; fixed inputs have one shape."""

    def shape(sizes: tuple[int | str, ...], at: int) -> Shape:
        known = {"S": count[at], "P": past[at]}
        return tuple(known[size] if isinstance(size, str) else size for size in sizes)

    return {
        tensor.name: (shape(tensor.shape, 0), shape(tensor.shape, 1), shape(tensor.shape, 2))
        for tensor in decoder.graph.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }


def shapes_text(profile: Profile, at: int) -> str:
    """Return the shapes of a profile as `trtexec` and ONNX Runtime's providers spell them: `name:1x3x336x336,…`.

    Args:
        profile: The profile.
        at: 0 for the least shapes, 1 for the usual, 2 for the largest.
    """
    return ",".join(f"{name}:{'x'.join(map(str, shapes[at]))}" for name, shapes in profile.items())


def usual_limits(manifest: Manifest, limits: Limits) -> Limits:
    """Return limits cut to a bundle's context, with room for a whole crop unpruned and for all crops of an image pruned."""
    found, crops = limits.within(manifest.decoder.context_length), manifest.crops
    longest = manifest.tokens_per_crop
    if manifest.layout.line_break:
        # In the shape of the most tokens and lines.
        longest += max(shape.grid[0] for shape in crops.shapes)
    if crops.kind == "tiles":
        # Each line of tiles side by side may have its end.
        ends = crops.shapes[0].grid[0] if manifest.layout.row_end else 0
        marks = USUAL_MARKS if any(manifest.layout.marks) else 0
        longest = max(longest, crops.most * (manifest.default_budget + ends + marks) + USUAL_TEXT)
    if found.prompt > longest:
        return found
    positions = found.positions
    if longest >= positions:
        positions = min(longest + USUAL_POSITIONS, manifest.decoder.context_length)
    return Limits(found.images, positions, positions)
