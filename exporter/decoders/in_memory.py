"""Classes of onnxruntime-genai's model builder that take their weights and rotary angles from a module in memory.

The builder itself leaves much out without a word: most scalings of the angles, windows (`context_length` ends before them),
layers without positions, scaled queries, planes of image tokens; and it would take any linear layer with as many outputs as
there are tokens for the head. What a checkpoint needs of these is a class over the builder's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from leanvlm.exporter.decoders import frequency_axes, planes_of, query_scale, rotary_embedding, rotary_kinds
from leanvlm.exporter.decoders.portable import HIDDEN
from leanvlm.exporter.decoders.recurrent import linear_layers, with_states
from leanvlm.runtime.positions import PositionRule

# Constants of the builder's.
FIRST, FIRST_ROW, STEP = (f"/model/constants/INT64/{value}" for value in ("[0]", "0", "1"))
PLANES, ANGLES, MASK, SCALE = "/model/planes", "/model/rotary", "/model/mask", "/model/query_scale"
LAST_SEEN = "last_seen"
# Which input of attention is added to its scores.
BIAS = 10


def in_memory(base: type, decoder: Any, positions: PositionRule) -> type:
    """Return a class over one of the builder's for a decoder in memory.

    Args:
        base: The builder's.
        decoder: Causal language model with `model` and `lm_head`.
        positions: How prompts are numbered.
    """
    made = _with_weights(base, decoder)
    if linear_layers(decoder.config):
        made = with_states(made)
    if positions.kept == "original":
        made = _with_positions(made)
    if any(rotary_kinds(decoder)):
        made = _with_kinds(made, decoder)
    if positions.visibility != "causal":
        made = _with_mask(made)
    if positions.axes == 3:
        made = _with_axes(made, decoder)
    scale = query_scale(decoder.config)
    if scale is not None:
        made = _with_query_scale(made, *scale)
    return _with_planes(made, planes_of(decoder)) if planes_of(decoder) else made


def _with_weights(base: Any, decoder: Any) -> type:
    class InMemory(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # As a number it would be added in the dtype of a norm's weight: 1 + w of bfloat16 has 8 bits.
            self.layernorm_attrs["add_offset"] = torch.full((1,), float(self.layernorm_attrs["add_offset"]))

        def load_weights(self, input_path: str) -> Any:
            return decoder

        def make_rotary_embedding_caches_from_scratch(self) -> tuple[Tensor, Tensor]:
            return self.angles()

        def angles(self, *kind: str) -> tuple[Tensor, Tensor]:
            positions = torch.arange(self.rope_attrs["cache_length"])[None]
            cos, sin = rotary_embedding(decoder)(torch.zeros(1), positions, *kind)
            return cos[0, :, : cos.shape[2] // 2], sin[0, :, : sin.shape[2] // 2]

        def make_attention_init(self, config: Any) -> None:
            if any(hasattr(getattr(layer, "self_attn", None), "q_norm") for layer in decoder.model.layers):
                self.attention_attrs |= {"q_norm": True, "k_norm": True}
            super().make_attention_init(config)

        def make_context_length_init(self, config: Any) -> None:
            super().make_context_length_init(config)
            self.window_size = -1

        def make_attention(self, layer_id: int, attention: Any, root_input: Any, **kwargs: Any) -> None:
            attrs = self.attention_attrs
            before = {name: attrs[name] for name in ("rope", "use_rope_in_attn")}
            attrs.update({name: value and bool(getattr(attention, "use_rope", True)) for name, value in before.items()})
            super().make_attention(layer_id, attention, root_input, **kwargs)
            attrs.update(before)

        def has_lm_head(self, module: Any) -> bool:
            return module is decoder.lm_head

    return InMemory


def _with_kinds(base: Any, decoder: Any) -> type:
    """Give each kind of layers a rotary table of its own."""
    kinds = rotary_kinds(decoder)

    class WithKinds(base):  # type: ignore[misc]
        def make_attention(self, layer_id: int, attention: Any, root_input: Any, **kwargs: Any) -> None:
            self.kind = kinds[layer_id]
            self.rope_attrs["create_caches"] = self.kind not in kinds[:layer_id]
            super().make_attention(layer_id, attention, root_input, **kwargs)

        def make_rotary_embedding_caches(self, **kwargs: Any) -> Any:
            names = {f"{part}_cache_name": f"{part}_cache_{self.kind}" for part in ("cos", "sin")}
            return super().make_rotary_embedding_caches(**(kwargs | names))

        def make_rotary_embedding_caches_from_scratch(self) -> Any:
            return self.angles(self.kind)

    return WithKinds


def _with_mask(base: Any) -> type:
    """Let each position see what an input says, in place of what is behind it.

    Attention is told not to be causal, and a bias of the scores hides what is not to be seen.
    """

    class WithMask(base):  # type: ignore[misc]
        def make_inputs_and_outputs(self) -> None:
            self.input_names[LAST_SEEN] = LAST_SEEN
            self.input_types[LAST_SEEN] = ir.DataType.INT64
            self.input_shapes[LAST_SEEN] = ["batch_size", "sequence_length"]
            super().make_inputs_and_outputs()

        def make_attention_mask_reformatting_for_gqa(self) -> None:
            super().make_attention_mask_reformatting_for_gqa()
            _make_mask(self)

        def make_node(self, op_type: str, inputs: Any, outputs: Any, **attributes: Any) -> None:
            if op_type == "GroupQueryAttention":
                inputs = [*inputs[:BIAS], f"{MASK}/bias", *inputs[BIAS + 1 :]]
                attributes["causal"] = 0
            super().make_node(op_type, inputs, outputs, **attributes)

    return WithMask


def _with_positions(base: Any) -> type:
    """Take the rotation out of the attention op, which ignores position ids on the CPU, and the packed projection with it."""

    class WithPositions(base):  # type: ignore[misc]
        def is_fused_rope_supported(self) -> bool:
            return False

        def is_packed_matmul_supported(self) -> bool:
            return False

    return WithPositions


def _with_axes(base: Any, decoder: Any) -> type:
    """Compute the angles of a prompt in the graph, and let them be the rotary table of that run.

    So the usual operator turns by any layout of the axes; one of its own for them came with ONNX Runtime 1.31 only.
    """

    class WithAxes(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # The angles are made in the decoder's dtype, so nothing is cast around the operator.
            self.rope_attrs["cast"] |= dict.fromkeys(("use_fp32", "root_input", "output_0"), False)

        def make_inputs_and_outputs(self) -> None:
            self.input_shapes["position_ids"] = [3, "batch_size", "sequence_length"]
            super().make_inputs_and_outputs()

        def make_rotary_embedding_caches(self, **kwargs: Any) -> tuple[str, str]:
            if self.rope_attrs["create_caches"]:
                self.rope_attrs["create_caches"] = False
                _make_angles(self, decoder)
            return f"{ANGLES}/cos", f"{ANGLES}/sin"

        def make_rotary_embedding(self, name: str, root_input: Any, output: str, **kwargs: Any) -> None:
            # The first row of the table is the first position's.
            super().make_rotary_embedding(name, root_input, output, **(kwargs | {"position_ids": FIRST}))

    return WithAxes


def _with_query_scale(base: Any, beta: float, length: int) -> type:
    """Scale queries by their positions before the attention op; it is all one whether they are turned before or in it."""

    class WithQueryScale(base):  # type: ignore[misc]
        def make_attention_mask_reformatting_for_gqa(self) -> None:
            super().make_attention_mask_reformatting_for_gqa()
            _make_query_scale(self, beta, length)

        def make_group_query_attention(self, name: str, **kwargs: Any) -> None:
            packed = not kwargs["k_path"]
            scale = f"{SCALE}/packed" if packed else f"{SCALE}/scale"
            shape = ["batch_size", "sequence_length", self.q_size + 2 * self.kv_size * packed]
            self.make_mul(f"{name}/scale", [kwargs["q_path"], scale], self.io_dtype, shape)
            super().make_group_query_attention(name, **(kwargs | {"q_path": f"{name}/scale/output_0"}))

    return WithQueryScale


def _with_planes(base: Any, planes: int) -> type:
    """Split rows into embeddings and planes, and add a plane behind each of the first layers."""

    class WithPlanes(base):  # type: ignore[misc]
        def make_inputs_and_outputs(self) -> None:
            self.input_shapes["inputs_embeds"] = ["batch_size", "sequence_length", (1 + planes) * self.hidden_size]
            super().make_inputs_and_outputs()

        def make_layer(self, layer_id: int, layer: Any) -> None:
            attrs, shape = self.layernorm_attrs, ["batch_size", "sequence_length", self.hidden_size]
            if layer_id == 0:
                names = [f"{PLANES}/embeddings", *(f"{PLANES}/{at}" for at in range(planes))]
                sizes = f"/model/constants/INT64/[{', '.join([str(self.hidden_size)] * len(names))}]"
                self.make_node("Split", ["inputs_embeds", sizes], names, name=f"{PLANES}/Split", axis=2)
                for name in names:
                    self.make_value(name, self.io_dtype, shape=shape)
                attrs["root_input"] = attrs["skip_input"] = names[0]
            super().make_layer(layer_id, layer)
            if layer_id < planes:
                # What the layer adds to its input is added at the next norm; so is the plane.
                self.make_add(f"{PLANES}/{layer_id}/Add", [attrs["skip_input"], f"{PLANES}/{layer_id}"], self.io_dtype, shape)
                attrs["skip_input"] = f"{PLANES}/{layer_id}/Add/output_0"

    return WithPlanes


def _make_mask(builder: Any) -> None:
    """Write the nodes that make a bias of the scores (B, 1, S, T) of the last row that each position sees."""
    make = _maker(builder, MASK)
    total = builder.mask_attrs["total_seq_len"].removesuffix("/Cast")
    shape = ["batch_size", 1, "sequence_length", "total_sequence_length"]
    rows = make("Range", [FIRST_ROW, f"{total}/output_0", STEP], "rows", ir.DataType.INT64, shape[3:])
    last = make("Unsqueeze", [LAST_SEEN, "/model/constants/INT64/[1, 3]"], "last", ir.DataType.INT64, [*shape[:3], 1])
    seen = make("LessOrEqual", [rows, last], "seen", ir.DataType.BOOL, shape)
    for name, value in (("shown", 0.0), ("hidden", HIDDEN)):
        builder.make_initializer(torch.tensor(value), f"{MASK}/{name}", to=builder.io_dtype)
    make("Where", [seen, f"{MASK}/shown", f"{MASK}/hidden"], "bias", builder.io_dtype, shape)


def _make_angles(builder: Any, decoder: Any) -> None:
    """Write the nodes that compute cosine and sine (S, head_dim / 2) of three axes' positions.

    Positions are gathered, not multiplied: a GPU's products of fp32 keep 10 bits.
    """
    rotary = rotary_embedding(decoder)
    half, count = len(rotary.inv_freq), "sequence_length"
    builder.make_initializer(frequency_axes(decoder), f"{ANGLES}/axes")
    builder.make_initializer(rotary.inv_freq.float(), f"{ANGLES}/frequencies")
    builder.make_initializer(torch.tensor(float(rotary.attention_scaling)), f"{ANGLES}/magnitude")

    make, whole, real = _maker(builder, ANGLES), ir.DataType.INT64, ir.DataType.FLOAT
    axes = make("Squeeze", ["position_ids", "/model/constants/INT64/[1]"], "positions", whole, [3, count])
    chosen = make("Gather", [axes, f"{ANGLES}/axes"], "chosen", whole, [half, count], axis=0)
    turned = make("Transpose", [chosen], "turned", whole, [count, half], perm=[1, 0])
    numbers = make("Cast", [turned], "numbers", real, [count, half], to=real)
    angles = make("Mul", [numbers, f"{ANGLES}/frequencies"], "angles", real, [count, half])
    for function in ("Cos", "Sin"):
        value = make(function, [angles], function, real, [count, half])
        scaled = make("Mul", [value, f"{ANGLES}/magnitude"], f"{function}/scaled", real, [count, half])
        make("Cast", [scaled], function.lower(), builder.io_dtype, [count, half], to=builder.io_dtype)


def _make_query_scale(builder: Any, beta: float, length: int) -> None:
    """Write the nodes that compute what queries are scaled by: `scale` (B, S, 1), and `packed` with ones for keys and values.

    A decoder that counts by itself does so from the mask, whose sum less one is the last of its positions.
    """
    make, whole, real = _maker(builder, SCALE), ir.DataType.INT64, ir.DataType.FLOAT
    batch, count, width = "batch_size", "sequence_length", builder.q_size + 2 * builder.kv_size
    one, positions = "/model/constants/INT64/1", builder.input_names.get("position_ids")
    if positions is None:
        size = make("Shape", ["inputs_embeds"], "size", whole, [1], start=1, end=2)
        first = make("Sub", [one, make("Squeeze", [size], "count", whole, [])], "first", whole, [])
        # From the first to the last, counted back from 0.
        back = make("Range", [first, one, one], "back", whole, [count])
        last = make("Cast", [f"{builder.mask_attrs['seqlens_k']}/output_0"], "last", whole, [batch], to=whole)
        column = make("Unsqueeze", [last, "/model/constants/INT64/[1]"], "column", whole, [batch, 1])
        positions = make("Add", [column, back], "positions", whole, [batch, count])
    values = {"length": torch.tensor(length), "beta": torch.tensor(beta), "one": torch.tensor(1.0)}
    for name, value in values.items():
        builder.make_initializer(value, f"{SCALE}/{name}")
    lengths = make("Div", [positions, f"{SCALE}/length"], "lengths", whole, [batch, count])
    numbers = make("Cast", [lengths], "numbers", real, [batch, count], to=real)
    more = make("Log", [make("Add", [numbers, f"{SCALE}/one"], "more", real, [batch, count])], "log", real, [batch, count])
    times = make("Mul", [more, f"{SCALE}/beta"], "times", real, [batch, count])
    scaled = make("Add", [times, f"{SCALE}/one"], "scaled", real, [batch, count])
    narrow = make("Cast", [scaled], "narrow", builder.io_dtype, [batch, count], to=builder.io_dtype)
    scale = make("Unsqueeze", [narrow, "/model/constants/INT64/[2]"], "scale", builder.io_dtype, [batch, count, 1])
    if builder.attention_attrs["use_packed_matmul"]:
        builder.make_initializer(torch.arange(width) < builder.q_size, f"{SCALE}/queries")
        builder.make_initializer(torch.tensor(1.0), f"{SCALE}/kept", to=builder.io_dtype)
        make("Where", [f"{SCALE}/queries", scale, f"{SCALE}/kept"], "packed", builder.io_dtype, [batch, count, width])


def _maker(builder: Any, prefix: str) -> Callable[..., str]:
    """Return a function that writes a node with one output and returns its name."""

    def make(kind: str, inputs: list[str], name: str, dtype: Any, shape: list[Any], **attributes: Any) -> str:
        made = f"{prefix}/{name}"
        builder.make_node(kind, inputs, [made], name=f"{made}/node", **attributes)
        builder.make_value(made, dtype, shape=shape)
        return made

    return make
