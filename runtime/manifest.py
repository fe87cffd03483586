"""The manifest of a bundle: what `leanvlm.json` says, as one record that is checked as a whole.

A bundle is a folder; its manifest is the only link between exporting and running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from leanvlm.runtime.crops import PIXELS, VALID, CropRule
from leanvlm.runtime.errors import InputError, ManifestError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Count, Size, plain, read, shorten
from leanvlm.runtime.specs import (
    RESIZE_INPUTS,
    DecoderSpec,
    EngineSpec,
    FileSpec,
    GraphSpec,
    PrunerSpec,
    ResizeSpec,
    SourceSpec,
    StageSpec,
    VisionSpec,
    check_names,
    fits,
)

SCHEMA = 2
MANIFEST = "leanvlm.json"
Target = Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"]
TARGETS: tuple[str, ...] = get_args(Target)
POSITIONS: tuple[str, ...] = ("compact", "original")
# The model builder gives other pairs an attention op without the shared cache, so they are not offered.
PRECISIONS = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}
# Of the vision graphs, where it can be chosen; the first is the default. Elsewhere they compute in the dtype of their outputs.
VISION_PRECISIONS: dict[str, tuple[str, ...]] = {"cpu": ("fp32", "int8")}
# Outputs of a vision graph with a row for each kept token: (B, K, …).
PER_TOKEN = ("image_features", "keep_indices")
VISION_OUTPUTS = (*PER_TOKEN, "effective_rank", "num_selected", "converged", "feature_sum", "attention")


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know of a bundle (schema 2).

    Attributes:
        budgets: Image tokens kept per crop, where crops differ in shape of the largest; the first is the default.
        crops: How an image is cut into crops.
        layout: What an image becomes in the prompt.
        saliency: What ranks the image tokens: `class`, the class token's attention; `received`, the mean attention that a token
            receives, where a tower has no class token.
        vision: One graph for each crop shape and budget, N (unpruned) among them; those of a shape that keep as many tokens are
            one file.
        stages: Vision graphs that end with a stage, where those of the whole are timed so.
        engines: What `leanvlm build` added. Their files are checked when one is opened, not with the bundle's own.
        splice: The graph that puts a prompt together on a GPU; None where the processor does.
        resize: Graphs that resize and cut pictures on a GPU, one for each axis that may come first; none: the processor does.
        embed_tokens: File of the token table, one tensor named `embed_tokens.weight`, (vocab_size, D).
        image: How an image becomes pixel values.
        image_token_id: The token that stands for one image in the prompt.
        positions: `compact` numbers the kept tokens in a row; `original` keeps their positions in the full sequence.
        vision_precision: `int8` where the products of tower and projector are of 8-bit levels; None where a target leaves no
            choice, or the bundle was made before there was one.
        verification: What the export measured against the checkpoint, per stage and per budget.
    """

    source: SourceSpec
    family: str
    pruner: PrunerSpec
    budgets: tuple[Size, ...]
    target: Target
    precision: str
    crops: CropRule
    layout: Layout
    vision: tuple[VisionSpec, ...]
    decoder: DecoderSpec
    embed_tokens: str
    image: ImageSpec
    image_token_id: Count
    positions: PositionRule
    min_onnxruntime: str
    versions: Mapping[str, str]
    files: Mapping[str, FileSpec]
    saliency: Literal["class", "received"] = "class"
    splice: GraphSpec | None = None
    resize: tuple[ResizeSpec, ...] = ()
    stages: tuple[StageSpec, ...] = ()
    engines: tuple[EngineSpec, ...] = ()
    vision_precision: str | None = None
    verification: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def line_end(self) -> int:
        """Row behind the vocabulary that ends a line of image tokens; -1 where the layout has none."""
        return -1 if self.layout.row_end is None else self.decoder.extra_rows[self.layout.row_end]

    @property
    def tokens_per_crop(self) -> int:
        """N of the largest crop shape: the budget that prunes nothing."""
        return max(shape.tokens for shape in self.crops.shapes)

    @property
    def default_budget(self) -> int:
        """The budget used when none is asked for: the first that the export named."""
        return self.budgets[0]

    def budget(self, asked: int | None) -> int:
        """Return the budget to use for `asked` (image tokens per crop), or the default for None.

        Raises:
            InputError: The bundle holds no vision graph of that budget.
        """
        budget = self.default_budget if asked is None else asked
        if budget not in self.budgets:
            held = ", ".join(str(b) for b in sorted(self.budgets))
            raise InputError(f"budget {budget} is not in this bundle; it holds {held}")
        return budget

    def vision_graph(self, budget: int, shape: int = 0) -> VisionSpec:
        """Return the vision graph of a budget for crops of a shape.

        Args:
            budget: One of the bundle's.
            shape: Index of the crop shape.
        """
        return next(graph for graph in self.vision if (graph.shape, graph.budget) == (shape, budget))

    def stage_graphs(self, shape: int) -> dict[str, StageSpec]:
        """Return the graphs that end with a stage for crops of a shape, by stage."""
        return {graph.stage: graph for graph in self.stages if graph.shape == shape}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which `from_dict` reads back to an equal manifest."""
        data: dict[str, Any] = plain(self)
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Read the JSON form.

        Raises:
            ManifestError: An unknown schema, or a key that is missing, unknown, not of its type or out of its range.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise ManifestError(f"{MANIFEST} has schema {shorten(schema)}, of a newer leanvlm than this: install that one")
        if type(schema) is not int or schema != SCHEMA:
            raise ManifestError(
                f"{MANIFEST} has schema {shorten(schema)}; this version of leanvlm reads schema {SCHEMA}: export it again"
            )
        manifest = read(cls, data, MANIFEST, ManifestError)
        manifest._check_consistency()
        return manifest

    def _check_consistency(self) -> None:
        if self.precision not in PRECISIONS[self.target]:
            raise ManifestError(f"{MANIFEST}: precision {shorten(self.precision)} is not one for {self.target}")
        if self.vision_precision not in (None, *VISION_PRECISIONS.get(self.target, ())):
            raise ManifestError(f"{MANIFEST}: vision_precision {shorten(self.vision_precision)} is not one for {self.target}")
        wanted = {(at, budget) for at in range(len(self.crops.shapes)) for budget in self.budgets}
        found = [(graph.shape, graph.budget) for graph in self.vision]
        if set(found) != wanted or len(found) != len(wanted) or self.tokens_per_crop not in self.budgets:
            raise ManifestError(f"{MANIFEST}: budgets {list(self.budgets)}, crop shapes and vision graphs do not match")
        if len(set(self.budgets)) != len(self.budgets) or max(self.budgets) > self.tokens_per_crop:
            raise ManifestError(f"{MANIFEST}: budgets {list(self.budgets)} must differ, and be {self.tokens_per_crop} at most")
        if self.crops.shapes[0].pixels != self.image.size:
            raise ManifestError(f"{MANIFEST}: images of {list(self.image.size)} do not fit the first crop shape")
        if self.layout.row_end is not None and self.layout.row_end not in self.decoder.extra_rows:
            raise ManifestError(f"{MANIFEST}: row_end {shorten(self.layout.row_end)} is none of the decoder's extra_rows")
        if (self.layout.mosaic or self.layout.line_break) and self.crops.shapes[0].leading:
            raise ManifestError(f"{MANIFEST}: lines of tokens have no place for those in front of their crops' grids")
        if self.positions.axes != self.decoder.axes:
            raise ManifestError(f"{MANIFEST}: positions of {self.positions.axes} axes are not those that the decoder takes")
        if (self.positions.visibility == "causal") == bool(self.decoder.named("last_seen")):
            raise ManifestError(
                f"{MANIFEST}: visibility {self.positions.visibility} is not what the decoder takes: one that is not causal is "
                "told the last row that each position sees"
            )
        if any(graph.shape >= len(self.crops.shapes) for graph in self.stages):
            raise ManifestError(f"{MANIFEST}: stages name a crop shape that is not there")
        if self.image_token_id >= self.decoder.vocab_size:
            raise ManifestError(f"{MANIFEST}: image_token_id {self.image_token_id} is beyond {self.decoder.vocab_size} tokens")
        self._check_kept()
        self._check_resize()
        used = [*self.vision, *self.stages, self.decoder.graph, *([self.splice] if self.splice else []), *self.resize]
        graphs = [*(graph.file for graph in used), self.embed_tokens]
        unlisted = [file for file in graphs if file not in self.files]
        if unlisted:
            raise ManifestError(f"{MANIFEST}: {shorten(unlisted[0])} is used but not listed under files")

    def _check_resize(self) -> None:
        """Check that pictures can be resized in either order of the axes, into what the vision graphs take, or not at all."""
        if self.resize and sorted(graph.first for graph in self.resize) != ["height", "width"]:
            raise ManifestError(f"{MANIFEST}: resize must be two graphs, one with each axis first, or none")
        if self.resize and self.image.layout != "uint8":
            raise ManifestError(f"{MANIFEST}: resize makes levels, but the images' layout is {self.image.layout}")
        for graph in self.resize:
            check_names(graph, RESIZE_INPUTS, ("crops",))

    def _check_kept(self) -> None:
        """Check that every vision graph takes the images that are made and returns as many tokens as its budget says."""
        for graph in self.vision:
            kept, shape = graph.kept, self.crops.shapes[graph.shape]
            if kept > shape.tokens or (kept < shape.tokens and graph.budget == self.tokens_per_crop):
                raise ManifestError(f"{MANIFEST}: {graph.file} keeps {kept} of {shape.tokens} at budget {graph.budget}")
            taken = (PIXELS, VALID) if self.crops.is_padded else (PIXELS,)
            check_names(graph, taken, VISION_OUTPUTS)
            surplus = next((tensor.name for tensor in graph.inputs if tensor.name not in taken), None)
            if surplus is not None:
                raise ManifestError(f"{MANIFEST}: {graph.file} takes {shorten(surplus)}, which crops cut so do not have")
            for tensor in (*graph.inputs, *graph.outputs):
                wanted: tuple[int | None, ...] = (None, *[None] * (len(tensor.shape) - 1))
                if tensor.name == PIXELS:
                    wanted = (None, 3, *shape.pixels)
                elif tensor.name == VALID:
                    wanted = (None, shape.tokens)
                elif tensor.name in PER_TOKEN:
                    wanted = (None, kept, self.decoder.row_width)[: 3 if tensor.name == PER_TOKEN[0] else 2]
                if not fits(tensor.shape, wanted, free=tensor.name == PIXELS):
                    raise ManifestError(
                        f"{MANIFEST}: {graph.file} is listed as keeping {kept} tokens, but its {tensor.name} has the shape "
                        f"{list(tensor.shape)}"
                    )


def parse_budgets(text: str) -> tuple[int, ...]:
    """Read `64` or `64,128`.

    Raises:
        InputError: Something that is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--budget {text!r} is not a number of image tokens, such as 64 or 64,128") from error
