"""What an export will do, checked against its checkpoint and this machine before any weight is read.

Sizes go through three sieves before anything of such a size is made: the ranges of the configuration, the headers of the weight
files, the free disk.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from leanvlm.exporter.checkpoint import Checkpoint, hub_id, open_checkpoint
from leanvlm.exporter.config import ExportConfig, Share
from leanvlm.exporter.decoders import check_decoder, context_length, decoder_for, least_onnxruntime, token_rows
from leanvlm.exporter.families import Description
from leanvlm.exporter.gate_file import read_gate_file
from leanvlm.exporter.graphs import VisionPlan
from leanvlm.exporter.output import check_output
from leanvlm.exporter.passes import rounded_products
from leanvlm.exporter.pruners import PRUNERS, NoPruner, Pruner, parse
from leanvlm.exporter.rounding import BLOCK
from leanvlm.exporter.targets import MIN_ONNXRUNTIME, TARGETS
from leanvlm.exporter.text_files import check_text
from leanvlm.exporter.weights import match_weights, outline
from leanvlm.runtime.backends.ort import check_version
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import InputError, LeanVLMWarning, UnsupportedPrunerError
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.preprocess import ImageSpec

__all__ = ["DTYPES", "EMBED_TOKENS", "VISION_DATA", "Plan", "fetch", "plan", "vision_dtype"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
EMBED_TOKENS = "embed_tokens.safetensors"
VISION_DATA = "vision.data"


@dataclass(frozen=True)
class Plan:
    """What an export will do, known before any weight is read.

    Attributes:
        config: The request.
        checkpoint: Where the weights are, or from the Hub where they will be: `fetch` brings them.
        vision: The vision graphs, first those of the default budget, one for each crop shape.
        positions: How a prompt is numbered.
        sizes: File name to estimated bytes.
        gate: The manifest's record of the gate file, if there is one.
    """

    config: ExportConfig
    checkpoint: Checkpoint
    vision: tuple[VisionPlan, ...]
    positions: PositionRule
    sizes: dict[str, int]
    gate: dict[str, Any] | None = None

    @property
    def image(self) -> ImageSpec:
        """The checkpoint's image processor, in the layout that the target's vision graph takes."""
        return replace(self.checkpoint.image_spec, layout=TARGETS[self.config.target].layout)

    @property
    def files(self) -> dict[str, VisionPlan]:
        """The vision graphs by file, each once."""
        return {graph.file: graph for graph in self.vision}

    @property
    def steps(self) -> int:
        """How many steps `export` will report."""
        return len(self.checkpoint.weight_files) + 2 * len(self.files) + 6

    @property
    def total_bytes(self) -> int:
        """Estimated size of the bundle."""
        return sum(self.sizes.values())


def plan(config: ExportConfig) -> Plan:
    """Check a request against its checkpoint and this machine, without fetching or reading weights.

    Raises:
        LeanVLMError: Anything that the export would fail on later and that can be known now.
    """
    check_output(config)
    checkpoint = open_checkpoint(config, weights=False)
    count, asked = checkpoint.spec.tokens_per_crop, config.budgets
    config = config.resolved(count)
    for budget in config.counts:
        if budget > count:
            what = (
                "image tokens of one of its crops" if checkpoint.frame.crops.kind == "tiles" else "image tokens of this model"
            )
            raise InputError(f"budget {budget} is more than the {count} {what}")
    positions = _positions(config, checkpoint)
    check_decoder(checkpoint.config.text_config, config.target, positions.visibility)
    _check_onnxruntime(checkpoint.config.text_config, config.target, positions)
    _check_vision_precision(config, checkpoint)
    _warn_of_context(checkpoint.config.text_config)
    check_text(config, checkpoint)
    references, gate = _gate(config, checkpoint)
    vision = _vision(config, checkpoint, asked, references)
    model = outline(checkpoint.family, checkpoint.config)
    if checkpoint.weight_files:
        match_weights(checkpoint.family, model, checkpoint.weight_files)
    sizes = _estimate(config, checkpoint, model, list(dict.fromkeys(graph.file for graph in vision)))
    result = Plan(config, checkpoint, vision, positions, sizes, gate)
    _check_disk(result)
    return result


def _check_vision_precision(config: ExportConfig, checkpoint: Checkpoint) -> None:
    """Refuse to round towers whose products are not the checkpoint's linear layers; raises InputError."""
    if config.resolved_vision_precision == "int8" and not checkpoint.spec.rounds:
        raise InputError(
            f"--vision-precision int8 is not possible for {checkpoint.family.model_type!r}, whose vision graphs cannot be "
            "verified in it: leave it out"
        )


def _warn_of_context(text: Any) -> None:
    context, whole = context_length(text), text.max_position_embeddings
    if context < whole:
        message = (
            f"the bundle's context is {context} tokens, the checkpoint's {whole}: beyond that its decoder attends to the last "
            "tokens only, or turns them by other angles, which a graph here does not do"
        )
        warnings.warn(message, LeanVLMWarning, stacklevel=3)


def _positions(config: ExportConfig, checkpoint: Checkpoint) -> PositionRule:
    """Return how prompts are numbered.

    Raises:
        InputError: Positions that the model cannot have.
    """
    seen = checkpoint.frame.visibility
    if checkpoint.frame.axes == 1:
        return PositionRule(config.positions or "compact", visibility=seen)
    if config.positions == "compact":
        raise InputError(
            "--positions compact is not possible: this model's image tokens have the row and column of their place for "
            "positions; leave it out, or give original"
        )
    return PositionRule("original", checkpoint.frame.axes, "grid", seen)


def _check_onnxruntime(config: Any, target: str, positions: PositionRule) -> None:
    """Refuse a decoder that the ONNX Runtime of this machine is too old to verify; raises BackendError."""
    least = least_onnxruntime(config, target, positions.visibility)
    if least != MIN_ONNXRUNTIME:
        check_version(require("onnxruntime", TARGETS[target].extra), least)


def _vision(
    config: ExportConfig, checkpoint: Checkpoint, asked: tuple[int | Share, ...], references: dict[str, Any]
) -> tuple[VisionPlan, ...]:
    """Return the vision graphs of every budget and crop shape, those of the default budget first.

    Args:
        config: The request, its budgets as numbers of the largest shape.
        checkpoint: The model.
        asked: The budgets as they were asked for; a share is one of every shape.
        references: The gate's reference values.
    """
    parse(config.pruner)
    spec, shapes = checkpoint.spec, checkpoint.frame.crops.shapes
    whole = spec.tokens_per_crop
    wanted = [*zip(config.counts, asked, strict=True), *([] if whole in config.counts else [(whole, whole)])]
    graphs = []
    for budget, said in wanted:
        for at, shape in enumerate(shapes):
            kept = said.of(shape.tokens) if isinstance(said, Share) else min(budget, shape.tokens)
            pruner = _pruner(config.pruner, spec, shape, kept, references)
            graphs.append(VisionPlan(at, budget, pruner, kept, _file(shape, kept, alone=len(shapes) == 1)))
    return tuple(graphs)


def _file(shape: CropShape, kept: int, *, alone: bool) -> str:
    return f"vision_{kept}.onnx" if alone else f"vision_{shape.text}_{kept}.onnx"


def _pruner(method: str, spec: Description, shape: CropShape, kept: int, references: dict[str, Any]) -> Pruner:
    """Return the pruner that keeps so many tokens of a crop of a shape."""
    count = shape.tokens
    if kept == count:
        return NoPruner(keep=count - spec.leading)
    pruner = pruner_for(method, spec, kept, **references)
    if isinstance(pruner, NoPruner):
        raise InputError(f"pruner 'none' keeps all {count} image tokens; use it with --budget {count}")
    if pruner.keep != kept - spec.leading:
        raise InputError(f"--pruner sets keep={pruner.keep}, --budget {kept}; give the number as --budget only")
    return pruner


def pruner_for(method: str, spec: Description, budget: int, **references: Any) -> Pruner:
    """Return the pruner of a method that keeps a budget of a model's tokens, with those that are always kept.

    Raises:
        UnsupportedPrunerError: The method needs what the model's tower does not tell.
        InputError: The budget holds nothing but the tokens that are always kept.
    """
    if budget <= spec.leading:
        raise InputError(f"budget {budget} leaves no room beside the class token, which is always kept; give at least 2")
    pruner = parse(method, keep=budget - spec.leading, **references)
    if not pruner.needs <= spec.signals:
        able = ", ".join(name for name, cls in PRUNERS.items() if cls.needs <= spec.signals and cls is not NoPruner)
        raise UnsupportedPrunerError(
            f"pruner {method.partition(':')[0]!r} needs a class token's attention, and this model's tower has no class token; "
            f"pruners that do without: {able}"
        )
    return pruner


def _gate(config: ExportConfig, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the gate's reference values for this model, and the manifest's record of the file that they come from."""
    declared = {"erank_ref": checkpoint.erank_ref}
    if config.gate_file is None:
        return declared, None
    file = read_gate_file(config.gate_file)
    if hub_id(config) is None:
        file.check_source(config.gate_file, checkpoint.source())
    fields = file.pruner_fields()
    pruner = parse(config.pruner)
    if not fields.keys() & vars(pruner).keys():
        raise InputError(f"--gate-file is for a pruner with a gate, such as agile; {config.pruner!r} has none")
    return {**declared, **fields}, file.record(config.gate_file)


def fetch(request: Plan) -> Plan:
    """Return a plan whose weights are on this machine: those of a Hub repository are fetched, and the gate file held to them.

    Raises:
        LeanVLMError: They cannot be had, or are other weights than the gate file's.
    """
    config = request.config
    if hub_id(config) is None:
        return request
    checkpoint = open_checkpoint(replace(config, revision=request.checkpoint.revision))
    if config.gate_file is not None:
        read_gate_file(config.gate_file).check_source(config.gate_file, checkpoint.source())
    return replace(request, checkpoint=checkpoint)


def vision_dtype(config: ExportConfig) -> torch.dtype:
    """Return the dtype that an export's vision graphs compute in, the gate and the selection aside."""
    return TARGETS[config.target].vision_dtype or DTYPES[config.resolved_precision]


def _estimate(config: ExportConfig, checkpoint: Checkpoint, model: nn.Module, graphs: list[str]) -> dict[str, int]:
    """Estimate each file's size from the parameter counts."""
    parts = checkpoint.family.parts(model)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    rows = token_rows(parts.decoder)
    decoder: Any = parts.decoder
    # The head is written, tied to the table or not.
    weights = count(decoder.model) - rows.numel() + decoder.lm_head.weight.numel()
    sizes = dict.fromkeys(graphs, 250_000)
    tower = parts.tower("feature", None, checkpoint.spec.shape)
    in_8_bits = config.resolved_vision_precision == "int8"
    per_weight = 1.0 + 4 / rounded_products.BLOCK if in_8_bits else vision_dtype(config).itemsize
    sizes[VISION_DATA] = int(per_weight * (count(tower) + count(parts.project)))
    # Quantised weights carry one scale per block; norms stay as they are.
    per_weight = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0 + 4 / BLOCK, "int4": 0.5 + 4 / BLOCK}[config.resolved_precision]
    sizes["decoder.onnx.data"] = int(weights * per_weight)
    half = checkpoint.config.dtype == torch.float16 and not decoder_for(decoder.config).is_scaled
    sizes[EMBED_TOKENS] = rows.numel() * (2 if half else 4)
    return sizes


def _check_disk(request: Plan) -> None:
    folder = request.config.output_folder.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if request.total_bytes > free:
        need, have = request.total_bytes / 1e9, free / 1e9
        raise InputError(f"the bundle needs about {need:.1f} GB and {folder} has {have:.1f} GB free; choose another -o")
