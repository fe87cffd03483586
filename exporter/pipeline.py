"""A planned export, step by step: load, trace, write, build, verify, put in place.

A bundle is written to a temporary folder beside its path and renamed when it is complete and verified; whatever goes wrong
before, the temporary folder is removed and an older bundle stays.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save
from torch import nn

from leanvlm.exporter.checkpoint import Checkpoint, load_model
from leanvlm.exporter.config import NO_TEMPLATE
from leanvlm.exporter.decoders import context_length, head_dim, kv_heads, least_onnxruntime, planes_of, token_rows
from leanvlm.exporter.decoders.genai import DECODER, build_decoder
from leanvlm.exporter.decoders.portable import save_decoder, trace_decoder
from leanvlm.exporter.dialect import check_dialect, target_opset
from leanvlm.exporter.families import Parts
from leanvlm.exporter.output import files_replaced, put_in_place, scratch_folder, warn_of_losses
from leanvlm.exporter.passes.cut_stage import cut_after
from leanvlm.exporter.passes.shared_weights import save_sharing
from leanvlm.exporter.plan import DTYPES, EMBED_TOKENS, VISION_DATA, Plan, vision_dtype
from leanvlm.exporter.pruners import PRUNERS
from leanvlm.exporter.reference import Reference
from leanvlm.exporter.resize_graph import AXES, resize_file, write_resize_graph
from leanvlm.exporter.splice_graph import SPLICE, write_splice_graph
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.text_files import write_text_files
from leanvlm.exporter.verify import verify
from leanvlm.exporter.verify_rounded import measure_rounding
from leanvlm.exporter.vision_graphs import Tokens, VisionTracer
from leanvlm.runtime.backends.ort import PROVIDERS
from leanvlm.runtime.bundle import file_sha256, write_manifest
from leanvlm.runtime.embeddings import TENSOR
from leanvlm.runtime.errors import LeanVLMWarning, UnsupportedModelError
from leanvlm.runtime.machine.gpu import free_memory
from leanvlm.runtime.manifest import MANIFEST, Manifest
from leanvlm.runtime.optional import require
from leanvlm.runtime.records import shorten
from leanvlm.runtime.session import Session, load
from leanvlm.runtime.signals import raise_again
from leanvlm.runtime.specs import (
    DecoderSpec,
    FileSpec,
    GraphSpec,
    PrunerSpec,
    ResizeSpec,
    Role,
    StageSpec,
    TensorSpec,
    VisionSpec,
)

COPIED = ("preprocessor_config.json", "processor_config.json")
TOOLS = ("leanvlm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")

# Stages of a vision graph that others follow.
CUT: tuple[Literal["vision", "project"], ...] = ("vision", "project")

Step = Callable[[str], None]


def export_plan(request: Plan, on_step: Step = lambda step: None) -> Manifest:
    """Carry out a plan and return the manifest of the new bundle.

    Args:
        request: What `plan` returned.
        on_step: Told each step as it begins, for a progress display.

    Raises:
        LeanVLMError: The checkpoint, a graph or the verification failed; nothing is left behind.
    """
    config = request.config

    def step(name: str) -> None:
        raise_again()
        on_step(name)

    there = files_replaced(config)
    warn_of_losses(config.output_folder, there)
    with scratch_folder(config.output_folder) as scratch:
        folder = scratch / config.output_folder.name
        folder.mkdir()
        manifest = _write_bundle(request, folder, scratch, step)
        step("put in place")
        put_in_place(folder, config, there, scratch)
        return manifest


def _write_bundle(request: Plan, folder: Path, scratch: Path, on_step: Step) -> Manifest:
    checkpoint, config = request.checkpoint, request.config
    on_step("read weights")
    model = load_model(checkpoint, lambda file: on_step(f"map {file.name}"))
    parts = checkpoint.family.parts(model)
    vision, stages = _write_vision(request, parts, folder, on_step)
    gc.collect()
    on_step("build decoder")
    if TARGETS[config.target].decoder == "portable":
        _write_portable(parts.decoder, request, folder)
    else:
        build_decoder(
            parts.decoder,
            checkpoint,
            target=config.target,
            precision=config.resolved_precision,
            positions=request.positions,
            folder=folder,
            scratch=scratch,
        )
    gc.collect()
    on_step("write token table")
    _write_table(parts, folder)
    _write_small_files(request, folder)
    manifest = _manifest(request, vision, stages, parts, folder)
    write_manifest(folder, manifest)
    # Weights that are not prepacked are the files' own pages, so that the check needs no second copy of the model.
    with _open(folder, config.target) as session:
        reference = Reference(checkpoint, model, _reference_device(checkpoint, config.target))
        measured = verify(session, reference, request.vision, on_step, raw=config.template == NO_TEMPLATE)
    if manifest.vision_precision == "int8":
        # As it will run: without prepacked weights ONNX Runtime's kernel rounds no activations.
        with load(folder, device="cpu", cache_mb=0) as session:
            measured["rounded"] = measure_rounding(session, reference, request.vision)
    manifest = replace(manifest, verification=measured)
    write_manifest(folder, manifest)
    return manifest


def _open(folder: Path, target: str) -> Session:
    """Open a bundle for its verification, on its own device if this machine has it, else on the processor."""
    runtime = require("onnxruntime", TARGETS[target].extra)
    here = PROVIDERS.get(target) in runtime.get_available_providers()
    with warnings.catch_warnings():
        # Verifying on the processor is slow; the manifest says where it was done.
        warnings.simplefilter("ignore", LeanVLMWarning)
        return load(folder, device=target if here else "cpu", prepack=False, cache_mb=0)


def _reference_device(checkpoint: Checkpoint, target: str) -> str:
    """Return where the checkpoint itself runs: on a GPU if it has room for it beside the bundle, of about the same size."""
    if not TARGETS[target].is_gpu or not torch.cuda.is_available():
        return "cpu"
    found = free_memory()
    return "cuda" if found is not None and found[0] > 3 * checkpoint.weight_bytes else "cpu"


def _write_vision(request: Plan, parts: Parts, folder: Path, on_step: Step) -> tuple[list[VisionSpec], list[StageSpec]]:
    """Trace the vision graphs and save them over one weights file, on a GPU with cuts to time their stages by."""
    spec, target, crops = request.checkpoint.spec, request.config.target, request.checkpoint.frame.crops
    dtype, image, record = vision_dtype(request.config), request.image, TARGETS[target]
    projector = _in_dtype(parts.project, dtype)
    models: dict[str, ir.Model] = {}
    levels = image if image.layout == "uint8" else None
    rounding = record.rounded_passes if request.config.resolved_vision_precision == "int8" else {}
    tracer = VisionTracer(target_opset(target), {**record.passes, **rounding}, spec.leading, crops.is_padded)
    for name, planned in request.files.items():
        shape, key = crops.shapes[planned.shape], (planned.shape, planned.pruner.scored_block)
        on_step(f"trace {Path(name).stem.replace('_', ' ')}")
        if key not in tracer.keys:
            tower = _in_dtype(parts.tower(planned.pruner.scored_block, levels, shape), dtype)
            example = torch.zeros(2, 3, *shape.pixels, dtype=dtype if levels is None else torch.uint8)
            tokens = Tokens(tower, projector, spec.signals, planes=planes_of(parts.decoder) > 0)
            tracer.add(key, tokens.eval(), example)
        models[name] = tracer.graph(key, planned, shape, projector)
        if record.dialect:
            check_dialect(models[name], name)
    specs = [VisionSpec(*_graph(g.file, models[g.file]), g.shape, g.budget, g.kept) for g in request.vision]
    cuts = []
    if record.cut_stages:
        # Of every shape that of the default budget.
        for planned in request.vision[: len(crops.shapes)]:
            for stage in CUT:
                name = planned.file.replace("vision", f"stage_{stage}") if len(crops.shapes) > 1 else f"stage_{stage}.onnx"
                models[name] = cut_after(models[planned.file], stage)
                cuts.append(StageSpec(*_graph(name, models[name]), planned.shape, stage))
    on_step("write vision")
    save_sharing(models, folder, VISION_DATA)
    return specs, cuts


def _write_portable(decoder: nn.Module, request: Plan, folder: Path) -> None:
    """Trace the decoder in standard operators, from a copy in its dtype: the verification wants the weights as read."""
    config, visibility = request.config, request.positions.visibility
    dtype = DTYPES[config.resolved_precision]
    narrow = copy.deepcopy(decoder).to(dtype)
    model = trace_decoder(narrow, opset=target_opset(config.target), dtype=dtype, visibility=visibility)
    for rewrite in TARGETS[config.target].decoder_passes.values():
        rewrite(model)
    check_dialect(model, DECODER)
    save_decoder(model, folder / DECODER)


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a module in a dtype: itself in fp32, as the verification wants it, or a copy in another."""
    module.to(torch.float32)
    return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)


def _write_table(parts: Parts, folder: Path) -> None:
    table = token_rows(parts.decoder)
    if parts.extra_rows:
        table = torch.cat([table, *(row[None].to(table.dtype) for row in parts.extra_rows.values())])
    if table.dtype not in (torch.float16, torch.float32):
        table = table.float()  # NumPy has no bfloat16.
    (folder / EMBED_TOKENS).write_bytes(save({TENSOR: table.contiguous()}))


def _write_small_files(request: Plan, folder: Path) -> None:
    """Write tokenizer, template and generation settings, and copy processor and licence as the checkpoint has them."""
    write_text_files(request.config, request.checkpoint, folder)
    for name in (*COPIED, request.checkpoint.licence_file):
        if name is not None and (request.checkpoint.folder / name).is_file():
            shutil.copyfile(request.checkpoint.folder / name, folder / name)


def _manifest(request: Plan, vision: list[VisionSpec], stages: list[StageSpec], parts: Parts, folder: Path) -> Manifest:
    checkpoint, config, spec = request.checkpoint, request.config, request.checkpoint.spec
    first = request.vision[0].pruner
    # As JSON holds them, so that a manifest that is read back is equal.
    values: Any = first
    params = json.loads(json.dumps({key: value for key, value in asdict(values).items() if key != "keep"}))
    name = next(key for key, cls in PRUNERS.items() if isinstance(first, cls))
    for leftover in ("genai_config.json",):
        (folder / leftover).unlink(missing_ok=True)
    decoder = _decoder_spec(checkpoint, parts, folder)
    splice = _write_splice(decoder, folder) if TARGETS[config.target].splice else None
    resize = _write_resize(folder) if TARGETS[config.target].resize else ()
    files = {f.name: FileSpec(f.stat().st_size, file_sha256(f)) for f in sorted(folder.iterdir()) if f.name != MANIFEST}
    return Manifest(
        source=checkpoint.source(),
        family=checkpoint.family.model_type,
        pruner=PrunerSpec(name, params, request.gate),
        budgets=tuple(dict.fromkeys((*config.counts, *(graph.budget for graph in vision)))),
        crops=checkpoint.frame.crops,
        layout=checkpoint.frame.layout,
        saliency=spec.saliency,
        target=config.target,
        precision=config.resolved_precision,
        vision_precision=config.resolved_vision_precision,
        vision=tuple(vision),
        stages=tuple(stages),
        decoder=decoder,
        splice=splice,
        resize=resize,
        embed_tokens=EMBED_TOKENS,
        image=request.image,
        image_token_id=spec.image_token_id,
        positions=request.positions,
        min_onnxruntime=least_onnxruntime(checkpoint.config.text_config, config.target, request.positions.visibility),
        versions={tool: found for tool in TOOLS if (found := _version(tool))},
        files=files,
    )


def _decoder_spec(checkpoint: Checkpoint, parts: Parts, folder: Path) -> DecoderSpec:
    graph = ir.load(folder / DECODER).graph
    text = checkpoint.config.text_config
    roles = {str(value.name): _role(str(value.name)) for value in graph.inputs}
    keys = [value for value in graph.inputs if roles[str(value.name)] == "key"]
    return DecoderSpec(
        graph=GraphSpec(DECODER, _tensors(graph.inputs), _tensors(graph.outputs)),
        layers=len(keys),
        kv_heads=kv_heads(text),
        head_dim=head_dim(text),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        context_length=context_length(text),
        kv_dtype="float16" if keys[0].dtype == ir.DataType.FLOAT16 else "float32",
        extra_rows={name: text.vocab_size + at for at, name in enumerate(parts.extra_rows)},
        planes=planes_of(parts.decoder),
        roles=roles,
        cache="shared" if any(str(value.name).startswith("present.") for value in graph.outputs) else "appended",
    )


ROLES: dict[str, Role] = {
    "inputs_embeds": "embeddings",
    "attention_mask": "mask",
    "position_ids": "positions",
    "last_seen": "last_seen",
    "past_length": "past_length",
    "last_position": "last_position",
}

# Of an input of each layer, the last part of its name.
ENDS: dict[str, Role] = {"key": "key", "value": "value", "conv": "state", "recurrent": "state"}


def _role(name: str) -> Role:
    """Return what an input of a decoder's graph is for; raises UnsupportedModelError if that is not known."""
    found = ROLES.get(name) or ENDS.get(name.rpartition(".")[2])
    if found is None:
        raise UnsupportedModelError(
            f"the model builder that is installed gives the decoder an input {shorten(name)}, which is not known here: install "
            "the onnxruntime-genai of constraints.txt"
        )
    return found


def _write_splice(decoder: DecoderSpec, folder: Path) -> GraphSpec:
    """Write the graph that puts prompts together."""
    dtype = ir.DataType.from_numpy(np.dtype(decoder.kv_dtype))
    graph = write_splice_graph(folder, decoder.row_width, dtype)
    return GraphSpec(SPLICE, _tensors(graph.inputs), _tensors(graph.outputs))


def _write_resize(folder: Path) -> tuple[ResizeSpec, ...]:
    """Write the graphs that resize pictures."""
    graphs = {first: write_resize_graph(folder, first) for first in AXES}
    return tuple(
        ResizeSpec(resize_file(first), _tensors(graph.inputs), _tensors(graph.outputs), first)
        for first, graph in graphs.items()
    )


def _graph(file: str, model: ir.Model) -> tuple[str, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the fields of a graph's spec: its file, inputs and outputs."""
    return file, _tensors(model.graph.inputs), _tensors(model.graph.outputs)


def _tensors(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(value.name, value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in value.shape))
        for value in values
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
