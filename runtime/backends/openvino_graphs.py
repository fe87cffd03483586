"""What is changed in a bundle's graphs for OpenVINO, once its front end has read them.

A vision graph becomes two: the tower may compute in 8 bits of precision, while the effective rank, which is made of eigenvalues
down to 1e-6 of the largest, may not. Nor should what ranks the tokens, so the tower's last blocks are in the second part too.

Attention of the decoder is written in OpenVINO's own operators, with the cache as state, in the form that its plug-in for
processors computes in one kernel and appends to in place:

    q, k, v, past ─ GroupQueryAttention ─ y, present

    state ─ Gather ─ Concat ─┬─ (heads repeated) ─ ScaledDotProductAttention ─ Transpose ─ Reshape ─ y
                k, turned ───┘└─ Assign

The front end's own translation copies the whole cache with every token, and turns all of a head where a model turns a part.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.optional import require
from leanvlm.runtime.specs import DecoderSpec

STAGES = ("vision", "project", "prune")
CUT = "leanvlm.cut"
"""Begins the name of a tensor that goes from the first part to the second."""
ONE = "leanvlm.one"
"""Input of the second part: the number 1, which no optimisation can know."""
BEAM = "leanvlm.beam"
"""Input of the decoder: which of the cache's sequences goes on, of which there is one."""
COLUMNS = "leanvlm.columns"
"""Input of the decoder: which row of its sequence each row of the cache is, the new ones too; `GONE` is none of it any more."""
# OpenVINO computes whole numbers of 64 bits in 32.
GONE = 1 << 30

# The tower's blocks in the second part, the last ones. With 0, 1 and 2 of them, and the others in bfloat16, 93.7, 95.8 and
# 96.5 % of the kept tokens were fp32's, on 200 built-in scenes; each makes a tower of 24 blocks 6 % slower than in bfloat16.
EXACT_BLOCKS = 1

Model = Any
Node = Any
Output = Any

RESHAPES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
# Inputs of GroupQueryAttention by their place, as ONNX Runtime documents the operator.
COS, SIN, POSITIONS, BIAS, SINK = 7, 8, 9, 10, 11


def split(model: Model) -> tuple[Model, Model | None]:
    """Cut a vision graph in two; what goes over is named alike on both sides.

    Args:
        model: The graph, which is used up.

    Returns:
        The part that may be coarse; and the exact one, the tower's last blocks, project and prune: None where there is neither.
    """
    ov, ops = _library()
    exact = _exact(model)
    results: dict[bool, list[Node]] = {True: [], False: []}
    for result in model.results:
        results[result.get_name() in exact].append(result)
    if not results[True]:
        return model, None
    carried: list[Node] = []
    first: list[Node] = []
    second: list[Node] = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" or node.get_name() in exact:
            continue
        readers = [at for output in node.outputs() for at in output.get_target_inputs()]
        if kind == "Parameter" and all(at.get_node().get_name() in exact for at in readers):
            second.append(node)
            continue
        if kind == "Parameter":
            first.append(node)
        for output in node.outputs():
            readers = [at for at in output.get_target_inputs() if at.get_node().get_name() in exact]
            if readers:
                # What is an input of the graph is given to both parts.
                name = min(output.get_names()) if kind == "Parameter" else f"{CUT}.{len(carried)}"
                second.append(_carry_over(ops, output, readers, name))
                carried += [] if kind == "Parameter" else [ops.result(output)]
    coarse = ov.Model([*results[False], *carried], first, "coarse")
    return coarse, _apart(ops, ov.Model(results[True], second, "exact"))


def _exact(model: Model) -> set[str]:
    """Return the unique names of the nodes in the exact part: the stages and blocks there, and whatever is made of them."""
    stages, nodes = stages_of(model), model.get_ordered_ops()
    numbers = [number for node in nodes if (number := _block(node)) is not None]
    least = max(numbers, default=0) + 1 - EXACT_BLOCKS
    named = {node.get_name() for node in nodes if (number := _block(node)) is not None and number >= max(least, 0)}
    exact: set[str] = set()
    for node in nodes:
        sources = [node.input_value(at).get_node().get_name() for at in range(node.get_input_size())]
        late = node.get_type_name() not in ("Constant", "Parameter") and stages[node.get_name()] == len(STAGES) - 1
        if late or node.get_name() in named or not exact.isdisjoint(sources):
            exact.add(node.get_name())
    for node in reversed(nodes):
        # What the front end made of the first node of a block or stage, and the sizes that it reads.
        readers = [at.get_node().get_name() for output in node.outputs() for at in output.get_target_inputs()]
        inner = node.get_type_name() not in ("Constant", "Parameter") and (
            _stage(node) is None or node.get_output_element_type(0).is_integral()
        )
        if inner and readers and exact.issuperset(readers):
            exact.add(node.get_name())
    return exact


def _block(node: Node) -> int | None:
    """Return which of the tower's blocks a node is of, or None."""
    found = re.match(r"/?vision/blocks/(\d+)/", str(node.get_friendly_name()))
    return int(found[1]) if found else None


def _carry_over(ops: Any, output: Output, readers: list[Any], name: str) -> Node:
    """Let readers of an output read an input of their own instead, and return it; both have the name from now on."""
    parameter = ops.parameter(output.partial_shape, output.element_type)
    parameter.output(0).set_names({name})
    for reader in readers:
        reader.replace_source_output(parameter.output(0))
    output.add_names({name})
    return parameter


def _apart(ops: Any, model: Model) -> Model:
    """Keep sums and the reshaping beside them apart by a product with 1.

    OpenVINO 2026.4 makes one node of a sum over an axis and a transposition of an axis of size 1 beside it, and gives it the
    shape of the sum: (B, N, 1) where (B, 1, N) is right. So AgilePruner's dot products of tokens came out wrong wherever there
    are fewer tokens than columns, and with them every fourth of the kept tokens.
    """
    one = ops.parameter([], np.float32)
    one.output(0).set_names({ONE})
    count = 0
    for node in model.get_ordered_ops():
        if not node.get_type_name().startswith("Reduce") or not node.get_output_element_type(0).is_real():
            continue
        source = node.input_value(0)
        if source.get_node().get_type_name() in RESHAPES:
            node.input(0).replace_source_output(ops.multiply(source, one).output(0))
            count += 1
        readers = [at for at in node.output(0).get_target_inputs() if at.get_node().get_type_name() in RESHAPES]
        if readers:
            product = ops.multiply(node, one).output(0)
            for reader in readers:
                reader.replace_source_output(product)
            count += 1
    if count:
        model.add_parameters([one])
    return model


def stages_of(model: Model) -> dict[str, int]:
    """Return the index of each node's stage by the node's unique name.

    The exporter's names begin with the stage. What the front end makes of one ONNX node keeps its name on the last; those
    before it belong to whoever reads them. A node whose value is an output of the graph goes by that output's name; it belongs
    to what it is made of.
    """
    nodes = model.get_ordered_ops()
    outputs = {name for result in model.results for name in result.input_value(0).get_names()}
    stages: dict[str, int | None] = {node.get_name(): _stage(node) for node in nodes}
    for node in nodes:
        named = any(outputs & set(output.get_names()) for output in node.outputs())
        if named and stages[node.get_name()] is None:
            found = [stages[node.input_value(at).get_node().get_name()] for at in range(node.get_input_size())]
            stages[node.get_name()] = max((stage for stage in found if stage is not None), default=None)
    for node in reversed(nodes):
        if stages[node.get_name()] is None:
            readers = [stages[at.get_node().get_name()] for output in node.outputs() for at in output.get_target_inputs()]
            stages[node.get_name()] = min((stage for stage in readers if stage is not None), default=None)
    return {name: 0 if stage is None else stage for name, stage in stages.items()}


def _stage(node: Node) -> int | None:
    first, slash, _ = str(node.get_friendly_name()).lstrip("/").partition("/")
    return STAGES.index(first) if slash and first in STAGES else None


def keep_state(model: Model, spec: DecoderSpec) -> None:
    """Make a decoder keep its cache: what were inputs and outputs for it are state then; the graph is changed in place.

    Raises:
        BackendError: Attention that is not GroupQueryAttention, or one with a sink.
    """
    _, ops = _library()
    attentions = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupQueryAttention"]
    if len(attentions) != spec.layers:
        raise BackendError(
            f"{spec.graph.file} has {len(attentions)} GroupQueryAttention for {spec.layers} layers, so OpenVINO would not keep "
            "its cache; run it without --provider"
        )
    (embeddings,) = (node for node in model.get_parameters() if set(spec.named("embeddings")) & set(node.output(0).get_names()))
    writer = _Attention(ops, spec, embeddings)
    for node in attentions:
        writer.rewrite(node)
    caches = {*spec.caches, *spec.caches.values()}
    for result in list(model.get_results()):
        if caches & set(result.input_value(0).get_names()):
            model.remove_result(result)
    for parameter in list(model.get_parameters()):
        if caches & set(parameter.output(0).get_names()):
            model.remove_parameter(parameter)
    model.add_sinks(writer.sinks)
    model.add_parameters([writer.beam, writer.columns])
    model.validate_nodes_and_infer_types()


class _Attention:
    """Writes attention with a state for each layer's keys and values.

    Attributes:
        beam: The input that the states are gathered by.
        columns: The input that says which row of the sequence each row of the states is.
        sinks: What assigns the states.
    """

    def __init__(self, ops: Any, spec: DecoderSpec, embeddings: Node) -> None:
        self.beam = ops.parameter([-1], np.int32)
        self.beam.output(0).set_names({BEAM})
        self.columns = ops.parameter([-1], np.int64)
        self.columns.output(0).set_names({COLUMNS})
        self.sinks: list[Node] = []
        self._ops, self._spec = ops, spec
        sizes = ops.shape_of(embeddings, output_type="i64")
        # The rows of what is read now: the last ones.
        count = ops.gather(sizes, np.array([1]), np.int64(0))
        self._rows = ops.slice(
            self.columns, ops.negative(count), np.array([np.iinfo(np.int64).max]), np.array([1]), np.array([0])
        )
        # (B, kv_heads, 0, head_dim), what a state is at first.
        empty = ops.concat([ops.gather(sizes, np.array([0]), np.int64(0)), np.array([spec.kv_heads, 0, spec.head_dim])], 0)
        self._nothing = ops.broadcast(np.dtype(spec.kv_dtype).type(0), empty)
        self._masks: dict[tuple[int, int], Node] = {}

    def rewrite(self, node: Node) -> None:
        """Put operators in the place of one GroupQueryAttention."""
        ops, about = self._ops, node.get_attributes()
        if self._given(node, SINK) is not None:
            raise BackendError(
                f"{node.get_friendly_name()} has a sink, which is not done with OpenVINO; run it without --provider"
            )
        query, key, value = (node.input_value(at) for at in range(3))
        key_cache, past_keys = self._state(f"{node.get_friendly_name()}/key")
        value_cache, past_values = self._state(f"{node.get_friendly_name()}/value")
        if about["do_rotary"]:
            query, key = self._turned(node, query), self._turned(node, key)
        keys, values = ops.concat([past_keys, key], 2), ops.concat([past_values, value], 2)
        self.sinks += [ops.assign(keys, key_cache), ops.assign(values, value_cache)]
        heads = about["num_heads"]
        scale = np.float32(about["scale"] or self._spec.head_dim**-0.5)
        seen = self._mask(node, about)
        attended = ops.scaled_dot_product_attention(
            query, self._repeated(keys, heads), self._repeated(values, heads), seen, scale
        )
        rows = ops.reshape(ops.transpose(attended, np.array([0, 2, 1, 3])), np.array([0, 0, -1]), True)
        node.output(0).replace(rows.output(0))

    def _state(self, name: str) -> tuple[Any, Node]:
        """Return a new variable, and what it holds of the sequence."""
        util = require("openvino.op.util", "openvino")
        info = util.VariableInfo()
        info.data_shape = require("openvino", "openvino").PartialShape([-1, self._spec.kv_heads, -1, self._spec.head_dim])
        info.data_type = self._nothing.get_output_element_type(0)
        info.variable_id = name
        variable = util.Variable(info)
        return variable, self._ops.gather(self._ops.read_value(self._nothing, variable), self.beam, np.int64(0))

    def _turned(self, node: Node, heads: Node) -> Node:
        """Turn the first columns of heads (B, H, S, head_dim), two halves of them, by the angles of their positions."""
        ops, given = self._ops, self._given(node, POSITIONS)
        if node.get_attributes()["rotary_interleaved"]:
            raise BackendError(
                f"{node.get_friendly_name()} turns neighbours, which is not done with OpenVINO; run it without --provider"
            )
        places = self._rows if given is None else ops.reshape(given, np.array([-1]), False)
        tables = (node.input_value(COS), node.input_value(SIN))
        cos, sin = (ops.unsqueeze(ops.gather(table, places, np.int64(0)), np.array([0, 1])) for table in tables)
        half = tables[0].partial_shape[1].get_length()
        rest = self._spec.head_dim - 2 * half
        parts = ops.variadic_split(heads, np.int64(-1), np.array([half, half, rest] if rest else [half, half])).outputs()
        first = ops.subtract(ops.multiply(parts[0], cos), ops.multiply(parts[1], sin))
        second = ops.add(ops.multiply(parts[0], sin), ops.multiply(parts[1], cos))
        return ops.concat([first, second, *parts[2:]], -1)

    def _repeated(self, cache: Node, heads: int) -> Node:
        """Repeat keys or values (B, kv_heads, S, head_dim) for grouped queries."""
        ops, repeats = self._ops, heads // self._spec.kv_heads
        if repeats == 1:
            return cache
        wide = ops.broadcast(ops.unsqueeze(cache, np.int64(2)), np.array([1, 1, repeats, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(wide, np.array([0, heads, -1, self._spec.head_dim]), True)

    def _mask(self, node: Node, about: dict[str, Any]) -> Node:
        """Return what is added to the scores: (1, 1, S, cache), or the graph's own bias where it says what is seen."""
        ops, bias = self._ops, self._given(node, BIAS)
        is_causal, window = about["causal"], about["local_window_size"]
        if not is_causal and bias is not None:
            return bias
        key = (is_causal, window)
        if key not in self._masks:
            rows, columns = ops.unsqueeze(self._rows, np.int64(1)), ops.unsqueeze(self.columns, np.int64(0))
            # Rows that are gone are behind all others.
            hidden = ops.greater(columns, rows if is_causal else np.int64(GONE - 1))
            if window > 0:
                hidden = ops.logical_or(hidden, ops.greater_equal(ops.subtract(rows, columns), np.int64(window)))
            added = ops.select(hidden, np.float32(np.finfo(np.float32).min), np.float32(0))
            self._masks[key] = ops.unsqueeze(added, np.array([0, 1]))
        return self._masks[key] if bias is None else ops.add(self._masks[key], bias)

    @staticmethod
    def _given(node: Node, place: int) -> Output | None:
        """Return an input, or None where it was left out, for which the front end puts an empty constant."""
        if place >= node.get_input_size():
            return None
        value = node.input_value(place)
        left_out = value.get_node().get_type_name() == "Constant" and 0 in list(value.shape)
        return None if left_out else value


def _library() -> tuple[Any, Any]:
    return require("openvino", "openvino"), require("openvino.opset13", "openvino")
