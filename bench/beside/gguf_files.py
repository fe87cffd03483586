"""A checkpoint as llama.cpp reads it: `decoder-TYPE.gguf` with the tokenizer, and `tower.gguf` with the projector.

llama.cpp's own converter knows a tokenizer by a checksum, and ours is in no list; so the files are written here with its
package `gguf`. Names of tensors and keys are those of its format. Run in the environment of llama.cpp:

    python -m bench.beside.gguf_files CHECKPOINT FOLDER TYPE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[Any]
Tensors = Callable[[str], Array]
TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# Its name for single digits, then the expression of GPT-2.
SPLIT = "starcoder"
BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
TOWER_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip


def write(checkpoint: Path, folder: Path, kind: str) -> None:
    """Write both files; the decoder's products are of `kind`, all else is the checkpoint's fp16, norms and biases fp32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "numpy")) for path in sorted(checkpoint.glob("model*.safetensors"))]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (a file is no mapping)

        def tensor(end: str) -> Array:
            (name,) = (name for name in places if name == end or name.endswith("." + end))
            return np.asarray(places[name].get_tensor(name))

        _decoder(folder / "decoder.gguf", config["text_config"], tensor, checkpoint, kind)
        _tower(folder / "tower.gguf", config["vision_config"], tensor, checkpoint)


def _decoder(path: Path, config: dict[str, Any], tensor: Tensors, checkpoint: Path, kind: str) -> None:
    out, heads = gguf.GGUFWriter(path, "llama"), config["num_attention_heads"]
    out.add_name("random LLaVA")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_vocab_size(config["vocab_size"])
    _tokenizer(out, checkpoint, config["vocab_size"])
    _put(out, "token_embd.weight", tensor("embed_tokens.weight"))
    _put(out, "output_norm.weight", tensor("model.norm.weight"))
    _put(out, "output.weight", tensor("lm_head.weight"), kind)
    for index in range(config["num_hidden_layers"]):
        for name, source in BLOCK.items():
            values = tensor(f"model.layers.{index}.{source}.weight")
            if name in ("attn_q", "attn_k"):
                # Its rotation turns neighbours where transformers turns halves.
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            _put(out, f"blk.{index}.{name}.weight", values, kind)
    _finish(out)


def _tokenizer(out: gguf.GGUFWriter, checkpoint: Path, size: int) -> None:
    made = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: text for text, number in made["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in made["added_tokens"] if token["special"]}
    tokens |= special
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in made["model"]["merges"]]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(SPLIT)
    out.add_token_list([tokens.get(number, f"<unused{number}>") for number in range(size)])
    out.add_token_types([gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(size)])
    out.add_token_merges(merges)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(True)


def _tower(path: Path, config: dict[str, Any], tensor: Tensors, checkpoint: Path) -> None:
    processor = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    out = gguf.GGUFWriter(path, "clip")
    out.add_clip_has_vision_encoder(True)
    out.add_clip_projector_type("mlp")
    out.add_vision_use_gelu(False)  # That is: quick.
    out.add_vision_projection_dim(len(tensor("multi_modal_projector.linear_2.bias")))
    out.add_vision_image_size(config["image_size"])
    out.add_vision_patch_size(config["patch_size"])
    out.add_vision_embedding_length(config["hidden_size"])
    out.add_vision_feed_forward_length(config["intermediate_size"])
    out.add_vision_block_count(config["num_hidden_layers"])
    out.add_vision_head_count(config["num_attention_heads"])
    out.add_vision_attention_layernorm_eps(config["layer_norm_eps"])
    out.add_vision_image_mean(processor["image_mean"])
    out.add_vision_image_std(processor["image_std"])
    for name, values in _tower_tensors(config, tensor):
        _put(out, name, values)
    _finish(out)


def _tower_tensors(config: dict[str, Any], tensor: Tensors) -> Iterator[tuple[str, Array]]:
    yield "v.class_embd", tensor("embeddings.class_embedding")
    yield "v.patch_embd.weight", tensor("embeddings.patch_embedding.weight")
    yield "v.position_embd.weight", tensor("embeddings.position_embedding.weight").astype(np.float32)
    for part in ("weight", "bias"):
        yield f"v.pre_ln.{part}", tensor(f"pre_layrnorm.{part}")
        yield f"v.post_ln.{part}", tensor(f"post_layernorm.{part}")
        yield f"mm.0.{part}", tensor(f"multi_modal_projector.linear_1.{part}")
        yield f"mm.2.{part}", tensor(f"multi_modal_projector.linear_2.{part}")
        for index in range(config["num_hidden_layers"]):
            for name, source in TOWER_BLOCK.items():
                yield f"v.blk.{index}.{name}.{part}", tensor(f"encoder.layers.{index}.{source}.{part}")


def _put(out: gguf.GGUFWriter, name: str, values: Array, kind: str = "f16") -> None:
    if values.ndim == 1 or values.dtype == np.float32:
        out.add_tensor(name, np.ascontiguousarray(values, np.float32))
    elif kind == "f16":
        out.add_tensor(name, np.ascontiguousarray(values, np.float16))
    else:
        packed = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), TYPES[kind])
        out.add_tensor(name, packed, raw_dtype=TYPES[kind])


def _finish(out: gguf.GGUFWriter) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
