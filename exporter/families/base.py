"""What a family is: data about a checkpoint, and its parts as modules that all families have alike.

A family file names a checkpoint's attributes, so that nothing else does. It composes small modules of ours around the
checkpoint's own; nothing foreign is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from leanvlm.exporter.pruners.base import ScoredBlock, Signal
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.positions import Visibility
from leanvlm.runtime.preprocess import ImageSpec

# Whose attention a token's score is: the class token's, or that of all tokens on average.
Saliency = Literal["class", "received"]


@dataclass(frozen=True)
class Description:
    """What a checkpoint's configuration says of its image tokens.

    Attributes:
        grid: Rows and columns of image tokens, behind any merging of patches.
        image_size: Pixels on each side, (height, width), that the tower takes.
        image_token_id: The token that stands for an image in the prompt.
        layers: The hidden states that the projector reads, side by side; 0 = embeddings.
        blocks: Blocks of the tower.
        saliency: What scores the tokens.
        leading: Tokens in front of the patches that have no position on the grid, such as a class token; they are always kept.
        scored: The only 0-based block whose attention may score the tokens, where not all see the whole image.
        rounds: Whether vision graphs in int8 can be verified: their products with weights are the checkpoint's linear layers.
    """

    grid: tuple[int, int]
    image_size: tuple[int, int]
    image_token_id: int
    layers: tuple[int, ...]
    blocks: int
    saliency: Saliency = "class"
    leading: int = 0
    scored: int | None = None
    rounds: bool = True

    @property
    def shape(self) -> CropShape:
        """The shape of a crop that the tower takes."""
        return CropShape(self.image_size, self.grid, self.leading)

    @property
    def tokens_per_crop(self) -> int:
        """N, the image tokens of one crop."""
        return self.shape.tokens

    @property
    def signals(self) -> frozenset[Signal]:
        """What the tower tells the pruners beside the tokens themselves; without a class token none is un-split."""
        return frozenset(("saliency", "keys", "unsplit") if self.saliency == "class" else ("saliency", "keys"))

    def scored_block(self, where: ScoredBlock) -> int:
        """Return the 0-based block whose attention scores the tokens, for what a pruner asks for."""
        if self.scored is not None:
            return self.scored
        return max(max(self.layers) - 1, 0) if where == "feature" else self.blocks - 1


@dataclass(frozen=True)
class Frame:
    """What a checkpoint's processors do to images and their place in a prompt, as records that the manifest takes as they are.

    Attributes:
        image: How one crop becomes pixel values.
        crops: How an image becomes crops.
        layout: What an image becomes in the prompt.
        axes: Coordinates of a position in the decoder: 1, or 3 where an image token has the row and column of its place.
        visibility: Which positions see which in the decoder.
        template: A chat template that writes what the checkpoint's own processor does, for one that comes without.
        begun: Whether the tokenizer puts its first token in front of a prompt, if it does so with other texts.
    """

    image: ImageSpec
    crops: CropRule
    layout: Layout = Layout()  # noqa: RUF009 (frozen)
    axes: Literal[1, 3] = 1
    visibility: Visibility = "causal"
    template: str | None = None
    begun: bool = True


@dataclass(frozen=True)
class Attention:
    """One self-attention of a checkpoint's tower, for the hooks of the reference.

    Attributes:
        module: Returns the mixed tokens and, where `config` asks for eager attention, the probabilities (B, H, N, N).
        config: Holds `_attn_implementation`, which says how the module computes.
        heads: H.
        query: Projects to (B, N, H * d); None in a model that packs crops.
        keys: Projects to (B, N, H * d); None there too.
        given: Of a model that packs crops, what is given all patches (S, E) to make tokens of them.
    """

    module: nn.Module
    config: Any
    heads: int
    query: nn.Module | None = None
    keys: nn.Module | None = None
    given: nn.Module | None = None


@dataclass(frozen=True)
class Parts:
    """A loaded checkpoint, taken apart; the modules are its own or share its weights.

    Attributes:
        vision: The whole tower, as the checkpoint has it.
        tower: Makes a module, pixel values (B, 3, H, W) -> `Seen`, scored as told, for crops of a shape. With an image
            processor the pixels are uint8 levels, and the module does that processor's arithmetic itself.
        project: Hidden states (B, N, Dv) -> features (B, N, D), token by token.
        entry: The checkpoint's module that is first given what `project` takes, where `project` is a module of ours.
        attention: The self-attention of the tower's block of that number.
        skipped: Tokens of the tower in front of those that a pruner may see as `leading` or as patches.
        decoder: The causal language model, with `model` and `lm_head`.
        inputs: What the model's `get_image_features` takes for the crops (C, 3, H, W) of an image of a size (height, width).
        cell: Patches on each side of what becomes one token.
        order: Of a model that packs all crops into one sequence of patches: for each patch of a shape in raster order, its
            place (N,) in the sequence of one crop. None where crops are a batch.
        planes: Takes what `get_image_features` returns to the planes (S, D) of all crops' tokens, in the decoder's order.
        extra_rows: Embeddings (D,) that the model learned beside those of tokens, by name; each becomes a row of the table.
    """

    vision: nn.Module
    tower: Callable[[ScoredBlock, ImageSpec | None, CropShape], nn.Module]
    project: nn.Module
    attention: Callable[[int], Attention]
    skipped: int
    decoder: nn.Module
    inputs: Callable[[Tensor, tuple[int, int]], dict[str, Any]]
    cell: int = 1
    order: Callable[[CropShape], Tensor] | None = None
    planes: Callable[[Any], Sequence[Tensor]] = lambda found: ()
    entry: nn.Module | None = None
    extra_rows: Mapping[str, Tensor] = field(default_factory=dict)


class Family(Protocol):
    """One Hugging Face `model_type`."""

    model_type: str

    def check_parts(self, raw: Mapping[str, Any]) -> None:
        """Refuse what `config.json` holds of parts that are not handled, before transformers reads them."""
        ...

    def describe(self, config: Any) -> Description:
        """Read a transformers configuration.

        Raises:
            UnsupportedModelError: Something that is not handled.
            CheckpointError: A number that is not possible.
        """
        ...

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the checkpoint's processors do.

        Args:
            config: A transformers configuration that `describe` took.
            processor: The image processor's configuration, resolved.
            tokenizer: The content of `tokenizer_config.json`.

        Raises:
            UnsupportedModelError: A step that is not handled, or sizes that do not fit the tower.
        """
        ...

    def empty(self, config: Any) -> nn.Module:
        """Build the checkpoint's model on the meta device."""
        ...

    def canonical_key(self, key: str) -> str:
        """Map a weight's name, in any key layout that checkpoints use, to one common spelling."""
        ...

    def finish(self, model: nn.Module) -> None:
        """Give real values to the buffers that no checkpoint stores."""
        ...

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        ...
