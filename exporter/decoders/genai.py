"""The decoder of the ONNX Runtime targets, made by onnxruntime-genai's model builder from the module in memory.

The builder knows no family. It gets the language model's configuration and a model class whose `load_weights` returns the
modules that are already there, so the weights are read once and no copy reaches the disk but the finished graph.

| direction | name | shape | meaning |
|---|---|---|---|
| in | `inputs_embeds` | (B, S, D) | text embeddings with the image embeddings spliced between |
| | with planes | (B, S, D + planes * D) | each row's planes behind it, added behind the first layers; 0 in rows of text |
| in | `position_ids` | (B, S) int64 | only with original positions; else the decoder counts by itself |
| | three axes | (3, B, S) int64 | of a decoder whose positions have three coordinates; B is 1 |
| in | `last_seen` | (B, S) int64 | only where some see positions behind them: the last row of the sequence that each sees |
| in | `attention_mask` | (B, past + S) int64 | ones; its length tells the decoder how much of the cache is valid |
| | on cuda | (B, S_max) int64 | ones for the valid part; of the cache's length, so that all steps have one shape |
| in | `last_position` | (1,) int64 | only on cuda: the position whose logits are wanted |
| in | `past_key_values.<l>.key` / `.value` | (B, kv_heads, S_max, head_dim) | the cache; shared with `present` |
| out | `logits` | (B, 1, V) | of the last position |
| out | `next_token`, `top_logit` | (B, 1, 1) | only on cuda: the most probable token and its logit |
| out | `present.<l>.key` / `.value` | as the cache | same buffer |
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.decoders import check_decoder, context_length, decoder_for, head_dim, kv_heads
from leanvlm.exporter.decoders.in_memory import in_memory
from leanvlm.exporter.targets import TARGETS
from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError
from leanvlm.runtime.optional import require
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.records import load_json

DECODER = "decoder.onnx"
# Of the rotary parameters, those that the builder needs to know.
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")
OPTIONS = ["exclude_embeds=true", "prune_lm_head=true"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def build_decoder(
    decoder: nn.Module,
    checkpoint: Checkpoint,
    *,
    target: str,
    precision: str,
    positions: PositionRule,
    folder: Path,
    scratch: Path,
) -> Path:
    """Write `decoder.onnx` and its data file.

    Args:
        decoder: Causal language model with `model` and `lm_head`.
        checkpoint: For the text configuration and the tokenizer that the builder wants to see.
        target: `cpu` or `cuda`.
        precision: fp32, fp16, int8 or int4.
        positions: How prompts are numbered.
        folder: Where the files go.
        scratch: A folder for the builder's small inputs, removed by the caller.

    Returns:
        The graph's path.
    """
    text = checkpoint.config.text_config
    check_decoder(text, target, positions.visibility)
    source = scratch / "decoder"
    write_text_checkpoint(checkpoint, source)
    record = TARGETS[target]
    log = io.StringIO()
    with _captured(log):
        builder = require("onnxruntime_genai.models.builder", record.extra)
        cache = str(scratch / "cache")
        extra = builder.parse_extra_options(str(source), str(source), str(folder), precision, target, cache, OPTIONS)
        details = extra.pop("hf_details")
        extra.pop("_effective_builder_config", None)
        extra["filename"] = DECODER
        # Norms of the heads inside the attention op are newer than the ONNX Runtime that a bundle asks for, and not on the CPU.
        extra["fuse_qk_norm_gqa"] = False
        extra["fuse_mlp_gate_up"] = precision in record.gate_up_in_one
        io_dtype = builder.set_io_dtype(precision, target, extra)
        onnx_dtype = builder.set_onnx_dtype(precision, extra)
        # The builder offers some of its classes only; the package that they come from has all.
        classes = sys.modules[builder.QwenModel.__module__.rpartition(".")[0]]
        model_class = in_memory(_builder_class(classes, text), decoder, positions)
        model = model_class(details["hf_config"], io_dtype, onnx_dtype, target, cache, extra)
        model.make_model(str(source))
        model.save_model(str(folder))
    path = folder / DECODER
    if not path.is_file():
        raise CheckpointError(f"the model builder wrote no decoder; its last words: {log.getvalue()[-200:]!r}")
    if record.decoder_passes:
        # Weights stay where they are, in their own file.
        graph = ir.load(path)
        for rewrite in record.decoder_passes.values():
            rewrite(graph)
        ir.save(graph, path)
    return path


def _builder_class(classes: Any, text: Any) -> type:
    """Return the builder's class for a text configuration; raises UnsupportedModelError if it is too old to have it."""
    name = decoder_for(text).builder
    if not hasattr(classes, name):
        raise UnsupportedModelError(
            f"the model builder that is installed writes no {text.model_type!r} decoder: pip install -U onnxruntime-genai "
            f"(it has no {name})"
        )
    found: type = getattr(classes, name)
    return found


def write_text_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what the builder reads from disk: the text configuration and the tokenizer, no weights."""
    folder.mkdir(parents=True)
    text = checkpoint.config.text_config
    kind = decoder_for(text)
    rope = dict(text.rope_parameters or {}) | {"rope_type": "default"}
    activation = getattr(text, kind.activation)
    config = text.to_dict() | {
        "architectures": [kind.architecture],
        "model_type": kind.written_as or text.model_type,
        "max_position_embeddings": context_length(text),
        "head_dim": head_dim(text),
        "num_key_value_heads": kv_heads(text),
        # Of two names for the activation the builder reads the one that transformers does not.
        "hidden_act": activation,
        "hidden_activation": activation,
        # The angles come from the decoder; what the builder does not know it would refuse.
        "rope_parameters": {key: rope[key] for key in ROPE_KEYS if key in rope},
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = config.get(key) if config.get(key) is not None else getattr(checkpoint.config, key, None)
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        # The builder would ask whether to run a tokenizer class of the checkpoint's own.
        kept = {key: value for key, value in load_json(settings, CheckpointError).items() if key != "auto_map"}
        settings.write_text(json.dumps(kept), encoding="utf-8")


@contextlib.contextmanager
def _captured(log: io.StringIO) -> Iterator[None]:
    """Catch what the builder prints and logs; its import also sets the root logger up, which is put back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
