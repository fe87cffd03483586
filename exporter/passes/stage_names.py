"""Name every node by its stage, as a path: `node_matmul_3` becomes `/prune/MatMul_3`.

The exporter keeps a node's module path in its metadata and writes a flat name; a profiler only shows the name. A node
of a vision graph without a scope (shape arithmetic of the traced inputs) takes the first stage, `vision`. A decoder's nodes
serve the stages prefill and decode alike, so their paths begin with `decoder`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable

import onnx_ir as ir

STAGES = ("vision", "project", "prune")
SCOPES = "pkg.torch.onnx.name_scopes"


def name_by_stage(model: ir.Model) -> int:
    """Rename the nodes of a vision graph in place; return how many were renamed."""
    return _rename(model, _stage)


def name_by_layer(model: ir.Model) -> int:
    """Rename the nodes of a decoder in place, such as `/decoder/layers.3/self_attn/q_proj/MatMul`; return how many."""
    return _rename(model, lambda scopes: ["decoder", *(scopes[-1].replace("layers.", "layers:").split(".") if scopes else [])])


def _rename(model: ir.Model, path_of: Callable[[list[str]], list[str]]) -> int:
    count: Counter[str] = Counter()
    for node in model.graph:
        scopes = [scope for scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1] if scope]
        path = "/".join(["", *path_of(scopes), node.op_type])
        node.name = f"{path}_{count[path]}" if count[path] else path
        count[path] += 1
    return sum(count.values())


def _stage(scopes: list[str]) -> list[str]:
    """Return the parts of a node's module path, beginning with its stage."""
    modules = [scope for scope in scopes if scope.split(".")[0] in STAGES]
    return modules[-1].split(".") if modules else [STAGES[0]]
