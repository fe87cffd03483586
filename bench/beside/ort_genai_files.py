"""A folder that onnxruntime-genai's loop runs: it has no type for LLaVA, so `phi3v`, its general one, gets graphs by hand.

Decoder and vision graph are those of our bundle of all tokens, so that only the loop differs; between them stands a graph that
puts the picture's rows among those of the text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
IMAGE_TOKEN = 3


def write(bundle: Path, folder: Path, threads: int) -> None:
    """Write the folder; weights are linked to the bundle's files."""
    folder.mkdir(parents=True)
    manifest = json.loads((bundle / "leanvlm.json").read_text(encoding="utf-8"))
    decoder, image_tokens = manifest["decoder"], max(manifest["budgets"])
    for name in ("decoder.onnx", "decoder.onnx.data", "vision.data", "tokenizer.json", "tokenizer_config.json"):
        os.link(bundle / name, folder / name)
    _vision(bundle / f"vision_{image_tokens}.onnx", folder / "vision.onnx", decoder["hidden_size"])
    _embedding(bundle / manifest["embed_tokens"], folder / "embedding.onnx")
    (folder / "genai_config.json").write_text(json.dumps(_config(decoder, threads), indent=1), encoding="utf-8")


def _vision(source: Path, target: Path, width: int) -> None:
    """Flatten the features to (N, D), and leave the other outputs out."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    (features,) = (output for output in graph.output if output.name == "image_features")
    for node in graph.node:
        for at, name in enumerate(node.output):
            if name == features.name:
                node.output[at] = "features_in_batch"
        for at, name in enumerate(node.input):
            if name == features.name:
                node.input[at] = "features_in_batch"
    graph.initializer.append(numpy_helper.from_array(np.array([-1, width]), "flat"))
    graph.node.append(helper.make_node("Reshape", ["features_in_batch", "flat"], ["image_features"]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("image_features", FLOAT, ["N", width]))
    onnx.save(model, target)


def _embedding(table: Path, target: Path) -> None:
    """Look up the text's rows, and put the picture's where the image token is; steps have no picture, and no such token."""
    (rows,) = load_file(table).values()
    width = rows.shape[1]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["text"]),
        helper.make_node("Equal", ["input_ids", "image_token"], ["is_image"]),
        helper.make_node("NonZero", ["is_image"], ["axes_first"]),
        helper.make_node("Transpose", ["axes_first"], ["places"], perm=[1, 0]),
        helper.make_node("ScatterND", ["text", "places", "image_features"], ["inputs_embeds"]),
    ]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [
            helper.make_tensor_value_info("input_ids", INT64, ["B", "S"]),
            helper.make_tensor_value_info("image_features", FLOAT, ["N", width]),
        ],
        [helper.make_tensor_value_info("inputs_embeds", FLOAT, ["B", "S", width])],
        [
            numpy_helper.from_array(rows.astype(np.float32), "table"),
            numpy_helper.from_array(np.array(IMAGE_TOKEN), "image_token"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), target)


def _config(decoder: dict[str, Any], threads: int) -> dict[str, Any]:
    session = {"intra_op_num_threads": threads, "provider_options": []}
    return {
        "model": {
            "type": "phi3v",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "vocab_size": decoder["vocab_size"],
            "context_length": decoder["context_length"],
            "decoder": {
                "session_options": session,
                "filename": "decoder.onnx",
                "head_size": decoder["head_dim"],
                "hidden_size": decoder["hidden_size"],
                "num_attention_heads": decoder["hidden_size"] // decoder["head_dim"],
                "num_key_value_heads": decoder["kv_heads"],
                "num_hidden_layers": decoder["layers"],
                "inputs": {
                    "inputs_embeds": "inputs_embeds",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
            "embedding": {
                "session_options": session,
                "filename": "embedding.onnx",
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "vision": {
                "session_options": session,
                "filename": "vision.onnx",
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": "image_features"},
            },
        },
        "search": {"do_sample": False, "max_length": 1024, "past_present_share_buffer": True},
    }
