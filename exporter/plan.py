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
from leanvlm.exporter.config import ExportConfig
from leanvlm.exporter.decoders import check_decoder, context_length, decoder_for, token_rows
from leanvlm.exporter.families import Description
from leanvlm.exporter.gate_file import read_gate_file
from leanvlm.exporter.output import check_output
from leanvlm.exporter.pruners import PRUNERS, NoPruner, Pruner, parse
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.text_files import check_text
from leanvlm.exporter.weights import match_weights, outline
from leanvlm.runtime.errors import InputError, LeanVLMWarning, UnsupportedPrunerError
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
        pruners: Budget to pruner, N (unpruned) last.
        sizes: File name to estimated bytes.
        gate: The manifest's record of the gate file, if there is one.
    """

    config: ExportConfig
    checkpoint: Checkpoint
    pruners: dict[int, Pruner]
    sizes: dict[str, int]
    gate: dict[str, Any] | None = None

    @property
    def image(self) -> ImageSpec:
        """The checkpoint's image processor, in the layout that the target's vision graph takes."""
        return replace(self.checkpoint.image_spec, layout=TARGETS[self.config.target].layout)

    @property
    def steps(self) -> int:
        """How many steps `export` will report."""
        return len(self.checkpoint.weight_files) + 2 * len(self.pruners) + 6

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
    count = checkpoint.spec.tokens_per_crop
    config = config.resolved(count)
    for budget in config.counts:
        if budget > count:
            what = (
                "image tokens of this model" if checkpoint.frame.crops.kind == "whole" else "image tokens of one of its crops"
            )
            raise InputError(f"budget {budget} is more than the {count} {what}")
    check_decoder(checkpoint.config.text_config, config.target)
    _warn_of_context(checkpoint.config.text_config)
    check_text(config, checkpoint)
    references, gate = _gate(config, checkpoint)
    pruners = _pruners(config, checkpoint.spec, references)
    model = outline(checkpoint.family, checkpoint.config)
    if checkpoint.weight_files:
        match_weights(checkpoint.family, model, checkpoint.weight_files)
    result = Plan(config, checkpoint, pruners, _estimate(config, checkpoint, model, list(pruners)), gate)
    _check_disk(result)
    return result


def _warn_of_context(text: Any) -> None:
    context, whole = context_length(text), text.max_position_embeddings
    if context < whole:
        message = (
            f"the bundle's context is {context} tokens, the checkpoint's {whole}: beyond that its decoder attends to the last "
            "tokens only, or turns them by other angles, which a graph here does not do"
        )
        warnings.warn(message, LeanVLMWarning, stacklevel=3)


def _pruners(config: ExportConfig, spec: Description, references: dict[str, Any]) -> dict[int, Pruner]:
    """Return the pruner of each budget, N (unpruned) last."""
    parse(config.pruner)
    count = spec.tokens_per_crop
    pruners = {budget: pruner_for(config.pruner, spec, budget, **references) for budget in config.counts if budget < count}
    for budget, pruner in pruners.items():
        if isinstance(pruner, NoPruner):
            raise InputError(f"pruner 'none' keeps all {count} image tokens; use it with --budget {count}")
        if pruner.keep != budget - spec.leading:
            raise InputError(f"--pruner sets keep={pruner.keep}, --budget {budget}; give the number as --budget only")
    return {**pruners, count: NoPruner(keep=count - spec.leading)}


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


def _estimate(config: ExportConfig, checkpoint: Checkpoint, model: nn.Module, budgets: list[int]) -> dict[str, int]:
    """Estimate each file's size from the parameter counts."""
    parts = checkpoint.family.parts(model)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    rows = token_rows(parts.decoder)
    decoder: Any = parts.decoder
    # The head is written, tied to the table or not.
    weights = count(decoder.model) - rows.numel() + decoder.lm_head.weight.numel()
    # Quantised weights carry one scale per block of 32; norms stay as they are.
    per_weight = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0 + 4 / 32, "int4": 0.5 + 4 / 32}[config.resolved_precision]
    sizes = {f"vision_{budget}.onnx": 250_000 for budget in budgets}
    sizes[VISION_DATA] = vision_dtype(config).itemsize * (count(parts.tower("feature", None)) + count(parts.project))
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
